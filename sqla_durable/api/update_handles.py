"""Waiting for the answer to an update, from anywhere that reaches its database."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Generator, Iterator
from datetime import timedelta
from typing import Any, Generic, TypeVar, overload
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

import sqla_durable.api.polling as polling
from sqla_durable.api.callers import id_of
from sqla_durable.api.handle import refuse_event_loop
from sqla_durable.definitions.codec import Codec
from sqla_durable.errors import (
    ArgumentError,
    NotFoundError,
    ResultTimeoutError,
    UpdateNotAnsweredError,
    UpdateRejectedError,
)
from sqla_durable.models import Workflow
from sqla_durable.store import updates
from sqla_durable.store.updates import Sent

R = TypeVar("R", covariant=True)
S = TypeVar("S")


class _BaseUpdate(Generic[R]):
    def __init__(self, outlook: polling.Outlook, codec: Codec, workflow_id: UUID, update_id: int) -> None:
        self._outlook = outlook
        self._codec = codec
        self.workflow_id = workflow_id
        self.id = update_id

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} of workflow {self.workflow_id}>"

    def _is_accepted(self, session: Session) -> bool:
        """Look whether the workflow has taken it."""
        sent = self._sent(session)
        self._refuse_rejected(sent, only_refused=True)
        if not sent.is_taken and sent.status.finished:
            raise self._not_answered(f"{sent.status.as_predicate} without taking update {sent.name!r} {self.id}.")
        return sent.is_taken

    def _answer(self, session: Session) -> str | None:
        """Look for the answer; JSON text, or None while there is none."""
        sent = self._sent(session)
        self._refuse_rejected(sent, only_refused=False)
        if sent.answer is not None:
            return sent.answer
        if sent.status.finished:
            raise self._not_answered(f"has {sent.status} without answering update {sent.name!r} {self.id}.")
        if sent.is_taken and not sent.is_remembered:
            raise self._not_answered(f"took update {sent.name!r} {self.id} and began anew without answering it.")
        return None

    def _sent(self, session: Session) -> Sent:
        sent = updates.look(session, self.workflow_id, self.id)
        if sent is None:
            raise NotFoundError(
                f"no update {self.id} of workflow {self.workflow_id} is visible. The transaction that sent it is "
                "not committed, or the workflow was deleted, or it has continued as new since it took this update "
                "without a key.",
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
        value: R = self._codec.decode(json.dumps(json.loads(answer)["reply"]))
        return value

    def _pauses(self, timeout: timedelta | None, *, what: str) -> Iterator[float]:
        yield from polling.pauses(timeout)
        raise ResultTimeoutError(
            f"workflow {self.workflow_id} has not {what} update {self.id} after {timeout}; it still may.",
            workflow_id=self.workflow_id,
        )


class Update(_BaseUpdate[R]):
    """An update that was sent, for sync code to wait for its answer.

    ```python
    with SessionLocal.begin() as session:
        request = update(session, order.checkout, "set_address", Address("Elm Street 7"), reply=Saved)
    saved = request.result(timeout=timedelta(seconds=10))
    ```

    Looks in short transactions of its own, so after the sender's commit; takes no lock. Any process can make one again:
    `update_handle(SessionLocal, request.workflow_id, request.id, reply=Saved)`.

    Attributes:
        workflow_id: the id of the workflow's record.
        id: the id of the update.
    """

    def result(self, timeout: timedelta | None = None) -> R:
        """Wait for the answer; give the workflow's reply.

        Args:
            timeout: how long to wait; None waits as long as it takes.

        Raises:
            UpdateRejectedError: the workflow has refused or rejected it; `reason` says why.
            UpdateNotAnsweredError: the workflow has ended without answering it, or has begun anew since it took it.
            ResultTimeoutError: there is no answer yet; it may still come.
            NotFoundError: it is not visible: the transaction that sent it is not committed, or was rolled back.
            DecodingError: the reply does not fit the type.
            SchemaError, SessionError: the database does not hold the tables.
            UsageError: this was called in a running event loop, which it would block.
        """
        refuse_event_loop("Update.result()", "send it with an AsyncSession, and await the result")
        pauses = self._pauses(timeout, what="answered")
        while (answer := self._outlook.look(self._answer)) is None:
            time.sleep(next(pauses))
        return self._value(answer)

    def accepted(self, timeout: timedelta | None = None) -> None:
        """Return when the workflow has taken it: it is valid, and will be answered unless the workflow ends before.

        Raises:
            UpdateRejectedError: the workflow has refused it.
            UpdateNotAnsweredError: the workflow has ended without taking it.
            Exception: the others as `result`.
        """
        refuse_event_loop("Update.accepted()", "send it with an AsyncSession, and await that")
        pauses = self._pauses(timeout, what="accepted")
        while not self._outlook.look(self._is_accepted):
            time.sleep(next(pauses))


class AsyncUpdate(_BaseUpdate[R]):
    """An update that was sent, for async code to wait for its answer.

    ```python
    async with AsyncSessionLocal.begin() as session:
        request = await update(session, order.checkout, "set_address", Address("Elm Street 7"), reply=Saved)
    saved = await request.result(timeout=timedelta(seconds=10))
    ```

    `await request` is `await request.result()`. See `Update`.
    """

    async def result(self, timeout: timedelta | None = None) -> R:  # noqa: ASYNC109 (durable work is not cancelled by it)
        """Wait for the answer; give the workflow's reply. See `Update.result`."""
        pauses = self._pauses(timeout, what="answered")
        while (answer := await self._outlook.look_async(self._answer)) is None:  # noqa: ASYNC110 (of other processes)
            await asyncio.sleep(next(pauses))
        return self._value(answer)

    async def accepted(self, timeout: timedelta | None = None) -> None:  # noqa: ASYNC109 (likewise)
        """Return when the workflow has taken it. See `Update.accepted`."""
        pauses = self._pauses(timeout, what="accepted")
        while not await self._outlook.look_async(self._is_accepted):  # noqa: ASYNC110 (likewise)
            await asyncio.sleep(next(pauses))

    def __await__(self) -> Generator[Any, None, R]:
        return self.result().__await__()


