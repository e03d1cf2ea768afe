"""`parallel`: the branches of a `def` workflow, each in a thread. Those of an `async def` one are asyncio tasks."""

from __future__ import annotations

import inspect
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from sqla_durable.errors import ArgumentError, UsageError
from sqla_durable.operations.branch import Branch, Branches, name_of
from sqla_durable.operations.outcome import is_own_failure
from sqla_durable.runtime.context import Context, active
from sqla_durable.runtime.runtimes import BlockingRuntime
from sqla_durable.unwinding import ControlFlow, Released

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")
R = TypeVar("R")

_NAME = "sqla-durable branch"


@overload
def parallel(a: Callable[[], A], /, *, max_workers: int | None = None) -> tuple[A]: ...
@overload
def parallel(a: Callable[[], A], b: Callable[[], B], /, *, max_workers: int | None = None) -> tuple[A, B]: ...
@overload
def parallel(
    a: Callable[[], A], b: Callable[[], B], c: Callable[[], C], /, *, max_workers: int | None = None
) -> tuple[A, B, C]: ...
@overload
def parallel(
    a: Callable[[], A], b: Callable[[], B], c: Callable[[], C], d: Callable[[], D], /, *, max_workers: int | None = None
) -> tuple[A, B, C, D]: ...
@overload
def parallel(*functions: Callable[[], R], max_workers: int | None = None) -> tuple[R, ...]: ...


def parallel(*functions: Callable[[], Any], max_workers: int | None = None) -> tuple[Any, ...]:
    """Call functions at the same time, each in a thread, and return what they return, in the order given.

    ```python
    @durable.workflow
    def checkout(order_id: int) -> int:
        paid, parcel = parallel(partial(pay, order_id), partial(pack, order_id))
        return ship(parcel)
    ```

    In a `def` workflow each is a branch: it may call several steps, which are counted within it, `pay/charge`, so that
    no key depends on which branch is faster. A branch is named after its function, and counted in the order given.
    All are executed to their ends, whatever becomes of the others. Outside a workflow and inside a step they are
    called just so, in threads.

    Args:
        *functions: what to call, without arguments: `functools.partial(pay, 7)` or `lambda: pay(7)`.
        max_workers: how many threads there are at most; by default one for each function.

    Raises:
        Exception: that of the first function in the order given that raised one, when all have ended.
        ArgumentError: one of them cannot be called, or `max_workers` is less than 1.
        UsageError: this is an `async def` workflow, or a function is `async def`.
        UsageError: the code is in a thread of its own, which is no branch of the workflow.
    """
    _refuse_arguments(functions, max_workers)
    lines = _lines(functions)
    if lines:
        _Crew(lines, threads=min(max_workers or len(lines), len(lines))).execute()
    return tuple(each.value() for each in lines)


class _Line:
    """One function, and what became of it."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._variables = copy_context()
        self._value: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """Call the function here."""
        try:
            self._value = self._variables.run(self._call)
        except BaseException as error:
            self.error = error

    def value(self) -> Any:
        """Return what the function returned."""
        return self._value

    def _call(self) -> Any:
        value = self._function()
        if inspect.iscoroutine(value):
            value.close()
            raise UsageError(
                f"parallel() calls {self._function!r} in a thread, and it is async def: make it a def, or the workflow "
                "async def with asyncio.gather."
            )
        return value


@dataclass(frozen=True, slots=True)
class _Place:
    """Where branches come from: the branch that calls `parallel`."""

    context: Context
    parent: Branch

    @property
    def branches(self) -> Branches:
        return self.context.attempt.branches


class _BranchLine(_Line):
    """A function that is a branch of a workflow."""

    def __init__(self, function: Callable[[], Any], place: _Place, runtime: BlockingRuntime) -> None:
        super().__init__(function)
        self.place = place
        self.branch = place.parent.open(name_of(function))
        self._runtime = runtime
        self._fork = runtime.fork()

    def run(self) -> None:
        """Call the function here, as the branch."""
        self.place.branches.enter(self.branch, threading.get_ident())
        super().run()
        error, attempt = self.error, self.place.context.attempt
        if isinstance(error, ControlFlow) and not is_own_failure(attempt, error):
            attempt.stop(lambda: error)

    def _call(self) -> Any:
        with ExitStack() as stack:
            stack.callback(self._runtime.join, self._fork)
            stack.enter_context(Context(self._fork).entered())
            return super()._call()


class _Crew:
    """Threads that take one line after another."""

    def __init__(self, lines: Sequence[_Line], *, threads: int) -> None:
        self._lines = lines
        self._todo = deque(lines[threads:])
        self._first = lines[:threads]

    def execute(self) -> None:
        """Execute all, wait for all, and raise the first error."""
        place = self._place_of(self._first[0])
        if place is not None:
            place.branches.begin_threads(
                place.parent, [each.branch for each in self._first if isinstance(each, _BranchLine)]
            )
        try:
            self._execute(place)
        finally:
            if place is not None:
                place.branches.end_threads(place.parent)
        self._raise()

    def _execute(self, place: _Place | None) -> None:
        with ThreadPoolExecutor(len(self._first), thread_name_prefix=_NAME) as pool:
            running = [pool.submit(self._work, each) for each in self._first]
            try:
                wait(running)
            except BaseException:  # of this thread, such as a KeyboardInterrupt: theirs are kept
                self._todo.clear()
                if place is not None:
                    place.context.attempt.stop(Released)
                raise

    def _work(self, line: _Line) -> None:
        following: _Line | None = line
        while following is not None:
            following.run()
            following = self._next()
        place = self._place_of(line)
        if place is not None:
            place.branches.end_thread(place.parent, threading.get_ident())

    def _next(self) -> _Line | None:
        try:
            return self._todo.popleft()
        except IndexError:
            return None

    def _place_of(self, line: _Line) -> _Place | None:
        return line.place if isinstance(line, _BranchLine) else None

    def _raise(self) -> None:
        """Raise what ends the attempt, or else the first error in the order given, which is the same on a replay."""
        errors = [each.error for each in self._lines if each.error is not None]
        for error in sorted(errors, key=lambda each: not isinstance(each, ControlFlow)):
            raise error


def _lines(functions: Sequence[Callable[[], Any]]) -> Sequence[_Line]:
    context = active()
    if context is None or not context.is_workflow_code:
        return [_Line(each) for each in functions]
    runtime = context.runtime
    if not isinstance(runtime, BlockingRuntime):
        raise UsageError(
            f"parallel() was called in workflow {context.attempt.name!r}, which is async def: await "
            "asyncio.gather(...) of coroutines there, or use an asyncio.TaskGroup."
        )
    parent = context.attempt.branches.require_here("parallel()", workflow=context.attempt.name)
    place = _Place(context, parent)
    return [_BranchLine(each, place, runtime) for each in functions]


def _refuse_arguments(functions: Sequence[object], max_workers: int | None) -> None:
    for each in functions:
        if not callable(each):
            raise ArgumentError(
                f"parallel() takes functions and calls them, got {each!r}: pass functools.partial(pay, 7) or "
                "lambda: pay(7) instead of pay(7)."
            )
    if max_workers is not None and max_workers < 1:
        raise ArgumentError(f"max_workers={max_workers!r} of parallel() is less than 1: there would be no thread.")
