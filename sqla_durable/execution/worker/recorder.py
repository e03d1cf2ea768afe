"""Where the attempts of a worker record: through its writer, and transactional steps in a session of their own.

`WorkerRecorder` is the same for code on the event loop and in threads; how it waits is given to it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import threading
from collections.abc import Callable, Coroutine
from dataclasses import field
from functools import partial
from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker
from typing_extensions import override

from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.definitions.registry import StepDefinition
from sqla_durable.errors import EncodingError
from sqla_durable.execution.worker.database import Database, persistently
from sqla_durable.execution.worker.writer import Row, StreamWriter, Write, Writer
from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.runtime import Recorder, run_blocking
from sqla_durable.operations.shielding import mark_retrieved, wait_done
from sqla_durable.operations.suspending import Suspension, Waker, Wakers
from sqla_durable.operations.transaction import ClosingTransaction, ReleasingTransaction, StepTransaction
from sqla_durable.runtime.waiting import BlockingLock, InThread, Lock, OnLoop, Ticket, Waiting
from sqla_durable.store import Checkpoint, Completion, Connectable, Suspend
from sqla_durable.store.streams import Append, Appended
from sqla_durable.unwinding import Released

T = TypeVar("T")


class Slots:
    """The slots of a worker, each of which executes one workflow.

    Attributes:
        count: how many there are.
        taken: how many are not free.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.taken = 0
        self._released = asyncio.Event()

    @property
    def free(self) -> int:
        """How many are free."""
        return self.count - self.taken

    def take(self) -> None:
        """Take one."""
        self.taken += 1

    def release(self) -> None:
        """Release one."""
        self.taken -= 1
        self._released.set()

    async def next_release(self) -> None:
        """Wait until one is released."""
        self._released.clear()
        await self._released.wait()


@dataclass(frozen=True, slots=True)
class Sessions:
    """Opens the sessions of transactional steps of one kind.

    Attributes:
        maker: the user's sessionmaker; None where no step takes such a session.
        places: bounds the connections that they hold at once.
    """

    maker: Callable[..., Session | AsyncSession] | None
    places: Lock

    @classmethod
    def in_threads(cls, maker: sessionmaker[Session] | None, *, places: int) -> Sessions:
        """Open sessions in threads."""
        return cls(maker, BlockingLock(threading.Semaphore(places)))

    @classmethod
    def on_loop(cls, maker: async_sessionmaker[AsyncSession] | None, *, places: int) -> Sessions:
        """Open sessions on the event loop."""
        return cls(maker, asyncio.Semaphore(places))

    def transaction(self, step: StepDefinition, waiting: Waiting) -> StepTransaction:
        """Return the transaction of a step, in a session of its own; it releases a place that is to be taken first."""
        maker = self.maker
        assert maker is not None  # noqa: S101 (the worker has checked it at its start)
        inner = ClosingTransaction(maker(close_resets_only=False), isolation_level=step.options.isolation_level)
        # Cancelled in the middle of a rollback, it would leave a connection open.
        return ReleasingTransaction(inner, self.places.release, rolls_back=waiting.finish_despite_cancel)