@overload
def update_handle(
    source: Session | sessionmaker[Session], workflow: Workflow | UUID, update_id: int, *, reply: type[S]
) -> Update[S]: ...


@overload
def update_handle(
    source: Session | sessionmaker[Session], workflow: Workflow | UUID, update_id: int, *, reply: Any = Any
) -> Update[Any]: ...


@overload
def update_handle(
    source: AsyncSession | async_sessionmaker[AsyncSession],
    workflow: Workflow | UUID,
    update_id: int,
    *,
    reply: type[S],
) -> AsyncUpdate[S]: ...


@overload
def update_handle(
    source: AsyncSession | async_sessionmaker[AsyncSession],
    workflow: Workflow | UUID,
    update_id: int,
    *,
    reply: Any = Any,
) -> AsyncUpdate[Any]: ...


def update_handle(source: polling.Source, workflow: Workflow | UUID, update_id: int, *, reply: Any = Any) -> Any:
    """Wait for the answer to an update that was sent elsewhere. Does not look whether it is there.

    ```python
    saved = update_handle(SessionLocal, workflow_id, update_id, reply=Saved).result(timeout=timedelta(seconds=10))
    ```

    Args:
        source: a session or a sessionmaker, for its engine; an async one gives an `AsyncUpdate`.
        workflow: the receiver, its record or its id.
        update_id: the `id` of the update.
        reply: as what the reply is wanted.

    Raises:
        ArgumentError: what is given is no workflow, or no id of an update.
        SessionError: the source is none, or its engine is not PostgreSQL's.
    """
    if not isinstance(update_id, int):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(f"{update_id!r} is no id of an update: give the integer that `update(...).id` has.")
    outlook = polling.Outlook.of(source, what="update_handle()")
    kind: Any = AsyncUpdate if outlook.is_async else Update
    return kind(outlook, reply_codec(reply, f"update {update_id}"), id_of(workflow), update_id)


def reply_codec(reply: Any, what: str) -> Codec:
    """Give the codec of a reply."""
    return Codec.of(reply, what=f"reply to {what}")
