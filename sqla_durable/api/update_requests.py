"""What a workflow is asked: it waits for an update, looks whether it is acceptable, and answers it, once."""

from __future__ import annotations

import inspect
import json
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Generic, TypeVar, cast, overload
from uuid import UUID

from pydantic import ValidationError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sqla_durable.api.callers import AnySession
from sqla_durable.api.operate import operate, require_sendable
from sqla_durable.api.publishing import encode, publish
from sqla_durable.definitions.checks import fault_in, require_duration
from sqla_durable.definitions.codec import Codec
from sqla_durable.definitions.failure import Failure
from sqla_durable.definitions.redaction import problems_of
from sqla_durable.errors import ArgumentError, DecodingError, UsageError
from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.calls import Position
from sqla_durable.operations.outcome import is_own_failure
from sqla_durable.operations.runtime import Runtime
from sqla_durable.operations.waiting import receive_update
from sqla_durable.runtime.context import active, outside
from sqla_durable.store import Checkpoint, Connectable, Origin, Verdict, updates
from sqla_durable.unwinding import AttemptLost

T = TypeVar("T")

_REASON_LIMIT = 10_000
"""How many characters of a reason a sender is told."""


class UpdateRequest(Generic[T]):
    """An update that a workflow has taken, to be answered by `reply` or `reject`.

    ```python
    request = wait_update("set_address", Address, validate=in_europe)
    request.reply(save(order_id, request.payload))
    ```

    Where an answer is called decides when it is committed. In the workflow's own code it is an operation of its own,
    carried out exactly once, committed when it returns. In a transactional step pass the step's session first: then it
    commits with the step, or not at all. A plain step cannot answer: it may be executed again. The workflow's row is
    locked while the answer is written, with a session until the step commits. Outside a workflow nothing happens.
    In `async def` code, await the call.

    Attributes:
        workflow_id: the id of the workflow's record.
        id: the id of the update.
        name: its name.
        payload: what was sent, as it is recorded.
    """

    __slots__ = ("id", "name", "payload", "workflow_id")

    def __init__(self, workflow_id: UUID, update_id: int, name: str, payload: T) -> None:
        self.workflow_id = workflow_id
        self.id = update_id
        self.name = name
        self.payload = payload

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} {self.id} of workflow {self.workflow_id}>"

    @overload
    def reply(self, value: object = None, /) -> Awaitable[None]: ...

    @overload
    def reply(self, session: AnySession, value: object = None, /) -> Awaitable[None]: ...

    def reply(self, *given: Any) -> Awaitable[None]:
        """Answer with a value, of any type that can be stored as JSON.

        Args:
            *given: the session of a transactional step; and the value.

        Raises:
            UsageError: it was answered before; or it is another workflow's; or a session is given where there is none
                of the workflow's, or is missing in a transactional step; or this is a plain step, or a task or thread
                of its own.
            EncodingError, PayloadTooLargeError: the value cannot be stored, or is too large; nothing was written.
        """
        session, value = _split(given, None)
        what = f"reply to update {self.name!r}"

        def answer(limit: int) -> str:
            return f'{{"reply": {encode(value, what=what, limit=limit)}}}'

        return self._answer("reply", session, answer)

    @overload
    def reject(self, reason: str, /) -> Awaitable[None]: ...

    @overload
    def reject(self, session: AnySession, reason: str, /) -> Awaitable[None]: ...

    def reject(self, *given: Any) -> Awaitable[None]:
        """Answer that it is not done, and why: its sender gets an `UpdateRejectedError`.

        Args:
            *given: the session of a transactional step; and the reason, a text.

        Raises:
            ArgumentError: the reason is blank, or no text.
            UsageError: as `reply`.
        """
        session, reason = _split(given, "")
        if fault := fault_in(reason, longest=None):
            raise ArgumentError(f"reject({reason!r}): the reason {fault}: say in words why.")
        return self._answer("reject", session, lambda _: json.dumps({"rejected": reason[:_REASON_LIMIT]}))

    def _answer(self, verb: str, session: AnySession | None, encoded: Callable[[int], str]) -> Awaitable[None]:
        context = active()
        if context is not None and context.attempt.workflow_id != self.workflow_id:
            raise UsageError(
                f"{self!r} is answered in workflow {context.attempt.workflow_id}: only its own can do that."
            )

        def publication(limit: int) -> _Answer:
            return _Answer(self.id, self.name, encoded(limit))

        return publish(f"{verb}()", session, publication, name=f"{verb}({self.name})")


def _split(given: tuple[Any, ...], default: object) -> tuple[AnySession | None, Any]:
    """Tell the session from the value."""
    has_session = bool(given) and isinstance(given[0], (Session, AsyncSession))
    values = given[1:] if has_session else given
    if len(values) > 1:
        raise ArgumentError(f"an update is answered with one value, got {values!r}: a session comes before it.")
    return given[0] if has_session else None, values[0] if values else default


@dataclass(frozen=True, slots=True)
class _Answer:
    """An answer that is to be written, as JSON text."""

    update_id: int
    name: str
    answer: str

    def record(self, connectable: Connectable, checkpoint: Checkpoint) -> None:
        written = updates.record_answer(connectable, checkpoint, update_id=self.update_id, answer=self.answer)
        self._require(written, checkpoint.fence.workflow_id)

    def write(self, connectable: Connectable, origin: Origin) -> None:
        written = updates.put_answer(connectable, origin, update_id=self.update_id, answer=self.answer)
        self._require(written, origin.fence.workflow_id)

    async def write_at_once(self, runtime: Runtime, origin: Origin) -> None:
        raise UsageError(
            f"update {self.name!r} was answered in step {origin.step_key!r} of workflow {runtime.attempt.name!r}, "
            "which is plain and may be executed again: answer in the workflow's code, or let the step take a Session "
            "and pass that first."
        )

    def _require(self, written: Verdict, workflow_id: UUID) -> None:
        match written:
            case Verdict.RECORDED:
                pass
            case Verdict.LOST:
                raise AttemptLost(workflow_id)
            case Verdict.DUPLICATE:
                raise UsageError(
                    f"update {self.name!r} {self.update_id} of workflow {workflow_id} was answered before: its sender "
                    "may have read that. Answer each update once."
                )


