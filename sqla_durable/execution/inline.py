"""How an attempt waits, calls and records on the executor's own session."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only
from typing_extensions import override

import sqla_durable.runtime.tasks as tasks
from sqla_durable.definitions.database_errors import first_line, is_about_data, is_untranslatable
from sqla_durable.definitions.registry import StepDefinition
from sqla_durable.errors import EncodingError, UsageError
from sqla_durable.operations.arrivals import Waker
from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.calls import Position, Suspension, Wait
from sqla_durable.operations.parking import suspension_of_threads, wait_or_park
from sqla_durable.operations.runtime import StepCall, run_blocking
from sqla_durable.operations.shielding import finish_despite_cancel
from sqla_durable.operations.transaction import ReleasingTransaction, StepTransaction, in_session
from sqla_durable.operations.transaction_retries import TransactionRetry
from sqla_durable.runtime.context import Fork
from sqla_durable.runtime.shells import AsyncRuntime, BlockingRuntime
from sqla_durable.store import (
    Checkpoint,
    Completion,
    Connectable,
    Park,
    Verdict,
    attempts,
    refresh_loaded,
    schema,
    steps,
)
from sqla_durable.unwinding import AttemptLost

T = TypeVar("T")
Row = TypeVar("Row", Checkpoint, Completion)

_LOOK_EVERY = 0.1  # seconds between two looks for what is waited for


class Writing(Protocol):
    """What the runtimes need of the executor's story; see `story.Story`."""

    session: Session | AsyncSession

    @property
    def longest_pause(self) -> float:
        """How many seconds may pass before the lease is to be extended."""
        ...

    def transaction(self, *, isolation_level: str | None = None) -> StepTransaction:
        """Give a transaction that is not yet begun."""
        ...

    async def write(self, statement: Callable[[Session], T], *, pause: Callable[[float], Awaitable[None]]) -> T:
        """Write what the engine records, and extend the lease if it is time."""
        ...

    def close_lease(self, session: Session) -> None:
        """Own nothing any more."""

    def refuse_waiting(self, key: str) -> None:
        """Refuse to wait for what others do, where they cannot see the workflow.

        Raises:
            UsageError: nothing of it is committed before the caller commits.
        """

    def transaction_retry(self) -> TransactionRetry:
        """Return the policy for what undoes a transaction."""
        ...

    def twin(self, session: Session) -> Writing:
        """Give the same story on the `Session` inside an `AsyncSession`."""
        ...


