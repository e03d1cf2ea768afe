"""One attempt at a workflow: who it is, what is already recorded, and which key the next operation gets."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from uuid import UUID

from sqla_durable.errors import ControlFlow, Suspended, UnfinishedStepError, UsageError
from sqla_durable.store import Claimed, Fence, Recorded


@dataclass(frozen=True, slots=True)
class Position:
    """The identity of one operation: its key in the workflow, its name, and when it was called."""

    key: str
    name: str
    number: int


@dataclass(frozen=True, slots=True)
class Wait:
    """An operation that waits.

    Attributes:
        until: when it goes on, on the clock of `time.monotonic`.
        in_memory_until: until when it may hold its place in the worker; what is longer is to be parked.
    """

    until: float
    in_memory_until: float

    @property
    def seconds(self) -> float:
        """How long it still waits."""
        return max(0.0, self.until - time.monotonic())


class Progress:
    """What a step reports of itself while it is executed, in all tries of one attempt.

    Attributes:
        details: the last that it has reported, as JSON text, in an earlier attempt perhaps.
    """

    def __init__(self, details: str | None) -> None:
        self.details = details
        self._sent_at = float("-inf")
        self._unsent = False

    @property
    def unsent(self) -> bool:
        """Whether there is something newer than what was sent."""
        return self._unsent

    def report(self, details: str | None, *, interval: float) -> bool:
        """Note details; tell whether they are to be sent now, `interval` seconds after the last ones."""
        self.details = self.details if details is None else details
        self._unsent = True
        return time.monotonic() - self._sent_at >= interval

    def sent(self) -> None:
        """Note that the newest details are on their way."""
        self._sent_at = time.monotonic()
        self._unsent = False


class Attempt:
    """One execution of a workflow function.

    A step's key is its name and occurrence, given when the step is called and not when it ends, so that parallel
    steps have the same keys on every replay, whichever is faster. The workflow's own code visits, in one thread; the
    steps that it has called may wait and leave in others.
    """

    def __init__(self, claimed: Claimed) -> None:
        self.fence: Fence = claimed.fence
        self.name: str = claimed.name
        self.number: int = claimed.attempt
        self.input: str = claimed.input
        self._history: Mapping[str, Recorded] = claimed.history
        self._occurrences: Counter[str] = Counter()
        self._places: dict[str, object] = {}
        self._keys: set[str] = set()
        self._visited = 0
        self._unfinished: dict[str, None] = {}
        self._waits: dict[str, Wait] = {}
        self._progress: dict[str, Progress] = {}
        self._parking = threading.Lock()
        self._active_at = time.monotonic()
        self._stop: Callable[[], ControlFlow] | None = None

    @property
    def workflow_id(self) -> UUID:
        """The id of the workflow's record."""
        return self.fence.workflow_id

    def visit(self, name: str, place: object, *, key: str | None = None) -> Position:
        """Give the identity of the operation that the workflow calls now.

        Raises:
            UsageError: an explicit key is used twice, or two functions share a step name.
        """
        if self._places.setdefault(name, place) != place:
            raise UsageError(
                f"two functions are called under the step name {name!r} in workflow {self.name!r}: a replay could "
                "take one's outcome for the other's. Give one of them another name."
            )
        self._visited += 1
        self._occurrences[key or name] += 1
        position = Position(self._key(name, key), name, self._visited)
        if position.key in self._keys:
            raise UsageError(
                f"the step key {position.key!r} is used twice in workflow {self.name!r}: change one of them."
            )
        self._keys.add(position.key)
        self._unfinished[position.key] = None
        self._active_at = time.monotonic()
        return position

    def left(self, position: Position) -> None:
        """Note that an operation ended, whichever way."""
        self._unfinished.pop(position.key, None)
        self._active_at = time.monotonic()

    def recorded(self, position: Position) -> Recorded | None:
        """Give the operation's outcome from an earlier attempt."""
        found = self._history.get(position.key)
        return found if found is not None and found.status.finished else None

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
        self._waits[position.key] = wait

    def go_on(self, position: Position) -> None:
        """Note that an operation waits no longer."""
        self._waits.pop(position.key, None)

    @property
    def executing(self) -> bool:
        """Whether a step that the workflow has called is being executed now, and not waiting."""
        return any(key not in self._waits for key in list(self._unfinished))

    def begin_parking(self, *, quiet: float) -> float | None:
        """Give the seconds for which the workflow can be parked now, once; None: it stays in memory.

        Only when every operation that it has called waits, and all of them for long enough: parking ends the others.

        Args:
            quiet: for how many seconds the workflow must have called nothing, and nothing of it must have ended.
        """
        with self._parking:
            if time.monotonic() - self._active_at < quiet:
                return None
            waits = [self._waits.get(key) for key in list(self._unfinished)]
            if self.stopped or any(each is None or each.until <= each.in_memory_until for each in waits):
                return None
            self.stop(Suspended)
            return min(each.seconds for each in waits if each is not None)

    def end_parking(self) -> None:
        """Take back that the workflow is parked: what was to be recorded with it was refused."""
        if self._stop is Suspended:
            self._stop = None

    def idempotency_key(self, position: Position) -> str:
        """Give a text that is the same on every execution of this step, and of no other step."""
        return f"{self.workflow_id}/{position.key}"

    def stop(self, signal: Callable[[], ControlFlow]) -> None:
        """Let the attempt end at its next operation, with this signal; the first one given counts."""
        self._stop = self._stop or signal

    @property
    def stopped(self) -> bool:
        """Whether the attempt was told to end."""
        return self._stop is not None

    @property
    def parked(self) -> bool:
        """Whether the attempt ends because its workflow is parked."""
        return self._stop is Suspended

    def proceed(self) -> None:
        """Raise the signal with which the attempt is to end, if there is one."""
        if self._stop is not None:
            raise self._stop()

    def refuse_unfinished(self) -> None:
        """Refuse to finish a workflow that leaves steps behind.

        Raises:
            UnfinishedStepError: a step was called and not awaited, or is still running in another task.
        """
        if self._unfinished:
            steps = list(self._unfinished)
            raise UnfinishedStepError(
                f"workflow {self.name!r} returned while {', '.join(map(repr, steps))} was not finished: "
                "await every step, the sync ones too.",
                steps=steps,
            )

    def _key(self, name: str, explicit: str | None) -> str:
        occurrence = self._occurrences[explicit or name]
        if occurrence == 1:
            return explicit or name
        if explicit is None:
            return f"{name}#{occurrence}"
        raise UsageError(f"the step key {explicit!r} is used twice in workflow {self.name!r}: each needs its own.")
