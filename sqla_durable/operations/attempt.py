"""One attempt at a workflow: what is recorded already, which operations it has called, and whether it is to end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Collection, Generator, Hashable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from uuid import UUID

from sqla_durable.definitions.checks import escape_key, unescape_key
from sqla_durable.definitions.json_values import MARK
from sqla_durable.definitions.log import Log
from sqla_durable.definitions.payloads import Place
from sqla_durable.definitions.registry import DurableOptions
from sqla_durable.definitions.retry import Tries
from sqla_durable.errors import DecodingError, HistoryLimitError, UsageError
from sqla_durable.operations.branch import Branches, no_branch
from sqla_durable.operations.calls import Position, Progress
from sqla_durable.operations.history import FIRED, HistoryCheck
from sqla_durable.operations.suspending import Suspension, Wait, Waker, Wakers
from sqla_durable.store import Claimed, Fence, Recorded
from sqla_durable.unwinding import (
    CallRefused,
    Cancelling,
    ContinuedAsNew,
    ControlFlow,
    Suspended,
    refusal,
)

TIMERS = "#timers"
"""The key in the details of a waiting operation under which the due times of asyncio's timers are stored."""

DEFAULT_HISTORY_LIMIT = 50_000
"""How many operations one workflow may call, unless its `Durable` says otherwise."""

log = Log("sqla_durable.workflow")

_NO_OPTIONS = DurableOptions()

_compensating: ContextVar[Attempt | None] = ContextVar("compensating", default=None)
"""The attempt whose saga is compensating, for the code that is executed to compensate."""