@dataclass(frozen=True, slots=True)
class Resources:
    """What the attempts of one worker share.

    Attributes:
        database: executes the statements that are no part of a batch.
        transacting: executes those that belong together.
        writer: commits checkpoints and outcomes, in batches.
        stream_writer: commits what is appended to streams, in batches.
        threads: where sync code is executed.
        sync_sessions: opens the sessions of sync steps.
        async_sessions: opens the sessions of async steps.
        stopping: set when the worker is to stop.
        loop: the worker's event loop.
        waiting_on_loop: how code on the event loop waits.
        waiting_in_threads: how code in threads waits.
        slots: counts the workflows that are executed.
        wakers: wake operations that wait in memory.
        detached: steps in threads whose calls were cancelled, and that can commit nothing.
    """

    database: Database
    transacting: Database
    writer: Writer
    stream_writer: StreamWriter
    threads: concurrent.futures.ThreadPoolExecutor
    sync_sessions: Sessions
    async_sessions: Sessions
    stopping: threading.Event
    loop: asyncio.AbstractEventLoop
    waiting_on_loop: OnLoop
    waiting_in_threads: InThread
    slots: Slots
    wakers: Wakers
    detached: set[asyncio.Future[Any]] = field(default_factory=set[asyncio.Future[Any]])

    def in_thread(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """Call a function in one of the worker's threads, in a copy of the context."""
        return self.loop.run_in_executor(self.threads, contextvars.copy_context().run, function)

    def detach(self, thread: asyncio.Future[Any]) -> None:
        """Await a step in a thread no longer, but when the worker stops."""
        self.detached.add(thread)
        thread.add_done_callback(self.detached.discard)
        thread.add_done_callback(mark_retrieved)


class WorkerRecorder(Recorder):
    """Records what one attempt decides, through the worker's writer.

    Attributes:
        is_cancelled: set in a sync step of an `async def` workflow when its call was cancelled: it ends, and records
            nothing more, while the attempt goes on.
    """

    def __init__(self, attempt: Attempt, resources: Resources, waiting: Waiting, sessions: Sessions) -> None:
        super().__init__(attempt)
        self.is_cancelled = False
        self._resources = resources
        self._waiting = waiting
        self._sessions = sessions
        self._add = resources.writer.add
        self._stopping = resources.stopping
        self._last: Ticket | None = None

    @classmethod
    def for_thread(cls, attempt: Attempt, resources: Resources) -> WorkerRecorder:
        """Return the recorder of code that is executed in one of the worker's threads."""
        return cls(attempt, resources, resources.waiting_in_threads, resources.sync_sessions)

    @classmethod
    def for_loop(cls, attempt: Attempt, resources: Resources) -> WorkerRecorder:
        """Return the recorder of code that is executed on the worker's event loop."""
        return cls(attempt, resources, resources.waiting_on_loop, resources.async_sessions)

    @property
    @override
    def slot_is_wanted(self) -> bool:
        return self._resources.slots.free <= 0

    @override
    async def settle(self) -> None:
        """Wait for the commits on their way; then end here if the attempt is to stop."""
        if self.is_cancelled:
            raise asyncio.CancelledError  # only this call was cancelled, and the attempt goes on
        if self._last is not None:
            await self.flush()
        if self._stopping.is_set():
            self.attempt.stop(Released)
        self.attempt.raise_if_stopped()

    @override
    async def record(self, checkpoint: Checkpoint) -> None:
        """Hand a checkpoint to the writer; the workflow's code goes on."""
        if self.is_cancelled:
            raise asyncio.CancelledError
        self._submit(checkpoint)

    @override
    def note(self, checkpoint: Checkpoint) -> None:
        self._submit(checkpoint)

    @override
    async def execute(self, statement: Callable[[Connectable], T]) -> T:
        """Call a store function on a connection of the worker's own."""
        return await self._waiting.on_loop(persistently(self._resources.database, statement, what="operation"))

    @override
    async def execute_together(self, statements: Callable[[Connectable], T]) -> T:
        """Call a store function in a transaction on a connection of the worker's own."""
        return await self._waiting.on_loop(persistently(self._resources.transacting, statements, what="operation"))

    @override
    async def append(self, append: Append) -> Appended:
        """Append to a stream, in one commit with what others append."""
        return await self._waiting.on_loop(self._resources.stream_writer.append(append))

    @override
    async def begin(self, step: StepDefinition) -> StepTransaction:
        """Open a session of the user's own sessionmaker, used for this step only."""
        transaction = self._sessions.transaction(step, self._waiting)
        await self._sessions.places.acquire()
        await transaction.begin()
        if self.is_cancelled:  # while it waited for a place
            await transaction.rollback()
            raise asyncio.CancelledError
        return transaction

    @override
    async def finish(self, completion: Completion) -> None:
        """Record the outcome, in the same commit as what is still on its way."""
        self._submit(completion)
        try:
            await self.flush()
        except EncodingError:
            self._last = None  # another outcome waits for none of them
            raise

    @override
    async def suspend(self, suspension: Suspension, *, remember: Callable[[Connectable], None] | None = None) -> None:
        """Suspend the workflow in the same commit as what is still on its way."""
        if remember is not None:
            await self.execute(remember)
        self._submit(Suspend(self.attempt.fence, suspension.seconds, suspension.awaits))
        await self.flush()

    @override
    async def pause(self, seconds: float) -> None:
        """Wait, or until the worker stops; the attempt is to stop then, or it would wait again and again."""
        await self._waiting.pause(seconds)
        if self._stopping.is_set():
            self.attempt.stop(Released)
        if self.is_cancelled:
            raise asyncio.CancelledError

    @override
    def waker(self) -> Waker:
        return self._waiting.waker()

    @override
    def fork(self) -> WorkerRecorder:
        branch = WorkerRecorder.for_thread(self.attempt, self._resources)
        branch._last = self._last
        return branch

    @override
    def join(self, branch: Recorder) -> None:
        assert isinstance(branch, WorkerRecorder)  # noqa: S101 (made by `fork`)
        try:
            run_blocking(branch.flush())
        except BaseException:
            self.follow(branch)  # what was refused stops every later operation, of whichever branch
            raise

    def follow(self, other: Recorder) -> None:
        """Let what is recorded here from now on follow what was recorded there."""
        assert isinstance(other, WorkerRecorder)  # noqa: S101 (made by `fork`)
        self._last = other._last

    @override
    async def in_session(self, work: Callable[[Recorder], T]) -> T:
        """Call a function in one of the worker's threads; cancelled meanwhile, it can record nothing more."""
        recorder = WorkerRecorder.for_thread(self.attempt, self._resources)
        thread = self._resources.in_thread(partial(_outcome, recorder, work))
        try:
            await wait_done(thread)
        except asyncio.CancelledError:
            recorder.is_cancelled = True
            self._resources.detach(thread)
            raise
        value, error = thread.result()
        if error is not None:
            raise error
        return value

    @override
    async def on_loop(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if self.is_cancelled:
            coroutine.close()
            raise asyncio.CancelledError
        return await self._waiting.on_loop(coroutine)

    async def flush(self) -> None:
        """Wait for the commits on their way: for the last, because the writer keeps their order."""
        last = self._last
        if last is None:
            return
        await self._waiting.settled(last)  # steps that are called at the same time wait for the same commits
        if self._last is last:
            self._last = None  # not before: what was refused stops every later operation

    def _submit(self, row: Row) -> None:
        write = Write(row, self._last)
        try:
            self._waiting.call_on_loop(self._add, write)
        except RuntimeError:  # the loop is closed: the worker has left this thread behind
            write.refuse()
        self._last = write


def _outcome(
    recorder: WorkerRecorder, work: Callable[[Recorder], T]
) -> tuple[T | Any, concurrent.futures.CancelledError | None]:
    """Return what a step returned, or that it failed with this error: a future would make a cancel of it."""
    try:
        return _worked(recorder, work), None
    except concurrent.futures.CancelledError as error:
        return None, error


def _worked(recorder: WorkerRecorder, work: Callable[[Recorder], T]) -> T | None:
    if recorder.is_cancelled:  # while it waited for a thread
        return None
    try:
        return work(recorder)
    finally:
        run_blocking(recorder.flush())
