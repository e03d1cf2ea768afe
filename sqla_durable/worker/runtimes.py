"""How attempts in a worker wait, call and record: sync workflows in threads, async ones on the event loop.

Checkpoints and outcomes go to the writer; a transactional step has a session of its own from the user's sessionmaker.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable.errors import AttemptLost, EncodingError, Released, Suspended
from sqla_durable.failure import Failure
from sqla_durable.operations.attempt import Attempt, Position, Wait
from sqla_durable.operations.runtime import StepCall
from sqla_durable.operations.transaction import ClosingTransaction, HeldTransaction, StepTransaction
from sqla_durable.registry import SessionKind, StepDefinition, WorkflowDefinition
from sqla_durable.runtime import AsyncRuntime, BlockingRuntime
from sqla_durable.status import WorkflowStatus
from sqla_durable.store import Checkpoint, Completion, Connectable, Park
from sqla_durable.store.streams import Append, Appended
from sqla_durable.worker.database import Database, persistently
from sqla_durable.worker.gatherer import Gatherer
from sqla_durable.worker.writer import Row, Writer

T = TypeVar("T")

_QUIET = 5.0  # seconds
_LOOK_EVERY = 1.0  # seconds after which a step that waits in memory looks whether the workflow can be parked


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all attempts of one worker share.

    Attributes:
        sync_places, async_places: bound the connections that transactional steps hold at once.
        stopping: set in threads that pause when the worker is told to stop.
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

    def stop_if_leaving(self, attempt: Attempt) -> None:
        """Let an attempt end here from the moment on in which the worker is told to stop."""
        if self.stopping.is_set():
            attempt.stop(Released)

    def from_thread(self, statement: Callable[[Connectable], T]) -> T:
        """Execute on a connection of the worker's own, from one of its threads.

        Raises:
            AttemptLost: the worker has left the thread behind.
        """
        return self.wait_for(persistently(self.database, statement, what="operation"))

    def wait_for(self, execution: Coroutine[Any, Any, T]) -> T:
        """Execute on the worker's event loop, from one of its threads.

        Raises:
            AttemptLost: the worker has left the thread behind.
        """
        try:
            return asyncio.run_coroutine_threadsafe(execution, self.loop).result()
        except (RuntimeError, concurrent.futures.CancelledError) as error:  # the loop is closed, or ends
            execution.close()
            raise AttemptLost from error

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Call a function in one of the worker's threads, in a copy of the context."""
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self.threads, context.run, function)


class Parking(Protocol):
    """What waiting needs of either runtime.

    Attributes:
        quiet: how long the workflow must have been quiet before it is parked.
    """

    attempt: Attempt

    @property
    def quiet(self) -> float:
        """Give the seconds."""
        ...

    async def pause(self, seconds: float) -> None:
        """Wait a moment in memory."""

    async def park(self, seconds: float) -> None:
        """Suspend the workflow, and return when that is committed."""


async def wait_or_park(runtime: Parking, position: Position, wait: Wait) -> None:
    """Wait as a row once everything in the workflow waits for long enough, until then in memory.

    Raises:
        Suspended: the workflow is parked.
        ControlFlow: the attempt is to end.
    """
    attempt = runtime.attempt
    attempt.wait(position, wait)
    try:
        while True:
            seconds = attempt.begin_parking(quiet=runtime.quiet)
            if seconds is not None:
                try:
                    await runtime.park(seconds)
                except EncodingError:  # the database refuses the try that was to be recorded with it
                    attempt.end_parking()
                    raise
                raise Suspended
            if not wait.seconds:
                return
            await runtime.pause(min(wait.seconds, _LOOK_EVERY))
            attempt.proceed()
    finally:
        attempt.go_on(position)


