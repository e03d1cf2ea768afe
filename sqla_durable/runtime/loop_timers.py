"""The timers of asyncio that workflow code arms: `asyncio.timeout`, `wait_for`, `call_later`, and the scopes of anyio.

All of them are armed by `call_at` and `call_later` of the event loop, which are replaced on the loop while workflows
are executed there. A timer has an identity in its branch, as an operation has. So its deadline can outlive the attempt,
and what fired before fires again in a replay.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from typing_extensions import override

from sqla_durable.errors import UsageError
from sqla_durable.operations.attempt import TIMERS, Attempt
from sqla_durable.operations.branch import Branch
from sqla_durable.operations.calls import Position
from sqla_durable.operations.history import FIRED
from sqla_durable.operations.outcome import CancelledCall, checkpoint_of
from sqla_durable.operations.runtime import Recorder
from sqla_durable.operations.shielding import ended
from sqla_durable.runtime.context import ACTIVE, Context, workflow_code
from sqla_durable.store import Checkpoint, Connectable, steps
from sqla_durable.store.timers import now as database_now

TURNS = 20
"""Turns of the event loop in which no recorded outcome is returned: after that nothing is being replayed."""

_REMEMBERED = 100  # fired timers of an attempt; one operation is cancelled by few
_users: WeakKeyDictionary[asyncio.AbstractEventLoop, int] = WeakKeyDictionary()


class Timer(asyncio.TimerHandle):
    """A timer of a workflow's own code.

    Attributes:
        key: its identity in the workflow.
        due: when it fires, on the clock of the event loop; its `when` is the time that the code has asked for.
        is_due: whether that time has come.
    """

    def __init__(self, timers: Timers, key: str, branch: Branch, when: float, due: float, given: _Given) -> None:
        super().__init__(when, given.callback, given.args, timers.loop, given.context)
        self._given = given
        self.key, self.branch, self.due, self.is_due = key, branch, due, False
        self._timers = timers
        self._inner = timers.loop.call_at(due, timers.expire, self, context=contextvars.Context())

    @override
    def cancel(self) -> None:
        """Cancel it, as the code does that has armed it."""
        self.disarm()
        asyncio.Handle.cancel(self)  # TimerHandle would count it among those that the loop itself has

    def disarm(self) -> None:
        """Keep it from firing by itself."""
        self._inner.cancel()
        self._timers.forget(self)

    def fire(self) -> None:
        """Call its callback now, as the event loop would."""
        self.disarm()
        given, loop = self._given, self._timers.loop
        try:
            given.context.run(given.callback, *given.args)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            message = f"Exception in callback {given.callback!r}"
            loop.call_exception_handler({"message": message, "exception": error, "handle": self})


class _Given:
    """What a timer is to call."""

    def __init__(
        self, callback: Callable[..., object], args: tuple[Any, ...], context: contextvars.Context | None
    ) -> None:
        self.callback, self.args = callback, args
        self.context = contextvars.copy_context() if context is None else context


class Timers:
    """The timers of one attempt.

    On a replay a timer does not fire while recorded outcomes are still being returned, nor while a call that was
    cancelled waits for its cancel, unless it is the one that cancelled it.

    Attributes:
        fired_count: how many timers have fired.
        unfired: the keys of those that fired in earlier attempts, and have not fired yet in this one.
        is_checking: whether those that are due wait for a replay to end before they fire.
    """

    def __init__(self, attempt: Attempt, recorder: Recorder) -> None:
        self.loop = asyncio.get_running_loop()
        self._attempt = attempt
        self._recorder = recorder
        self._firings = attempt.fired_timers if attempt.is_replaying else {}
        self.unfired = dict.fromkeys(self._firings)
        self._until_fired: list[asyncio.Future[None]] = []
        self._armed: dict[str, Timer] = {}
        self._counts: defaultdict[str, int] = defaultdict(int)
        self._deadlines: Mapping[str, float] = {}
        self._ahead: dict[Branch, float] = {}
        self._fired: deque[str] = deque(maxlen=_REMEMBERED)
        self.fired_count = 0
        self._firing: Branch | None = None
        self._deciding = 0
        self._waiting: list[CancelledCall] = []
        self._replayed = self._seen = self._quiet = 0
        self.is_checking = False

    @property
    def ahead(self) -> float:
        """The seconds by which this branch is ahead of the clock, because a timer fired early."""
        return self._ahead.get(self._branch, 0.0)

    @property
    def _branch(self) -> Branch:
        branches = self._attempt.branches
        return branches.here() or self._firing or branches.root

    def arm(self, when: float, given: _Given) -> Timer:
        """Arm a timer; `when` is on the clock of the code that is executed here."""
        branch = self._branch
        self._counts[branch.path] += 1
        key = f"{branch.path}#{self._counts[branch.path]}"
        timer = Timer(self, key, branch, when, self._deadlines.get(key, when - self.ahead), given)
        self._armed[key] = timer
        if timer.due <= self._now():
            self.expire(timer)
        elif self._waiting:
            self._check()
        return timer

    def forget(self, timer: Timer) -> None:
        """Forget a timer that has fired, or is not to fire any more."""
        self._armed.pop(timer.key, None)

    def remember(self, seconds: Mapping[str, float]) -> None:
        """Fire timers in so many seconds, by key, when the code has armed them."""
        now = self._now()
        self._deadlines = {key: now + each for key, each in seconds.items()}

    @property
    def seconds(self) -> dict[str, float]:
        """In how many seconds timers are due, by key."""
        now = self._now()
        return {key: each.due - now for key, each in self._armed.items()}

    def fired_since(self, mark: int) -> tuple[str, ...]:
        """Return which timers have fired since then."""
        fired = list(self._fired)
        return tuple(fired[max(0, len(fired) - (self.fired_count - mark)) :])

    def expire(self, timer: Timer) -> None:
        """Fire a timer as soon as it may."""
        timer.is_due = True
        self._check()

    async def settled(self) -> None:
        """Return when everything that is due has fired, as far as it may."""
        while self.is_checking:  # noqa: ASYNC110 (turns of the loop are counted, no time)
            await asyncio.sleep(0)

    def unfired_before(self, call: str) -> Generator[tuple[str, CancelledCall]]:
        """Yield the timers that fired in an earlier attempt while this call was open, and have not fired yet."""
        for key in list(self.unfired):
            order, calls = self._firings[key]
            if call in calls and key in self.unfired:
                yield key, CancelledCall(order, (key,))

    async def fired(self, key: str, *, within: float) -> bool:
        """Wait until a timer has fired, for so many seconds at most; return whether it has."""
        if key in self.unfired:
            waiter = self.loop.create_future()
            self._until_fired.append(waiter)
            await asyncio.wait([waiter], timeout=within)
        return key not in self.unfired

    async def caught_up(self) -> None:
        """Return when what a timer has led to is replayed, too."""
        seen, turns = self._replayed, 0
        while turns < TURNS:
            await asyncio.sleep(0)
            seen, turns = (seen, turns + 1) if seen == self._replayed else (self._replayed, 0)

    def give_up(self, key: str) -> None:
        """Stop waiting for a timer that today's code does not arm."""
        self.unfired.pop(key, None)

    def replayed(self) -> None:
        """Note that a recorded outcome is returned."""
        self._replayed += 1

    @contextmanager
    def deciding(self) -> Generator[None]:
        """Keep all timers from firing meanwhile."""
        self._deciding += 1
        try:
            yield
        finally:
            self._deciding -= 1
            self._check()

    @contextmanager
    def cancelling(self, cancelled: CancelledCall) -> Generator[None]:
        """Keep all timers from firing but those that fired while a call was open: the code is to see the same again."""
        self._waiting.append(cancelled)
        self._check()
        try:
            yield
        finally:
            self._waiting.remove(cancelled)
            self.replayed()
            self._check()

    def let_fire_next(self) -> None:
        """Fire the timer that has been due for longest, although it may be another one than the first time."""
        due = self._due()
        if due and not self._deciding:
            self.loop.call_soon(self._fire, due[0], context=contextvars.Context())

    def abandon(self) -> None:
        """Disarm all."""
        for each in list(self._armed.values()):
            each.cancel()

    def _now(self) -> float:
        return contextvars.Context().run(self.loop.time)  # as it is for everybody else

    def _check(self) -> None:
        if not self.is_checking and self._to_fire():
            self.is_checking, self._quiet = True, 0
            self.loop.call_soon(self._turn, context=contextvars.Context())

    def _turn(self) -> None:
        """Wait until nothing is being replayed; then fire what may."""
        if self._seen != self._replayed:
            self._seen, self._quiet = self._replayed, 0
        self._quiet += 1
        if self._attempt.is_replaying and self._quiet < TURNS:
            self.loop.call_soon(self._turn)
            return
        self.is_checking = False
        for each in self._to_fire():
            self._fire(each)

    def _to_fire(self) -> list[Timer]:
        if self._deciding:
            return []
        if not self._waiting:
            return self._due()
        first = min(self._waiting, key=lambda each: each.order)  # what was cancelled first, has had its consequences
        return [each for key, each in self._armed.items() if key in first.fired]

    def _due(self) -> list[Timer]:
        return sorted((each for each in self._armed.values() if each.is_due), key=lambda each: each.due)

    def _fire(self, timer: Timer) -> None:
        if timer.key not in self._armed:  # one that fired just before has disarmed it
            return
        early = timer.when() - self._now()
        if early > self._ahead.get(timer.branch, 0.0):
            self._ahead[timer.branch] = early
        self._fired.append(timer.key)
        self.fired_count += 1
        self._record(timer.key)
        self._firing = timer.branch
        try:
            timer.fire()
        finally:
            self._firing = None
            waiting, self._until_fired = self._until_fired, []
            for each in waiting:
                if not each.done():
                    each.set_result(None)

    def _record(self, key: str) -> None:
        """Record which operations are open when a timer fires: on a replay they are over after it, as they are now."""
        attempt = self._attempt
        self.unfired.pop(key, None)
        if key in self._firings or attempt.is_stopped or not (calls := attempt.open_calls):
            return
        self._firings[key] = order, _ = attempt.history_check.count, calls
        firing = {"timer": key, "number": len(self._firings), "order": order, "open": calls}
        position = Position(f"{FIRED}:{key}", FIRED, max(1, order))
        self._recorder.note(checkpoint_of(attempt, position, output=json.dumps(firing)))


