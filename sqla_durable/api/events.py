"""Events: values that a workflow shows under a key, for whoever asks; the latest counts, and the history stays."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Coroutine, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, overload
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

import sqla_durable.api.polling as polling
from sqla_durable.api.callers import AnySession, id_of
from sqla_durable.api.handle import refuse_event_loop
from sqla_durable.api.publishing import encode, publish
from sqla_durable.definitions.checks import require_text
from sqla_durable.definitions.codec import Codec
from sqla_durable.errors import ArgumentError, EventNotSetError, ResultTimeoutError
from sqla_durable.models import Workflow
from sqla_durable.operations.runtime import Runtime
from sqla_durable.store import Checkpoint, Connectable, Origin, events

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Setting:
    """An event that is to be set, with its value as JSON text."""

    key: str
    value: str

    def record(self, connectable: Connectable, checkpoint: Checkpoint) -> None:
        events.record(connectable, checkpoint, key=self.key, value=self.value)

    def write(self, connectable: Connectable, origin: Origin) -> None:
        events.put(connectable, origin, key=self.key, value=self.value)

    async def write_at_once(self, runtime: Runtime, origin: Origin) -> None:
        await runtime.recorder.execute(partial(self.write, origin=origin))


@overload
def set_event(key: str, value: object, /) -> Awaitable[None]: ...


@overload
def set_event(session: AnySession, key: str, value: object, /) -> Awaitable[None]: ...


def set_event(*given: Any) -> Awaitable[None]:
    """Show a value under a key: in a workflow's code, or in one of its steps. In `async def` code, await the call.

    ```python
    @durable.workflow
    def checkout(order_id: int) -> None:
        set_event("status", "packing")
        ...
    ```

    In a workflow's own code it is an operation of its own, carried out exactly once, committed when it returns. In a
    transactional step pass the step's session first: then it commits with the step. In a plain step it is committed
    when it returns, whatever becomes of the step, and set again by the next try. Each is refused to an attempt that no
    longer owns its workflow; the workflow's row is locked while it is written, with a session until the step commits.
    Outside a workflow nothing happens.

    Args:
        *given: the session of a transactional step; a key, which is a text; and the value, of any type that can be
            stored as JSON: whoever reads it says of which type it is to be.

    Raises:
        ArgumentError: the key cannot be stored, or is the engine's own.
        EncodingError, PayloadTooLargeError: the value cannot be stored, or is too large; nothing was written.
        UsageError: a session is given where there is none of the workflow's, or is missing in a transactional step; or
            this is a task or thread of its own.
    """
    *session, key, value = given
    require_text(key, what="key of an event")
    if key.startswith("#"):
        raise ArgumentError(f"the key of an event is {key!r}, which begins with '#': such keys are the engine's own.")

    def publication(limit: int) -> _Setting:
        return _Setting(key, encode(value, what=f"value of event {key!r}", limit=limit))

    return publish("set_event()", session[0] if session else None, publication, name=f"set_event({key})")


@overload
def get_event(
    source: Session | sessionmaker[Session], workflow: Workflow | UUID, key: str, *, timeout: timedelta | None = None
) -> Any: ...


@overload
def get_event(
    source: Session | sessionmaker[Session],
    workflow: Workflow | UUID,
    key: str,
    kind: type[T],
    *,
    timeout: timedelta | None = None,
) -> T: ...


@overload
def get_event(
    source: AsyncSession | async_sessionmaker[AsyncSession],
    workflow: Workflow | UUID,
    key: str,
    *,
    timeout: timedelta | None = None,
) -> Coroutine[Any, Any, Any]: ...


@overload
def get_event(
    source: AsyncSession | async_sessionmaker[AsyncSession],
    workflow: Workflow | UUID,
    key: str,
    kind: type[T],
    *,
    timeout: timedelta | None = None,
) -> Coroutine[Any, Any, T]: ...


def get_event(
    source: polling.Source,
    workflow: Workflow | UUID,
    key: str,
    kind: Any = Any,
    *,
    timeout: timedelta | None = None,
) -> Any:
    """Give the latest value of a workflow's event, from outside the workflow; wait for the first one.

    ```python
    status = get_event(SessionLocal, workflow.id, "status", str, timeout=timedelta(seconds=30))
    ```

    Polls in short transactions of its own, on the engine of the session or sessionmaker: a session that is given is
    not used itself. Takes no lock. With an `AsyncSession` or its maker, await the call.

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
        UsageError: the sync form was called in a running event loop, which it would block.
    """
    require_text(key, what="key of an event")
    outlook = polling.Outlook.of(source, what="get_event()")
    search = _Search(id_of(workflow), key, Codec.of(kind, what=f"value of event {key!r}"), timeout)
    return _wait_async(outlook, search) if outlook.is_async else _wait(outlook, search)


def _wait(outlook: polling.Outlook, search: _Search) -> Any:
    refuse_event_loop("get_event()", "give it an AsyncSession or its sessionmaker, and await it")
    pauses = search.pauses()
    while (found := outlook.look(search.look)) is None:
        time.sleep(next(pauses))
    return search.codec.decode(found)


async def _wait_async(outlook: polling.Outlook, search: _Search) -> Any:
    pauses = search.pauses()
    while (found := await outlook.look_async(search.look)) is None:  # noqa: ASYNC110 (it waits for other processes)
        await asyncio.sleep(next(pauses))
    return search.codec.decode(found)


@dataclass(frozen=True, slots=True)
class _Search:
    workflow_id: UUID
    key: str
    codec: Codec
    timeout: timedelta | None

    def look(self, session: Session) -> str | None:
        found = events.latest(session, self.workflow_id, self.key)
        if found.value is None and found.status.finished:
            raise EventNotSetError(
                f"workflow {self.workflow_id} is {found.status} and has never set the event {self.key!r}.",
                workflow_id=self.workflow_id,
                key=self.key,
            )
        return found.value

    def pauses(self) -> Iterator[float]:
        yield from polling.pauses(self.timeout)
        raise ResultTimeoutError(
            f"workflow {self.workflow_id} has not set the event {self.key!r} after {self.timeout}; it goes on.",
            workflow_id=self.workflow_id,
        )
