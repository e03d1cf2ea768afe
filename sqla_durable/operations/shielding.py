"""Tasks that finish although they are cancelled: one cancelled while it connects would leave a connection open.

The only module of `operations` that knows asyncio.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from typing_extensions import override

T = TypeVar("T")

CANCEL_GRACE = 3.0
"""How many seconds a cancelled task may take to finish: on a busy machine connecting is slow."""


CancelledError = asyncio.CancelledError


def is_cancelled_here() -> bool:
    """Return whether the task that executes this was cancelled; a thread without an event loop cannot be."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return False
    return task is not None and task.cancelling() > 0


async def finish_despite_cancel(coroutine: Coroutine[Any, Any, T]) -> T:
    """Await a coroutine to its end even if this is cancelled meanwhile; then it has `CANCEL_GRACE` seconds."""
    task = GracefulTask(coroutine)
    try:
        await wait_done(task)
    except asyncio.CancelledError:
        task.cancel()
        await ended(task)
        raise
    return task.result()


async def wait_done(future: asyncio.Future[Any]) -> None:
    """Wait until a future is done, and do not cancel it when this is cancelled.

    Unlike `asyncio.shield`, an error that the future ends with later is not reported here.
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
    """Wait until a task has ended, even if this is cancelled meanwhile, and mark its error as retrieved.

    Args:
        on_cancel: called each time that this is cancelled.
    """
    while not task.done():
        try:
            await wait_done(task)
        except asyncio.CancelledError:
            on_cancel()
    mark_retrieved(task)


def mark_retrieved(task: asyncio.Future[Any]) -> None:
    """Mark the error of a task that is not awaited as retrieved, so that asyncio does not report it."""
    if not task.cancelled():
        task.exception()


class GracefulTask(asyncio.Task[T]):
    """A task that has time to finish when it is cancelled, as at the end of `asyncio.run()`, which waits for it.

    ```python
    task = GracefulTask(send(hint), name="hints")
    ```
    """

    def __init__(self, coroutine: Coroutine[Any, Any, T], *, name: str | None = None) -> None:
        super().__init__(coroutine, loop=asyncio.get_running_loop(), name=name)
        self._grace_timer: asyncio.TimerHandle | None = None

    @override
    def cancel(self, msg: Any = None) -> bool:
        """Cancel the task in `CANCEL_GRACE` seconds, unless it has ended by then."""
        if self._grace_timer is None and not self.done():
            self._grace_timer = self.get_loop().call_later(CANCEL_GRACE, self.cancel_now)
        return not self.done()

    def cancel_now(self) -> bool:
        """Cancel the task at once."""
        return super().cancel()
