"""The two runtimes, which call the user's code: `BlockingRuntime` in a thread, `AsyncRuntime` on an event loop.

What a step means is in `operations`; the `Recorder` that a runtime is given decides where outcomes are recorded.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import threading
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, NoReturn, TypeAlias, TypeVar, cast

from typing_extensions import override

import sqla_durable.runtime.tasks as tasks
from sqla_durable.definitions.inspection import SessionKind
from sqla_durable.definitions.interceptors import Around, AsyncEntered, Entered
from sqla_durable.definitions.limits import Watch
from sqla_durable.definitions.log import Log
from sqla_durable.definitions.redaction import brief
from sqla_durable.definitions.registry import WorkflowDefinition
from sqla_durable.models.base import StepStatus
from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.calls import Position, StepCall
from sqla_durable.operations.outcome import (
    CancelledCall,
    cancelled_call_in,
    checkpoint_of,
    note_if_ending,
    noting_ending,
    record_cancelled_call,
)
from sqla_durable.operations.runtime import Operation, Recorder, Runtime, execution_of, run_blocking
from sqla_durable.operations.shielding import GracefulTask, ended, wait_done
from sqla_durable.operations.step import execute_step
from sqla_durable.operations.suspending import Suspension, Wait
from sqla_durable.runtime.asyncio_internals import cancels_met
from sqla_durable.runtime.context import ACTIVE, Context
from sqla_durable.runtime.loop_timers import Timers, keep_due
from sqla_durable.unwinding import AttemptLost

T = TypeVar("T")
Work: TypeAlias = Callable[[], Awaitable[Any]]

log = Log("sqla_durable.workflow")

_CHECK_EVERY = 0.5  # seconds between two checks whether a timer has fired again in a replay
_QUIET = 5.0  # seconds without anything that could cancel a call again
_SILENT = 64  # checks before it is logged that a replay does not go on
_WITHOUT_END = Wait(until=float("inf"), in_memory_until=float("inf"))


class BlockingRuntime(Runtime):
    """Executes `def` workflows, and sync steps of `async def` ones: whatever waits blocks the thread.

    Args:
        workflow: of a step of an `async def` workflow, the runtime of that one.
    """

    is_async = False

    def __init__(self, attempt: Attempt, recorder: Recorder, *, workflow: AsyncRuntime | None = None) -> None:
        super().__init__(attempt, recorder)
        self._workflow = workflow

    @override
    def perform_step(self, call: StepCall) -> Any:
        with noting_ending(self.attempt), Context(self, step=call).entered():
            return run_blocking(execute_step(self, call))

    @override
    def perform_operation(self, position: Position, operation: Operation) -> Any:
        try:
            with noting_ending(self.attempt), Context(self, is_operating=True).entered():
                return run_blocking(operation(self, position))
        finally:
            self.attempt.end_call(position)

    @override
    def perform_in_step(self, position: Position, operation: Operation) -> Any:
        return run_blocking(operation(self, position))

    @override
    async def call_workflow(self, definition: WorkflowDefinition, arguments: dict[str, Any]) -> Any:
        self.limit = definition.durable_options.payload_limit
        self.attempt.branches.begin(threading.get_ident)
        with Context(self).entered():
            return definition.call(arguments)

    @override
    async def call_step(self, call: StepCall, *injected: object, watch: Watch | None = None) -> Any:
        """Call a step's function; one that comes back too late has failed."""
        if watch is None:
            return call.definition.fn(*injected, *call.args, **call.kwargs)
        with watch.measured():
            return call.definition.fn(*injected, *call.args, **call.kwargs)

    @override
    def intercepted(self, step: StepCall | None = None) -> AbstractAsyncContextManager[None]:
        return Entered(_around(Context(self, step=step)))

    @override
    async def begin_suspension(self, wait: Wait) -> Suspension | None:
        """Stop the attempt if every branch waits; idle time proves nothing, because a thread may do anything else."""
        if self._workflow is not None:
            return await self.recorder.on_loop(self._workflow.begin_suspension(wait))
        attempt = self.attempt
        return attempt.begin_suspension(
            quiet=float("inf"), idle=lambda: attempt.branches.all_wait_or_are_in(attempt.homes_in_calls)
        )

    @override
    async def suspend(self, suspension: Suspension, position: Position) -> None:
        """Suspend the workflow; operations on its event loop that wait end after that, and not in its middle."""
        if self._workflow is None:
            return await super().suspend(suspension, position)
        with self._workflow.suspended_by_step():
            return await super().suspend(suspension, position)

    def fork(self) -> BlockingRuntime:
        """Return the runtime of a branch in another thread."""
        branch = BlockingRuntime(self.attempt, self.recorder.fork())
        branch.limit = self.limit
        return branch

    def join(self, branch: BlockingRuntime) -> None:
        """Return when everything that a branch has recorded is committed; called in its thread, at its end."""
        self.recorder.join(branch.recorder)