class ThreadRuntime(BlockingRuntime):
    """An attempt at a `def` workflow, or a sync step of an `async def` one, in a thread."""

    def __init__(self, attempt: Attempt, surroundings: Surroundings, *, quiet: float = 0.0) -> None:
        super().__init__(attempt)
        self._surroundings = surroundings
        self._last: concurrent.futures.Future[None] | None = None
        self.quiet = quiet

    async def pause(self, seconds: float) -> None:
        """Wait, or until the worker stops; then the attempt is told to end, or it would wait again and again."""
        self._surroundings.stopping.wait(seconds)
        self._surroundings.stop_if_leaving(self.attempt)

    async def wait(self, position: Position, wait: Wait) -> None:
        """Wait in memory, or as a row."""
        await wait_or_park(self, position, wait)

    async def park(self, seconds: float) -> None:
        """Suspend the workflow in the same commit as what is still on its way."""
        self._submit(Park(self.attempt.fence, seconds))
        self.flush()

    async def settle(self) -> None:
        """Wait for the commits on their way; then end here if the attempt was told to."""
        self.flush()
        self._surroundings.stop_if_leaving(self.attempt)
        self.attempt.proceed()

    async def record(self, checkpoint: Checkpoint) -> None:
        """Hand a checkpoint to the writer; the workflow's code goes on."""
        self._submit(checkpoint)

    async def execute(self, statement: Callable[[Connectable], T]) -> T:
        """Call a store function on a connection of the worker's own."""
        return self._surroundings.from_thread(statement)

    async def append(self, append: Append) -> Appended:
        """Append to a stream, with what others append."""
        return self._surroundings.wait_for(self._surroundings.gatherer.append(append))

    async def begin(self, step: StepDefinition) -> StepTransaction:
        """Open a session of the user's own sessionmaker, used for this step only."""
        maker = self._surroundings.sessionmaker
        assert step.session is SessionKind.SYNC  # noqa: S101 (the registry refuses other steps in sync code)
        assert maker is not None  # noqa: S101 (the worker has checked it at its start)
        places = self._surroundings.sync_places
        inner = ClosingTransaction(maker(close_resets_only=False), isolation_level=step.isolation_level)
        transaction = HeldTransaction(inner, places.release)
        places.acquire()
        await transaction.begin()
        return transaction

    async def finish(self, completion: Completion) -> None:
        """Record the outcome, in the same commit as what is still on its way."""
        try:
            self._submit(completion)
            self.flush()
        except EncodingError as error:
            self._surroundings.writer.submit_from_thread(refused(completion, error)).result()

    def flush(self) -> None:
        """Wait for the commits on their way: for the last, because the writer keeps their order."""
        if self._last is not None:
            self._last.result()
            self._last = None  # not before: what was refused stops every later operation

    def _submit(self, row: Row) -> None:
        self._last = self._surroundings.writer.submit_from_thread(row, after=self._last)


class LoopRuntime(AsyncRuntime):
    """An attempt at an `async def` workflow, on the worker's event loop."""

    def __init__(self, attempt: Attempt, surroundings: Surroundings) -> None:
        super().__init__(attempt)
        self._surroundings = surroundings
        self._last: asyncio.Future[None] | None = None
        self._home: asyncio.Task[Any] | None = None

    @property
    def quiet(self) -> float:
        """How long the workflow must have been quiet before it is parked: not at all where its own task waits.

        In another task, of `gather` for example, its own code may be awaiting something else than this operation.
        """
        return 0.0 if asyncio.current_task() is self._home else _QUIET

    async def body(self, definition: WorkflowDefinition, arguments: dict[str, Any]) -> Any:
        """Call the workflow's function."""
        self._home = asyncio.current_task()
        return await super().body(definition, arguments)

    async def pause(self, seconds: float) -> None:
        """Wait, or until the worker stops; then the attempt is told to end, or it would wait again and again."""
        try:
            async with asyncio.timeout(seconds):
                await self._surroundings.stopping_async.wait()
        except TimeoutError:
            pass
        self._surroundings.stop_if_leaving(self.attempt)

    async def wait(self, position: Position, wait: Wait) -> None:
        """Wait in memory, or as a row."""
        await wait_or_park(self, position, wait)

    async def park(self, seconds: float) -> None:
        """Suspend the workflow in the same commit as what is still on its way."""
        self._submit(Park(self.attempt.fence, seconds))
        await self.flush()

    async def settle(self) -> None:
        """Wait for the commits on their way; then end here if the attempt was told to."""
        await self.flush()
        self._surroundings.stop_if_leaving(self.attempt)
        self.attempt.proceed()

    async def record(self, checkpoint: Checkpoint) -> None:
        """Hand a checkpoint to the writer; the workflow's code goes on."""
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
        inner = ClosingTransaction(maker(close_resets_only=False), isolation_level=step.isolation_level)
        transaction = HeldTransaction(inner, places.release)
        await places.acquire()
        await transaction.begin()
        return transaction

    async def finish(self, completion: Completion) -> None:
        """Record the outcome, in the same commit as what is still on its way."""
        try:
            self._submit(completion)
            await self.flush()
        except EncodingError as error:
            await self._surroundings.writer.submit(refused(completion, error))

    async def flush(self) -> None:
        """Wait for the commits on their way: for the last, because the writer keeps their order."""
        last = self._last
        if last is None:
            return
        await asyncio.shield(last)  # steps that are called at the same time wait for the same commits
        if self._last is last:
            self._last = None  # not before: what was refused stops every later operation

    def _submit(self, row: Row) -> None:
        self._last = self._surroundings.writer.submit(row, after=self._last)

    async def perform_blocking(self, call: StepCall) -> Any:
        """Perform a step that takes a `Session` in a thread, as a whole."""
        await self.settle()
        runtime = ThreadRuntime(self.attempt, self._surroundings, quiet=self.quiet)
        return await self.in_thread(lambda: _performed(runtime, call))

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Call a function in one of the worker's threads."""
        return await self._surroundings.in_thread(function)


def _performed(runtime: ThreadRuntime, call: StepCall) -> Any:
    try:
        return runtime.perform(call)
    finally:
        runtime.flush()


def refused(completion: Completion, error: EncodingError) -> Completion:
    """Give the outcome of a workflow whose own outcome the database refuses."""
    return Completion(completion.fence, WorkflowStatus.FAILED, error=Failure.of(error).to_json())
