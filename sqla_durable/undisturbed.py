"""What is cancelled, and what is not to be: a task that was, and tasks that use connections.

To cancel one of those in the middle of connecting would leave a connection that nobody closes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from typing_extensions import override

T = TypeVar("T")

LAST_MOMENT = 3.0
"""How many seconds a task goes on at most that is cancelled: on a busy machine connecting takes its time."""


CancelledError = asyncio.CancelledError


def is_cancelled_here() -> bool:
    """Return whether the task that executes this was cancelled; a thread without an event loop cannot be."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return False
    return task is not None and task.cancelling() > 0


async def undisturbed(coroutine: Coroutine[Any, Any, T]) -> T:
    """Await something to its end, also if this is cancelled meanwhile: then in its last moment, before that goes on."""
    task = Undisturbed(coroutine)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # seen
        raise


class Undisturbed(asyncio.Task[T]):
    """A task that has a last moment when it is cancelled, as all are at the end of `asyncio.run()`, which waits for it.

    ```python
    task = Undisturbed(send(hint), name="hints")
    ```
    """

    def __init__(self, coroutine: Coroutine[Any, Any, T], *, name: str | None = None) -> None:
        super().__init__(coroutine, loop=asyncio.get_running_loop(), name=name)
        self._last_moment: asyncio.TimerHandle | None = None

    @override
    def cancel(self, msg: Any = None) -> bool:
        """Cancel it in `LAST_MOMENT` seconds, unless it has ended by then."""
        if self._last_moment is None and not self.done():
            self._last_moment = self.get_loop().call_later(LAST_MOMENT, self.cancel_now)
        return not self.done()

    def cancel_now(self) -> bool:
        """Cancel it."""
        return super().cancel()
