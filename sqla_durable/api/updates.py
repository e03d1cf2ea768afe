"""Updates: sent to a workflow in the sender's transaction; it says whether it accepts them, and answers."""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, overload
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

import sqla_durable.api.hints as hints
import sqla_durable.api.polling as polling
from sqla_durable.api.callers import AnySession, id_of, in_savepoint, perform, require_receiver, require_session
from sqla_durable.api.operate import require_sendable
from sqla_durable.api.start import BoundWorkflow, start
from sqla_durable.api.update_handles import AsyncUpdate, Update, reply_codec
from sqla_durable.definitions.checks import require_text
from sqla_durable.definitions.codec import Codec
from sqla_durable.models import Workflow
from sqla_durable.store import keys
from sqla_durable.store import updates as statements

S = TypeVar("S")


@overload
def update(
    session: Session,
    workflow: Workflow | UUID,
    name: str,
    payload: object = None,
    *,
    reply: type[S],
    key: str | None = None,
) -> Update[S]: ...


@overload
def update(
    session: Session,
    workflow: Workflow | UUID,
    name: str,
    payload: object = None,
    *,
    reply: Any = Any,
    key: str | None = None,
) -> Update[Any]: ...


@overload
def update(
    session: AsyncSession,
    workflow: Workflow | UUID,
    name: str,
    payload: object = None,
    *,
    reply: type[S],
    key: str | None = None,
) -> Coroutine[Any, Any, AsyncUpdate[S]]: ...


@overload
def update(
    session: AsyncSession,
    workflow: Workflow | UUID,
    name: str,
    payload: object = None,
    *,
    reply: Any = Any,
    key: str | None = None,
) -> Coroutine[Any, Any, AsyncUpdate[Any]]: ...


def update(
    session: Session | AsyncSession,
    workflow: Workflow | UUID,
    name: str,
    payload: object = None,
    *,
    reply: Any = Any,
    key: str | None = None,
) -> Any:
    """Ask a running workflow for something, in the caller's transaction; its answer comes after the commit.

    ```python
    with SessionLocal.begin() as session:
        request = update(session, order.checkout, "set_address", Address("Elm Street 7"), reply=Saved, key=request_id)
    saved = request.result(timeout=timedelta(seconds=10))
    ```

    Never commits: it is sent when the caller commits. The workflow may wait for it already, or come to wait for it
    later, or not have begun. It takes updates of a name first in, first out, each once, and may refuse one. Sending
    waits for nobody, and the receiver's worker does not wait for the sender. Flushes the session.

    Args:
        session: the caller's session; with an `AsyncSession`, await the call.
        workflow: the receiver, its record or its id.
        name: what the workflow waits for, with `wait_update`.
        payload: a value that goes into JSON: what JSON knows, a dataclass, a pydantic model, a datetime.
        reply: as what the reply is wanted.
        key: an idempotency key: the same workflow, name and key are the same update. The first one stands, and both
            senders get its answer, also after the workflow's end.

    Raises:
        NotFoundError: there is no such workflow. Nothing was sent, and the transaction is usable.
        WorkflowFinishedError: it has an outcome, and this update was not sent before. Likewise.
        EncodingError, PayloadTooLargeError: the payload cannot be stored, or is too large.
        ArgumentError: a name or key cannot be one, or what is given is no workflow.
        SchemaError, SessionError: the session's database does not hold the tables, or it is in AUTOCOMMIT.
    """
    sending = _Sending.of(session, name, payload, key=key, reply=reply)
    return perform(session, partial(sending.send, workflow=workflow), rights="updater")


@overload
def start_with_update(
    session: Session,
    bound: BoundWorkflow,
    name: str,
    payload: object = None,
    *,
    reply: type[S],
    key: str | None = None,
) -> tuple[Workflow, Update[S]]: ...


@overload
def start_with_update(
    session: Session,
    bound: BoundWorkflow,
    name: str,
    payload: object = None,
    *,
    reply: Any = Any,
    key: str | None = None,
) -> tuple[Workflow, Update[Any]]: ...


