"""How attempts in a worker wait, call and record: sync workflows in threads, async ones on the event loop.

Checkpoints and outcomes go to the writer; a transactional step has a session of its own from the user's sessionmaker.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker
from typing_extensions import override

import sqla_durable.runtime.tasks as tasks
from sqla_durable.definitions.inspection import SessionKind
from sqla_durable.definitions.registry import StepDefinition
from sqla_durable.errors import EncodingError
from sqla_durable.execution.worker.database import Database, persistently
from sqla_durable.execution.worker.gatherer import Gatherer
from sqla_durable.execution.worker.writer import Row, Writer
from sqla_durable.operations.arrivals import Arrivals, Waker
from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.calls import Position, Suspension, Wait
from sqla_durable.operations.parking import suspension_of_threads, wait_or_park
from sqla_durable.operations.runtime import StepCall
from sqla_durable.operations.shielding import finish_despite_cancel, see, wait_done
from sqla_durable.operations.transaction import ClosingTransaction, ReleasingTransaction, StepTransaction
from sqla_durable.runtime.context import Fork
from sqla_durable.runtime.shells import AsyncRuntime, BlockingRuntime
from sqla_durable.store import Checkpoint, Completion, Connectable, Park
from sqla_durable.store.streams import Append, Appended
from sqla_durable.unwinding import AttemptLost, Released

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all attempts of one worker share.

    Attributes:
        sync_places, async_places: bound the connections that transactional steps hold at once.
        stopping: set in threads that pause when the worker is told to stop.
        left_to_themselves: steps in threads whose calls were cancelled; they can commit nothing.
    """

    database: Database
    writer: Writer
    gatherer: Gatherer
    threads: concurrent.futures.ThreadPoolExecutor
    sessionmaker: sessionmaker[Session] | None
    async_sessionmaker: async_sessionmaker[AsyncSession] | None
    sync_places: threading.Semaphore
    async_places: asyncio.Semaphore
    stopping: threading.Event
    stopping_async: asyncio.Event
    loop: asyncio.AbstractEventLoop
    arrivals: Arrivals
    left_to_themselves: set[asyncio.Future[Any]] = field(default_factory=set[asyncio.Future[Any]])

    def stop_if_leaving(self, attempt: Attempt) -> None:
        """Let an attempt end here from the moment on in which the worker is told to stop."""
        if self.stopping.is_set():
            attempt.stop(Released)

    def from_thread(self, statement: Callable[[Connectable], T]) -> T:
        """Execute on a connection of the worker's own, from one of its threads.

        Raises:
            AttemptLost: the worker has left the thread behind.
        """
        return self.on_loop(persistently(self.database, statement, what="operation"))

    def on_loop(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Execute a coroutine on the worker's event loop, from one of its threads.

        Raises:
            AttemptLost: the worker has left the thread behind.
        """
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()
        except (RuntimeError, concurrent.futures.CancelledError) as error:  # the loop is closed, or ends
            coroutine.close()
            raise AttemptLost from error

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Call a function in one of the worker's threads, in a copy of the context."""
        return await self.begin_in_thread(function)

    def begin_in_thread(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """Begin to call a function in one of the worker's threads, in a copy of the context."""
        context = contextvars.copy_context()
        return asyncio.get_running_loop().run_in_executor(self.threads, context.run, function)

    def leave_to_itself(self, thread: asyncio.Future[Any]) -> None:
        """Let a step in a thread come to its end, which nobody waits for but the worker when it stops."""
        self.left_to_themselves.add(thread)
        thread.add_done_callback(self.left_to_themselves.discard)
        thread.add_done_callback(see)


class ThreadRuntime(BlockingRuntime):
    """An attempt at a `def` workflow, or a sync step of an `async def` one, in a thread."""

    def __init__(self, attempt: Attempt, surroundings: Surroundings) -> None:
        super().__init__(attempt)
        self._surroundings = surroundings
        self._last: concurrent.futures.Future[None] | None = None

    async def begin_parking(self, wait: Wait) -> Suspension | None:
        """Return how the workflow can be suspended now."""
        return suspension_of_threads(self.attempt)

    def fork(self) -> Fork:
        """Give a runtime of its own to a branch's thread: what the workflow has recorded comes before its effects."""
        branch = ThreadRuntime(self.attempt, self._surroundings)
        branch._last = self._last
        return Fork(branch.context(), join=lambda: self._join(branch))

    def _join(self, branch: ThreadRuntime) -> None:
        try:
            branch.flush()
        except BaseException:
            self._last = branch._last  # what was refused stops every later operation, of whichever branch
            raise

    async def pause(self, seconds: float) -> None:
        """Wait, or until the worker stops; then the attempt is told to end, or it would wait again and again."""
        self._surroundings.stopping.wait(seconds)
        self._surroundings.stop_if_leaving(self.attempt)

    async def listen(self, waker: Waker, seconds: float) -> None:
        """Block the thread until the operation is woken, as it is when the attempt is to end."""
        waker.woken.wait(seconds)

    async def wait(self, position: Position, wait: Wait) -> None:
        """Wait in memory, or as a row."""
        await wait_or_park(self, position, wait)

    async def park(self, parking: Suspension, position: Position) -> None:
        """Suspend the workflow in the same commit as what is still on its way."""
        self._submit(Park(self.attempt.fence, parking.seconds, parking.awaits))
        self.flush()

    async def settle(self) -> None:
        """Wait for the commits on their way; then end here if the attempt was told to."""
        self.flush()
        self._surroundings.stop_if_leaving(self.attempt)
        self.attempt.raise_if_stopped()

    async def record(self, checkpoint: Checkpoint) -> None:
        """Hand a checkpoint to the writer; the workflow's code goes on."""
        self._submit(checkpoint)

    def note(self, checkpoint: Checkpoint) -> None:
        """Hand a checkpoint to the writer."""
        self._submit(checkpoint)

    async def execute(self, statement: Callable[[Connectable], T]) -> T:
        """Call a store function on a connection of the worker's own."""
        return self._surroundings.from_thread(statement)

    async def append(self, append: Append) -> Appended:
        """Append to a stream, with what others append."""
        return self._surroundings.on_loop(self._surroundings.gatherer.append(append))

    async def begin(self, step: StepDefinition) -> StepTransaction:
        """Open a session of the user's own sessionmaker, used for this step only."""
        maker = self._surroundings.sessionmaker
        assert step.session is SessionKind.SYNC  # noqa: S101 (the registry refuses other steps in sync code)
        assert maker is not None  # noqa: S101 (the worker has checked it at its start)
        places = self._surroundings.sync_places
        inner = ClosingTransaction(maker(close_resets_only=False), isolation_level=step.options.isolation_level)
        transaction = ReleasingTransaction(inner, places.release)
        places.acquire()
        await transaction.begin()
        return transaction

    async def finish(self, completion: Completion) -> None:
        """Record the outcome, in the same commit as what is still on its way."""
        try:
            self._submit(completion)
            self.flush()
        except EncodingError:
            self._last = None  # another outcome waits for none of them
            raise

    def flush(self) -> None:
        """Wait for the commits on their way: for the last, because the writer keeps their order."""
        if self._last is not None:
            self._last.result()
            self._last = None  # not before: what was refused stops every later operation

    def _submit(self, row: Row) -> None:
        self._last = self._surroundings.writer.submit_from_thread(row, after=self._last)


class LoopTransaction(ClosingTransaction):
    """A transaction on the event loop: cancelled in the middle of its end, it would leave a connection open."""

    async def rollback(self) -> None:
        """Roll back, and close the session for good, also when cancelled meanwhile."""
        await finish_despite_cancel(super().rollback())

    async def discard(self) -> None:
        """Close the session and its connection for good, also when cancelled meanwhile."""
        await finish_despite_cancel(super().discard())


class LoopRuntime(AsyncRuntime):
    """An attempt at an `async def` workflow, on the worker's event loop."""

    def __init__(self, attempt: Attempt, surroundings: Surroundings) -> None:
        super().__init__(attempt)
        self._surroundings = surroundings
        self._last: asyncio.Future[None] | None = None

    async def begin_parking(self, wait: Wait) -> Suspension | None:
        """Return how the workflow can be suspended now."""
        return tasks.parking_of_tasks(self.attempt, wait, timers=self.timers.seconds.values())

    async def pause(self, seconds: float) -> None:
        """Wait, or until the worker stops; then the attempt is told to end, or it would wait again and again."""
        try:
            async with asyncio.timeout(seconds):
                await self._surroundings.stopping_async.wait()
        except TimeoutError:
            pass
        self._surroundings.stop_if_leaving(self.attempt)

    async def listen(self, waker: Waker, seconds: float) -> None:
        """Wait until the operation is woken, as it is when the attempt is to end."""
        woken = asyncio.Event()
        waker.on_wake = partial(self._surroundings.loop.call_soon_threadsafe, woken.set)
        try:
            if not waker.woken.is_set():
                async with asyncio.timeout(seconds):
                    await woken.wait()
        except TimeoutError:
            pass
        finally:
            waker.on_wake = None

    async def wait(self, position: Position, wait: Wait) -> None:
        """Wait in memory, or as a row."""
        await wait_or_park(self, position, wait)

    async def park(self, parking: Suspension, position: Position) -> None:
        """Suspend the workflow in the same commit as what is still on its way."""
        with self.timers.deciding():
            await self.remember_timers(position)
            self._submit(Park(self.attempt.fence, parking.seconds, parking.awaits))
            await self.flush()

    async def settle(self) -> None:
        """Wait for the commits on their way; then end here if the attempt was told to."""
        await self.flush()
        self._surroundings.stop_if_leaving(self.attempt)
        self.attempt.raise_if_stopped()

    async def record(self, checkpoint: Checkpoint) -> None:
        """Hand a checkpoint to the writer; the workflow's code goes on."""
        self._submit(checkpoint)

    def note(self, checkpoint: Checkpoint) -> None:
        """Hand a checkpoint to the writer."""
        self._submit(checkpoint)

    async def execute(self, statement: Callable[[Connectable], T]) -> T:
        """Call a store function on a connection of the worker's own."""
        return await persistently(self._surroundings.database, statement, what="operation")

    async def append(self, append: Append) -> Appended:
        """Append to a stream, with what others append."""
        return await self._surroundings.gatherer.append(append)

    async def begin(self, step: StepDefinition) -> StepTransaction:
        """Open a session of the user's own sessionmaker, used for this step only."""
        maker = self._surroundings.async_sessionmaker
        assert step.session is SessionKind.ASYNC  # noqa: S101 (sync sessions are performed in a thread)
        assert maker is not None  # noqa: S101 (the worker has checked it at its start)
        places = self._surroundings.async_places
        inner = LoopTransaction(maker(close_resets_only=False), isolation_level=step.options.isolation_level)
        transaction = ReleasingTransaction(inner, places.release)
        await places.acquire()
        await transaction.begin()
        return transaction

    async def finish(self, completion: Completion) -> None:
        """Record the outcome, in the same commit as what is still on its way."""
        try:
            self._submit(completion)
            await self.flush()
        except EncodingError:
            self._last = None  # another outcome waits for none of them
            raise

    async def flush(self) -> None:
        """Wait for the commits on their way: for the last, because the writer keeps their order."""
        last = self._last
        if last is None:
            return
        await wait_done(last)  # steps that are called at the same time wait for the same commits
        last.result()
        if self._last is last:
            self._last = None  # not before: what was refused stops every later operation

    def _submit(self, row: Row) -> None:
        self._last = self._surroundings.writer.submit(row, after=self._last)

    async def perform_blocking(self, call: StepCall) -> Any:
        """Perform a step that takes a `Session` in a thread, as a whole."""
        await self.settle()
        runtime = StepRuntime(self, self._surroundings)
        thread = self._surroundings.begin_in_thread(lambda: _outcome(runtime, call))
        try:
            await wait_done(thread)
        except asyncio.CancelledError:
            runtime.is_cancelled = True
            self._surroundings.leave_to_itself(thread)
            raise
        value, error = thread.result()
        if error is not None:
            raise error
        return value

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Call a function in one of the worker's threads."""
        return await self._surroundings.in_thread(function)


class StepRuntime(ThreadRuntime):
    """A sync step of an `async def` workflow, in a thread: what the workflow's tasks wait for, the event loop knows."""

    def __init__(self, workflow: LoopRuntime, surroundings: Surroundings) -> None:
        super().__init__(workflow.attempt, surroundings)
        self._workflow = workflow
        self.is_cancelled = False

    @override
    async def begin_parking(self, wait: Wait) -> Suspension | None:
        """Ask on the event loop, where nothing changes meanwhile."""
        self._end_if_cancelled()
        return self._surroundings.on_loop(self._workflow.begin_parking(wait))

    @override
    async def pause(self, seconds: float) -> None:
        """Wait; a call that was cancelled ends here, and makes no other try."""
        await super().pause(seconds)
        self._end_if_cancelled()

    @override
    async def settle(self) -> None:
        """Wait for the commits on their way; a call that was cancelled ends here."""
        self._end_if_cancelled()
        await super().settle()

    @override
    async def record(self, checkpoint: Checkpoint) -> None:
        """Record a failed try, or an outcome; of a call that was cancelled, none."""
        self._end_if_cancelled()
        await super().record(checkpoint)

    @override
    async def begin(self, step: StepDefinition) -> StepTransaction:
        """Open a session; a call that was cancelled while it waited for a place does not call its function."""
        transaction = await super().begin(step)
        try:
            self._end_if_cancelled()
        except BaseException:
            await transaction.rollback()
            raise
        return transaction

    def _end_if_cancelled(self) -> None:
        if self.is_cancelled:
            raise asyncio.CancelledError  # no signal: the attempt goes on


def _outcome(runtime: StepRuntime, call: StepCall) -> tuple[Any, concurrent.futures.CancelledError | None]:
    """Return what a step returned, or that it failed with this error: a future would make a cancel of it."""
    try:
        return _performed(runtime, call), None
    except concurrent.futures.CancelledError as error:
        return None, error


def _performed(runtime: StepRuntime, call: StepCall) -> Any:
    if runtime.is_cancelled:  # while it waited for a thread
        return None
    try:
        return runtime.perform(call)
    finally:
        runtime.flush()
