"""One attempt at a workflow: who it is, what is already recorded, and which key the next operation gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from uuid import UUID

from sqla_durable.errors import ControlFlow, UnfinishedStepError, UsageError
from sqla_durable.store import Claimed, Fence, Recorded


@dataclass(frozen=True, slots=True)
class Position:
    """The identity of one operation: its key in the workflow, its name, and when it was called."""

    key: str
    name: str
    number: int


class Attempt:
    """One execution of a workflow function.

    A step's key is its name and occurrence, given when the step is called and not when it ends, so that parallel
    steps have the same keys on every replay, whichever is faster. Not thread-safe: the workflow's own code calls it.
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
        return position

    def left(self, position: Position) -> None:
        """Note that an operation ended, whichever way."""
        self._unfinished.pop(position.key, None)

    def recorded(self, position: Position) -> Recorded | None:
        """Give the operation's checkpoint from an earlier attempt."""
        return self._history.get(position.key)

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
