"""Updates: sent to a workflow in the sender's transaction, and the handles that wait for its answer.

The workflow accepts or refuses an update and answers it; that side is in `update_requests`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Generic
from uuid import UUID

from sqlalchemy.orm import Session, sessionmaker
from typing_extensions import TypeVar

import sqla_durable.api.hints as hints
from sqla_durable.api.calls import ANY, require_sendable
from sqla_durable.api.polling import PollingEngine, pauses, refuse_event_loop
from sqla_durable.api.sessions import id_of, in_savepoint, require_receiver, write
from sqla_durable.api.workflows import BoundWorkflow, start
from sqla_durable.definitions.checks import require_text
from sqla_durable.definitions.codec import Codec
from sqla_durable.definitions.payloads import Payloads, Place, opened
from sqla_durable.errors import (
    ArgumentError,
    NotFoundError,
    ResultTimeoutError,
    UpdateNotAnsweredError,
    UpdateRejectedError,
)
from sqla_durable.models import Workflow
from sqla_durable.store import blobs, keys
from sqla_durable.store import updates as statements
from sqla_durable.store.updates import Sent

R = TypeVar("R", covariant=True)
S = TypeVar("S", default=Any)


def send_update(
    session: Session,
    workflow: Workflow | UUID,
    name: str,
    payload: object = None,
    *,
    reply: type[S] = ANY,
    key: str | None = None,
) -> UpdateHandle[S]:
    """Ask a running workflow for something, in the caller's transaction; its answer comes after the commit.

    ```python
    with SessionLocal.begin() as session:
        request = send_update(session, order.checkout, "set_address", address, reply=Saved, key=request_id)
    saved = request.result(timeout=timedelta(seconds=10))
    ```

    Never commits: it is sent when the caller commits. The workflow may wait for it already, or come to wait for it
    later, or not have begun. It receives updates of a name first in, first out, each once, and may refuse one. Sending
    takes no lock that the receiver's worker waits for. Flushes the session.

    Args:
        session: the caller's session.
        workflow: the receiver, its record or its id.
        name: what the workflow waits for, with `wait_update`.
        payload: a value that goes into JSON: what JSON knows, a dataclass, a pydantic model, a datetime.
        reply: the reply's type.
        key: an idempotency key: the same workflow, name and key are the same update. The first one stands, and both
            senders get its answer, also after the workflow's end.

    Raises:
        NotFoundError: there is no such workflow. Nothing was sent, and the transaction is usable.
        WorkflowFinishedError: it has an outcome, and this update was not sent before. Likewise.
        EncodingError, PayloadTooLargeError: the payload cannot be stored, or is too large.
        ArgumentError: a name or key cannot be one, or what is given is no workflow.
        SchemaError, SessionError: the session's database does not hold the tables, or it is in AUTOCOMMIT.
    """
    new: NewUpdate[S] = NewUpdate.of(name, payload, reply=reply, key=key)
    send = partial(new.send, workflow=workflow)
    sent = write(session, send, name="send_update", rights="updater")
    return UpdateHandle(PollingEngine.of(session), new.reply, *sent)


def start_with_update(
    session: Session,
    bound: BoundWorkflow,
    name: str,
    payload: object = None,
    *,
    reply: type[S] = ANY,
    key: str | None = None,
) -> tuple[Workflow, UpdateHandle[S]]:
    """Start a workflow, or find the one that has its key, and send it an update, in the caller's transaction.

    ```python
    cart, request = start_with_update(session, shopping.options(key=customer).bind(customer), "add", item, reply=int)
    ```

    In a step of another workflow the record is that one's child. See `WorkflowFunction.start` and `send_update`.

    Raises:
        WorkflowFinishedError: the workflow with this key has an outcome, and this update was not sent to it before.
            Nothing was sent.
        Exception: as `start` and `send_update`.
    """
    new: NewUpdate[S] = NewUpdate.of(name, payload, reply=reply, key=key)
    start = partial(new.start, bound=bound)
    workflow, sent = write(session, start, name="start_with_update", rights="updater")
    return workflow, UpdateHandle(PollingEngine.of(session), new.reply, *sent)


def update_handle(
    source: Session | sessionmaker[Session], workflow: Workflow | UUID, update_id: int, *, reply: type[S] = ANY
) -> UpdateHandle[S]:
    """Return what waits for the answer to an update that was sent elsewhere, without checking that it exists.

    ```python
    saved = update_handle(SessionLocal, workflow_id, update_id, reply=Saved).result(timeout=timedelta(seconds=10))
    ```

    Args:
        source: a session or a sessionmaker, for its engine.
        workflow: the receiver, its record or its id.
        update_id: the `id` of the update.
        reply: the reply's type.

    Raises:
        ArgumentError: `workflow` is no workflow, or `update_id` no id of an update.
        SessionError: the source is none, or its engine is not PostgreSQL's.
    """
    engine = PollingEngine.of_sync(source, name="update_handle")
    return UpdateHandle(engine, *handle_parts(workflow, update_id, reply))


def handle_parts(workflow: Workflow | UUID, update_id: int, reply: Any) -> tuple[Codec, UUID, int]:
    """Return what a handle of an update consists of, besides the engine.

    Raises:
        ArgumentError: `workflow` is no workflow, or `update_id` no id of an update.
    """
    if not isinstance(update_id, int):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(f"{update_id!r} is no id of an update: give the integer that `send_update(...).id` has.")
    return reply_codec(reply, f"update {update_id}"), id_of(workflow), update_id


def reply_codec(reply: Any, what: str) -> Codec:
    """Return the codec of a reply."""
    return Codec.of(reply, what=f"reply to {what}")


class _BaseUpdate(Generic[R]):
    def __init__(self, engine: PollingEngine, codec: Codec, workflow_id: UUID, update_id: int) -> None:
        self._engine = engine
        self._codec = codec
        self.workflow_id = workflow_id
        self.id = update_id

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} of workflow {self.workflow_id}>"

    def _is_accepted(self, session: Session) -> bool:
        """Read whether the workflow has received it."""
        sent = self._sent(session)
        self._refuse_rejected(sent, only_refused=True)
        if not sent.is_taken and sent.status.finished:
            raise self._not_answered(f"{sent.status.as_predicate} without receiving update {sent.name!r} {self.id}.")
        return sent.is_taken

    def _answer(self, session: Session) -> str | None:
        """Read the answer, as JSON text; None while there is none."""
        sent = self._sent(session)
        self._refuse_rejected(sent, only_refused=False)
        if sent.answer is not None:
            return sent.answer
        if sent.status.finished:
            raise self._not_answered(f"has {sent.status} without answering update {sent.name!r} {self.id}.")
        if sent.is_taken and not sent.is_remembered:
            raise self._not_answered(
                f"received update {sent.name!r} {self.id} and continued as new without answering it."
            )
        return None

    def _sent(self, session: Session) -> Sent:
        sent = statements.read(session, self.workflow_id, self.id)
        if sent is None:
            raise NotFoundError(
                f"no update {self.id} of workflow {self.workflow_id} is visible. The transaction that sent it is "
                "not committed, or the workflow was deleted, or it has continued as new since it received "
                "this update without a key.",
                workflow_id=self.workflow_id,
            )
        return sent

    def _refuse_rejected(self, sent: Sent, *, only_refused: bool) -> None:
        answer = json.loads(sent.answer or "{}")
        reason = answer.get("refused") or (None if only_refused else answer.get("rejected"))
        if reason is not None:
            raise UpdateRejectedError(
                f"workflow {self.workflow_id} has rejected update {sent.name!r} {self.id}: {reason}",
                workflow_id=self.workflow_id,
                update_id=self.id,
                reason=reason,
            )

    def _not_answered(self, what: str) -> UpdateNotAnsweredError:
        message = f"workflow {self.workflow_id} {what}"
        return UpdateNotAnsweredError(message, workflow_id=self.workflow_id, update_id=self.id)

    def _value(self, answer: str) -> R:
        place = Place.of(self.workflow_id, f"reply {self.id}")
        value: R = self._codec.decode(opened(json.dumps(json.loads(answer)["reply"]), place))
        return value

    def _pauses(self, timeout: timedelta | None, *, what: str) -> Iterator[float]:
        yield from pauses(timeout)
        raise ResultTimeoutError(
            f"workflow {self.workflow_id} has not {what} update {self.id} after {timeout}; it still may.",
            workflow_id=self.workflow_id,
        )


class UpdateHandle(_BaseUpdate[R]):
    """Waits in sync code for the answer to an update that was sent.

    ```python
    with SessionLocal.begin() as session:
        request = send_update(session, order.checkout, "set_address", Address("Elm Street 7"), reply=Saved)
    saved = request.result(timeout=timedelta(seconds=10))
    ```

    Polls in short transactions of its own, so after the sender's commit; takes no lock. Any process can make one again:
    `update_handle(SessionLocal, request.workflow_id, request.id, reply=Saved)`.

    Attributes:
        workflow_id: the id of the workflow's record.
        id: the id of the update.
    """

    def result(self, timeout: timedelta | None = None) -> R:
        """Wait for the answer and return the workflow's reply.

        Args:
            timeout: how long to wait; None waits as long as it takes.

        Raises:
            UpdateRejectedError: the workflow has refused or rejected it; `reason` says why.
            UpdateNotAnsweredError: the workflow has ended without answering it, or has continued as new since it
                received it.
            ResultTimeoutError: there is no answer yet; it may still come.
            NotFoundError: it is not visible: the transaction that sent it is not committed, or was rolled back.
            DecodingError: the reply does not fit the type.
            SchemaError, SessionError: the database does not hold the tables.
            UsageError: this was called in a running event loop, which it would block.
        """
        refuse_event_loop("UpdateHandle.result()", "send it with an AsyncSession, and await the result")
        pauses = self._pauses(timeout, what="answered")
        while (answer := self._engine.read(self._answer)) is None:
            time.sleep(next(pauses))
        return self._value(answer)

    def accepted(self, timeout: timedelta | None = None) -> None:
        """Return when the workflow has received it: it is valid, and will be answered unless the workflow ends before.

        Raises:
            UpdateRejectedError: the workflow has refused it.
            UpdateNotAnsweredError: the workflow has ended without receiving it.
            Exception: the others as `result`.
        """
        refuse_event_loop("UpdateHandle.accepted()", "send it with an AsyncSession, and await that")
        pauses = self._pauses(timeout, what="accepted")
        while not self._engine.read(self._is_accepted):
            time.sleep(next(pauses))


class AsyncUpdateHandle(_BaseUpdate[R]):
    """Waits in async code for the answer to an update that was sent.

    ```python
    async with AsyncSessionLocal.begin() as session:
        request = await send_update(session, order.checkout, "set_address", Address("Elm Street 7"), reply=Saved)
    saved = await request.result(timeout=timedelta(seconds=10))
    ```

    `await request` is `await request.result()`. See `UpdateHandle`.
    """

    @classmethod
    def of(cls, update: UpdateHandle[S]) -> AsyncUpdateHandle[S]:
        """Return the same update for async code."""
        return AsyncUpdateHandle(update._engine, update._codec, update.workflow_id, update.id)

    async def result(self, timeout: timedelta | None = None) -> R:  # noqa: ASYNC109 (durable work is not cancelled by it)
        """Wait for the answer and return the workflow's reply. See `UpdateHandle.result`."""
        pauses = self._pauses(timeout, what="answered")
        while (answer := await self._engine.read_async(self._answer)) is None:  # noqa: ASYNC110 (of other processes)
            await asyncio.sleep(next(pauses))
        return self._value(answer)

    async def accepted(self, timeout: timedelta | None = None) -> None:  # noqa: ASYNC109 (likewise)
        """Return when the workflow has received it. See `UpdateHandle.accepted`."""
        pauses = self._pauses(timeout, what="accepted")
        while not await self._engine.read_async(self._is_accepted):  # noqa: ASYNC110 (likewise)
            await asyncio.sleep(next(pauses))

    def __await__(self) -> Generator[Any, None, R]:
        return self.result().__await__()