class AsyncRuntime(Runtime):
    """Executes `async def` workflows on an event loop; plain sync steps are called in threads.

    Args:
        threads: where those are called; by default asyncio's.
    """

    is_async = True

    def __init__(
        self, attempt: Attempt, recorder: Recorder, *, threads: concurrent.futures.Executor | None = None
    ) -> None:
        super().__init__(attempt, recorder)
        self._threads = threads
        self._loop: asyncio.AbstractEventLoop
        self._suspending: asyncio.Future[None] | None = None
        self.timers: Timers
        # By task: the cancels received and the timers fired when an operation returned without raising the cancel.
        self._missed_cancels: dict[asyncio.Task[Any], tuple[int, int]] = {}

    @override
    def perform_step(self, call: StepCall) -> Coroutine[Any, Any, Any]:
        again = partial(execute_step, self, call)
        is_in_session = call.definition.session is SessionKind.SYNC
        work = partial(self._perform_in_session, call) if is_in_session else again
        coroutine: Any = self._carry_out(call.position, Context(self, step=call), work, again)
        coroutine.__qualname__ = call.position.key  # for Python's warning that it was never awaited
        return cast("Coroutine[Any, Any, Any]", coroutine)

    @override
    def perform_operation(self, position: Position, operation: Operation) -> Coroutine[Any, Any, Any]:
        work = partial(operation, self, position)
        coroutine: Any = self._carry_out(position, Context(self, is_operating=True), work, work)
        coroutine.__qualname__ = position.key
        return cast("Coroutine[Any, Any, Any]", coroutine)

    @override
    def perform_in_step(self, position: Position, operation: Operation) -> Any:
        """Perform an operation of a step's function, whose code may be in another thread: there it blocks."""
        here = _running_loop()
        if self.attempt.is_cancelled_call(position):
            raise AttemptLost(self.attempt.workflow_id)
        if here is self._loop:
            return operation(self, position)
        future = _submit(operation(self, position), self._loop)
        return _result(future) if here is None else _awaited(future)

    async def _carry_out(self, position: Position, context: Context, work: Work, again: Work) -> Any:
        """Do the work; if the workflow's own code cancels it, let the code see what is recorded.

        A straight line of few calls, without context managers: every operation of every workflow passes through it.

        Args:
            position: the operation.
            context: the ambient context of the work.
            work: performs the operation.
            again: returns the outcome once that is recorded.
        """
        attempt, timers = self.attempt, self.timers
        task: Any = asyncio.current_task()
        attempt.continue_call_here(position, task)
        recorded = attempt.recorded(position)
        met, mark = task.cancelling() and cancels_met(task), timers.fired_count
        is_raised = False
        token = ACTIVE.set(context)
        try:
            if recorded is not None and (cancelled := cancelled_call_in(recorded)) is not None:
                await self._until_cancelled(position, cancelled)
            try:
                if self._missed_cancels and recorded is None and (missed := self._take_missed_cancel(task)) is not None:
                    met, mark = -1, missed
                    raise asyncio.CancelledError
                if timers.unfired:
                    for timer, firing in timers.unfired_before(position.key):
                        await self._until_fired(position, timer, firing)
                if recorded is not None:
                    timers.replayed()
                elif attempt.is_replaying:
                    await tasks.let_replay_catch_up(attempt)
                if recorded is None and timers.is_checking:
                    await timers.settled()
                if attempt.branches.has_new:
                    await tasks.let_new_tasks_begin(attempt)
                return await work()
            except asyncio.CancelledError:
                if attempt.is_stopped or task.cancelling() <= met or await self._is_cancelled(position, mark):
                    raise
                return await again()
        except BaseException as error:
            is_raised = isinstance(error, asyncio.CancelledError)
            note_if_ending(attempt, error)
            raise
        finally:
            ACTIVE.reset(token)
            # A cancel that is yet to be thrown into the task is none of these.
            if not is_raised and (count := cancels_met(task)) > met and attempt.branches.here() is not None:
                self._missed_cancels[task] = count, mark
            if position.key in attempt.unfinished:  # cancelled before the operation itself has begun
                attempt.end_call(position)

    async def _perform_in_session(self, call: StepCall) -> Any:
        """Perform a step that takes a `Session` as a whole where it may block."""
        if self.attempt.recorded(call.position) is not None:
            return await execute_step(self, call)
        await self.recorder.settle()

        def perform_step(recorder: Recorder) -> Any:
            return BlockingRuntime(self.attempt, recorder, workflow=self).perform_step(call)

        return await self.recorder.in_session(perform_step)

    def _take_missed_cancel(self, task: asyncio.Task[Any]) -> int | None:
        """Return the timer count at a cancel that arrived after the last operation had its outcome, if one did."""
        count, mark = self._missed_cancels.pop(task, (0, 0))
        return mark if count and task.cancelling() >= count else None

    async def _is_cancelled(self, position: Position, mark: int) -> bool:
        """Settle what became of an operation whose call was cancelled, however often it is cancelled meanwhile."""
        attempt = self.attempt
        found = attempt.recorded(position)
        if found is None:
            cancelled = CancelledCall(attempt.history_check.count, self.timers.fired_since(mark))
            with self.timers.deciding():
                settling = GracefulTask(record_cancelled_call(self, position, cancelled))
                # If the attempt is ending, the record may be dropped: the next attempt decides again.
                await ended(settling, on_cancel=lambda: attempt.is_stopped and settling.cancel_now())
            found = settling.result()
            attempt.note_outcome(found)
        is_cancelled = cancelled_call_in(found) is not None
        if is_cancelled:
            attempt.note_cancelled_call(position)
        return is_cancelled

    async def _until_cancelled(self, position: Position, cancelled: CancelledCall) -> NoReturn:
        """Wait until the workflow's code cancels the call again, as it did in an earlier attempt."""
        attempt = self.attempt
        checks, words = 0, "workflow %r %s: the call %r waits to be cancelled, as it was in an earlier attempt"
        attempt.begin_wait(position, _WITHOUT_END)
        try:
            with self.timers.cancelling(cancelled):
                while not attempt.is_quiet(quiet=_QUIET, idle=self._is_idle):
                    checks += 1
                    if checks >= _SILENT and not checks & (checks - 1):  # less and less often
                        log.warning(words, attempt.name, attempt.workflow_id, position.key)
                    await self.recorder.pause_replay(_CHECK_EVERY)
                    self.timers.let_fire_next()
                    if not attempt.is_cancelling:  # what it did before is yet to be found, so that it can be undone
                        await self.proceed()
        finally:
            attempt.end_wait(position)
        log.warning(
            "workflow %r %s: an earlier attempt cancelled the call %r, and today's code does not: it is cancelled all "
            "the same",
            attempt.name,
            attempt.workflow_id,
            position.key,
        )
        raise asyncio.CancelledError

    def _is_idle(self) -> bool:
        return not self.timers.seconds or tasks.are_idle(self.attempt)

    async def _until_fired(self, position: Position, timer: str, firing: CancelledCall) -> None:
        """Wait until a timer has fired that did so in an earlier attempt, while this operation was open."""
        attempt = self.attempt
        attempt.begin_wait(position, _WITHOUT_END)
        try:
            with self.timers.cancelling(firing):
                while not await self.timers.fired(timer, within=_CHECK_EVERY):
                    await self.proceed()
                    if attempt.is_quiet(quiet=_QUIET, idle=self._is_idle):
                        words = (
                            "workflow %r %s: a timer fired before %r in an earlier attempt, and today's code arms none"
                        )
                        log.warning(words, attempt.name, attempt.workflow_id, position.key)
                        self.timers.give_up(timer)
            await self.timers.caught_up()
        finally:
            attempt.end_wait(position)

    @override
    async def call_workflow(self, definition: WorkflowDefinition, arguments: dict[str, Any]) -> Any:
        self.limit = definition.durable_options.payload_limit
        self.attempt.branches.begin(tasks.current_task)
        self._loop = asyncio.get_running_loop()
        self.timers = Timers(self.attempt, self.recorder)
        if self.attempt.is_replaying:
            self.timers.remember(await self.recorder.due_timers())
        token = ACTIVE.set(Context(self))
        try:
            coroutine: Awaitable[Any] = definition.call(arguments)
            try:
                value = await coroutine
            finally:
                if self._suspending is not None:  # by a branch that would be cancelled in the middle of it
                    await wait_done(self._suspending)
            await tasks.until_cancelled_have_ended(self.attempt)
            return value
        finally:
            ACTIVE.reset(token)

    @override
    def call_step(self, call: StepCall, *injected: object, watch: Watch | None = None) -> Awaitable[Any]:
        """Call a step's function, and cancel it in time; one in a thread has failed if it comes back too late."""
        function = call.definition.fn
        if call.definition.is_async:
            awaited = function(*injected, *call.args, **call.kwargs)
            return awaited if watch is None else _cut_off(awaited, watch)
        bound = partial(function, *injected, *call.args, **call.kwargs)
        # Awaited to its end: the next try must not begin beside it.
        return self._loop.run_in_executor(
            self._threads, contextvars.copy_context().run, partial(_returned, bound, watch)
        )

    @override
    def intercepted(self, step: StepCall | None = None) -> AbstractAsyncContextManager[None]:
        """Enter the interceptors, those that are awaited too."""
        return AsyncEntered(_around(Context(self, step=step)))

    @override
    async def begin_suspension(self, wait: Wait) -> Suspension | None:
        return tasks.begin_suspension(self.attempt, wait, timers=self.timers.seconds.values())

    @override
    async def suspend(self, suspension: Suspension, position: Position) -> None:
        """Suspend the workflow, and let the row of the operation that waits keep when timers of asyncio are due.

        To the end, although the operation is cancelled meanwhile: the attempt is stopped already, and nobody would
        execute a row that stayed `running` until a heartbeat finds it.
        """
        attempt = self.attempt
        self._suspending = self._loop.create_future()
        try:
            with self.timers.deciding():
                seconds = self.timers.seconds
                waiting = checkpoint_of(attempt, position, StepStatus.WAITING)
                remember = partial(keep_due, checkpoint=waiting, due_in=seconds) if seconds else None
                suspending = GracefulTask(self.recorder.suspend(suspension, remember=remember))
                await ended(suspending, on_cancel=suspending.cancel)
                if suspending.cancelled():  # it took too long: whether the row is suspended is to be found out
                    attempt.undo_suspension()
                    attempt.stop(partial(AttemptLost, attempt.workflow_id))
                suspending.result()
        finally:
            self._suspending.set_result(None)

    @contextmanager
    def suspended_by_step(self) -> Generator[None]:
        """Let the workflow's other operations wait while a step, perhaps in a thread, suspends it."""
        suspending = self._suspending = self._loop.create_future()
        try:
            yield
        finally:
            with suppress(RuntimeError):  # the loop is closed, and nothing waits there any more
                self._loop.call_soon_threadsafe(suspending.set_result, None)

    @override
    async def proceed(self) -> None:
        """Wait for a suspension that another operation has begun: raising would end the attempt in its middle."""
        if self._suspending is not None:
            await wait_done(self._suspending)
        self.attempt.raise_if_stopped()

    @override
    def close(self) -> None:
        self.attempt.stop(partial(AttemptLost, self.attempt.workflow_id))
        self._missed_cancels.clear()
        if hasattr(self, "timers"):
            self.timers.abandon()
        tasks.abandon(self.attempt)
        self.attempt.branches.end()


