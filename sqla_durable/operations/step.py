"""The step: return its recorded outcome, or execute it, record the outcome, and return what a replay will return.

While a plain step is executed, its heartbeats are sent with the newest details that its function has reported.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable
from functools import cached_property, partial
from typing import Any

from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sqla_durable.definitions.codec import Encoded
from sqla_durable.definitions.database_errors import (
    first_line,
    is_about_data,
    is_obstacle,
    is_transient,
    spoils_connection,
)
from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.definitions.failure import Failure, record
from sqla_durable.definitions.inspection import SessionKind
from sqla_durable.definitions.limits import TimeLimits, Watch
from sqla_durable.definitions.retry import RetryPolicy
from sqla_durable.errors import (
    DecodingError,
    DefinitionError,
    EncodingError,
    PayloadError,
    SessionError,
    TransactionLostError,
    UsageError,
)
from sqla_durable.models.base import StepStatus
from sqla_durable.operations.calls import StepCall
from sqla_durable.operations.outcome import checkpoint_of, failure_of_step, is_own_failure, outcome_of
from sqla_durable.operations.runtime import Runtime, execution_of
from sqla_durable.operations.suspending import MOMENT, Wait
from sqla_durable.operations.transaction import StepTransaction, TransactionGuard
from sqla_durable.operations.transaction_retries import (
    LOSSES,
    Phase,
    Setback,
    TransactionRetry,
    describe,
    log,
    sqlstate_of,
    wait_after_loss,
)
from sqla_durable.store import Checkpoint, Recorded, Verdict, steps
from sqla_durable.unwinding import AttemptLost, Interrupted

HEARTBEAT_INTERVAL = 1.0
"""Seconds between two heartbeats that one step writes; of the reports in between only the newest is kept."""


async def execute_step(runtime: Runtime, call: StepCall) -> Any:
    """Return the outcome of a step: the recorded one, or that of executing it now.

    Exactly once for the writes of a transactional step; at least once for the effects of a plain one.

    Raises:
        Exception: the step's own error, the same on first execution and on replay.
        StepFailedError: likewise, where the error's own type cannot be rebuilt.
        ControlFlow: the attempt ends here.
    """
    attempt, recorded = runtime.attempt, None
    try:
        recorded = attempt.recorded(call.position)
        if recorded is None:
            await runtime.recorder.settle()
            recorded = await _Execution(runtime, call).recorded()
        return outcome_of(attempt, recorded, call.definition.result)
    except DecodingError as error:
        if recorded is not None and recorded.status is StepStatus.SUCCEEDED:  # otherwise the step itself failed with it
            attempt.note_undecodable(call.position, error)
        raise
    finally:
        attempt.end_call(call.position)


class _Again(Exception):
    """The step returned, and its policy requests another try."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


@dataclass(frozen=True, slots=True)
class _TryAtOnce:
    """The database rolled the try back: the next one follows in `seconds`, and nothing is recorded."""

    seconds: float


@dataclass(frozen=True, slots=True)
class _TryLater:
    """Another try follows in `seconds`; the last one is recorded, with its error unless it returned."""

    seconds: float
    error: BaseException | None


@dataclass(frozen=True, slots=True)
class _Decided:
    """The error is the step's outcome."""

    error: BaseException


class _AlreadyRecorded(Exception):
    """Another execution of the step has committed, or this one did and its acknowledgement was lost."""

    def __init__(self, recorded: Recorded) -> None:
        self.checkpoint = recorded


