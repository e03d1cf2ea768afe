"""The two shells: how sync and async code call the user's functions in the ambient context.

What a step means is in `operations`; where its outcome goes is decided by the executors and the worker, which derive
from these classes.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn, TypeAlias, TypeVar, cast

import sqla_durable.runtime.tasks as tasks
from sqla_durable.definitions.inspection import SessionKind
from sqla_durable.definitions.interceptors import Around, entered, entered_async
from sqla_durable.definitions.jsonb import DEFAULT_LIMIT
from sqla_durable.definitions.limits import Watch
from sqla_durable.definitions.log import Log
from sqla_durable.definitions.redaction import brief
from sqla_durable.definitions.registry import StepDefinition, WorkflowDefinition
from sqla_durable.models.status import StepStatus
from sqla_durable.operations.attempt import TIMERS, Attempt
from sqla_durable.operations.calls import Position, Wait
from sqla_durable.operations.outcome import CancelledCall, cancelled_call_in, checkpoint_of, record_cancelled_call
from sqla_durable.operations.runtime import Operation, StepCall, execution_of, run_blocking
from sqla_durable.operations.shielding import GracefulTask, ended
from sqla_durable.operations.step import run_step
from sqla_durable.operations.transaction import StepTransaction
from sqla_durable.operations.transaction_retries import TransactionRetry
from sqla_durable.runtime.context import Context, Fork
from sqla_durable.runtime.loop_timers import Timers, watching
from sqla_durable.store import Checkpoint, Completion, Connectable, steps, streams, timers
from sqla_durable.store.streams import Append, Appended
from sqla_durable.unwinding import AttemptLost, ControlFlow

T = TypeVar("T")
Work: TypeAlias = Callable[[], Awaitable[Any]]

log = Log("sqla_durable.workflow")

_LOOK_EVERY = 0.5  # seconds between two looks whether a replay goes on
_QUIET = 5.0  # seconds without anything that could cancel a call again
_SILENT = 64  # such looks before it is logged that a replay does not go on
_STAYS = Wait(until=float("inf"), in_memory_until=float("inf"))


class BaseRuntime(ABC):
    """What both shells share; see `operations.runtime.Runtime` for what each method promises."""

    def __init__(self, attempt: Attempt) -> None:
        self.attempt = attempt
        self.limit = DEFAULT_LIMIT

    @abstractmethod
    async def pause(self, seconds: float) -> None:
        """Wait a moment in memory."""

    @abstractmethod
    async def wait(self, position: Position, wait: Wait) -> None:
        """Wait until an operation goes on."""

    @abstractmethod
    async def settle(self) -> None:
        """Return when everything recorded so far is committed."""

    @abstractmethod
    async def record(self, checkpoint: Checkpoint) -> None:
        """Record a checkpoint."""

    @abstractmethod
    def note(self, checkpoint: Checkpoint) -> None:
        """Record a checkpoint without awaiting it."""

    @abstractmethod
    async def execute(self, statement: Callable[[Connectable], T]) -> T:
        """Call a store function of one statement, in a transaction of its own."""

    async def append(self, append: Append) -> Appended:
        """Append to a stream, in a transaction of its own."""
        return await self.execute(partial(streams.append, origin=append.origin, name=append.name, values=append.values))

    @abstractmethod
    async def begin(self, step: StepDefinition) -> StepTransaction:
        """Open the transaction of a step."""

    @abstractmethod
    async def finish(self, completion: Completion) -> None:
        """Record the workflow's outcome."""

    @contextmanager
    def telling(self) -> Generator[None]:
        """Note that the workflow's own code is told of the attempt's end, by what an operation raises."""
        try:
            yield
        except (ControlFlow, asyncio.CancelledError) as signal:
            self.attempt.note_signal(signal)
            raise

    def transaction_retry(self) -> TransactionRetry:
        """Return the policy for what undoes a step's transaction."""
        return TransactionRetry()

    def around(self, step: StepCall | None) -> Iterator[Around]:
        """Ask the interceptors one by one, each when those before it are entered."""
        execution = execution_of(self.attempt, step)
        if step is None:
            return (each.workflow(execution) for each in self.attempt.options.interceptors.workflows)
        return (each.step(execution) for each in self.attempt.options.interceptors.steps)