def _around(context: Context) -> Iterator[Around]:
    """Yield the context, and what the interceptors return: each is asked when those before it are entered."""
    yield context.entered()
    attempt, step = context.attempt, context.step
    execution = execution_of(attempt, step)
    if step is None:
        for each in attempt.options.interceptors.workflows:
            yield each.workflow(execution)
    else:
        for each in attempt.options.interceptors.steps:
            yield each.step(execution)


async def _cut_off(awaited: Awaitable[T], watch: Watch) -> T:
    """Await something, and cancel it when its time is over; what it returns after that is too late, too."""
    watch.begin()
    timer = asyncio.timeout(None)
    try:
        async with timer:
            with _expiring(timer, watch):
                value = await awaited
    except TimeoutError:
        if timer.expired():
            watch.check()
        raise
    if timer.expired():
        watch.check()
    return value


@contextmanager
def _expiring(timer: asyncio.Timeout, watch: Watch) -> Generator[None]:
    """Let a timer expire when a limit is reached, which heartbeats defer."""
    loop = asyncio.get_running_loop()
    next_check: asyncio.TimerHandle | None = None

    def check() -> None:
        nonlocal next_check
        left = watch.left
        if left > 0:
            next_check = loop.call_later(left, check)
        else:
            timer.reschedule(loop.time())

    check()
    try:
        yield
    finally:
        if next_check is not None:
            next_check.cancel()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _submit(coroutine: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> concurrent.futures.Future[T]:
    try:
        return asyncio.run_coroutine_threadsafe(coroutine, loop)
    except RuntimeError as error:  # the loop is closed
        coroutine.close()
        raise AttemptLost from error


async def _awaited(future: concurrent.futures.Future[T]) -> T:
    """Await what another event loop does."""
    return await asyncio.wrap_future(future)


def _result(future: concurrent.futures.Future[T]) -> T:
    try:
        return future.result()
    except concurrent.futures.CancelledError as error:  # the loop ends
        raise AttemptLost from error


def _returned(function: Callable[[], T], watch: Watch | None) -> T:
    """Call a function in a thread; raise RuntimeError in place of StopIteration and KeyboardInterrupt.

    A future cannot hold a StopIteration: awaiting it would never end (PEP 479). A KeyboardInterrupt would end the event
    loop of the task that awaits it, although Ctrl-C interrupts the main thread only.
    """
    try:
        with nullcontext() if watch is None else watch.measured():
            return function()
    except (StopIteration, KeyboardInterrupt) as error:
        raise RuntimeError(f"the step raised {brief(error)}") from error
