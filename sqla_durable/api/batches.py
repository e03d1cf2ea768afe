"""Batch steps: what steps of many workflows ask for at about the same time is done by one call.

The calls are collected in the memory of one process. Each is a step of its own workflow, with an outcome of its own.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import inspect
import threading
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import Any, TypeGuard, get_args, get_origin
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
    _refuse_single(fn, found, parameters, hints.get("return"))
    call.__annotations__ = {"item": _item(parameters[0] if parameters else Any), "return": _item(hints.get("return"))}
    call.__name__, call.__doc__ = found, fn.__doc__
    call.__module__, call.__qualname__ = place_of(fn)
    return call


def _refuse_single(fn: Callable[..., Any], name: str, parameters: Sequence[Any], returned: Any) -> None:
    """Refuse a function of one item: it would be called with a list, and fail in each workflow."""
    required = [each for each in inspect.signature(fn).parameters.values() if each.default is each.empty]
    if len(required) == 1 and all(map(_fits_list, [*parameters[:1], Any if returned is None else returned])):
        return
    raise DefinitionError(
        f"batch step {name!r} is a function {inspect.signature(fn)}: take one list of items, and return a list with a "
        "result for each, such as (texts: list[str]) -> list[int]."
    )


def _fits_list(hint: Any) -> bool:
    kind = get_origin(hint) or hint
    if kind is Any or not isinstance(kind, type):
        return True
    return issubclass(list, kind) or (issubclass(kind, Sequence) and kind is not str)


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


class _Raised:
    """An error that is the outcome of items.

    Not an exception of their futures: these refuse `StopIteration`, and let `SystemExit` end the event loop.
    """

    def __init__(self, error: BaseException) -> None:
        self._error, self._traceback = error, error.__traceback__

    def again(self) -> BaseException:
        """Return the error, to be raised for one item without the traceback of another one's."""
        return self._error.with_traceback(self._traceback)


def _value(outcome: Any) -> Any:
    """Return a result, or raise the error that is there instead."""
    if isinstance(outcome, _Raised):
        raise outcome.again()
    return outcome


def _outcomes(results: Sequence[Any]) -> list[Any]:
    return [_Raised(each) if isinstance(each, Exception) else each for each in results]


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
        outcomes: list[Any] = []
        try:
            outcomes = _outcomes(_results(await fn([item for item, _ in taken]), len(taken), name))
        except BaseException as error:
            outcomes = [_Raised(error)] * len(taken)
            if not isinstance(error, (Exception, SystemExit)):
                raise
        finally:
            for (_, future), outcome in zip(taken, outcomes, strict=True):
                if not future.done():  # its workflow may have been cancelled meanwhile
                    future.set_result(outcome)

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
            _cancel_unwanted(task, [future for _, future in taken])

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
            return _value(await future)
        except asyncio.CancelledError:  # it takes no place of another one's
            collected.waiting = [each for each in collected.waiting if each[1] is not future]
            raise

    return call


def _cancel_unwanted(task: asyncio.Task[None], futures: Sequence[asyncio.Future[Any]]) -> None:
    """Cancel the call of a batch once nobody waits for it any more, as a step's own function is cancelled."""
    waiting = len(futures)

    def count(_: object) -> None:
        nonlocal waiting
        waiting -= 1
        if not waiting:
            task.cancel()

    for each in futures:
        each.add_done_callback(count)


class _Batch:
    """Items that are waiting in threads; that of the first one executes them."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self.is_full = threading.Event()
        self.outcomes: concurrent.futures.Future[Sequence[Any]] = concurrent.futures.Future()


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
        try:
            try:
                batch.is_full.wait(seconds)
            finally:
                with lock:
                    if batch in open_batch:
                        open_batch.clear()
            returned = contextvars.Context().run(fn, list(batch.items))  # it belongs to none of the workflows
            batch.outcomes.set_result(_outcomes(_results(returned, len(batch.items), name)))
        except BaseException as error:
            batch.outcomes.set_result([_Raised(error)] * len(batch.items))

    def call(item: Any) -> Any:
        batch, number = join(item)
        if number == 0:
            execute(batch)
        return _value(batch.outcomes.result()[number])

    return call
