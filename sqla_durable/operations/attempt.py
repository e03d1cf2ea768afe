"""One attempt at a workflow: who it is, what is already recorded, and which key the next operation gets."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Collection, Generator, Hashable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from uuid import UUID

from sqla_durable.definitions.classes import DEFAULT as DEFAULT_ERRORS
from sqla_durable.definitions.classes import KnownErrors
from sqla_durable.definitions.interceptors import NO_INTERCEPTORS, Interceptors
from sqla_durable.definitions.retry import Tries
from sqla_durable.errors import DecodingError, HistoryLimitError, UnfinishedStepError, UsageError
from sqla_durable.operations.branch import Branches
from sqla_durable.operations.changes import FIRED, Visits
from sqla_durable.operations.reports import Progress
from sqla_durable.operations.suspending import Suspension, Wait, Waker, Wakers, refusal
from sqla_durable.store import Claimed, Fence, Recorded
from sqla_durable.unwinding import CallRefused, Cancelling, ContinuedAsNew, ControlFlow, Suspended

TIMERS = "#timers"
"""The name of the details in which an operation that waits keeps the deadlines of asyncio's timers."""

DEFAULT_HISTORY_LIMIT = 50_000
"""How many operations one workflow may call, unless its `Durable` says otherwise."""


@dataclass(frozen=True, slots=True)
class Position:
    """The identity of one operation: its key in the workflow, its name, and its place in the order of calls."""

    key: str
    name: str
    number: int


_compensating: ContextVar[Attempt | None] = ContextVar("compensating", default=None)
"""The attempt whose saga is undoing what was done in its block, for the code that does so."""


