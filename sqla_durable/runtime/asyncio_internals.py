"""What is read of asyncio beyond its public interface, for which that has no way to ask. Standard library only.

Each function says what it reads, what for, and what follows where a version of Python does not have it: nothing but
that a workflow is suspended later, or that asyncio reports an error that nobody needs. The tests execute all of it on
each Python that is there.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Collection
from types import FrameType
from typing import Any, TypeAlias

Task: TypeAlias = "asyncio.Task[Any]"

_WAIT_FOR_FRAMES = 6  # between a task factory and `asyncio.wait_for`, at most


def cancels_met(task: Task) -> int:
    """Return how many cancels a task has met; `cancelling` counts one that is yet to be thrown into it, too.

    Reads `Task._must_cancel`. Without it such a cancel counts as met, and the code may get it at its next operation.
    """
    requested = task.cancelling()
    return requested - 1 if requested and getattr(task, "_must_cancel", False) else requested


def error_of(future: asyncio.Future[Any]) -> BaseException | None:
    """Return the error of a future that is done, without marking it as retrieved, as `exception` would.

    Reads `Future._exception`. Without it there is none, and asyncio reports what the engine raises.
    """
    error: BaseException | None = getattr(future, "_exception", None)
    return error


def futures_of(task: Task) -> list[asyncio.Future[Any]]:
    """Return the futures that get a task's outcome, of `gather` and `shield`.

    Reads `Future._callbacks`, and the closures of the functions in it. Without it there are none, and asyncio reports
    their errors where nobody awaits them.
    """
    callbacks: list[tuple[Any, Any]] = getattr(task, "_callbacks", None) or []
    cells = [cell for callback, _ in callbacks for cell in getattr(callback, "__closure__", None) or ()]
    return [each.cell_contents for each in cells if _holds_future(each)]


def _holds_future(cell: Any) -> bool:
    try:
        return isinstance(cell.cell_contents, asyncio.Future)
    except ValueError:  # it is empty
        return False


def waits_only_for(task: Any, known: Collection[object], *, functions: Collection[Callable[..., Any]] = ()) -> bool:
    """Return whether a task is seen to wait for some of these tasks and futures, and for nothing else.

    Reads `Task._fut_waiter`, `_children` of what `gather` returns, `TaskGroup._tasks`, and in the frame of the
    innermost coroutine the future that `wait_for` or one of `functions` waits for. Without them it is not seen, and the
    workflow is suspended after a quiet while only.

    Args:
        task: the task.
        known: what it may wait for.
        functions: coroutine functions that wait for their first argument.
    """
    waiter: Any = getattr(task, "_fut_waiter", None)
    if waiter is None or waiter.done():
        return False
    if waiter in known:
        return True
    gathered: Any = getattr(waiter, "_children", None)
    if gathered is not None:
        return all(each.done() or each in known for each in gathered)
    innermost = _innermost(task.get_coro())
    if innermost is None or innermost.cr_frame is None:
        return False
    variables = innermost.cr_frame.f_locals
    for function in (asyncio.wait_for, *functions):
        if innermost.cr_code is function.__code__:
            return variables.get(function.__code__.co_varnames[0]) in known
    group: Any = variables.get("self")
    if isinstance(group, asyncio.TaskGroup):
        return all(each.done() or each in known for each in getattr(group, "_tasks", (waiter,)))
    return False


def _innermost(coroutine: Any) -> Any:
    """Return the coroutine in which a coroutine waits; None if that is another awaitable from the beginning."""
    if not inspect.iscoroutine(coroutine):
        return None
    while inspect.iscoroutine(coroutine.cr_await):
        coroutine = coroutine.cr_await
    return coroutine


def module_of(coroutine: Any) -> str:
    """Return the name of the module whose code a coroutine executes; empty where that is not seen.

    Reads `cr_frame`.
    """
    frame: FrameType | None = getattr(coroutine, "cr_frame", None)
    return "" if frame is None else str(frame.f_globals.get("__name__"))


def variables_of(coroutine: Any) -> Collection[Any]:
    """Return the values of a coroutine's variables, its arguments among them; none where they are not seen.

    Reads `cr_frame`.
    """
    frame: FrameType | None = getattr(coroutine, "cr_frame", None)
    return () if frame is None else tuple(frame.f_locals.values())


def unwrap_anyio(coroutine: Any) -> Any:
    """Return the coroutine that one of anyio's executes: newer versions of anyio put one of their own around it.

    Reads the frame of `TaskHandle._run_coro`, and `TaskHandle._coro`. Without them it is the coroutine itself, and a
    branch has the name of anyio's.
    """
    while getattr(coroutine, "__qualname__", None) == "TaskHandle._run_coro" and coroutine.cr_frame is not None:
        inner = getattr(coroutine.cr_frame.f_locals.get("self"), "_coro", None)
        if inner is None:
            break
        coroutine = inner
    return coroutine


def is_in_wait_for() -> bool:
    """Return whether the task that is being made is one of `asyncio.wait_for`.

    Up to Python 3.11 that makes one and waits for it, where later versions wait in the caller's own task: it is the
    same line of code, and its steps have the same keys with every version. Reads the stack.
    """
    frame = inspect.currentframe()
    for _ in range(_WAIT_FOR_FRAMES + 1):
        if frame is None or frame.f_code is asyncio.wait_for.__code__:
            break
        frame = frame.f_back
    return frame is not None and frame.f_code is asyncio.wait_for.__code__