class BlockingRuntime(BaseRuntime):
    """The shell of `def` workflows: whatever waits blocks the thread."""

    def context(self, step: StepCall | None = None) -> Context:
        """Give the ambient context of the workflow's own code, or of a step's function."""
        return Context(
            self.attempt,
            self.perform,
            self.operate if step is None else self.operate_in_step,
            self.note,
            is_async=False,
            fork=self.fork,
            step=step,
            limit=self.limit if step is None else step.definition.limit,
        )

    @abstractmethod
    def fork(self) -> Fork:
        """Give what executes a branch of the workflow in another thread."""

    def perform(self, call: StepCall) -> Any:
        """Perform a step and give its outcome."""
        with self.telling(), self.context(call).entered():
            return run_blocking(run_step(self, call))

    def operate(self, position: Position, operation: Operation) -> Any:
        """Carry out an operation and give its outcome."""
        try:
            with self.telling(), self.context().operating():
                return run_blocking(operation(self, position))
        finally:
            self.attempt.end_call(position)

    def operate_in_step(self, position: Position, operation: Operation) -> Any:
        """Carry out an operation of a step's function, which goes on after it."""
        return run_blocking(operation(self, position))

    @asynccontextmanager
    async def intercepted(self, step: StepCall | None = None) -> AsyncGenerator[None]:
        """Enter the interceptors; nothing here suspends."""
        with self.context(step).entered(), entered(self.around(step)):
            yield

    async def call(self, call: StepCall, *injected: object, watch: Watch | None = None) -> Any:
        """Call a step's function; one that comes back too late has failed."""
        with self.context(call).entered(), _measured(watch):
            return call.definition.fn(*injected, *call.args, **call.kwargs)

    async def body(self, definition: WorkflowDefinition, arguments: dict[str, Any]) -> Any:
        """Call the workflow's function."""
        self.limit = definition.durable.payload_limit
        self.attempt.branches.begin(threading.get_ident)
        with self.context().entered():
            return definition.call(arguments)

    async def drive(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Bring an attempt to its end, here."""
        return await coroutine

    def leave(self) -> None:
        """Leave nothing behind at the attempt's end: the branches of sync code have ended before."""


class AsyncRuntime(BaseRuntime):
    """The shell of `async def` workflows: sync steps are executed in threads."""

    def __init__(self, attempt: Attempt) -> None:
        super().__init__(attempt)
        self.timers: Timers
        # How many cancels a task had met when its code was not told of them, and which timers had fired before.
        self._owed: dict[asyncio.Task[Any], tuple[int, int]] = {}

    def context(self, step: StepCall | None = None) -> Context:
        """Give the ambient context of the workflow's own code, or of a step's function."""
        return Context(
            self.attempt,
            self.perform,
            self.operate,
            self.note,
            is_async=True,
            step=step,
            limit=self.limit if step is None else step.definition.limit,
        )

    def perform(self, call: StepCall) -> Coroutine[Any, Any, Any]:
        """Perform a step and return its outcome, when awaited."""
        again = partial(run_step, self, call)
        is_in_thread = call.definition.session is SessionKind.SYNC and self.attempt.recorded(call.position) is None
        work = partial(self.perform_blocking, call) if is_in_thread else again
        return _named(self._carry_out(call.position, self.context(call), work, again), call.position)

    def operate(self, position: Position, operation: Operation) -> Coroutine[Any, Any, Any]:
        """Carry out an operation and return its outcome, when awaited."""
        work = partial(operation, self, position)
        return _named(self._carry_out(position, replace(self.context(), is_operating=True), work, work), position)

    async def _carry_out(self, position: Position, context: Context, work: Work, again: Work) -> Any:
        """Do the work; cancelled by the workflow's own code, see to it that the code sees what is recorded.

        Args:
            context: the ambient context of the work.
            again: returns the outcome once that is recorded.
        """
        attempt = self.attempt
        attempt.continue_call_here(position)
        recorded = attempt.recorded(position)
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        met, mark = tasks.cancels_met(task), self.timers.mark
        is_told = False
        try:
            with self.telling(), context.entered():
                if recorded is not None and (cancelled := cancelled_call_in(recorded)) is not None:
                    await self._until_cancelled(position, cancelled)
                try:
                    if self._owed and recorded is None and (owed := self._pay(task)) is not None:
                        met, mark = -1, owed
                        raise asyncio.CancelledError
                    for timer, firing in self.timers.unfired_before(position.key):
                        await self._until_fired(position, timer, firing)
                    if recorded is None:
                        await tasks.let_replay_catch_up(attempt)
                        if self.timers.is_looking:
                            await self.timers.settled()
                    else:
                        self.timers.replayed()
                    if attempt.branches.has_new:
                        await tasks.let_new_tasks_begin(attempt)
                    return await work()
                except asyncio.CancelledError:
                    if attempt.is_stopped or task.cancelling() <= met or await self._is_cancelled(position, mark):
                        raise
                    return await again()
        except asyncio.CancelledError:
            is_told = True
            raise
        finally:
            # One that is yet to be thrown into the task is not owed.
            if not is_told and (count := tasks.cancels_met(task)) > met and attempt.branches.here() is not None:
                self._owed[task] = count, mark
            attempt.end_call(position)  # cancelled before the operation itself has begun

    def _pay(self, task: asyncio.Task[Any]) -> int | None:
        """Return the mark of a cancel that came too late for the last operation and that the code is to learn of."""
        count, mark = self._owed.pop(task, (0, 0))
        return mark if count and task.cancelling() >= count else None

    async def _is_cancelled(self, position: Position, mark: int) -> bool:
        """Settle what became of an operation whose call was cancelled, however often it is cancelled meanwhile."""
        attempt = self.attempt
        found = attempt.recorded(position)
        if found is None:
            cancelled = CancelledCall(attempt.history_check.count, self.timers.fired_since(mark))
            with self.timers.deciding():
                settling = GracefulTask(record_cancelled_call(self, position, cancelled))
                # What an attempt that is ending would still record is not needed: its successor finds that or nothing.
                await ended(settling, on_cancel=lambda: attempt.is_stopped and settling.cancel_now())
            found = settling.result()
            attempt.note_outcome(found)
        is_cancelled = cancelled_call_in(found) is not None
        if is_cancelled:
            attempt.cancelled_calls.add(position.key)
        return is_cancelled

    async def _until_cancelled(self, position: Position, cancelled: CancelledCall) -> NoReturn:
        """Wait until the workflow's code cancels the call again, as it did in an earlier attempt."""
        attempt = self.attempt
        looks, told = 0, "workflow %r %s: the call %r waits to be cancelled, as it was in an earlier attempt"
        attempt.begin_wait(position, _STAYS)
        try:
            with self.timers.cancelling(cancelled):
                while not attempt.is_quiet(quiet=_QUIET, idle=self._is_idle):
                    looks += 1
                    if looks >= _SILENT and not looks & (looks - 1):  # more and more seldom
                        log.warning(told, attempt.name, attempt.workflow_id, position.key)
                    await self.moment()
                    self.timers.let_fire_next()
                    if not attempt.is_cancelling:  # what it did before is yet to be found, so that it can be undone
                        attempt.raise_if_stopped()
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
        attempt.begin_wait(position, _STAYS)
        try:
            with self.timers.cancelling(firing):
                while not await self.timers.fired(timer, within=_LOOK_EVERY):
                    attempt.raise_if_stopped()
                    if attempt.is_quiet(quiet=_QUIET, idle=self._is_idle):
                        told = (
                            "workflow %r %s: a timer fired before %r in an earlier attempt, and today's code arms none"
                        )
                        log.warning(told, attempt.name, attempt.workflow_id, position.key)
                        self.timers.give_up(timer)
            await self.timers.caught_up()
        finally:
            attempt.end_wait(position)

    async def moment(self) -> None:
        """Wait a moment of a replay."""
        await self.pause(_LOOK_EVERY)

    async def drive(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Bring an attempt to its end, in a task that knows a cancel from outside."""
        return await tasks.in_attempt_task(coroutine, self.attempt)

    @abstractmethod
    async def perform_blocking(self, call: StepCall) -> Any:
        """Perform a step that takes a `Session`, without blocking the event loop."""

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Call a function in a thread, in a copy of the context."""
        return await asyncio.to_thread(function)

    @asynccontextmanager
    async def intercepted(self, step: StepCall | None = None) -> AsyncGenerator[None]:
        """Enter the interceptors, those that are awaited too."""
        with self.context(step).entered():
            async with entered_async(self.around(step)):
                yield

    async def call(self, call: StepCall, *injected: object, watch: Watch | None = None) -> Any:
        """Call a step's function, and cancel it in time; one in a thread has failed if it comes back too late."""
        function = call.definition.fn
        with replace(self.context(call), operate=self._operate_from(asyncio.get_running_loop())).entered():
            if call.definition.is_async:
                awaited = function(*injected, *call.args, **call.kwargs)
                return await (awaited if watch is None else _cut_off(awaited, watch))
            # Never left to itself: the next try must not begin beside it.
            bound = partial(function, *injected, *call.args, **call.kwargs)
            return await self.in_thread(lambda: _returned(bound, watch))

    def _operate_from(self, loop: asyncio.AbstractEventLoop) -> Callable[[Position, Operation], Any]:
        """Give `operate` for a step's function, whose code may be in another thread: there it waits for the loop."""

        def operate(position: Position, operation: Operation) -> Any:
            here = _running_loop()
            if position.key in self.attempt.cancelled_calls:
                raise AttemptLost(self.attempt.workflow_id)
            if here is loop:
                return operation(self, position)
            future = _submit(operation(self, position), loop)
            return _result(future) if here is None else asyncio.wrap_future(future)

        return operate

    async def body(self, definition: WorkflowDefinition, arguments: dict[str, Any]) -> Any:
        """Call the workflow's function."""
        self.limit = definition.durable.payload_limit
        self.attempt.branches.begin(tasks.whereabouts)
        self.timers = Timers(self.attempt, self.note)
        await self.recall()
        with self.context().entered(), tasks.branching(), watching():
            coroutine: Awaitable[Any] = definition.call(arguments)
            value = await coroutine
            await tasks.until_cancelled_have_ended(self.attempt)
            return value

    async def recall(self) -> None:
        """Let timers be due when they were when the workflow was suspended."""
        deadlines = self.attempt.deadlines
        if deadlines:
            now = (await self.execute(timers.now)).timestamp()
            self.timers.remember({key: due - now for key, due in deadlines.items()})

    async def remember_timers(self, position: Position) -> None:
        """Let the row of an operation that waits keep when timers are due."""
        if seconds := self.timers.seconds:
            now = (await self.execute(timers.now)).timestamp()
            details = json.dumps({TIMERS: {key: now + due_in for key, due_in in seconds.items()}})
            waiting = checkpoint_of(self.attempt, position, StepStatus.WAITING)
            await self.execute(partial(steps.keep_details, checkpoint=waiting, details=details))

    def leave(self) -> None:
        """Cancel what the workflow leaves behind at the attempt's end; nothing of it is recorded any more."""
        self.attempt.stop(partial(AttemptLost, self.attempt.workflow_id))
        self._owed.clear()
        if hasattr(self, "timers"):
            self.timers.abandon()
        tasks.abandon(self.attempt)


def _named(coroutine: Coroutine[Any, Any, T], position: Position) -> Coroutine[Any, Any, T]:
    cast("Any", coroutine).__qualname__ = position.key  # for Python's warning that it was never awaited
    return coroutine


async def _cut_off(awaited: Awaitable[T], watch: Watch) -> T:
    """Await, and cancel what is not done in time; also what catches its cancellation and returns is too late."""
    watch.begin()
    timer = asyncio.timeout(None)
    try:
        async with timer:
            with _lookout(timer, watch):
                value = await awaited
    except TimeoutError:
        if timer.expired():
            watch.check()
        raise
    if timer.expired():
        watch.check()
    return value


@contextmanager
def _lookout(timer: asyncio.Timeout, watch: Watch) -> Generator[None]:
    """Let a timer expire when a limit is reached; heartbeats put that off."""
    loop = asyncio.get_running_loop()
    next_look: asyncio.TimerHandle | None = None

    def look() -> None:
        nonlocal next_look
        left = watch.left
        if left > 0:
            next_look = loop.call_later(left, look)
        else:
            timer.reschedule(loop.time())

    look()
    try:
        yield
    finally:
        if next_look is not None:
            next_look.cancel()


def _measured(watch: Watch | None) -> AbstractContextManager[None]:
    return nullcontext() if watch is None else watch.measured()


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


def _result(future: concurrent.futures.Future[T]) -> T:
    try:
        return future.result()
    except concurrent.futures.CancelledError as error:  # the loop ends
        raise AttemptLost from error


def _returned(function: Callable[[], T], watch: Watch | None) -> T:
    """Call a function in a thread; a StopIteration becomes what it becomes in a coroutine, and so does Ctrl-C's error.

    A future does not take the one, and an `await` of it would never end. Source: Python's PEP 479. The other would end
    the event loop of a task that awaits it, although nobody has pressed Ctrl-C: that interrupts the main thread only.
    """
    try:
        with _measured(watch):
            return function()
    except (StopIteration, KeyboardInterrupt) as error:
        raise RuntimeError(f"the step raised {brief(error)}") from error