@dataclass(frozen=True, slots=True)
class NewUpdate(Generic[S]):
    """An update to be sent; the payload is JSON text."""

    name: str
    payload: str
    key: str | None
    reply: Codec

    @classmethod
    def of(cls, name: str, payload: object, *, reply: type[S], key: str | None) -> NewUpdate[S]:
        """Check the arguments and encode the payload.

        Raises:
            EncodingError, PayloadTooLargeError: the payload cannot be stored, or is too large.
            ArgumentError: the name or the key cannot be one.
        """
        require_sendable(name, what="update name")
        if key is not None:
            require_text(key, what="key")
        text = Codec.inferred(what=f"payload of update {name!r}").encode(payload)
        return NewUpdate(name, text, key, reply_codec(reply, f"update {name!r}"))

    def start(self, session: Session, *, bound: BoundWorkflow) -> tuple[Workflow, tuple[UUID, int]]:
        """Start the workflow, send the update, and return the record with the ids of workflow and update."""
        workflow = start(session, bound)
        return workflow, self.send(session, workflow=workflow)

    def send(self, session: Session, *, workflow: Workflow | UUID) -> tuple[UUID, int]:
        """Send the update, and return the ids of its workflow and of itself."""
        session.flush()  # a workflow that was only just started is not in the table yet
        workflow_id = id_of(workflow)
        update_id = self._sent(session, workflow_id)
        blobs.adopt_in(session, self.payload, workflow_id)
        hints.announce(session, hints.sent_to(workflow_id, statements.signal_of(self.name)))
        return workflow_id, update_id

    def _sent(self, session: Session, workflow_id: UUID) -> int:
        for _ in range(keys.MOST_REPEATS):
            update_id, receiver = self._known(session, workflow_id)
            if update_id is None:  # and None again: somebody has just sent one of the key
                update_id = self._insert(session, workflow_id, receiver)
            if update_id is not None:
                return update_id
        raise keys.not_visible("update", name=self.name, key=self.key or "")

    def _insert(self, session: Session, workflow_id: UUID, receiver: str) -> int | None:
        payload = Payloads.of_workflow(receiver).seal(self.payload, Place.of(workflow_id, f"update {self.name}"))
        given: dict[str, Any] = {"name": self.name, "payload": payload, "key": self.key}
        try:
            return statements.send(session, workflow_id, **given)
        except keys.SnapshotKept:
            with in_savepoint(session, what="update", name=self.name, key=self.key):
                return statements.send_in_snapshot(session, workflow_id, **given)

    def _known(self, session: Session, workflow_id: UUID) -> tuple[int | None, str]:
        """Return the id of the update that has the key already, and the receiver's name; refuse a finished one."""
        found = statements.receiver(session, workflow_id, name=self.name, key=self.key)
        if found is None or found.known is None:
            require_receiver(f"update {self.name!r}", workflow_id, None if found is None else found.status)
            return None, "" if found is None else found.workflow_name
        return found.known, found.workflow_name
