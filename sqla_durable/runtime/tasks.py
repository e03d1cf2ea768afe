"""The asyncio tasks that workflow code makes: each is a branch, named and counted when it is made.

A task factory sees them; it is installed on the event loop while workflows are executed there, around whatever factory
there is. What tasks are waiting for, as far as that can be known, is told here too.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Generator, Iterable
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar, cast
from weakref import WeakKeyDictionary

from typing_extensions import override

from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.branch import Branch, Branches, name_of, unwrap_anyio
from sqla_durable.operations.calls import Position, Suspension, Wait
from sqla_durable.operations.parking import LOOK_EVERY, QUIET
from sqla_durable.operations.shielding import ended, see, wait_done
from sqla_durable.operations.workflow import control_flow_in
from sqla_durable.runtime.context import active, workflow_code
from sqla_durable.unwinding import Released

T = TypeVar("T")
Task: TypeAlias = "asyncio.Task[Any]"

_HOLD_WORKFLOWS = {"sqla_durable.tools", "sqla_durable.testing"}
_TURNS = 20  # of the event loop: a task group takes three to cancel, and one in another as many again
_users: WeakKeyDictionary[asyncio.AbstractEventLoop, int] = WeakKeyDictionary()
_starting: dict[object, tuple[Branches, Branch]] = {}  # by coroutine, while its task is being made


def whereabouts() -> object:
    """Give the current task; None in a thread without an event loop, and in a callback of the loop."""
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
        branch = parent if _is_waited_for() else parent.open(name_of(unwrap_anyio(coroutine)))
        _starting[coroutine] = branches, branch
        try:
            task = make()
            _settle_in(coroutine, task)
        finally:
            _starting.pop(coroutine, None)
        task.add_done_callback(branches.leave)
        return _overseen(task)

    def _operation(self, attempt: Attempt, task: Task, coroutine: Any) -> Task:
        """Let a call that got its key before count as ended with its task, which may be cancelled before it starts."""
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
    """Keep from the event loop what asyncio hands to it and not to who awaits a task."""
    try:
        return await coroutine, None
    except (KeyboardInterrupt, SystemExit) as error:
        return None, error


def cancels_met(task: Task) -> int:
    """Return how many cancels a task has met; asyncio counts one that is yet to be thrown into it, too."""
    requested = task.cancelling()
    return requested - 1 if requested and getattr(task, "_must_cancel", False) else requested


def _overseen(task: Task) -> Task:
    """Let asyncio not report signals of the engine's that nobody retrieves: they are meant for the attempt."""
    task.add_done_callback(_see_signal)
    return task


def _see_signal(task: Task) -> None:
    error: BaseException | None = getattr(task, "_exception", None)  # task.exception() would mark the user's errors too
    if error is not None and control_flow_in(error) is not None:
        task.exception()


def _settle_in(coroutine: object, task: Task) -> None:
    found = _starting.pop(coroutine, None)
    if found is not None:
        branches, branch = found
        branches.enter(branch, task)


def is_engines_own(coroutine: Any) -> bool:
    """Return whether this is a call of an operation, whose key was given when it was called."""
    frame = getattr(coroutine, "cr_frame", None)
    module = "" if frame is None else str(frame.f_globals.get("__name__"))
    return module.startswith("sqla_durable.") and ".".join(module.split(".")[:2]) not in _HOLD_WORKFLOWS


def _position_in(coroutine: Any) -> Position | None:
    """Give the identity of the operation that a coroutine of the engine's will carry out."""
    for each in coroutine.cr_frame.f_locals.values():
        found = getattr(each, "position", each)
        if isinstance(found, Position):
            return found
    return None


def _is_waited_for() -> bool:
    """Tell whether the task is made by `asyncio.wait_for`.

    Up to Python 3.11 that makes one and waits for it, where later versions wait in the caller's own task: it is the
    same line of code, and its steps have the same keys with every version.
    """
    frame = inspect.currentframe()
    for _ in range(6):
        if frame is None or frame.f_code is asyncio.wait_for.__code__:
            break
        frame = frame.f_back
    return frame is not None and frame.f_code is asyncio.wait_for.__code__


async def let_new_tasks_begin(attempt: Attempt) -> None:
    """Let tasks that the workflow's code has made begin before one of its operations is over.

    On the first execution most operations take time, and on a replay none: what is cancelled after one must have begun
    in both.
    """
    attempt.branches.has_new = False
    await asyncio.sleep(0)


