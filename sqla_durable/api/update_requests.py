"""The updates that a workflow receives: it waits for one, accepts or refuses it, and answers it, once."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Generic
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from typing_extensions import TypeVar

from sqla_durable.api.calls import ANY, Call, operation, publication, require_sendable, sealed
from sqla_durable.api.sessions import AnySession
from sqla_durable.definitions.checks import fault_in, require_duration
from sqla_durable.definitions.codec import Codec
from sqla_durable.definitions.failure import Failure
from sqla_durable.definitions.libraries import pydantic
from sqla_durable.definitions.redaction import problems_of
from sqla_durable.errors import ArgumentError, DecodingError, UsageError
from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.calls import Position
from sqla_durable.operations.outcome import is_own_failure
from sqla_durable.operations.runtime import Runtime
from sqla_durable.operations.waiting import receive_update
from sqla_durable.runtime.context import Context, active, outside
from sqla_durable.store import Checkpoint, Connectable, Origin, Verdict, updates
from sqla_durable.unwinding import AttemptLost

T = TypeVar("T", default=Any)
Q = TypeVar("Q")

_REASON_LIMIT = 10_000
"""How many characters of a reason are recorded at most."""


class _BaseRequest(Generic[T]):
    __slots__ = ("id", "name", "payload", "workflow_id")

    def __init__(self, workflow_id: UUID, update_id: int, name: str, payload: T) -> None:
        self.workflow_id = workflow_id
        self.id = update_id
        self.name = name
        self.payload = payload

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} {self.id} of workflow {self.workflow_id}>"

    def _reply(self, value: object, session: AnySession | None) -> Call[None]:
        what = f"reply to update {self.name!r}"

        def encoded(context: Context) -> str:
            return f'{{"reply": {sealed(value, context, "reply", str(self.id), what=what)}}}'

        return self._answer("reply", session, encoded)

    def _reject(self, reason: str, session: AnySession | None) -> Call[None]:
        if fault := fault_in(reason, longest=None):
            raise ArgumentError(f"reject({reason!r}): the reason {fault}: say in words why.")
        return self._answer("reject", session, lambda _: json.dumps({"rejected": reason[:_REASON_LIMIT]}))

    def _answer(self, verb: str, session: AnySession | None, encoded: Callable[[Context], str]) -> Call[None]:
        context = active()
        if context is not None and context.attempt.workflow_id != self.workflow_id:
            raise UsageError(
                f"{self!r} is answered in workflow {context.attempt.workflow_id}: only its own can do that."
            )

        def answer(context: Context) -> _Answer:
            return _Answer(self.id, self.name, encoded(context))

        call = publication(verb, f"{verb}({self.name})", answer, session=session)
        return Call(f"UpdateRequest.{verb}", call.carry_out)


class UpdateRequest(_BaseRequest[T]):
    """An update that a `def` workflow has received, to be answered by `reply` or `reject`.

    ```python
    request = wait_update("set_address", Address, validate=in_europe)
    request.reply(save(order_id, request.payload))
    ```

    Where an answer is called decides when it is committed. In the workflow's own code it is an operation of its own,
    carried out exactly once, committed when it returns. In a transactional step pass the step's session: then it
    commits with the step, or not at all. A plain step cannot answer: it may be executed again. The workflow's row is
    locked while the answer is written, with a session until the step commits. Outside a workflow nothing happens.

    Attributes:
        workflow_id: the id of the workflow's record.
        id: the id of the update.
        name: its name.
        payload: what was sent, as it is recorded.
    """

    __slots__ = ()

    def reply(self, value: object = None, *, session: Session | None = None) -> None:
        """Answer with a value, of any type that can be stored as JSON.

        Args:
            value: the answer.
            session: that of the transactional step.

        Raises:
            UsageError: it was answered before; or it is another workflow's; or a session is passed where there is none
                of the workflow's, or is missing in a transactional step; or this is a plain step, or a task or thread
                that is no branch of the workflow.
            EncodingError, PayloadTooLargeError: the value cannot be stored, or is too large; nothing was written.
        """
        self._reply(value, session).outcome()

    def reject(self, reason: str, *, session: Session | None = None) -> None:
        """Answer that it is not done, and why: its sender gets an `UpdateRejectedError`.

        Args:
            reason: a text.
            session: that of the transactional step.

        Raises:
            ArgumentError: the reason is blank, or no text.
            UsageError: as `reply`.
        """
        self._reject(reason, session).outcome()


class AsyncUpdateRequest(_BaseRequest[T]):
    """An update that an `async def` workflow has received, to be answered by `reply` or `reject`.

    ```python
    request = await wait_update("set_address", Address, validate=in_europe)
    await request.reply(await save(order_id, request.payload))
    ```

    See `UpdateRequest`, and its attributes.
    """

    __slots__ = ()

    @property
    def sync_request(self) -> UpdateRequest[T]:
        """The same request for a `def` step, which answers in its own transaction."""
        return UpdateRequest(self.workflow_id, self.id, self.name, self.payload)

    def reply(self, value: object = None, *, session: AsyncSession | None = None) -> Coroutine[Any, Any, None]:
        """Answer with a value, of any type that can be stored as JSON. See `UpdateRequest.reply`."""
        return self._reply(value, session).coroutine()

    def reject(self, reason: str, *, session: AsyncSession | None = None) -> Coroutine[Any, Any, None]:
        """Answer that it is not done, and why. See `UpdateRequest.reject`."""
        return self._reject(reason, session).coroutine()


@dataclass(frozen=True, slots=True)
class _Answer:
    """An answer to be written, as JSON text."""

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


def wait_update(
    name: str,
    kind: type[T] = ANY,
    *,
    validate: Callable[[T], object] | None = None,
    timeout: timedelta | None = None,
    step_key: str | None = None,
) -> UpdateRequest[T]:
    """Wait in a workflow's code for an acceptable update, and return it to be answered.

    ```python
    request = wait_update("set_address", Address, validate=in_europe, timeout=timedelta(days=14))
    ```

    It is the oldest one of the name that was not received before. One whose payload is not of the type, or that
    `validate` refuses, is answered as rejected, leaves no trace in the workflow's history, and the workflow goes on
    waiting. What is received is recorded, and its sender sees that it is accepted; a replay finds the same, and does
    not validate it again. Meanwhile the workflow is suspended and needs a row and nothing else.

    Args:
        name: the update's name.
        kind: the type of its payload.
        validate: refuses a payload by raising an exception, whose text is the reason, or by returning False. It
            only reads: it may be called several times for one update, and what it changes of the payload is lost.
            It is no part of the workflow: steps are plain functions there.
        timeout: how long to wait at most, from when the workflow first comes here, on the database's clock.
        step_key: an explicit identity in the history, instead of `update:NAME` and its occurrence.

    Raises:
        WaitTimeoutError: none came in time; the same on every replay. One that comes later can still be received.
        DecodingError: on a replay, the recorded payload does not fit the type that the code has now.
        UsageError: this is not a workflow's own code, or nobody could send one (a joined executor).
        UsageError: the workflow is `async def`; or the validator is, and the workflow is `def`.
        ArgumentError: the name is blank, the timeout no timedelta, or the validator no function.
    """
    return wait_update_call(UpdateRequest[T], name, kind, validate, timeout, step_key).outcome()


def wait_update_call(
    request: Callable[[UUID, int, str, Any], Q],
    name: str,
    kind: Any,
    validate: Callable[[Any], object] | None,
    timeout: timedelta | None,
    step_key: str | None,
) -> Call[Q]:
    """Return the call of `wait_update`, which returns a request of this class."""
    require_sendable(name, what="update name")
    if validate is not None and not callable(validate):  # pyright: ignore[reportUnnecessaryComparison]
        raise ArgumentError(f"validate={validate!r} is no function: give one that takes the payload.")
    if timeout is not None:
        require_duration(timeout, "timeout")
    receiving = _Receiving(request, name, Codec.of(kind, what=f"payload of update {name!r}"), validate, timeout)
    return operation("wait_update", f"update:{name}", receiving.receive, step_key=step_key)


@dataclass(frozen=True, slots=True)
class _Receiving:
    request: Callable[[UUID, int, str, Any], Any]
    name: str
    codec: Codec
    validate: Callable[[Any], object] | None
    timeout: timedelta | None

    async def receive(self, runtime: Runtime, position: Position) -> Any:
        receive = partial(
            receive_update, name=self.name, validate=partial(self._consider, runtime.attempt), within=self.timeout
        )
        taken = await receive(runtime, position)
        value = self._value(runtime.attempt, taken.payload)
        return self.request(runtime.attempt.workflow_id, taken.id, self.name, value)

    def _value(self, attempt: Attempt, payload: str) -> Any:
        return self.codec.decode(attempt.open(payload, "update", self.name))

    async def _consider(self, attempt: Attempt, payload: str) -> str | None:
        """Return why a payload is refused; None if it is not."""
        try:
            value = self._value(attempt, payload)
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
    if isinstance(error, DecodingError) and isinstance(error.__cause__, pydantic.ValidationError):
        return f"the payload does not fit: {problems_of(error.__cause__, below=1)}"[:_REASON_LIMIT]
    return (Failure.of(error).message.strip() or type(error).__name__)[:_REASON_LIMIT]