def keep_due(connectable: Connectable, *, checkpoint: Checkpoint, due_in: dict[str, float]) -> None:
    """Keep in the row of an operation that waits when timers are due, which is in so many seconds, by key."""
    now = database_now(connectable).timestamp()
    details = json.dumps({TIMERS: {key: now + seconds for key, seconds in due_in.items()}})
    steps.keep_details(connectable, checkpoint=checkpoint, details=details)


async def carried_through(context: Context, call: Awaitable[Any]) -> None:
    """Await a call of an operation, whatever the workflow's code cancels meanwhile: timers fire when it is over.

    It may follow on a cancel itself, as what a saga undoes; and a scope of anyio cancels again and again.
    """
    task = asyncio.ensure_future(call)
    timers = _timers_of(context)
    assert timers is not None  # noqa: S101 (the workflow is being executed)
    with timers.deciding():
        await ended(task, on_cancel=lambda: context.attempt.is_stopped and task.cancel())
    task.result()


@contextmanager
def watching() -> Generator[None]:
    """Replace the running event loop's timers, where workflow code arms them.

    Raises:
        UsageError: the loop does not let its methods be replaced.
    """
    loop = asyncio.get_running_loop()
    if not _users.get(loop):
        _install(loop)
    _users[loop] = _users.get(loop, 0) + 1
    try:
        yield
    finally:
        _users[loop] -= 1
        if not _users[loop]:
            _uninstall(loop)