async def let_replay_catch_up(attempt: Attempt) -> None:
    """Let what is recorded of other branches take effect before a branch executes its first step that is not.

    Recorded outcomes come at once: an error among them that has cancelled this branch before cancels it again here,
    before it executes anew what it was cancelled in.
    """
    branch = attempt.branches.here()
    if attempt.is_replaying and (branch is None or not branch.has_caught_up) and len(attempt.branches.homes) > 1:
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        if branch is not None:
            branch.has_caught_up = True


async def until_cancelled_have_ended(attempt: Attempt) -> None:
    """Wait for the branches and calls that the workflow itself has cancelled, as its last act perhaps."""
    while True:
        left = [*_live(attempt), *_calls(attempt)]
        ending = [each for each in left if each.done() or each.cancelling()]
        if not ending:
            break
        await asyncio.wait(ending)
        await asyncio.sleep(0)  # for their callbacks


def abandon(attempt: Attempt) -> None:
    """Cancel what an attempt leaves behind: nobody awaits it any more, and nothing of it can be recorded."""
    here = asyncio.current_task()
    carriers: set[Any] = {each for each in attempt.homes_in_calls if isinstance(each, asyncio.Task)}
    for task in carriers.union(_live(attempt), _calls(attempt)):
        if task is not here and not task.done():
            for each in (task, *_futures_of(task)):
                each.add_done_callback(see)
            task.cancel()


def _futures_of(task: Task) -> list[asyncio.Future[Any]]:
    """Return the futures that get a task's outcome, of `gather` and `shield`; asyncio has no public way to ask."""
    callbacks: list[tuple[Any, Any]] = getattr(task, "_callbacks", None) or []
    cells = [cell for callback, _ in callbacks for cell in getattr(callback, "__closure__", None) or ()]
    return [each.cell_contents for each in cells if _holds_future(each)]


def _holds_future(cell: Any) -> bool:
    try:
        return isinstance(cell.cell_contents, asyncio.Future)
    except ValueError:  # it is empty
        return False


def parking_of_tasks(attempt: Attempt, wait: Wait, *, timers: Iterable[float]) -> Suspension | None:
    """Return how an `async def` workflow can be suspended now.

    At once when every branch is seen to wait; where one may await something else, after a quiet while.

    Args:
        wait: what the operation waits for.
        timers: in how many seconds the timers of asyncio are due. The workflow is suspended until the first of them, if
            the operation's row can keep their deadlines.
    """
    due_in = min(timers, default=None)
    if due_in is not None and (due_in <= LOOK_EVERY or not wait.has_row):
        return None
    parking = attempt.begin_suspension(quiet=QUIET, idle=lambda: are_idle(attempt))
    return parking if parking is None or due_in is None else parking.within(due_in)


def are_idle(attempt: Attempt) -> bool:
    """Tell whether every branch is in an operation, or waits for branches and operations and for nothing else.

    Only what can be known counts: a branch that awaits anything else may have something to do.
    """
    carriers, homes = attempt.homes_in_calls, attempt.branches.homes
    known = carriers | homes.keys()
    return all(home in carriers or _waits_for(home, known) for home in homes)


def _waits_for(home: object, known: set[object]) -> bool:
    """Tell whether a task waits for known ones; asyncio has no public way to ask what it waits for."""
    waiter: Any = getattr(home, "_fut_waiter", None)
    if waiter is None or waiter.done():
        return False
    if waiter in known:
        return True
    gathered: Any = getattr(waiter, "_children", None)
    if gathered is not None:
        return all(each.done() or each in known for each in gathered)
    if not inspect.iscoroutine(cast("Task", home).get_coro()):
        return False
    last = _innermost(cast("Task", home).get_coro())
    if last.cr_code is asyncio.wait_for.__code__:
        return last.cr_frame.f_locals.get("fut") in known
    if last.cr_code is wait_done.__code__:  # a saga, for a compensation
        return last.cr_frame.f_locals.get("future") in known
    if isinstance(last.cr_frame.f_locals.get("self"), asyncio.TaskGroup):
        group: Any = last.cr_frame.f_locals["self"]
        return all(each.done() or each in known for each in getattr(group, "_tasks", [None]))
    return False


def _innermost(coroutine: Any) -> Any:
    while inspect.iscoroutine(coroutine.cr_await):
        coroutine = coroutine.cr_await
    return coroutine


def _live(attempt: Attempt) -> list[Task]:
    branches = attempt.branches
    return [cast("Task", home) for home, each in branches.homes.items() if each is not branches.root]


def _calls(attempt: Attempt) -> list[Task]:
    return [cast("Task", each) for each in list(attempt.branches.calls)]
