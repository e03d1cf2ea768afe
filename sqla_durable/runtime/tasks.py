"""The asyncio tasks that workflow code makes: each is a branch, named and counted when it is made.

A task factory sees them; it is installed on the event loop while workflows are executed there, around whatever factory
there is. Whether all tasks of a workflow wait for its operations is found out here too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator, Iterable
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar, cast
from weakref import WeakKeyDictionary

from typing_extensions import override

from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.branch import Branch, Branches, name_of
from sqla_durable.operations.calls import Position
from sqla_durable.operations.shielding import ended, mark_retrieved, wait_done
from sqla_durable.operations.suspending import CHECK_EVERY, QUIET, Suspension, Wait
from sqla_durable.operations.workflow import control_flow_in
from sqla_durable.runtime.asyncio_internals import (
    error_of,
    futures_of,
    is_in_wait_for,
    module_of,
    unwrap_anyio,
    variables_of,
    waits_only_for,
)
from sqla_durable.runtime.context import active, workflow_code
from sqla_durable.runtime.loop_timers import watching
from sqla_durable.unwinding import Released

T = TypeVar("T")
Task: TypeAlias = "asyncio.Task[Any]"

_HOLD_WORKFLOWS = {"sqla_durable.tools", "sqla_durable.testing"}
_TURNS = 20  # of the event loop: a task group takes three to cancel, and one in another as many again
_users: WeakKeyDictionary[asyncio.AbstractEventLoop, int] = WeakKeyDictionary()
_starting: dict[object, tuple[Branches, Branch]] = {}  # by coroutine, while its task is being made


def current_task() -> object:
    """Return the current task; None in a thread without an event loop, and in a callback of the loop."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return None
    if task is not None and _starting:  # a task that starts eagerly is executed before it is given to anybody
        _settle_in(task.get_coro(), task)
    return task


@contextmanager
def branching() -> Generator[None]:
    """Make the tasks of workflow code branches, on the running event loop."""
    loop = asyncio.get_running_loop()
    if not isinstance(loop.get_task_factory(), _Factory):
        loop.set_task_factory(cast("Any", _Factory(loop.get_task_factory())))
    _users[loop] = _users.get(loop, 0) + 1
    try:
        yield
    finally:
        _users[loop] -= 1
        ours = loop.get_task_factory()
        if not _users[loop] and isinstance(ours, _Factory):  # a foreign one that is wrapped around ours stays
            loop.set_task_factory(ours.inner)


@contextmanager
def hosting() -> Generator[None]:
    """Let `async def` workflows be executed on the running event loop: see the tasks and timers that they make."""
    with branching(), watching():
        yield


class _Factory:
    """A task factory that counts the tasks of workflow code, and leaves all others alone."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Task:
        context = workflow_code(options.get("context"))
        if context is None or coroutine in _starting:
            return self._make(loop, coroutine, options)
        code = unwrap_anyio(coroutine)
        if is_engines_own(code):
            return self._operation(context.attempt, self._make(loop, coroutine, options), code)
        parent = context.attempt.branches.here()
        if parent is None:
            return _overseen(self._make(loop, coroutine, options))
        return self._branch(context.attempt.branches, parent, coroutine, lambda: self._make(loop, coroutine, options))

    def _make(self, loop: asyncio.AbstractEventLoop, coroutine: Any, options: dict[str, Any]) -> Task:
        if self.inner is None:
            return asyncio.Task(coroutine, loop=loop, **options)
        return cast("Task", self.inner(loop, coroutine, **options))

    def _branch(self, branches: Branches, parent: Branch, coroutine: Any, make: Callable[[], Task]) -> Task:
        branch = parent if is_in_wait_for() else parent.open(name_of(unwrap_anyio(coroutine)))
        _starting[coroutine] = branches, branch
        try:
            task = make()
            _settle_in(coroutine, task)
        finally:
            _starting.pop(coroutine, None)
        task.add_done_callback(branches.leave)
        return _overseen(task)

    def _operation(self, attempt: Attempt, task: Task, coroutine: Any) -> Task:
        """Let an operation end with its task at the latest, which may be cancelled before it starts."""
        position = _position_in(coroutine)
        if position is not None:
            task.add_done_callback(lambda _: attempt.end_call(position))
        attempt.branches.enter_call(task)
        task.add_done_callback(attempt.branches.leave_call)
        return _overseen(task)


class AttemptTask(asyncio.Task[T]):
    """The task that an attempt's own code begins in: cancelled from outside, the attempt ends.

    A cancel by the workflow's own code, a timeout of asyncio's for example, is that code's affair.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, T], attempt: Attempt, *, name: str | None = None) -> None:
        super().__init__(coroutine, loop=asyncio.get_running_loop(), name=name)
        self._attempt = attempt

    @override
    def cancel(self, msg: Any = None) -> bool:
        """Cancel it."""
        context = active()
        if context is None or context.attempt is not self._attempt:
            self._attempt.stop(Released)
        return super().cancel(msg)