@overload
def start_with_update(
    session: AsyncSession,
    bound: BoundWorkflow,
    name: str,
    payload: object = None,
    *,
    reply: type[S],
    key: str | None = None,
) -> Coroutine[Any, Any, tuple[Workflow, AsyncUpdate[S]]]: ...


@overload
def start_with_update(
    session: AsyncSession,
    bound: BoundWorkflow,
    name: str,
    payload: object = None,
    *,
    reply: Any = Any,
    key: str | None = None,
) -> Coroutine[Any, Any, tuple[Workflow, AsyncUpdate[Any]]]: ...


def start_with_update(
    session: Session | AsyncSession,
    bound: BoundWorkflow,
    name: str,
    payload: object = None,
    *,
    reply: Any = Any,
    key: str | None = None,
) -> Any:
    """Start a workflow, or find the one that has its key, and send it an update, in the caller's transaction.

    ```python
    cart, request = start_with_update(session, shopping.options(key=customer).bind(customer), "add", item, reply=int)
    ```

    In a step of another workflow the record is that one's child. See `WorkflowFunction.start` and `update`.

    Raises:
        WorkflowFinishedError: the workflow with this key has an outcome, and this update was not sent to it before.
            Nothing was sent.
        Exception: as `start` and `update`.
    """
    sending = _Sending.of(session, name, payload, key=key, reply=reply)
    return perform(session, partial(sending.start, bound=bound), rights="updater")


@dataclass(frozen=True, slots=True)
class _Sending:
    """An update that is to be sent, and where its answer is looked for; the payload is JSON text."""

    name: str
    payload: str
    key: str | None
    reply: Codec
    outlook: polling.Outlook

    @classmethod
    def of(cls, session: AnySession, name: str, payload: object, *, key: str | None, reply: Any) -> _Sending:
        require_session(session)
        require_sendable(name, what="update name")
        if key is not None:
            require_text(key, what="key")
        text = Codec.inferred(what=f"payload of update {name!r}").encode(payload)
        outlook = polling.Outlook.of(session, what="update()")
        return cls(name, text, key, reply_codec(reply, f"update {name!r}"), outlook)

    def start(self, session: Session, *, bound: BoundWorkflow) -> tuple[Workflow, Update[Any] | AsyncUpdate[Any]]:
        """Start the workflow and send; give its record, and the update."""
        workflow = start(session, bound)
        return workflow, self.send(session, workflow=workflow)

    def send(self, session: Session, *, workflow: Workflow | UUID) -> Update[Any] | AsyncUpdate[Any]:
        """Send; give the update, to wait for its answer."""
        session.flush()  # a workflow that was only just started is not in the table yet
        workflow_id = id_of(workflow)
        update_id = self._sent(session, workflow_id)
        hints.announce(session, hints.sent_to(workflow_id, statements.signal_of(self.name)))
        face: type[AsyncUpdate[Any]] | type[Update[Any]] = AsyncUpdate if self.outlook.is_async else Update
        return face(self.outlook, self.reply, workflow_id, update_id)

    def _sent(self, session: Session, workflow_id: UUID) -> int:
        for _ in range(keys.MOST_REPEATS):
            update_id = self._known(session, workflow_id)
            if update_id is None:  # and None again: somebody has just sent one of the key
                update_id = self._insert(session, workflow_id)
            if update_id is not None:
                return update_id
        raise keys.not_visible("update", name=self.name, key=self.key or "")

    def _insert(self, session: Session, workflow_id: UUID) -> int | None:
        given: dict[str, Any] = {"name": self.name, "payload": self.payload, "key": self.key}
        try:
            return statements.send(session, workflow_id, **given)
        except keys.SnapshotKept:
            with in_savepoint(session, what="update", name=self.name, key=self.key):
                return statements.send_in_snapshot(session, workflow_id, **given)

    def _known(self, session: Session, workflow_id: UUID) -> int | None:
        """Give the id of the update that has the key already; refuse a receiver that will take none."""
        found = statements.receiver(session, workflow_id, name=self.name, key=self.key)
        if found is None or found.known is None:
            require_receiver(f"update {self.name!r}", workflow_id, None if found is None else found.status)
            return None
        return found.known