class BlockingInline(BlockingRuntime):
    """An attempt on a `Session`: whatever waits blocks the thread."""

    def __init__(self, story: Writing, attempt: Attempt) -> None:
        super().__init__(attempt)
        self._story = story
        self._lock = threading.Lock()

    @override
    async def pause(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251 (the blocking shell: no event loop runs it)

    @override
    async def wait(self, position: Position, wait: Wait) -> None:
        if wait.awaits or wait.polls:
            self._story.refuse_waiting(position.key)
            await self.pause(min(wait.seconds, _LOOK_EVERY))
            return
        while wait.seconds > 0:
            await self.pause(min(wait.seconds, self._story.longest_pause))
            await self._write(partial(_look, attempt=self.attempt))

    @override
    async def settle(self) -> None:
        self.attempt.raise_if_stopped()

    @override
    async def record(self, checkpoint: Checkpoint) -> None:
        await _escaping(lambda given: self._write(partial(_record, checkpoint=given)), checkpoint)

    @override
    def note(self, checkpoint: Checkpoint) -> None:
        run_blocking(self.record(checkpoint))

    @override
    async def execute(self, statement: Callable[[Connectable], T]) -> T:
        return await self._write(statement)

    @override
    async def begin(self, step: StepDefinition) -> StepTransaction:
        self._lock.acquire()
        try:
            self.attempt.raise_if_stopped()
        except BaseException:
            self._lock.release()
            raise
        inner = self._story.transaction(isolation_level=step.options.isolation_level)
        transaction = ReleasingTransaction(inner, self._lock.release)
        await transaction.begin()
        return transaction

    @override
    async def finish(self, completion: Completion) -> None:
        await _escaping(
            lambda given: self._story.write(partial(_finish, completion=given, story=self._story), pause=self.pause),
            completion,
        )

    async def _write(self, statement: Callable[[Session], T]) -> T:
        """Write in a transaction of its own, and have the session for oneself meanwhile."""
        with self._lock:
            self.attempt.raise_if_stopped()
            return await self._story.write(statement, pause=self.pause)

    @override
    def fork(self) -> Fork:
        session = self._story.session
        if isinstance(session, AsyncSession) or schema.engine_of(session).dialect.is_async:
            raise UsageError(
                f"parallel() was called in a workflow on {session!r}, the inside of an AsyncSession, which threads "
                "cannot use: execute the workflow on a Session of a sync engine, or in a worker."
            )
        return Fork(self.context(), join=_nothing)

    @override
    def transaction_retry(self) -> TransactionRetry:
        return self._story.transaction_retry()


class BlockingUntilWaiting(BlockingInline):
    """The same, which suspends the workflow where it waits."""

    def __init__(self, story: Writing, attempt: Attempt) -> None:
        super().__init__(story, attempt)
        attempt.is_slot_wanted = _always

    @override
    async def wait(self, position: Position, wait: Wait) -> None:
        await wait_or_park(self, position, wait)

    async def begin_parking(self, wait: Wait) -> Suspension | None:
        """Return how the workflow can be suspended now."""
        return suspension_of_threads(self.attempt)

    async def listen(self, waker: Waker, seconds: float) -> None:
        """Block the thread until the operation is woken, as it is when the attempt is to end."""
        waker.woken.wait(seconds)

    async def park(self, parking: Suspension, position: Position) -> None:
        """Suspend the workflow, in a transaction of its own."""
        with self._lock:
            await self._story.write(partial(_suspend, attempt=self.attempt, parking=parking), pause=self.pause)


class GreenletInline(BlockingInline):
    """A sync step on the `Session` inside an `AsyncSession`, which SQLAlchemy calls in a greenlet."""

    @override
    async def pause(self, seconds: float) -> None:
        await_only(asyncio.sleep(seconds))


class GreenletUntilWaiting(GreenletInline):
    """The same, of a workflow that is suspended where it waits: between two tries of the step."""

    def __init__(self, story: Writing, workflow: AsyncUntilWaiting) -> None:
        super().__init__(story, workflow.attempt)
        self._workflow = workflow

    @override
    async def wait(self, position: Position, wait: Wait) -> None:
        await wait_or_park(self, position, wait)

    async def begin_parking(self, wait: Wait) -> Suspension | None:
        """Return how the workflow can be suspended now."""
        return await self._workflow.begin_parking(wait)

    async def listen(self, waker: Waker, seconds: float) -> None:
        """Wait a moment."""
        await self.pause(seconds)

    async def park(self, parking: Suspension, position: Position) -> None:
        """Suspend the workflow; the session is this step's own."""
        await self._story.write(partial(_suspend, attempt=self.attempt, parking=parking), pause=self.pause)


class _UndisturbedTransaction(ReleasingTransaction):
    """A step's transaction on the caller's `AsyncSession`: cancelled in the middle of its end, it still ends."""

    @override
    async def commit(self) -> None:
        await finish_despite_cancel(super().commit())

    @override
    async def rollback(self) -> None:
        await finish_despite_cancel(super().rollback())

    @override
    async def discard(self) -> None:
        await finish_despite_cancel(super().discard())


class AsyncInline(AsyncRuntime):
    """An attempt on an `AsyncSession`, which one operation uses at a time."""

    def __init__(self, story: Writing, attempt: Attempt) -> None:
        super().__init__(attempt)
        self._story = story
        self._lock = asyncio.Lock()
        self._noted: list[Checkpoint] = []

    @override
    async def pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    @override
    async def wait(self, position: Position, wait: Wait) -> None:
        if wait.awaits or wait.polls:
            self._story.refuse_waiting(position.key)
            await self.pause(min(wait.seconds, _LOOK_EVERY))
            return
        while wait.seconds > 0:
            await self.pause(min(wait.seconds, self._story.longest_pause))
            async with self._turn():
                await self._write(partial(_look, attempt=self.attempt), pause=self.pause)

    @override
    async def settle(self) -> None:
        if self._noted:
            async with self._turn():
                await self._record_noted()
        self.attempt.raise_if_stopped()

    @override
    async def record(self, checkpoint: Checkpoint) -> None:
        async with self._turn():
            await self._recording(checkpoint)

    @override
    def note(self, checkpoint: Checkpoint) -> None:
        self._noted.append(checkpoint)

    @override
    async def execute(self, statement: Callable[[Connectable], T]) -> T:
        async with self._turn():
            return await self._write(statement, pause=self.pause)

    @override
    async def begin(self, step: StepDefinition) -> StepTransaction:
        await self._lock.acquire()
        try:
            self.attempt.raise_if_stopped()
        except BaseException:
            self._lock.release()
            raise
        inner = self._story.transaction(isolation_level=step.options.isolation_level)
        transaction = _UndisturbedTransaction(inner, self._lock.release)
        await transaction.begin()
        return transaction

    @override
    async def finish(self, completion: Completion) -> None:
        async with self._lock:
            await self._record_noted()
            # A step that was called beside the others, and that nobody awaits any more, must not touch the session.
            self.attempt.stop(partial(AttemptLost, self.attempt.workflow_id))
            await _escaping(
                lambda given: self._write(partial(_finish, completion=given, story=self._story), pause=self.pause),
                completion,
            )

    async def _write(self, statement: Callable[[Session], T], *, pause: Callable[[float], Awaitable[None]]) -> T:
        """Write to its end, also when cancelled meanwhile, which would spoil the session's connection."""
        return await finish_despite_cancel(self._story.write(statement, pause=pause))

    @override
    async def perform_blocking(self, call: StepCall) -> Any:
        def perform(session: Session) -> Any:
            return self.in_greenlet(self._story.twin(session)).perform(call)

        await self.settle()
        async with self._turn():
            return await in_session(self._story.session, perform)

    def in_greenlet(self, twin: Writing) -> GreenletInline:
        """Return the runtime of a sync step that takes a `Session`."""
        return GreenletInline(twin, self.attempt)

    async def _record_noted(self) -> None:
        """Record what was noted; whoever else settles meanwhile waits for the lock until it is committed."""
        while self._noted:
            await self._recording(self._noted[0])
            self._noted.pop(0)

    async def _recording(self, checkpoint: Checkpoint) -> None:
        await _escaping(lambda given: self._write(partial(_record, checkpoint=given), pause=self.pause), checkpoint)

    @asynccontextmanager
    async def _turn(self) -> AsyncGenerator[None]:
        """Have the session for oneself, as long as the attempt has not ended."""
        async with self._lock:
            self.attempt.raise_if_stopped()
            yield

    @override
    def transaction_retry(self) -> TransactionRetry:
        return self._story.transaction_retry()


class AsyncUntilWaiting(AsyncInline):
    """The same, which suspends the workflow where it waits."""

    def __init__(self, story: Writing, attempt: Attempt) -> None:
        super().__init__(story, attempt)
        attempt.is_slot_wanted = _always

    @override
    def in_greenlet(self, twin: Writing) -> GreenletInline:
        return GreenletUntilWaiting(twin, self)

    @override
    async def wait(self, position: Position, wait: Wait) -> None:
        await wait_or_park(self, position, wait)

    async def begin_parking(self, wait: Wait) -> Suspension | None:
        """Return how the workflow can be suspended now."""
        return tasks.parking_of_tasks(self.attempt, wait, timers=self.timers.seconds.values())

    async def listen(self, waker: Waker, seconds: float) -> None:
        """Wait a moment."""
        await self.pause(seconds)

    @override
    async def execute(self, statement: Callable[[Connectable], T]) -> T:
        if self.attempt.is_suspended:  # by `park`, which has the session
            return await self._write(statement, pause=self.pause)
        return await super().execute(statement)

    async def park(self, parking: Suspension, position: Position) -> None:
        """Suspend the workflow, in a transaction of its own."""
        async with self._lock:
            await self._record_noted()
            with self.timers.deciding():
                await self.remember_timers(position)
                await self._write(partial(_suspend, attempt=self.attempt, parking=parking), pause=self.pause)


def _always() -> bool:
    return True


async def _escaping(write: Callable[[Row], Awaitable[None]], row: Row) -> None:
    """Write a row; where the database does not have the characters of its error, with these escaped.

    Raises:
        EncodingError: the database refuses what the row holds, and would do so again.
    """
    try:
        await write(row)
    except DBAPIError as error:
        if is_untranslatable(error) and row.escaped != row:
            await write(row.escaped)
        elif is_about_data(error):
            raise EncodingError(f"the database refuses what the workflow records: {first_line(error)}") from error
        else:
            raise


def _nothing() -> None:
    """Wait for nothing: every operation is committed when it returns."""


def _look(session: Session, attempt: Attempt) -> None:
    """Look whether the workflow is still this attempt's; the transaction extends the lease."""
    if not attempts.still_owned(session, [attempt.fence]):
        raise AttemptLost(attempt.workflow_id)


def _record(session: Session, checkpoint: Checkpoint) -> None:
    if steps.record(session, checkpoint) is Verdict.LOST:
        raise AttemptLost(checkpoint.fence.workflow_id)


def _suspend(session: Session, attempt: Attempt, parking: Suspension) -> None:
    """Suspend the workflow; wait for whoever holds its row."""
    attempts.lock(session, attempt.fence)
    if attempts.write_batch(session, ends=[Park(attempt.fence, parking.seconds, parking.awaits)]).ends:
        raise AttemptLost(attempt.workflow_id)
    refresh_loaded(session, [attempt.workflow_id])


def _finish(session: Session, completion: Completion, story: Writing) -> None:
    if not attempts.finish(session, completion):
        raise AttemptLost(completion.fence.workflow_id)
    refresh_loaded(session, [completion.fence.workflow_id])
    story.close_lease(session)