class _Execution:
    """Executes one step until it has an outcome."""

    def __init__(self, runtime: Runtime, call: StepCall) -> None:
        self._runtime = runtime
        self._attempt = runtime.attempt
        self._call = call
        self._phase = Phase.BEFORE
        self._losses = 0  # in a row, those of earlier attempts included
        self._uncertain = False
        self._began = time.monotonic()
        self._in_memory_until: float | None = None
        self._limits = call.definition.options.time_limits

    @cached_property
    def _retry(self) -> TransactionRetry:
        return self._runtime.recorder.transaction_retry()

    async def recorded(self) -> Recorded:
        """Try, and try again as the policy says; return the outcome as it was recorded."""
        self._attempt.begin_step(self._call.position, self._call.tries)
        if self._limits is not None or self._attempt.is_replaying:
            await self._resume_tries()
        while True:
            if self._limits is not None and self._limits.left(self._call.tries.age) <= 0:
                return await self._record_failure(self._limits.exceeded(self._call.position.shown, None))
            self._call.tries.begin()
            try:
                return await self._try()
            except _AlreadyRecorded as settled:
                return settled.checkpoint
            except BaseException as raised:
                if not is_own_failure(self._attempt, raised):
                    raise
                error = failure_of_step(raised, self._call.position.shown)
                match self._within_time(await self._verdict(error), error):
                    case _TryAtOnce(seconds):
                        self._call.tries.uncount()
                        await self._runtime.recorder.pause(seconds)
                        self._attempt.raise_if_stopped()
                    case _TryLater(seconds, recorded):
                        await self._record_try(recorded, seconds)
                        await self._wait(seconds)
                    case _Decided(outcome):
                        return await self._record_failure(outcome)

    async def _resume_tries(self) -> None:
        """Continue with the tries where an earlier attempt ended, and not before the next one is due."""
        tried = self._attempt.unfinished_record(self._call.position)
        if tried is None:
            if self._limits is not None:
                await self._record_begin(self._limits)
        elif tried.status is StepStatus.RUNNING:  # the try that was interrupted is made again
            self._call.tries.resume(count=tried.tries - 1, age=tried.age)
        else:
            self._call.tries.resume(count=tried.tries, age=tried.age)
            self._losses = _losses_in(tried)
            if tried.due_in > 0:
                await self._wait(tried.due_in)

    async def _record_begin(self, limits: TimeLimits) -> None:
        """Record when the first try begins, so that a crash in it does not restart the total timeout."""
        if limits.total_timeout is not None:
            await self._runtime.recorder.record(self._checkpoint(StepStatus.RUNNING))
            await self._runtime.recorder.settle()
            self._call.tries.resume(count=0, age=0.0)  # the time of that write does not count

    async def _wait(self, seconds: float) -> None:
        """Wait before the next try: in memory during the first second of failing, suspended later.

        So a step that fails again and again does not occupy a slot of the worker.
        """
        now = time.monotonic()
        self._in_memory_until = self._in_memory_until or now + MOMENT
        wait = Wait(until=now + seconds, in_memory_until=self._in_memory_until, has_row=False)
        await self._runtime.wait(self._call.position, wait)
        await self._runtime.recorder.settle()

    async def _try(self) -> Recorded:
        definition = self._call.definition
        _ = definition.result  # raises before the step is executed, if its result could not be recorded
        if definition.session is SessionKind.NONE:
            value = await self._call_plain()
            if (policy := definition.options.policy) is not None:
                await self._ask_policy(policy, value)
            checkpoint = self._success(value)
            await self._runtime.recorder.record(checkpoint)
            return checkpoint.recorded
        self._phase = Phase.BEFORE
        transaction = await self._begin()
        try:
            checkpoint = await self._execute_in(transaction)
            self._phase = Phase.COMMIT
            self._uncertain = True  # from here on, an error may be raised after the commit
            await transaction.commit()
        except BaseException as error:
            await (transaction.discard() if spoils_connection(error) else transaction.rollback())
            raise
        return checkpoint.recorded

    async def _call_plain(self) -> Any:
        """Call the step's function; its last report is sent, whether it returns or raises."""
        try:
            value = await self._call_function()
        except BaseException as error:
            if self._attempt.has_unsent_report(self._call.position) and is_own_failure(self._attempt, error):
                await send_heartbeat(self._runtime, self._call)
            raise
        if self._attempt.has_unsent_report(self._call.position):
            await send_heartbeat(self._runtime, self._call)
        return value

    async def _begin(self) -> StepTransaction:
        try:
            return await self._runtime.recorder.begin(self._call.definition)
        except Exception as error:
            if is_transient(error) or not is_obstacle(error):
                raise
            # Without a connection nothing of the step was executed, whatever the reason.
            raise OperationalError("BEGIN", None, error, connection_invalidated=True) from error

    async def _execute_in(self, transaction: StepTransaction) -> Checkpoint:
        """Call the step's function and record its outcome, in one transaction."""
        if self._uncertain:
            await transaction.execute(self._refuse_recorded)
        self._phase = Phase.FUNCTION
        self._require_class(transaction.injected)
        guard = TransactionGuard(transaction.session, step=self._call.position.shown)
        try:
            value = await self._call_function(transaction)
            guard.check()
        finally:
            guard.leave()
        if (policy := self._call.definition.options.policy) is not None:
            await self._ask_policy(policy, value)
        checkpoint = self._success(value)
        await transaction.execute(lambda session: self._flush_and_record(session, checkpoint, transaction))
        return checkpoint

    def _require_class(self, session: Session | AsyncSession) -> None:
        wanted = self._call.definition.session_class
        if wanted is not None and not isinstance(session, wanted):
            raise SessionError(
                f"step {self._call.definition.name!r} takes a {wanted.__module__}.{wanted.__qualname__}, and its "
                f"session would be a {type(session).__module__}.{type(session).__qualname__}: pass such a session to "
                f"the executor, or a sessionmaker with class_={wanted.__qualname__} to the worker."
            )

    def _call_function(self, transaction: StepTransaction | None = None) -> Awaitable[Any]:
        """Call the step's function."""
        interceptors = self._attempt.options.interceptors
        injected = () if transaction is None else (transaction.injected,)
        watch = None if self._limits is None else self._watch(self._limits)
        if not interceptors.steps and (transaction is None or not interceptors.transactions):
            return self._runtime.call_step(self._call, *injected, watch=watch)
        return self._call_intercepted(transaction, injected, watch)

    async def _call_intercepted(
        self, transaction: StepTransaction | None, injected: tuple[object, ...], watch: Watch | None
    ) -> Any:
        """Call the step's function inside the interceptors, which also enclose the flush."""
        async with self._runtime.intercepted(self._call):
            if transaction is not None:
                await transaction.execute(self._intercept_transaction)
            value = await self._runtime.call_step(self._call, *injected, watch=watch)
            if transaction is not None:
                await transaction.execute(Session.flush)
            return value

    def _watch(self, limits: TimeLimits) -> Watch:
        """Begin to watch the time of a try, which heartbeats may extend."""
        watch = limits.of_try(self._call.position.shown, self._call.tries.age)
        self._attempt.progress(self._call.position).watch = watch
        return watch

    def _intercept_transaction(self, session: Session) -> None:
        execution = execution_of(self._attempt, self._call)
        for each in self._attempt.options.interceptors.transactions:
            each.transaction(execution, session)

    def _flush_and_record(self, session: Session, checkpoint: Checkpoint, transaction: StepTransaction) -> None:
        session.flush()
        match transaction.record(session, checkpoint):
            case Verdict.LOST:
                raise AttemptLost(self._attempt.workflow_id)
            case Verdict.DUPLICATE:
                self._refuse_recorded(session)
                raise AttemptLost(self._attempt.workflow_id)  # recorded, and deleted in between
            case Verdict.RECORDED:
                pass

    def _refuse_recorded(self, session: Session) -> None:
        found = steps.find(session, self._attempt.workflow_id, self._call.position.key)
        if found is not None:
            raise _AlreadyRecorded(found)

    async def _record_alone(self, checkpoint: Checkpoint) -> Recorded:
        await self._runtime.recorder.record(checkpoint)
        return checkpoint.recorded

    async def _record_failure(self, error: BaseException) -> Recorded:
        recorded = await self._record_alone(self._failure(error))
        if not self._uncertain:
            return recorded
        await self._runtime.recorder.settle()
        return await self._reread() or recorded

    async def _reread(self) -> Recorded | None:
        """Read the recorded outcome: after an uncertain commit it may be the success, and not the later failure."""
        find = partial(steps.find, workflow_id=self._attempt.workflow_id, key=self._call.position.key)
        while True:
            try:
                transaction = await self._begin()
                try:
                    return await transaction.execute(find)
                finally:
                    await transaction.rollback()
            except Exception as error:
                setback = Setback.of(error, Phase.BEFORE)
                seconds = None if setback is None else self._retry.wait_before_next(setback, error, what=self._label)
                if seconds is None:
                    raise Interrupted(error) from error
            await self._runtime.recorder.pause(seconds)
            self._attempt.raise_if_stopped()

    async def _record_try(self, error: BaseException | None, seconds: float) -> None:
        """Record a failed try, so that the number of tries survives a crash."""
        text = None if error is None else record(error, self._attempt.options.errors)
        await self._runtime.recorder.record(self._checkpoint(StepStatus.RETRYING, error=text, delay=seconds))

    def _within_time(
        self, verdict: _TryAtOnce | _TryLater | _Decided, error: BaseException
    ) -> _TryAtOnce | _TryLater | _Decided:
        """Return the verdict, or the failure of the step if the next try would begin after its total timeout."""
        if self._limits is None or isinstance(verdict, _Decided):
            return verdict
        if verdict.seconds < self._limits.left(self._call.tries.age):
            return verdict
        last = None if isinstance(error, _Again) else error
        return _Decided(self._limits.exceeded(self._call.position.shown, last))

    async def _verdict(self, error: BaseException) -> _TryAtOnce | _TryLater | _Decided:
        """Decide whether there is another try."""
        match error:
            case _Again():
                self._losses = 0
                return _TryLater(error.seconds, None)
            case PayloadError() | UsageError() | DefinitionError():
                return _Decided(error)
            case _:
                pass
        if self._call.definition.session is not SessionKind.NONE and isinstance(error, Exception):
            setback = Setback.of(error, self._phase)
            again = None if setback is None else self._after_setback(setback, error)
            if again is not None:
                return again
        self._losses = 0
        self._call.tries.failed(error)
        policy = self._call.definition.options.policy
        try:
            seconds = None if policy is None else await policy.wait_before_next(self._call.tries)
        except UsageError as broken:
            return _Decided(broken)
        return _Decided(error) if seconds is None else _TryLater(seconds, error)

    def _after_setback(self, setback: Setback, error: Exception) -> _TryAtOnce | _TryLater | _Decided | None:
        """Decide whether there is another try after a setback; None where the step's policy is to decide."""
        seconds = self._retry.wait_before_next(setback, error, what=self._label)
        match setback, seconds:
            case Setback.CONFLICT, None:
                return None
            case _, None:
                raise Interrupted(error) from error  # not the outcome of the step: the executor raises it to its caller
            case Setback.LOSS, _:
                return self._after_loss(error)
            case _:
                return _TryAtOnce(seconds)

    def _after_loss(self, error: Exception) -> _TryLater | _Decided:
        """Count a lost transaction; from the second in a row on, the step's policy may stop the tries."""
        self._losses += 1
        lost = self._loss_error(error)
        policy, seconds = self._call.definition.options.policy, wait_after_loss(self._losses)
        self._call.tries.failed(error)
        try:
            stops = policy is not None and self._losses > 1 and policy.stops(self._call.tries, upcoming=seconds)
        except UsageError as broken:
            return _Decided(broken)
        if stops or self._losses >= LOSSES:
            return _Decided(lost)
        log.warning("workflow %s: %s It is tried again in %.1f s.", self._attempt.workflow_id, lost, seconds)
        return _TryLater(seconds, lost)

    def _loss_error(self, error: Exception) -> TransactionLostError:
        key, count = self._call.position.shown, self._losses
        times = "once" if count == 1 else f"{count} times in a row"
        lost = TransactionLostError(
            f"step {key!r} lost its transaction {times} after its function was called: {describe(error, self._phase)}.",
            step=key,
            count=count,
            sqlstate=sqlstate_of(error),
        )
        lost.__cause__ = error
        return lost

    @property
    def _label(self) -> str:
        return f"workflow {self._attempt.workflow_id}, step {self._call.position.shown!r}"

    async def _ask_policy(self, policy: RetryPolicy, value: object) -> None:
        """Raise `_Again` if the policy requests another try, although the step has returned."""
        self._call.tries.returned(value)
        seconds = await policy.wait_before_next(self._call.tries)
        if seconds is not None:
            raise _Again(seconds)

    def _success(self, value: object) -> Checkpoint:
        encoded = self._call.definition.result.encoded(value)
        if self._attempt.options.payloads.codecs:
            encoded = encoded._replace(text=self._attempt.seal(encoded.text, "step", self._call.position.key))
        return self._checkpoint(StepStatus.SUCCEEDED, encoded=encoded)

    def _failure(self, error: BaseException) -> Checkpoint:
        return self._checkpoint(StepStatus.FAILED, error=record(error, self._attempt.options.errors))

    def _checkpoint(
        self,
        status: StepStatus,
        *,
        encoded: Encoded | None = None,
        error: str | None = None,
        delay: float | None = None,
    ) -> Checkpoint:
        return checkpoint_of(
            self._attempt,
            self._call.position,
            status,
            output=None if encoded is None else encoded.text,
            error=error,
            tries=max(1, self._call.tries.count),
            elapsed=time.monotonic() - self._began,
            delay=delay,
            value=None if encoded is None else (encoded.value,),
        )