class _Watch:
    """The methods of an event loop that see the timers of workflow code, and those that they replace."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.replaced = {name: each for name, each in vars(loop).items() if name in _REPLACED}
        self._call_at, self._call_later, self._time = loop.call_at, loop.call_later, loop.time

    def call_at(
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        timers = _timers_in(context)
        if timers is None:
            return self._call_at(when, callback, *args, context=context)
        return timers.arm(when, _Given(callback, args, context))

    def call_later(
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        timers = _timers_in(context)
        if timers is None:
            return self._call_later(delay, callback, *args, context=context)
        return timers.arm(self.time() + delay, _Given(callback, args, context))

    def time(self) -> float:
        if ACTIVE.get() is None:  # the event loop itself asks twice a turn
            return self._time()
        timers = _timers_in(None)
        return self._time() + (0.0 if timers is None else timers.ahead)


_REPLACED = ("call_at", "call_later", "time")


def _install(loop: asyncio.AbstractEventLoop) -> None:
    try:
        watch = _Watch(loop)
        for name in _REPLACED:
            setattr(loop, name, getattr(watch, name))
    except (AttributeError, TypeError) as error:
        raise UsageError(
            f"the event loop {loop!r} does not let its timers be seen, and a timeout of asyncio in a workflow would be "
            "lost while that waits: use asyncio's own event loop, or uvloop."
        ) from error


def _uninstall(loop: asyncio.AbstractEventLoop) -> None:
    for name in _REPLACED:
        watch = getattr(vars(loop).get(name), "__self__", None)
        if isinstance(watch, _Watch):  # a foreign one that is wrapped around ours stays
            delattr(loop, name)
            vars(loop).update({name: watch.replaced[name]} if name in watch.replaced else {})


def _timers_in(given: contextvars.Context | None) -> Timers | None:
    if ACTIVE.get() is None:
        return None
    context = workflow_code(given)
    return None if context is None else _timers_of(context)


def _timers_of(context: Context) -> Timers | None:
    return getattr(context.runtime, "timers", None)  # an AsyncRuntime has them, once it has called its workflow