async def in_attempt_task(coroutine: Coroutine[Any, Any, T], attempt: Attempt) -> T:
    """Await a coroutine in an `AttemptTask`; cancelled meanwhile, it is cancelled from outside and waited for."""
    task = AttemptTask(_caught(coroutine), attempt)
    try:
        await wait_done(task)
    except asyncio.CancelledError:
        task.cancel()
        await ended(task, on_cancel=task.cancel)
        raise
    value, ends_process = task.result()
    if ends_process is not None:
        raise ends_process
    return cast("T", value)


async def _caught(coroutine: Coroutine[Any, Any, T]) -> tuple[T | None, BaseException | None]:
    """Return an error that asyncio would raise in the event loop, and not where the task is awaited."""
    try:
        return await coroutine, None
    except (KeyboardInterrupt, SystemExit) as error:
        return None, error


def _overseen(task: Task) -> Task:
    """Mark the engine's exceptions as retrieved, so that asyncio does not log them; return the task."""
    task.add_done_callback(_mark_unwinding_retrieved)
    return task


def _mark_unwinding_retrieved(task: Task) -> None:
    error = error_of(task)  # task.exception() would mark the user's errors too
    if error is not None and control_flow_in(error) is not None:
        task.exception()


def _settle_in(coroutine: object, task: Task) -> None:
    found = _starting.pop(coroutine, None)
    if found is not None:
        branches, branch = found
        branches.enter(branch, task)


def is_engines_own(coroutine: Any) -> bool:
    """Return whether this is a call of an operation, whose key was given when it was called."""
    module = module_of(coroutine)
    return module.startswith("sqla_durable.") and ".".join(module.split(".")[:2]) not in _HOLD_WORKFLOWS


def _position_in(coroutine: Any) -> Position | None:
    """Return the identity of the operation that a coroutine of the engine's performs."""
    for each in variables_of(coroutine):
        found = getattr(each, "position", each)
        if isinstance(found, Position):
            return found
    return None


async def let_new_tasks_begin(attempt: Attempt) -> None:
    """Let tasks that the workflow's code has made begin before one of its operations is over.

    On the first execution most operations take time, and on a replay none: what is cancelled after one must have begun
    in both.
    """
    attempt.branches.has_new = False
    await asyncio.sleep(0)


async def let_replay_catch_up(attempt: Attempt) -> None:
    """Let recorded outcomes of other branches take effect before a branch executes its first step that has none.

    A replay returns recorded outcomes at once. An error among them that cancelled this branch before must do so again
    before the branch repeats the operation in which it was cancelled.
    """
    branch = attempt.branches.here()
    if attempt.is_replaying and (branch is None or not branch.has_caught_up) and len(attempt.branches.homes) > 1:
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        if branch is not None:
            branch.has_caught_up = True


async def until_cancelled_have_ended(attempt: Attempt) -> None:
    """Wait for the branches and calls that the workflow itself has cancelled, perhaps just before it returned."""
    while not attempt.branches.only_root_is_left:
        left = [*_live(attempt), *_calls(attempt)]
        ending = [each for each in left if each.done() or each.cancelling()]
        if not ending:
            break
        await asyncio.wait(ending)
        await asyncio.sleep(0)  # for their callbacks


def abandon(attempt: Attempt) -> None:
    """Cancel the tasks that an attempt leaves behind: nothing of them can be recorded any more."""
    if not attempt.unfinished and attempt.branches.only_root_is_left:
        return
    here = asyncio.current_task()
    carriers: set[Any] = {each for each in attempt.homes_in_calls if isinstance(each, asyncio.Task)}
    for task in carriers.union(_live(attempt), _calls(attempt)):
        if task is not here and not task.done():
            for each in (task, *futures_of(task)):
                each.add_done_callback(mark_retrieved)
            task.cancel()


def begin_suspension(attempt: Attempt, wait: Wait, *, timers: Iterable[float]) -> Suspension | None:
    """Stop an attempt at an `async def` workflow if all of its code waits, and return how it is suspended.

    At once when every branch is seen to wait; where one may await something else, after a quiet while.

    Args:
        attempt: the attempt.
        wait: what the operation waits for.
        timers: in how many seconds the timers of asyncio are due. The workflow is suspended until the first of them, if
            the operation's row can keep their deadlines.
    """
    due_in = min(timers, default=None)
    if due_in is not None and (due_in <= CHECK_EVERY or not wait.has_row):
        return None
    suspension = attempt.begin_suspension(quiet=QUIET, idle=lambda: are_idle(attempt))
    return suspension if suspension is None or due_in is None else suspension.within(due_in)


def are_idle(attempt: Attempt) -> bool:
    """Return whether every branch is in an operation, or waits for branches and operations and for nothing else.

    Only what can be known counts: a branch that awaits anything else may have something to do.
    """
    carriers, homes = attempt.homes_in_calls, attempt.branches.homes
    known = carriers | homes.keys()
    # A saga waits for a compensation by `wait_done`.
    return all(home in carriers or waits_only_for(home, known, functions=(wait_done,)) for home in homes)


def _live(attempt: Attempt) -> list[Task]:
    branches = attempt.branches
    return [cast("Task", home) for home, each in branches.homes.items() if each is not branches.root]


def _calls(attempt: Attempt) -> list[Task]:
    return [cast("Task", each) for each in list(attempt.branches.calls)]
