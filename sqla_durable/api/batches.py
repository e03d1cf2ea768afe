"""Batch steps: what steps of many workflows ask for at about the same time is done by one call.

The calls are collected in the memory of one process. Each is a step of its own workflow, with an outcome of its own.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import threading
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import Any, TypeGuard, get_args
from weakref import WeakKeyDictionary

from sqla_durable.definitions.checks import require_positive_duration
from sqla_durable.definitions.inspection import hints_of, is_coroutine, name_of, place_of, session_class
from sqla_durable.errors import ArgumentError, DefinitionError, UsageError


def batched(fn: Callable[..., Any], *, name: str | None, size: int, within: timedelta) -> Callable[[Any], Any]:
    """Return a function of one item that calls a function of many.

    Raises:
        DefinitionError: the function has no usable name, takes a session, or not one list.
        ArgumentError: the size or the time is out of range.
    """
    found = name_of(fn, name, what="step")
    if session_class(fn, what=f"step {found!r}") is not None:
        raise DefinitionError(
            f"batch step {found!r} takes a session, whose transaction would be that of many workflows: take none, and "
            "write in a step of the workflow."
        )
    if not isinstance(size, int) or size < 2:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(f"size={size!r} is no size of a batch: pass 2 or more.")
    require_positive_duration(within, "within")
    seconds = within.total_seconds()
    call = _on_loop(fn, found, size, seconds) if is_coroutine(fn) else _in_threads(fn, found, size, seconds)
    hints = hints_of(fn, f"step {found!r}")
    parameters = [hint for parameter, hint in hints.items() if parameter != "return"]
    call.__annotations__ = {"item": _item(parameters[0] if parameters else Any), "return": _item(hints.get("return"))}
    call.__name__, call.__doc__ = found, fn.__doc__
    call.__module__, call.__qualname__ = place_of(fn)
    return call


def _item(many: Any) -> Any:
    arguments = get_args(many)
    return arguments[0] if arguments else Any


def _results(returned: object, count: int, name: str) -> Sequence[Any]:
    """Refuse what is not a result for each item."""
    if _is_sequence(returned):
        if len(returned) == count:
            return returned
        shown = f"{len(returned)} results"
    else:
        shown = f"{returned!r}"
    raise UsageError(
        f"batch step {name!r} was given {count} items and returned {shown}: return a list with one result, or one "
        "exception, for each item in their order."
    )


def _is_sequence(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


class _Collected:
    """Items that are waiting on one event loop."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Any, asyncio.Future[Any]]] = []
        self.timer: asyncio.TimerHandle | None = None
        self.tasks: set[asyncio.Task[None]] = set()


def _on_loop(
    fn: Callable[[list[Any]], Awaitable[object]], name: str, size: int, seconds: float
) -> Callable[[Any], Awaitable[Any]]:
    by_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, _Collected] = WeakKeyDictionary()

    async def execute(taken: list[tuple[Any, asyncio.Future[Any]]]) -> None:
        try:
            results = _results(await fn([item for item, _ in taken]), len(taken), name)
        except BaseException as error:
            for _, future in taken:
                if not future.done():
                    future.cancel() if isinstance(error, asyncio.CancelledError) else future.set_exception(error)
            if not isinstance(error, Exception):
                raise
            return
        for (_, future), result in zip(taken, results, strict=True):
            if not future.done():  # its workflow may have been cancelled meanwhile
                future.set_exception(result) if isinstance(result, Exception) else future.set_result(result)

    def begin(collected: _Collected) -> None:
        if collected.timer is not None:
            collected.timer.cancel()
        taken = [each for each in collected.waiting if not each[1].done()]
        collected.waiting, collected.timer = [], None
        if taken:
            # In a context of its own: it belongs to none of the workflows.
            task = asyncio.get_running_loop().create_task(execute(taken), context=contextvars.Context())
            collected.tasks.add(task)
            task.add_done_callback(collected.tasks.discard)

    async def call(item: Any) -> Any:
        loop = asyncio.get_running_loop()
        collected = by_loop.setdefault(loop, _Collected())
        future: asyncio.Future[Any] = loop.create_future()
        collected.waiting.append((item, future))
        if len(collected.waiting) >= size:
            begin(collected)
        elif collected.timer is None:
            collected.timer = loop.call_later(seconds, begin, collected)
        try:
            return await future
        except asyncio.CancelledError:  # it takes no place of another one's
            collected.waiting = [each for each in collected.waiting if each[1] is not future]
            raise

    return call


class _Batch:
    """Items that are waiting in threads; that of the first one executes them."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self.is_full = threading.Event()
        self.results: concurrent.futures.Future[Sequence[Any]] = concurrent.futures.Future()


def _in_threads(fn: Callable[[list[Any]], object], name: str, size: int, seconds: float) -> Callable[[Any], Any]:
    lock = threading.Lock()
    open_batch: list[_Batch] = []  # one at most

    def join(item: Any) -> tuple[_Batch, int]:
        with lock:
            if not open_batch:
                open_batch.append(_Batch())
            batch = open_batch[0]
            batch.items.append(item)
            if len(batch.items) >= size:
                open_batch.clear()
                batch.is_full.set()
            return batch, len(batch.items) - 1

    def execute(batch: _Batch) -> None:
        batch.is_full.wait(seconds)
        with lock:
            if batch in open_batch:
                open_batch.clear()
        try:
            returned = contextvars.Context().run(fn, batch.items)  # it belongs to none of the workflows
            batch.results.set_result(_results(returned, len(batch.items), name))
        except BaseException as error:
            batch.results.set_exception(error)

    def call(item: Any) -> Any:
        batch, number = join(item)
        if number == 0:
            execute(batch)
        result = batch.results.result()[number]
        if isinstance(result, Exception):
            raise result
        return result

    return call
