"""Signals: sent to a workflow in the sender's transaction, received by it once, in order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID

from sqlalchemy.orm import Session
from typing_extensions import TypeVar

import sqla_durable.api.hints as hints
from sqla_durable.api.calls import ANY, Call, operation, require_sendable
from sqla_durable.api.sessions import ids_of, in_savepoint, require_receiver, write
from sqla_durable.api.workflows import BoundWorkflow, start
from sqla_durable.definitions.checks import require_duration, require_text
from sqla_durable.definitions.codec import Codec
from sqla_durable.definitions.interceptors import sending
from sqla_durable.definitions.payloads import Payloads, Place
from sqla_durable.errors import KeyNotVisibleError
from sqla_durable.models import Workflow
from sqla_durable.operations import waiting
from sqla_durable.store import blobs, signals
from sqla_durable.store import workflows as store_workflows
from sqla_durable.store.keys import SnapshotKept

T = TypeVar("T", default=Any)


def send_signal(
    session: Session,
    workflows: Workflow | UUID | Iterable[Workflow | UUID],
    name: str,
    payload: object = None,
    *,
    key: str | None = None,
) -> None:
    """Send a signal to a workflow, or to several, in the caller's transaction.

    ```python
    send_signal(session, order.checkout, "approved", Approval(by="ada"), key=f"approval-{order.id}")
    ```

    Never commits: it is sent when the caller commits. The workflow may wait for it already, or come to wait for it
    later, or not have begun. Signals of a name are received first in, first out, each of them once. Sending takes no
    lock that the receiver's worker waits for. To several workflows it is one statement: all or none. Flushes the
    session.

    Args:
        session: the caller's session.
        workflows: the receivers, records or ids.
        name: what the workflow waits for.
        payload: a value that goes into JSON: what JSON knows, a dataclass, a pydantic model, a datetime.
        key: an idempotency key: the same workflow, name and key are the same signal, and the first one stands. Sending
            it again changes nothing and is no error, also after the workflow's end.

    Raises:
        NotFoundError: there is no such workflow. Nothing was sent, and the transaction is usable.
        WorkflowFinishedError: it has an outcome, and this signal was not sent before. Likewise.
        EncodingError, PayloadTooLargeError: the payload cannot be stored, or is too large.
        ArgumentError: a name or key cannot be one, or what is given is no workflow.
        SchemaError, SessionError: the session's database does not hold the tables, or it is in AUTOCOMMIT.
    """
    signal = _NewSignal.of(name, payload, key)
    write(session, partial(signal.send, workflows=workflows), name="send_signal", rights="signaller")


@dataclass(frozen=True, slots=True)
class _NewSignal:
    """A signal to be sent; the payload is JSON text."""

    name: str
    payload: str
    key: str | None

    @classmethod
    def of(cls, name: str, payload: object, key: str | None) -> _NewSignal:
        require_sendable(name, what="signal name")
        if key is not None:
            require_text(key, what="key")
        return cls(name, Codec.inferred(what=f"payload of signal {name!r}").encode(payload), key)

    def start(self, session: Session, *, bound: BoundWorkflow) -> Workflow:
        """Start the workflow, send the signal, and return the record."""
        workflow = start(session, bound)
        self.send(session, workflows=workflow)
        return workflow

    def send(self, session: Session, *, workflows: Workflow | UUID | Iterable[Workflow | UUID]) -> None:
        """Send the signal, to all or none."""
        session.flush()  # a workflow that was only just started is not in the table yet
        names = self._receivers(session, sorted(set(ids_of(workflows))))
        ids = list(names)
        if ids:
            with sending(self.name, ids):
                self._insert_all(session, names)
            blobs.adopt_in(session, self.payload, ids[0])
            hints.announce(session, *hints.merged(hints.sent_to(each, self.name) for each in ids))

    def _receivers(self, session: Session, ids: Sequence[UUID]) -> dict[UUID, str]:
        """Return the names of the receivers, without those that have ended since the same signal was sent to them."""
        found = store_workflows.receivers(session, ids)
        ended = [each for each, receiver in found.items() if receiver.status.finished]
        known = self._known(session, ended)
        names: dict[UUID, str] = {}
        for each in ids:
            if each not in known:
                receiver = found.get(each)
                require_receiver(f"signal {self.name!r}", each, None if receiver is None else receiver.status)
                names[each] = "" if receiver is None else receiver.name
        return names

    def _known(self, session: Session, ids: Sequence[UUID]) -> set[UUID]:
        if not ids or self.key is None:
            return set()
        return signals.sent_with_key(session, ids, name=self.name, key=self.key)

    def _insert_all(self, session: Session, names: Mapping[UUID, str]) -> None:
        """Insert it for all by one statement, or where it is sealed for each of its own."""
        plain: list[UUID] = []
        for each, name in names.items():
            sealed = Payloads.of_workflow(name).seal(self.payload, Place.of(each, f"signal {self.name}"))
            if sealed == self.payload:
                plain.append(each)
            else:
                self._insert(session, [each], sealed)
        if plain:
            self._insert(session, plain, self.payload)

    def _insert(self, session: Session, ids: Sequence[UUID], payload: str) -> None:
        given: dict[str, Any] = {"name": self.name, "payload": payload, "key": self.key}
        try:
            signals.send(session, ids, **given)
        except SnapshotKept:
            for each in ids:
                # One that is newer than the snapshot is known all the same.
                with suppress(KeyNotVisibleError), in_savepoint(session, what="signal", name=self.name, key=self.key):
                    signals.send_in_snapshot(session, each, **given)


def start_with_signal(
    session: Session, bound: BoundWorkflow, name: str, payload: object = None, *, key: str | None = None
) -> Workflow:
    """Start a workflow, or find the one that has its key, and send it a signal, in the caller's transaction.

    ```python
    start_with_signal(session, cart.options(key=customer).bind(customer), "item added", item)
    ```

    In a step of another workflow the record is that one's child. See `WorkflowFunction.start` and `send_signal`.

    Raises:
        WorkflowFinishedError: the workflow with this key has an outcome, and this signal was not sent to it before.
            Nothing was sent.
        Exception: as `start` and `send_signal`.
    """
    signal = _NewSignal.of(name, payload, key)
    return write(session, partial(signal.start, bound=bound), name="start_with_signal", rights="signaller")


def wait_signal(name: str, kind: type[T] = ANY, *, timeout: timedelta | None = None, step_key: str | None = None) -> T:
    """Wait in a workflow's code for a signal, and return its payload.

    ```python
    approval = wait_signal("approved", Approval, timeout=timedelta(days=14))
    ```

    It is the oldest one of the name that was not received before, also if it was sent before the workflow came here.
    Which one it was is recorded: a replay finds the same. Meanwhile the workflow is suspended and needs a row and
    nothing else.

    Args:
        name: the signal's name.
        kind: the type of its payload.
        timeout: how long to wait at most, from when the workflow first comes here, on the database's clock.
        step_key: an explicit identity in the history, instead of `signal:NAME` and its occurrence.

    Raises:
        WaitTimeoutError: none came in time; the same on every replay. One that comes later can still be received.
        DecodingError: the payload does not fit `kind`. It counts as received.
        UsageError: this is not a workflow's own code, or nobody could send one (a joined executor).
        UsageError: the workflow is `async def`.
        ArgumentError: the name or the key cannot be one, or the timeout is no timedelta.
    """
    return wait_signal_call(name, kind, timeout, step_key).outcome()


def wait_signal_call(name: str, kind: type[T], timeout: timedelta | None, step_key: str | None) -> Call[T]:
    """Return the call of `wait_signal`."""
    require_sendable(name, what="signal name")
    if timeout is not None:
        require_duration(timeout, "timeout")
    codec = Codec.of(kind, what=f"payload of signal {name!r}")
    source = waiting.WaitSource.of_signal(name, timeout)
    receive = partial(waiting.receive, source=source, result=codec, within=timeout)
    return operation("wait_signal", f"signal:{name}", receive, step_key=step_key)
