"""Events: values that a workflow publishes under a key; readers get the latest, and the history is kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Generic, cast
from uuid import UUID

from sqlalchemy.orm import Session, sessionmaker
from typing_extensions import TypeVar

from sqla_durable.api.calls import ANY, Call, operation, publication, sealed
from sqla_durable.api.polling import PollingEngine, pauses, refuse_event_loop
from sqla_durable.api.sessions import AnySession, id_of
from sqla_durable.definitions.checks import require_duration, require_key
from sqla_durable.definitions.codec import Codec
from sqla_durable.definitions.payloads import Place, opened
from sqla_durable.errors import ArgumentError, EventNotSetError, NotFoundError, ResultTimeoutError
from sqla_durable.models import Workflow
from sqla_durable.operations import waiting
from sqla_durable.operations.runtime import Runtime
from sqla_durable.runtime.context import Context
from sqla_durable.store import Checkpoint, Connectable, Origin, events

T = TypeVar("T", default=Any)


@dataclass(frozen=True, slots=True)
class _NewEvent:
    """An event to be set, with its value as JSON text."""

    key: str
    value: str

    def record(self, connectable: Connectable, checkpoint: Checkpoint) -> None:
        events.record(connectable, checkpoint, key=self.key, value=self.value)

    def write(self, connectable: Connectable, origin: Origin) -> None:
        events.put(connectable, origin, key=self.key, value=self.value)

    async def write_at_once(self, runtime: Runtime, origin: Origin) -> None:
        await runtime.recorder.execute(partial(self.write, origin=origin))


def set_event(key: str, value: object, *, session: Session | None = None) -> None:
    """Publish a value under a key: in a workflow's code, or in one of its steps.

    ```python
    @durable.workflow
    def checkout(order_id: int) -> None:
        set_event("status", "packing")
        ...
    ```

    In a workflow's own code it is an operation of its own, carried out exactly once, committed when it returns. In a
    transactional step pass the step's session: then it commits with the step. In a plain step it is committed when it
    returns, whatever becomes of the step, and set again by the next try. Each is refused to an attempt that no longer
    owns its workflow; the workflow's row is locked while it is written, with a session until the step commits. Outside
    a workflow nothing happens.

    Args:
        key: the key of the event, a text.
        value: of any type that can be stored as JSON; its reader says which type is wanted.
        session: that of the transactional step.

    Raises:
        ArgumentError: the key cannot be stored, or is the engine's own.
        EncodingError, PayloadTooLargeError: the value cannot be stored, or is too large; nothing was written.
        UsageError: a session is passed where there is none of the workflow's, or is missing in a transactional step; or
            this is a task or thread that is no branch of the workflow.
        UsageError: the code is `async def`.
    """
    set_event_call(key, value, session).outcome()


def set_event_call(key: str, value: object, session: AnySession | None) -> Call[None]:
    """Return the call of `set_event`."""
    require_key(key, what="key of an event")
    if key.startswith("#"):
        raise ArgumentError(f"the key of an event is {key!r}, which begins with '#': such keys are the engine's own.")

    def encoded(context: Context) -> _NewEvent:
        return _NewEvent(key, sealed(value, context, "event", key, what=f"value of event {key!r}"))

    return publication("set_event", f"set_event({key})", encoded, session=session)


def wait_event(
    workflow: Workflow | UUID,
    key: str,
    kind: type[T] = ANY,
    *,
    timeout: timedelta | None = None,
    step_key: str | None = None,
) -> T:
    """Wait in a workflow's code until another workflow has set an event, and return its latest value.

    ```python
    address = wait_event(customer_workflow, "address", Address)
    ```

    The value is recorded: a replay finds the same. The other workflow is polled, at most every 30 seconds; meanwhile
    the workflow is suspended and needs a row and nothing else.

    Args:
        workflow: the other workflow, its record or its id.
        key: the event's key.
        kind: the type of its value.
        timeout: how long to wait at most.
        step_key: an explicit identity in the history, instead of `wait_event(KEY)` and its occurrence.

    Raises:
        WaitTimeoutError: it was not set in time.
        EventNotSetError: the other workflow is finished and has never set it.
        NotFoundError: there is no such workflow.
        DecodingError: the value does not fit `kind`.
        UsageError: this is not a workflow's own code, or nobody could set it (a joined executor).
        UsageError: the workflow is `async def`.
        ArgumentError: the key cannot be one, the timeout is no timedelta, or `workflow` is no workflow.
    """
    return wait_event_call(workflow, key, kind, timeout, step_key).outcome()


def wait_event_call(
    workflow: Workflow | UUID, key: str, kind: type[T], timeout: timedelta | None, step_key: str | None
) -> Call[T]:
    """Return the call of `wait_event`."""
    require_key(key, what="key of an event")
    if timeout is not None:
        require_duration(timeout, "timeout")
    take = partial(_take, workflow_id=id_of(workflow), key=key)
    late = f"event {key!r} was not set within {timeout}."
    source = waiting.WaitSource(None, waiting.in_one_statement(take), late, kind="event", key=key)
    receive = partial(waiting.receive, source=source, result=_codec_of(key, kind), within=timeout)
    return operation("wait_event", f"wait_event({key})", receive, step_key=step_key)


def get_event(
    source: Session | sessionmaker[Session],
    workflow: Workflow | UUID,
    key: str,
    kind: type[T] = ANY,
    *,
    timeout: timedelta | None = None,
) -> T:
    """Return the latest value of a workflow's event, from outside the workflow; wait for the first one.

    ```python
    status = get_event(SessionLocal, workflow.id, "status", str, timeout=timedelta(seconds=30))
    ```

    Polls in short transactions of its own, on the engine of the session or sessionmaker: a session that is passed is
    not used itself. Takes no lock.

    Args:
        source: a session or a sessionmaker, for its engine.
        workflow: the record, or its id.
        key: the key of the event.
        kind: the type of its value.
        timeout: how long to wait for a value; None waits as long as it takes.

    Raises:
        EventNotSetError: the workflow is finished, and has never set it.
        ResultTimeoutError: it is not set yet.
        NotFoundError: there is no such workflow, or its start is not committed.
        DecodingError: the value does not fit the type.
        ArgumentError: the key cannot be one.
        SchemaError, SessionError: the database does not hold the tables.
        UsageError: this was called in a running event loop, which it would block.
    """
    search = EventSearch.of(workflow, key, kind, timeout)
    engine = PollingEngine.of_sync(source, name="get_event")
    refuse_event_loop("get_event()", "await sqla_durable.asyncio.get_event")
    pauses = search.pauses()
    while (found := engine.read(search.latest)) is None:
        time.sleep(next(pauses))
    return search.decoded(found)


async def search_async(engine: PollingEngine, search: EventSearch[T]) -> T:
    """Return the latest value of an event as `get_event` does, without blocking the event loop."""
    pauses = search.pauses()
    while (found := await engine.read_async(search.latest)) is None:  # noqa: ASYNC110 (it waits for other processes)
        await asyncio.sleep(next(pauses))
    return search.decoded(found)


@dataclass(frozen=True, slots=True)
class EventSearch(Generic[T]):
    """Which event is awaited from outside its workflow, and how."""

    workflow_id: UUID
    key: str
    codec: Codec
    timeout: timedelta | None

    @classmethod
    def of(cls, workflow: Workflow | UUID, key: str, kind: type[T], timeout: timedelta | None) -> EventSearch[T]:
        """Check the arguments of `get_event`.

        Raises:
            ArgumentError: the key cannot be one, or this is no workflow.
        """
        require_key(key, what="key of an event")
        return EventSearch(id_of(workflow), key, _codec_of(key, kind), timeout)

    def latest(self, session: Session) -> str | None:
        """Read the latest value, as JSON text; None while there is none.

        Raises:
            EventNotSetError: there will be none.
        """
        found = events.latest(session, self.workflow_id, self.key)
        if found.value is None and found.status.finished:
            raise EventNotSetError(
                f"workflow {self.workflow_id} is {found.status} and has never set the event {self.key!r}.",
                workflow_id=self.workflow_id,
                key=self.key,
            )
        return found.value

    def decoded(self, value: str) -> T:
        """Return the value."""
        return cast("T", self.codec.decode(opened(value, Place.of(self.workflow_id, f"event {self.key}"))))

    def pauses(self) -> Iterator[float]:
        """Yield the seconds of the pauses between polls; raise when the time is up."""
        yield from pauses(self.timeout)
        raise ResultTimeoutError(
            f"workflow {self.workflow_id} has not set the event {self.key!r} after {self.timeout}; it goes on.",
            workflow_id=self.workflow_id,
        )


def _codec_of(key: str, kind: Any) -> Codec:
    return Codec.of(kind, what=f"value of event {key!r}")


def _take(connectable: Connectable, checkpoint: Checkpoint, *, workflow_id: UUID, key: str) -> str | None:
    found = events.take(connectable, checkpoint, workflow_id=workflow_id, key=key)
    if found is None:
        raise NotFoundError(f"no workflow {workflow_id} is there to wait for.", workflow_id=workflow_id)
    if found.value is None and found.status.finished:
        raise EventNotSetError(
            f"workflow {workflow_id} is finished and has never set the event {key!r}.", workflow_id=workflow_id, key=key
        )
    return found.value