def _losses_in(tried: Recorded) -> int:
    """Return how many transactions were lost in a row when this try was recorded."""
    error = None if tried.error is None else Failure.from_text(tried.error).rebuild()
    count = error.count if isinstance(error, TransactionLostError) else 0
    is_number = isinstance(count, int)  # pyright: ignore[reportUnnecessaryIsInstance]  # a row may hold anything
    return min(max(0, count), LOSSES) if is_number else 0


async def send_heartbeat(runtime: Runtime, call: StepCall) -> None:
    """Write a heartbeat of a step, with its newest details, in a transaction of its own.

    Raises:
        AttemptLost: the attempt no longer owns the workflow.
        EncodingError: the database refuses the details.
    """
    reported = runtime.attempt.progress(call.position)
    details = None if reported.details is None else runtime.attempt.seal(reported.details, "details", call.position.key)
    report = partial(steps.report_progress, checkpoint=_running(runtime, call), details=details)
    try:
        with reported.sending():
            await runtime.recorder.execute(report)
    except DBAPIError as error:
        if not is_about_data(error):
            raise
        raise EncodingError(
            f"the database refuses the details that step {call.position.shown!r} reports: {first_line(error)}"
        ) from error


def _running(runtime: Runtime, call: StepCall) -> Checkpoint:
    tries = call.tries
    return checkpoint_of(runtime.attempt, call.position, StepStatus.RUNNING, tries=tries.count, elapsed=tries.age)