class Attempt:
    """One execution of a workflow function.

    A step's key is its name and occurrence in its branch, given when the step is called and not when it ends, so that
    parallel steps have the same keys on every replay, whichever is faster. Callable from any thread: branches visit,
    and the steps that they have called wait and leave, at the same time.

    Attributes:
        branches: the live branches of the workflow's own code.
        has_children: whether it has started a child.
        holding: the keys under which maps have started children and do not let all of them go at once.
        joined: those of the maps that have an outcome, which hold none any more.
        timers: those of asyncio that the workflow's code has armed; see `loop_timers`.
        cancelled_calls: keys of operations that the workflow's code has cancelled in this attempt.
        warns_of_refusals: whether a call that is refused at the attempt's end is logged; only the first one is.
        is_replaying: whether an earlier attempt has recorded anything.
        unfinished: by key, the task or thread that is in an operation that was called and has not ended.
        undecodable: by key, what is wrong with recorded outcomes of steps that today's annotations do not fit.

    Args:
        claimed: the workflow, and its history.
        wakers: wake operations for signals that come, and workflows that end, while they wait in memory.
    """

    def __init__(self, claimed: Claimed, *, wakers: Wakers | None = None) -> None:
        self.fence: Fence = claimed.fence
        self.name: str = claimed.name
        self.number, self.input = claimed.attempt, claimed.input
        self.is_child: bool = claimed.is_child
        self.undoes: bool = claimed.is_cancelling
        self.overdue: str | None = claimed.overdue
        self.headers: Mapping[str, str] = claimed.headers
        self.has_children = False
        self.holding: set[str] = set()
        self.joined: set[str] = set()
        self.interceptors: Interceptors = NO_INTERCEPTORS
        self.history_limit = DEFAULT_HISTORY_LIMIT
        self.errors: KnownErrors = DEFAULT_ERRORS
        self.secrets: tuple[bytes, ...] = ()
        self._history: Mapping[str, Recorded] = claimed.history
        self._learned: dict[str, Recorded] = {}  # outcomes that this attempt has read again
        self.cancelled_calls: set[str] = set()
        self.timers: object = None
        self.visits = Visits(claimed.history)
        self.branches = Branches()
        self._places: dict[str, object] = {}
        self._keys: set[str] = set()
        self.unfinished: dict[str, object] = {}
        self.undecodable: dict[str, DecodingError] = {}
        self.is_replaying = bool(claimed.history)
        self._steps: dict[str, Tries] = {}  # by key, those that are being executed
        self._waits: dict[str, Wait] = {}
        self._listening: set[Waker] = set()
        self._wakers = wakers
        self._lock = self.branches.lock
        self._progress: dict[str, Progress] = {}
        self._active_at = time.monotonic()
        self.warns_of_refusals = True
        self._stop: Callable[[], ControlFlow] | None = Cancelling if claimed.is_cancelling else None

    @property
    def workflow_id(self) -> UUID:
        """The id of the workflow's record."""
        return self.fence.workflow_id

    @property
    def may_hold(self) -> bool:
        """Whether children of a map may wait for others to end: also of one in its history, not called again yet."""
        recorded = {key for key, each in self._history.items() if _starts_several(each)}
        return bool((self.holding | recorded) - self.joined)

    @property
    def may_have_notices(self) -> bool:
        """Whether rows of the engine's own may be left to it: of children, or of an earlier wait."""
        return self.has_children or self.is_replaying

    @property
    def deadlines(self) -> dict[str, float]:
        """When timers of asyncio are due with which the workflow was suspended, by key, in the database's seconds."""
        found: dict[str, float] = {}
        for each in self._history.values():
            if each.details is not None and TIMERS in each.details:
                found |= json.loads(each.details)[TIMERS]
        return found

    @property
    def fired_timers(self) -> dict[str, tuple[int, list[str]]]:
        """The timers of asyncio that fired in earlier attempts while operations were open, in that order, by key.

        Each with how many operations had been called before, and the keys of those that were open.
        """
        found = (json.loads(each.output or "{}") for each in self._history.values() if each.name == FIRED)
        return {each["timer"]: (each["order"], each["open"]) for each in sorted(found, key=lambda each: each["number"])}

    @property
    def open_calls(self) -> list[str]:
        """The keys of the operations that were called and have no outcome yet."""
        with self._lock:
            found = {key: self._history.get(key) for key in self.unfinished}
            return [key for key, each in found.items() if each is None or not each.status.finished]

    def visit(self, name: str, place: object, *, key: str | None = None) -> Position:
        """Give the identity of the operation that the workflow calls now, in the branch that the code is in.

        An explicit key is the operation's identity in the workflow, whatever branch it is called in.

        Raises:
            UsageError: an explicit key is used twice, two functions share a step name, or the code is in no branch.
            CallRefused: the code was told that the attempt ends, and the operation is not recorded.
        """
        branch = self.branches.require_here(f"step {name!r}", workflow=self.name)
        with self._lock:
            if self._places.setdefault(name, place) != place:
                raise UsageError(
                    f"two functions are called under the step name {name!r} in workflow {self.name!r}: a replay could "
                    "take one's outcome for the other's. Give one of them another name."
                )
            if self.visits.count >= self.history_limit:
                raise HistoryLimitError(
                    f"workflow {self.name!r} has called {self.history_limit:,} operations, its limit: every replay "
                    "reads all of them. Begin anew with continue_as_new(...), give parts of it to children, or raise "
                    "Durable(history_limit=...)."
                )
            identity = branch.key(name, explicit=key)
            if identity in self._keys:
                raise UsageError(
                    f"the step key {identity!r} is used twice in workflow {self.name!r}: change one of them."
                )
            self.refuse_after_signal(identity)
            self._keys.add(identity)
            position = Position(identity, name, self.visits.visit(identity, name))
            self.unfinished[position.key] = self.branches.home()
            self._active_at = time.monotonic()
            return position

    def carried_by(self, position: Position, home: object) -> None:
        """Note which task or thread an operation is performed in, wherever it was called."""
        with self._lock:
            self.unfinished[position.key] = home

    def operation_ended(self, position: Position) -> None:
        """Note that an operation ended, whichever way."""
        with self._lock:
            self.unfinished.pop(position.key, None)
            self._steps.pop(position.key, None)
            self._active_at = time.monotonic()

    def executes(self, position: Position, tries: Tries) -> None:
        """Note that a step is being executed; `operation_ended` ends that."""
        with self._lock:
            self._steps[position.key] = tries

    def executed_steps(self) -> dict[str, Tries]:
        """Return the tries of the steps that are being executed now, and not waiting, by key."""
        with self._lock:
            return {key: each for key, each in self._steps.items() if key not in self._waits}

    def recorded(self, position: Position) -> Recorded | None:
        """Return the operation's outcome, as an earlier attempt has recorded it, or as it was read again."""
        found = self._history.get(position.key)
        return found if found is not None and found.status.finished else self._learned.get(position.key)

    def learn(self, outcome: Recorded) -> None:
        """Note an outcome that stands in the database, whoever has recorded it."""
        self._learned[outcome.key] = outcome

    def tried(self, position: Position) -> Recorded | None:
        """Give what earlier attempts recorded of an operation that has no outcome yet."""
        found = self._history.get(position.key)
        return None if found is None or found.status.finished else found

    def progress(self, position: Position) -> Progress:
        """Give what a step has reported of itself, and reports."""
        tried = self.tried(position)
        return self._progress.setdefault(position.key, Progress(None if tried is None else tried.details))

    def wait(self, position: Position, wait: Wait) -> None:
        """Note that an operation waits."""
        with self._lock:
            self._waits[position.key] = wait

    def go_on(self, position: Position) -> None:
        """Note that an operation waits no longer."""
        with self._lock:
            self._waits.pop(position.key, None)

    @contextmanager
    def listening(self, waker: Waker, names: Collection[Hashable]) -> Generator[Waker]:
        """Wake an operation when one of these may be there, or the attempt is to end."""
        wakers = self._wakers
        with self._lock:
            self._listening.add(waker)
        if wakers is not None:
            wakers.subscribe(waker, names)
        try:
            yield waker
        finally:
            if wakers is not None:
                wakers.unsubscribe(waker, names)
            with self._lock:
                self._listening.discard(waker)

    @property
    def listens(self) -> bool:
        """Whether an operation waits for what others do."""
        return bool(self._listening)

    def wake_waiting(self) -> None:
        """Wake the operations that wait for what others do, so that they check whether the workflow is suspended."""
        for waker in tuple(self._listening):
            waker.wake()

    @property
    def executing(self) -> bool:
        """Whether a step that the workflow has called is being executed now, and not waiting."""
        with self._lock:
            return any(key not in self._waits for key in self.unfinished)

    @property
    def carriers(self) -> set[object]:
        """The tasks or threads that are in an operation now."""
        with self._lock:
            return set(self.unfinished.values())

    def begin_suspending(self, *, quiet: float, idle: Callable[[], bool]) -> Suspension | None:
        """Stop the attempt and return how the workflow is suspended; None: it stays in memory.

        Only when every operation that it has called waits, and all of them for long enough: this ends the others.

        Args:
            quiet: for how many seconds the workflow must have called nothing, and nothing of it must have ended, where
                it is not known to be idle.
            idle: returns whether all of the workflow's own code waits for its operations, and for nothing else.
        """
        with self._lock:
            waits = [self._waits.get(key) for key in self.unfinished]
            if self.stopped or any(each is None or each.in_memory for each in waits):
                return None
            if not idle() and time.monotonic() - self._active_at < quiet:
                return None
            self.stop(Suspended)
            return Suspension.of(each for each in waits if each is not None)

    def cancel_suspension(self) -> None:
        """Let the attempt go on: what was to be recorded with its suspension was refused."""
        if self._stop is Suspended:
            self._stop = None

    def is_quiet(self, *, quiet: float, idle: Callable[[], bool]) -> bool:
        """Return whether nothing but time, or what others do, can continue the workflow; see `begin_suspending`."""
        with self._lock:
            waits = all(key in self._waits for key in self.unfinished)
            return waits and idle() and time.monotonic() - self._active_at >= quiet

    def idempotency_key(self, position: Position) -> str:
        """Give a text that is the same on every execution of this step, and of no other step."""
        return f"{self.workflow_id}/{position.key}"

    def stop(self, signal: Callable[[], ControlFlow]) -> None:
        """Let the attempt end at its next operation, with this signal; the first one given counts."""
        self._stop = self._stop or signal
        self.wake_waiting()

    @contextmanager
    def compensating(self) -> Generator[None]:
        """Let operations be executed although the workflow is being cancelled: those that undo what it did."""
        cancelling, outer = self._stop is Cancelling, _compensating.set(self)
        self._stop = None if cancelling else self._stop
        try:
            yield
        finally:
            _compensating.reset(outer)
            self._stop = self._stop or (Cancelling if cancelling else None)

    @property
    def is_compensating(self) -> bool:
        """Whether the code that asks is undoing what was done in a saga's block; a branch beside that is not."""
        return _compensating.get() is self

    @property
    def stopped(self) -> bool:
        """Whether the attempt was told to end."""
        return self._stop is not None

    @property
    def ending(self) -> ControlFlow | None:
        """The signal with which the attempt ends, if it was told to."""
        return None if self._stop is None else self._stop()

    @property
    def cancelling(self) -> bool:
        """Whether the attempt ends because its workflow was cancelled, and is to undo what it did."""
        return self._stop is Cancelling

    @property
    def signal_is_delivered(self) -> bool:
        """Whether the code that asks has got the signal that ends the attempt, and goes on or is being unwound."""
        if self._stop is None:
            return False
        branch = self.branches.here()
        if branch is not None and branch.signal is self._stop:
            return True
        unwinding = sys.exception()
        if isinstance(unwinding, ControlFlow):  # another one, where a saga undoes
            return isinstance(unwinding, (CallRefused, type(self._stop())))
        return unwinding is not None and not isinstance(unwinding, Exception)

    def deliver_signal(self, signal: BaseException) -> None:
        """Note that the code that calls this gets a signal: the attempt is over."""
        if isinstance(signal, ControlFlow):
            self.stop(lambda: signal)
        branch = self.branches.here()
        if branch is not None:
            branch.signal = self._stop

    def refuse_after_signal(self, key: str) -> None:
        """Refuse a call that is not recorded by code that has got the signal that ends the attempt.

        Raises:
            CallRefused: it has. The first time in an attempt, that is logged.
        """
        if self._stop is None:
            return
        found = self._history.get(key)
        if (
            (found is None or not found.status.finished)
            and self.signal_is_delivered
            and (ending := self.ending) is not None
        ):
            warn, self.warns_of_refusals = self.warns_of_refusals, False
            raise refusal(
                ending,
                call=key,
                workflow=self.name,
                workflow_id=self.workflow_id,
                attempt=self.number,
                warn=warn,
            )

    @property
    def is_suspending(self) -> bool:
        """Whether the attempt ends because its workflow is suspended."""
        return self._stop is Suspended

    @property
    def suspended_by_engine(self) -> bool:
        """Return whether the engine has suspended the workflow or continued it as new, and not code that raised so."""
        return self._stop in (Suspended, ContinuedAsNew)

    def proceed(self) -> None:
        """Raise the signal with which the attempt is to end, if there is one."""
        if self._stop is not None:
            raise self._stop()

    def refuse_unfinished(self) -> None:
        """Refuse to finish a workflow that leaves steps behind.

        Raises:
            UnfinishedStepError: a step was called and not awaited, or a branch of the workflow is still running.
        """
        steps = list(self.unfinished)
        if steps:
            raise UnfinishedStepError(
                f"workflow {self.name!r} returned while {', '.join(map(repr, steps))} was not finished: "
                "await it where it is called (steps, the sync ones too, waits, sleeps, events). What stood behind it "
                "has been executed already.",
                steps=steps,
            )
        branches = self.branches.left_open
        if branches:
            raise UnfinishedStepError(
                f"workflow {self.name!r} returned while {', '.join(map(repr, branches))} was still running beside it, "
                "and what it would have done is lost: await every task that the workflow makes.",
                steps=branches,
            )


def _starts_several(recorded: Recorded) -> bool:
    return recorded.name.startswith("start:") and "," in (recorded.output or "")
