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
    """How an operation waits.

    Attributes:
        until: when it continues, on the clock of `time.monotonic`; infinite if only something else ends the wait.
        in_memory_until: until when it may keep its slot in the worker; for a longer wait the workflow is suspended.
        awaits: what else ends the wait; one of these is enough.
        polls: whether it ends early, to look again for what no notice announces.
        waker: wakes it when something that it awaits may have arrived.
        has_row: whether the operation's row can store details for the next attempt; that of a failed try cannot.
    """

    until: float
    in_memory_until: float
    awaits: tuple[Awaited, ...] = ()
    polls: bool = False
    waker: Waker | None = None
    has_row: bool = True

    @property
    def in_memory(self) -> bool:
        """Whether it ends while the workflow may still stay in memory."""
        return self.until <= self.in_memory_until

    @property
    def seconds(self) -> float:
        """How many seconds are left."""
        return max(0.0, self.until - time.monotonic())


@dataclass(frozen=True, slots=True)
class Suspension:
    """How a workflow is suspended: for `seconds`, or without a limit, and until one of `awaits` arrives."""

    seconds: float | None
    awaits: tuple[Awaited, ...]

    @classmethod
    def of(cls, waits: Iterable[Wait]) -> Suspension:
        """Return the suspension of a workflow in which all of these wait."""
        given = list(waits)
        soonest = min(each.seconds for each in given)
        return cls(soonest if isfinite(soonest) else None, tuple(awaited for each in given for awaited in each.awaits))

    def within(self, seconds: float) -> Suspension:
        """Return the same suspension, for at most so many seconds."""
        return self if self.seconds is not None and self.seconds <= seconds else replace(self, seconds=seconds)


class Progress:
    """What a step reports while it is executed, in all tries of one attempt.

    Attributes:
        details: the details that it reported last, as JSON text, perhaps in an earlier attempt.
        watch: the time limits of the current try, if it has any.
    """

    def __init__(self, details: str | None) -> None:
        self.details = details
        self.watch: Watch | None = None
        self._sent_at = float("-inf")
        self._unsent = False

    @property
    def unsent(self) -> bool:
        """Whether there is a report that was not sent."""
        return self._unsent

    def report(self, details: str | None, *, interval: float) -> bool:
        """Note details; return whether to send them now, because the last were sent `interval` seconds ago or more.

        Raises:
            StepTimeoutError: the try sent no heartbeat for too long, or its time is over.
        """
        if self.watch is not None:
            self.watch.note_heartbeat()
        self.details = self.details if details is None else details
        self._unsent = True
        return time.monotonic() - self._sent_at >= interval

    @contextmanager
    def sending(self) -> Generator[None]:
        """Mark the newest details as sent while the block sends them; if it fails, they are unsent again."""
        self._sent_at = time.monotonic()
        self._unsent = False
        try:
            with nullcontext() if self.watch is None else self.watch.writing():
                yield
        except BaseException:
            self._unsent = True
            raise
