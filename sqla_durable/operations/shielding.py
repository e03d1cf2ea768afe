"""What is cancelled, and what is not to be: a task that was, and tasks that use connections.

To cancel one of those in the middle of connecting would leave a connection that nobody closes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from typing_extensions import override

T = TypeVar("T")

CANCEL_GRACE = 3.0
"""How many seconds a task goes on at most that is cancelled: on a busy machine connecting takes its time."""


CancelledError = asyncio.CancelledError


def is_cancelled_here() -> bool:
    """Return whether the task that executes this was cancelled; a thread without an event loop cannot be."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return False
    return task is not None and task.cancelling() > 0


async def finish_despite_cancel(coroutine: Coroutine[Any, Any, T]) -> T:
    """Await something to its end, however often this is cancelled meanwhile: then in its last moment."""
    task = GracefulTask(coroutine)
    try:
        await wait_done(task)
    except asyncio.CancelledError:
        task.cancel()
        await ended(task)
        raise
    return task.result()


async def wait_done(future: asyncio.Future[Any]) -> None:
    """Wait until a future is done, and leave it alone when this is cancelled.

    What becomes of it afterwards is the affair of those who still wait: `asyncio.shield` would report an error of it.
    """
    if future.done():
        return
    waiter: asyncio.Future[None] = future.get_loop().create_future()

    def wake(_: asyncio.Future[Any]) -> None:
        if not waiter.done():
            waiter.set_result(None)

    future.add_done_callback(wake)
    try:
        await waiter
    finally:
        future.remove_done_callback(wake)


async def ended(task: asyncio.Future[Any], *, on_cancel: Callable[[], object] = lambda: None) -> None:
    """Wait until a task has ended, however often this is cancelled meanwhile, and mark its error as seen.

    Args:
        on_cancel: called each time that this is cancelled.
    """
    while not task.done():
        try:
            await wait_done(task)
        except asyncio.CancelledError:
            on_cancel()
    see(task)


def see(task: asyncio.Future[Any]) -> None:
    """Mark the error of a task that nobody awaits as seen, so that asyncio does not report it."""
    if not task.cancelled():
        task.exception()


class GracefulTask(asyncio.Task[T]):
    """A task that has a last moment when it is cancelled, as all are at the end of `asyncio.run()`, which waits for it.

    ```python
    task = GracefulTask(send(hint), name="hints")
    ```
    """

    def __init__(self, coroutine: Coroutine[Any, Any, T], *, name: str | None = None) -> None:
        super().__init__(coroutine, loop=asyncio.get_running_loop(), name=name)
        self._last_moment: asyncio.TimerHandle | None = None

    @override
    def cancel(self, msg: Any = None) -> bool:
        """Cancel it in `CANCEL_GRACE` seconds, unless it has ended by then."""
        if self._last_moment is None and not self.done():
            self._last_moment = self.get_loop().call_later(CANCEL_GRACE, self.cancel_now)
        return not self.done()

    def cancel_now(self) -> bool:
        """Cancel it."""
        return super().cancel()
