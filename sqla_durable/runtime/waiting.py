"""How code waits where it is executed: it blocks its thread, it awaits on an event loop, or it is in a greenlet.

Recorders are written once, over these three: they take locks, wait for commits, and pause in one of these ways.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Protocol, TypeAlias, TypeVar

from sqlalchemy.util import await_only
from typing_extensions import override

from sqla_durable.operations.shielding import finish_despite_cancel
from sqla_durable.operations.suspending import Waker
from sqla_durable.unwinding import AttemptLost

T = TypeVar("T")

Future: TypeAlias = "asyncio.Future[None] | concurrent.futures.Future[None]"


class Ticket:
    """Something that is to be committed; code on the event loop or in any thread may wait until it is settled.

    Attributes:
        is_settled: whether it is committed, or will not be.
        error: why it will not be.
    """

    __slots__ = ("_waiting", "error", "is_settled")

    def __init__(self) -> None:
        self.is_settled = False
        self.error: BaseException | None = None
        self._waiting: list[Future] = []

    def settle(self, error: BaseException | None = None) -> None:
        """End the wait for it, with an error or without; later calls change nothing."""
        if self.is_settled:
            return
        self.error = error
        self.is_settled = True  # before those who wait are read: one that comes now sees it
        for each in self._waiting:
            _end(each)

    def wake_when_settled(self, future: Future) -> None:
        """Set a future's result when this is settled, at once if it is; called from any thread."""
        self._waiting.append(future)
        if self.is_settled:
            _end(future)

    def raise_error(self) -> None:
        """Raise the error with which it was settled, if there is one."""
        if self.error is not None:
            raise self.error


def _end(future: Future) -> None:
    with suppress(asyncio.InvalidStateError, concurrent.futures.InvalidStateError):  # cancelled, or ended already
        future.set_result(None)


class Lock(Protocol):
    """A lock, or a semaphore."""

    async def acquire(self) -> object:
        """Wait for it, and take it."""

    def release(self) -> None:
        """Release it."""


class BlockingLock:
    """A lock or semaphore of threads, which blocks the thread that waits for it."""

    def __init__(self, inner: threading.Lock | threading.Semaphore) -> None:
        self._inner = inner
        self.release: Callable[[], None] = inner.release

    async def acquire(self) -> None:
        """Block the thread until it is free, and take it."""
        self._inner.acquire()


class Waiting(ABC):
    """How code waits where it is executed."""

    @abstractmethod
    async def pause(self, seconds: float) -> None:
        """Wait for so many seconds, or until the worker stops."""

    @abstractmethod
    def waker(self) -> Waker:
        """Return what wakes an operation that waits here."""

    @abstractmethod
    def lock(self) -> Lock:
        """Return a lock for which is waited here."""

    @abstractmethod
    async def finish_despite_cancel(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Await something to its end, also when this is cancelled meanwhile."""

    @abstractmethod
    async def on_loop(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Await a coroutine on the event loop.

        Raises:
            AttemptLost: that has ended, and has left this thread behind.
        """

    @abstractmethod
    def call_on_loop(self, function: Callable[[T], object], argument: T) -> None:
        """Call a function on the event loop, at once or soon.

        Raises:
            RuntimeError: the loop is closed.
        """

    @abstractmethod
    async def settled(self, ticket: Ticket) -> None:
        """Wait until a ticket is settled, and raise its error."""


class InThread(Waiting):
    """Code that blocks its thread.

    Args:
        stopping: set when the worker stops, which ends pauses; None in an executor.
        loop: the worker's event loop.
    """

    def __init__(
        self, *, stopping: threading.Event | None = None, loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        self._stopping = stopping
        self._loop = loop

    @override
    async def pause(self, seconds: float) -> None:
        if self._stopping is None:
            time.sleep(seconds)  # noqa: ASYNC251 (no event loop runs it)
        else:
            self._stopping.wait(seconds)

    @override
    def waker(self) -> Waker:
        return Waker()

    @override
    def lock(self) -> Lock:
        return BlockingLock(threading.Lock())

    @override
    async def finish_despite_cancel(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return await coroutine

    @override
    async def on_loop(self, coroutine: Coroutine[Any, Any, T]) -> T:
        assert self._loop is not None  # noqa: S101 (a worker's)
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()
        except (RuntimeError, concurrent.futures.CancelledError) as error:  # the loop is closed, or ends
            coroutine.close()
            raise AttemptLost from error

    @override
    def call_on_loop(self, function: Callable[[T], object], argument: T) -> None:
        assert self._loop is not None  # noqa: S101 (a worker's)
        self._loop.call_soon_threadsafe(function, argument)

    @override
    async def settled(self, ticket: Ticket) -> None:
        if not ticket.is_settled:
            waiting: concurrent.futures.Future[None] = concurrent.futures.Future()
            ticket.wake_when_settled(waiting)
            waiting.result()
        ticket.raise_error()


class InGreenlet(InThread):
    """Blocking code inside an `AsyncSession`, which SQLAlchemy calls in a greenlet of the event loop's thread."""

    @override
    async def pause(self, seconds: float) -> None:
        await_only(asyncio.sleep(seconds))

    @override
    async def on_loop(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return await coroutine  # in the loop's thread, where nothing changes meanwhile


class OnLoop(Waiting):
    """Code that awaits on the running event loop.

    Args:
        stopping: set when the worker stops, which ends pauses; None in an executor.
    """

    def __init__(self, *, stopping: asyncio.Event | None = None) -> None:
        self._stopping = stopping

    @override
    async def pause(self, seconds: float) -> None:
        if self._stopping is None:
            await asyncio.sleep(seconds)
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    @override
    def waker(self) -> Waker:
        return LoopWaker()

    @override
    def lock(self) -> Lock:
        return asyncio.Lock()

    @override
    async def finish_despite_cancel(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return await finish_despite_cancel(coroutine)

    @override
    async def on_loop(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return await coroutine

    @override
    def call_on_loop(self, function: Callable[[T], object], argument: T) -> None:
        function(argument)

    @override
    async def settled(self, ticket: Ticket) -> None:
        if not ticket.is_settled:
            waiting = asyncio.get_running_loop().create_future()  # of this wait alone, which may be cancelled
            ticket.wake_when_settled(waiting)
            await waiting
        ticket.raise_error()


class LoopWaker(Waker):
    """Wakes one operation that waits on the running event loop; `wake` may be called from any thread."""

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._woken_here: asyncio.Event | None = None  # while the operation waits

    @override
    def wake(self) -> None:
        super().wake()
        woken = self._woken_here  # the event loop may reset it at any time
        if woken is not None:
            with suppress(RuntimeError):  # the loop was closed: nothing waits
                self._loop.call_soon_threadsafe(woken.set)

    @override
    async def wait(self, seconds: float) -> None:
        """Wait until the operation is woken, for at most so many seconds."""
        self._woken_here = woken = asyncio.Event()
        try:
            if not self.is_woken:
                with suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await woken.wait()
        finally:
            self._woken_here = None