class _WaitUpdate:
    """`wait_update`, with its other face for type checkers."""

    @overload
    def __call__(
        self,
        name: str,
        *,
        validate: Callable[[Any], object] | None = None,
        timeout: timedelta | None = None,
        key: str | None = None,
    ) -> UpdateRequest[Any]: ...

    @overload
    def __call__(
        self,
        name: str,
        kind: type[T],
        *,
        validate: Callable[[T], object] | None = None,
        timeout: timedelta | None = None,
        key: str | None = None,
    ) -> UpdateRequest[T]: ...

    def __call__(
        self,
        name: str,
        kind: Any = Any,
        *,
        validate: Callable[[Any], object] | None = None,
        timeout: timedelta | None = None,
        key: str | None = None,
    ) -> Any:
        """Wait for an update that is acceptable, and take it; in `async def` code, await it.

        ```python
        request = await wait_update.aio("set_address", Address, validate=in_europe, timeout=timedelta(days=14))
        ```

        The oldest one of the name that was not taken before. One whose payload is not of the type, or that `validate`
        refuses, is answered as rejected, leaves no trace in the workflow's history, and the workflow goes on waiting.
        What is taken is recorded, and its sender sees that it is accepted; a replay finds the same, and does not
        validate it again. Meanwhile the workflow is a row and nothing else.

        Args:
            name: the update's name.
            kind: the type of its payload.
            validate: refuses a payload by raising an exception, whose text is the reason, or by returning False. It
                only reads: it may be called several times for one update, and what it changes of the payload is lost.
                It is no part of the workflow: steps are plain functions there. In `async def` code it may be a
                coroutine function; a sync one holds up the event loop.
            timeout: how long to wait at most, from when the workflow first comes here, on the database's clock.
            key: an explicit identity in the history, instead of `update:NAME` and its occurrence.

        Raises:
            WaitTimeoutError: none came in time; the same on every replay. One that comes later can still be taken.
            DecodingError: on a replay, what was taken does not fit the type that the code has now.
            UsageError: this is not a workflow's own code, or nobody could send one (a joined executor).
            UsageError: the validator has to be awaited, and the workflow is `def`.
            ArgumentError: the name is blank, the timeout no timedelta, or the validator no function.
        """
        require_sendable(name, what="update name")
        if validate is not None and not callable(validate):  # pyright: ignore[reportUnnecessaryComparison]
            raise ArgumentError(f"validate={validate!r} is no function: give one that takes the payload.")
        if timeout is not None:
            require_duration(timeout, "timeout")
        receiving = _Receiving(name, Codec.of(kind, what=f"payload of update {name!r}"), validate, timeout)
        return operate(f"update:{name}", receiving.request, key=key)

    @overload
    def aio(
        self,
        name: str,
        *,
        validate: Callable[[Any], object] | None = None,
        timeout: timedelta | None = None,
        key: str | None = None,
    ) -> Coroutine[Any, Any, UpdateRequest[Any]]: ...

    @overload
    def aio(
        self,
        name: str,
        kind: type[T],
        *,
        validate: Callable[[T], object] | None = None,
        timeout: timedelta | None = None,
        key: str | None = None,
    ) -> Coroutine[Any, Any, UpdateRequest[T]]: ...

    def aio(
        self,
        name: str,
        kind: Any = Any,
        *,
        validate: Callable[[Any], object] | None = None,
        timeout: timedelta | None = None,
        key: str | None = None,
    ) -> Coroutine[Any, Any, Any]:
        """The same in an `async def` workflow, for type checkers."""
        return cast("Coroutine[Any, Any, Any]", self(name, kind, validate=validate, timeout=timeout, key=key))


wait_update = _WaitUpdate()
"""Wait for an update in a workflow's code."""


@dataclass(frozen=True, slots=True)
class _Receiving:
    name: str
    codec: Codec
    validate: Callable[[Any], object] | None
    timeout: timedelta | None

    async def request(self, runtime: Runtime, position: Position) -> UpdateRequest[Any]:
        receive = partial(
            receive_update,
            name=self.name,
            validate=partial(self._consider, runtime.attempt),
            within=self.timeout,
        )
        taken = await receive(runtime, position)
        return UpdateRequest(runtime.attempt.workflow_id, taken.id, self.name, self.codec.decode(taken.payload))

    async def _consider(self, attempt: Attempt, payload: str) -> str | None:
        """Say why a payload is refused; None if it is not."""
        try:
            value = self.codec.decode(payload)
            if self.validate is None:
                return None
            with outside():
                verdict = self.validate(value)
                verdict = await verdict if inspect.isawaitable(verdict) else verdict
        except BaseException as error:
            if not is_own_failure(attempt, error):
                raise
            return _reason_of(error)
        return "it was refused" if verdict is False else None


def _reason_of(error: BaseException) -> str:
    if isinstance(error, DecodingError) and isinstance(error.__cause__, ValidationError):
        return f"the payload does not fit: {problems_of(error.__cause__, below=1)}"[:_REASON_LIMIT]
    return (Failure.of(error).message.strip() or type(error).__name__)[:_REASON_LIMIT]
