"""One call of a durable operation: its identity in the workflow, how it waits, and what a step reports meanwhile."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import isfinite

from sqla_durable.definitions.checks import unescape_key
from sqla_durable.definitions.limits import Watch
from sqla_durable.operations.arrivals import Waker
from sqla_durable.store import Awaited


@dataclass(frozen=True, slots=True)
class Position:
    """The identity of one operation.

    Attributes:
        key: its key in the workflow, with what the user chose escaped; see `escape_key`.
        name: its name, escaped likewise.
        number: its place in the order of calls.
    """

    key: str
    name: str
    number: int

    @property
    def shown(self) -> str:
        """The key as it is shown to users."""
        return unescape_key(self.key)


@dataclass(frozen=True, slots=True)
class Wait:
    """An operation that waits.

    Attributes:
        until: when it goes on, on the clock of `time.monotonic`; infinite if it has no time.
        in_memory_until: until when it may hold its place in the worker; what is longer is to be parked.
        awaits: what else it goes on for: one of these is enough.
        looks: whether it looks again and again for what others do.
        waker: wakes it when something that it awaits may be there.
        has_row: whether the operation's row can keep what outlives this attempt: that of a failed try has its own.
    """

    until: float
    in_memory_until: float
    awaits: tuple[Awaited, ...] = ()
    looks: bool = False
    waker: Waker | None = None
    has_row: bool = True

    @property
    def in_memory(self) -> bool:
        """Whether it is to end before the workflow may be suspended."""
        return self.until <= self.in_memory_until

    @property
    def seconds(self) -> float:
        """How long it still waits."""
        return max(0.0, self.until - time.monotonic())


@dataclass(frozen=True, slots=True)
class Suspension:
    """How a workflow is to be parked: until what is due first, in `seconds`, or until one of what it `awaits`."""

    seconds: float | None
    awaits: tuple[Awaited, ...]

    @classmethod
    def of(cls, waits: Iterable[Wait]) -> Suspension:
        """Give how to park what waits for all of these."""
        given = list(waits)
        soonest = min(each.seconds for each in given)
        return cls(soonest if isfinite(soonest) else None, tuple(awaited for each in given for awaited in each.awaits))

    def within(self, seconds: float) -> Suspension:
        """Return the same, but for no longer than that."""
        return self if self.seconds is not None and self.seconds <= seconds else replace(self, seconds=seconds)


class Progress:
    """What a step reports of itself while it is executed, in all tries of one attempt.

    Attributes:
        details: the last that it has reported, as JSON text, in an earlier attempt perhaps.
        watch: the limits of the try that is being made, if it has some.
    """

    def __init__(self, details: str | None) -> None:
        self.details = details
        self.watch: Watch | None = None
        self._sent_at = float("-inf")
        self._unsent = False

    @property
    def unsent(self) -> bool:
        """Whether there is something newer than what was sent."""
        return self._unsent

    def report(self, details: str | None, *, interval: float) -> bool:
        """Note details; tell whether they are to be sent now, `interval` seconds after the last ones.

        Raises:
            StepTimeoutError: the try has been silent for too long, or its time is over.
        """
        if self.watch is not None:
            self.watch.hear()
        self.details = self.details if details is None else details
        self._unsent = True
        return time.monotonic() - self._sent_at >= interval

    @contextmanager
    def sending(self) -> Generator[None]:
        """Send the newest details; if that is cut off, they are not sent yet."""
        self._sent_at = time.monotonic()
        self._unsent = False
        try:
            with nullcontext() if self.watch is None else self.watch.writing():
                yield
        except BaseException:
            self._unsent = True
            raise