class Attempt:
    """One execution of a workflow function.

    A step's key is its name and occurrence in its branch, assigned when the step is called and not when it ends, so
    that parallel steps have the same keys on every replay, whichever is faster. Thread-safe: branches call operations,
    and operations wait and end, at the same time.

    Attributes:
        options: the options of the `Durable` that the workflow belongs to.
        branches: the live branches of the workflow's own code.
        warns_of_refusal: whether the next refused call is logged; only the first of an attempt is.
        is_replaying: whether an earlier attempt has recorded anything.
        unfinished: by key, the task or thread that executes a call that has not ended.
        undecodable: by key, what is wrong with recorded outcomes of steps that today's annotations do not fit.

    Args:
        claimed: the workflow, and its history.
        wakers: wake operations that wait in memory for signals, and for workflows that end.
    """

    def __init__(self, claimed: Claimed, *, wakers: Wakers | None = None) -> None:
        self.fence: Fence = claimed.fence
        self.name: str = claimed.name
        self.number, self.input = claimed.attempt, claimed.input
        self.is_child: bool = claimed.is_child
        self.is_undoing: bool = claimed.is_cancelling
        self.deadline_message: str | None = claimed.overdue
        self.headers: Mapping[str, str] = claimed.headers
        self._has_children = False
        self._limiting_maps: set[str] = set()  # start keys of maps that limit how many of their children are active
        self._joined_maps: set[str] = set()  # start keys of maps that have an outcome: they hold no children any more
        self.options = _NO_OPTIONS
        self._others = () if claimed.origin is None else (claimed.origin,)
        self._history: Mapping[str, Recorded] = claimed.history
        self._learned: dict[str, Recorded] = {}  # outcomes that this attempt has read from the database since
        self._cancelled_calls: set[str] = set()
        self.history_check = HistoryCheck(claimed.history)
        self.branches = Branches()
        self._places: dict[str, object] = {}
        self._keys: set[str] = set()
        self.unfinished: dict[str, object] = {}
        self.undecodable: dict[str, DecodingError] = {}
        self.is_replaying = bool(claimed.history)
        self._steps: dict[str, Tries] = {}  # by key, the tries of steps that are being executed
        self._waits: dict[str, Wait] = {}
        self._listening: set[Waker] = set()
        self._wakers = wakers
        self._lock = self.branches.lock
        self._progress: dict[str, Progress] = {}
        self._active_at = time.monotonic()
        self.warns_of_refusal = True
        self._stop: Callable[[], ControlFlow] | None = Cancelling if claimed.is_cancelling else None

    @property
    def workflow_id(self) -> UUID:
        """The id of the workflow's record."""
        return self.fence.workflow_id

    @property
    def may_have_deferred(self) -> bool:
        """Whether children may be deferred: those of a map that is called now, or recorded and not called yet."""
        recorded = {key for key, each in self._history.items() if _starts_several(each)}
        return bool((self._limiting_maps | recorded) - self._joined_maps)

    @property
    def may_have_notices(self) -> bool:
        """Whether the inbox may hold notices of the engine: of children, or of an earlier wait."""
        return self._has_children or self.is_replaying

    @property
    def timers_due_at(self) -> dict[str, float]:
        """When the asyncio timers with which the workflow was suspended are due, by key, in the database's seconds."""
        found: dict[str, float] = {}
        for each in self._history.values():
            if each.details is not None and TIMERS in each.details:
                found |= json.loads(each.details)[TIMERS]
        return found

    @property
    def fired_timers(self) -> dict[str, tuple[int, list[str]]]:
        """The asyncio timers that fired in earlier attempts while operations were open, by key, in the order of firing.

        Each has the number of operations called before, and the keys of those that were open.
        """
        found = (json.loads(each.output or "{}") for each in self._history.values() if each.name == FIRED)
        return {each["timer"]: (each["order"], each["open"]) for each in sorted(found, key=lambda each: each["number"])}

    @property
    def open_calls(self) -> list[str]:
        """The keys of the operations that were called and have no outcome yet."""
        with self._lock:
            found = {key: self._history.get(key) for key in self.unfinished}
            return [key for key, each in found.items() if each is None or not each.status.finished]

    def begin_call(self, name: str, place: object, *, key: str | None = None) -> Position:
        """Register the call of an operation in the branch that the code is in, and return its identity.

        An explicit key is the operation's identity in the workflow, whatever branch it is called in. Names and keys are
        escaped, so that they may contain what marks occurrences and branches.

        Raises:
            UsageError: an explicit key is used twice, two functions share a step name, or the code is in no branch.
            HistoryLimitError: the workflow has called as many operations as it may.
            CallRefused: the code is being unwound, and the operation is not recorded.
        """
        home = self.branches.home()
        branch = self.branches.at(home)
        if branch is None:
            raise no_branch(f"step {name!r}", self.name)
        with self._lock:
            if self._places.setdefault(name, place) != place:
                raise UsageError(
                    f"two functions are called under the step name {name!r} in workflow {self.name!r}: a replay could "
                    "return the outcome of one for the other. Use another name for one of them."
                )
            limit = self.options.history_limit or DEFAULT_HISTORY_LIMIT
            if self.history_check.count >= limit:
                raise HistoryLimitError(
                    f"workflow {self.name!r} has called {limit:,} operations, its limit: every replay "
                    "reads all of them. Continue as new with continue_as_new(...), move parts of it to children, or "
                    "raise Durable(history_limit=...)."
                )
            escaped = escape_key(name)
            identity = branch.key(escaped, explicit=None if key is None else escape_key(key))
            if identity in self._keys:
                raise UsageError(
                    f"the step key {unescape_key(identity)!r} is used twice in workflow {self.name!r}: change one of "
                    "them."
                )
            if self._stop is not None:
                self.refuse_when_unwound(identity)
            self._keys.add(identity)
            position = Position(identity, escaped, self.history_check.add_call(identity, escaped))
            self.unfinished[identity] = home
            self._active_at = time.monotonic()
            return position

    def continue_call_here(self, position: Position, home: object) -> None:
        """Note that the call is executed in this task or thread, wherever it was made."""
        if self.unfinished.get(position.key) is not home:
            with self._lock:
                self.unfinished[position.key] = home

    def end_call(self, position: Position) -> None:
        """Note that the call of an operation ended, with or without an outcome."""
        with self._lock:
            self.unfinished.pop(position.key, None)
            self._steps.pop(position.key, None)
            self._active_at = time.monotonic()

    def begin_step(self, position: Position, tries: Tries) -> None:
        """Note that a step is being executed, until `end_call`."""
        with self._lock:
            self._steps[position.key] = tries

    def executing_steps(self) -> dict[str, Tries]:
        """Return the tries of the steps that are being executed now and are not waiting, by key."""
        with self._lock:
            return {key: each for key, each in self._steps.items() if key not in self._waits}

    def recorded(self, position: Position) -> Recorded | None:
        """Return the recorded outcome of an operation: an earlier attempt's, or one that was read since."""
        found = self._history.get(position.key)
        return found if found is not None and found.status.finished else self._learned.get(position.key)

    def place(self, field: str) -> Place:
        """Return the place of one of the workflow's values."""
        return Place(str(self.workflow_id), field, self._others)

    def seal(self, text: str, kind: str, key: str = "") -> str:
        """Return the JSON text to store of that of a value, by the codecs of its `Durable`."""
        payloads = self.options.payloads
        return payloads.seal(text, self.place(f"{kind} {key}".rstrip())) if payloads.codecs else text

    def open(self, text: str, kind: str, key: str = "") -> str:
        """Return the JSON text of a value from that which is stored.

        Raises:
            DecodingError: it was changed, or is another value.
            PayloadKeyError: this process has no key for it.
        """
        payloads = self.options.payloads
        if payloads.is_required or text.startswith(MARK):
            return payloads.open(text, self.place(f"{kind} {key}".rstrip()))
        return text

    def note_outcome(self, outcome: Recorded) -> None:
        """Note an outcome that was read from the database, whoever recorded it."""
        self._learned[outcome.key] = outcome

    def unfinished_record(self, position: Position) -> Recorded | None:
        """Return what earlier attempts recorded of an operation that has no outcome yet."""
        found = self._history.get(position.key)
        return None if found is None or found.status.finished else found

    def progress(self, position: Position) -> Progress:
        """Return the object that holds what a step reports while it is executed."""
        tried = self.unfinished_record(position)
        details = None if tried is None or tried.details is None else self.open(tried.details, "details", position.key)
        return self._progress.setdefault(position.key, Progress(details))

    def has_unsent_report(self, position: Position) -> bool:
        """Return whether a step has reported something that was not sent."""
        reported = self._progress.get(position.key)
        return reported is not None and reported.unsent

    def note_child(self) -> None:
        """Note that the workflow starts a child."""
        self._has_children = True

    def note_limiting_map(self, start_at: Position) -> None:
        """Note that a map, which starts its children there, limits how many of them are active at once."""
        self._limiting_maps.add(start_at.key)

    def note_joined_map(self, start_key: str) -> None:
        """Note that a map has an outcome, and so holds no children any more."""
        self._joined_maps.add(start_key)

    def note_undecodable(self, position: Position, error: DecodingError) -> None:
        """Note that today's annotations do not fit the recorded outcome of a step."""
        self.undecodable[position.key] = error

    def note_cancelled_call(self, position: Position) -> None:
        """Note that the workflow's code has cancelled a call in this attempt."""
        self._cancelled_calls.add(position.key)

    def is_cancelled_call(self, position: Position) -> bool:
        """Return whether the workflow's code has cancelled a call in this attempt."""
        return position.key in self._cancelled_calls

    def begin_wait(self, position: Position, wait: Wait) -> None:
        """Note that an operation begins to wait."""
        with self._lock:
            self._waits[position.key] = wait

    def end_wait(self, position: Position) -> None:
        """Note that an operation no longer waits."""
        with self._lock:
            self._waits.pop(position.key, None)

    @contextmanager
    def listening(self, waker: Waker, names: Collection[Hashable]) -> Generator[Waker]:
        """Wake an operation when one of these is announced, or when the attempt is to end."""
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
    def has_listeners(self) -> bool:
        """Whether an operation waits for a signal, an update, a callback or another workflow."""
        return bool(self._listening)

    def wake_listeners(self) -> None:
        """Wake the operations that wait in memory for something external: each checks whether it may wait on."""
        for waker in tuple(self._listening):
            waker.wake()

    @property
    def is_executing(self) -> bool:
        """Whether a call of the workflow is being executed now and is not waiting."""
        with self._lock:
            return any(key not in self._waits for key in self.unfinished)

    @property
    def homes_in_calls(self) -> set[object]:
        """The tasks and threads that execute calls now."""
        with self._lock:
            return set(self.unfinished.values())

    def begin_suspension(self, *, quiet: float, idle: Callable[[], bool]) -> Suspension | None:
        """Return how to suspend the workflow, and stop the attempt; None: it stays in memory.

        Only when every operation that it has called waits, and all of them for long enough: suspending ends the calls.

        Args:
            quiet: for how many seconds the workflow must have called nothing, and no call of it have ended, where
                `idle` is false.
            idle: returns whether all of the workflow's own code waits for its operations, and for nothing else.
        """
        with self._lock:
            waits = [self._waits.get(key) for key in self.unfinished]
            if self.is_stopped or any(each is None or each.in_memory for each in waits):
                return None
            if not idle() and time.monotonic() - self._active_at < quiet:
                return None
            self.stop(Suspended)
            return Suspension.of(each for each in waits if each is not None)

    def undo_suspension(self) -> None:
        """Undo `begin_suspension`: the database refused what was to be recorded with it."""
        if self._stop is Suspended:
            self._stop = None

    def is_quiet(self, *, quiet: float, idle: Callable[[], bool]) -> bool:
        """Return whether every call waits and the code is idle, as for `begin_suspension`."""
        with self._lock:
            waits = all(key in self._waits for key in self.unfinished)
            return waits and idle() and time.monotonic() - self._active_at >= quiet

    def idempotency_key(self, position: Position) -> str:
        """Return a text that is the same on every execution of this step, and different for every other step."""
        return f"{self.workflow_id}/{position.key}"

    def stop(self, ending: Callable[[], ControlFlow]) -> None:
        """Let the next operation raise what ends the attempt; later calls change nothing."""
        self._stop = self._stop or ending
        self.wake_listeners()

    @contextmanager
    def compensating(self) -> Generator[None]:
        """Allow operations although the workflow is being cancelled: compensations are executed here."""
        cancelling, outer = self._stop is Cancelling, _compensating.set(self)
        self._stop = None if cancelling else self._stop
        try:
            yield
        finally:
            _compensating.reset(outer)
            self._stop = self._stop or (Cancelling if cancelling else None)

    @property
    def is_compensating(self) -> bool:
        """Whether the calling code is executed to compensate; other branches are not."""
        return _compensating.get() is self

    @property
    def is_stopped(self) -> bool:
        """Whether the attempt is to end."""
        return self._stop is not None

    @property
    def ending(self) -> ControlFlow | None:
        """What the next operation raises to end the attempt, if it is to end."""
        return None if self._stop is None else self._stop()

    @property
    def is_cancelling(self) -> bool:
        """Whether the attempt ends because its workflow was cancelled, and its sagas are to compensate."""
        return self._stop is Cancelling

    @property
    def is_unwound(self) -> bool:
        """Whether the code of this branch has been unwound, or is being unwound, because the attempt ends."""
        if self._stop is None:
            return False
        branch = self.branches.here()
        if branch is not None and branch.unwound_by is self._stop:
            return True
        unwinding = sys.exception()
        if isinstance(unwinding, ControlFlow):  # a different one while a saga compensates
            return isinstance(unwinding, (CallRefused, type(self._stop())))
        return unwinding is not None and not isinstance(unwinding, Exception)

    def note_ending(self, ending: BaseException) -> None:
        """Note what is raised in the code of this branch to unwind it, and stop the attempt."""
        if isinstance(ending, ControlFlow):
            self.stop(lambda: ending)
        branch = self.branches.here()
        if branch is not None:
            branch.unwound_by = self._stop

    def refuse_when_unwound(self, key: str) -> None:
        """Refuse a call that is not recorded, if the code has been unwound because the attempt ends.

        Raises:
            CallRefused: it has. The first refusal of an attempt is logged.
        """
        if self._stop is None:
            return
        found = self._history.get(key)
        if (found is None or not found.status.finished) and self.is_unwound and (ending := self.ending) is not None:
            call = unescape_key(key)
            error = refusal(ending, call=call, workflow=self.name, workflow_id=self.workflow_id, attempt=self.number)
            if self.warns_of_refusal:
                self.warns_of_refusal = False
                log.warning("%s", error)
            raise error

    @property
    def is_suspended(self) -> bool:
        """Whether the attempt ends because its workflow is suspended."""
        return self._stop is Suspended

    @property
    def suspended_by_engine(self) -> bool:
        """Whether the engine suspended the workflow or continued it as new, and not code that raised the same class."""
        return self._stop in (Suspended, ContinuedAsNew)

    def raise_if_stopped(self) -> None:
        """Raise what ends the attempt, if it is to end."""
        if self._stop is not None:
            raise self._stop()

    def refuse_unfinished(self) -> None:
        """Refuse to finish a workflow whose calls or branches have not ended.

        Raises:
            UsageError: a call was not awaited, or a branch is still running.
        """
        if not self.unfinished and self.branches.only_root_is_left:
            return
        calls = list(map(unescape_key, self.unfinished))
        if calls:
            raise UsageError(
                f"workflow {self.name!r} returned with unfinished calls: {', '.join(map(repr, calls))}. Await each "
                "where it is called, steps that are sync too: the code after it has run already."
            )
        branches = self.branches.left_open
        if branches:
            raise UsageError(
                f"workflow {self.name!r} returned with branches still running: {', '.join(map(repr, branches))}. Await "
                "every task that the workflow creates: what these would have done is lost."
            )


def _starts_several(recorded: Recorded) -> bool:
    return recorded.name.startswith("start:") and "," in (recorded.output or "")
