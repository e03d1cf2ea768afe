"""How an operation waits, what wakes it, and how a workflow is suspended.

An operation waits in memory at first, and then as a row: its workflow is suspended. When this process notices what an
operation awaits in memory, it wakes the operation, which then queries the tables. Correctness does not depend on that:
an operation that is not woken polls after a while, or its workflow is suspended.

The loop of waiting itself is `Runtime.wait`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Iterable
from dataclasses import replace
from math import isfinite

from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.store import Awaited

QUIET = 5.0
"""For how many seconds an attempt must have done nothing to be suspended, where code of it may wait for anything."""

MOMENT = 1.0
"""For how many seconds an operation waits in memory before its wait becomes a row."""

CHECK_EVERY = 1.0
"""After how many seconds an operation that waits in memory checks whether the workflow can be suspended."""


@dataclass(frozen=True, slots=True)
class Wait:
    """An operation that waits.

    Attributes:
        until: when it goes on, on the clock of `time.monotonic`; infinite if it has no time.
        in_memory_until: until when it may keep its slot in the worker; a longer wait suspends the workflow.
        awaits: what else it goes on for: one of these is enough.
        polls: whether it polls for what others do, because nothing will wake it.
        waker: wakes it when something that it awaits may be there.
        has_row: whether asyncio's deadlines can be stored in the operation's row; that of a failed try is in use.
    """

    until: float
    in_memory_until: float
    awaits: tuple[Awaited, ...] = ()
    polls: bool = False
    waker: Waker | None = None
    has_row: bool = True

    @property
    def in_memory(self) -> bool:
        """Whether it is to end before the workflow may be suspended."""
        return self.until <= self.in_memory_until

    @property
    def seconds(self) -> float:
        """How many seconds are left."""
        return max(0.0, self.until - time.monotonic())


@dataclass(frozen=True, slots=True)
class Suspension:
    """For how long a workflow is suspended: for `seconds`, if given, or until one of what it `awaits` is there."""

    seconds: float | None
    awaits: tuple[Awaited, ...]

    @classmethod
    def of(cls, waits: Iterable[Wait]) -> Suspension:
        """Return the suspension of a workflow whose operations wait for all of these."""
        given = list(waits)
        soonest = min(each.seconds for each in given)
        return cls(soonest if isfinite(soonest) else None, tuple(awaited for each in given for awaited in each.awaits))

    def within(self, seconds: float) -> Suspension:
        """Return the same, but for no longer than that."""
        return self if self.seconds is not None and self.seconds <= seconds else replace(self, seconds=seconds)


class Waker:
    """Wakes one operation that waits in a thread; `wake` may be called from any thread."""

    def __init__(self) -> None:
        self._woken = threading.Event()

    @property
    def is_woken(self) -> bool:
        """Whether the operation was woken since the last `clear`."""
        return self._woken.is_set()

    def clear(self) -> None:
        """Forget that the operation was woken."""
        self._woken.clear()

    def wake(self) -> None:
        """Wake the operation now, or as soon as it waits."""
        self._woken.set()

    async def wait(self, seconds: float) -> None:
        """Block this thread until the operation is woken, for at most so many seconds."""
        self._woken.wait(seconds)


class Wakers:
    """The wakers of operations, by what they wait for: the payload of a signal's hint, or the id of a workflow."""

    def __init__(self) -> None:
        self._wakers: dict[Hashable, list[Waker]] = {}
        self._lock = threading.Lock()

    def subscribe(self, waker: Waker, names: Iterable[Hashable]) -> None:
        """Wake an operation for each of these names from now on."""
        with self._lock:
            for name in names:
                self._wakers.setdefault(name, []).append(waker)

    def unsubscribe(self, waker: Waker, names: Iterable[Hashable]) -> None:
        """Stop waking it for these."""
        with self._lock:
            for name in names:
                wakers = self._wakers[name]
                wakers.remove(waker)
                if not wakers:
                    del self._wakers[name]

    def wake(self, name: Hashable) -> bool:
        """Wake the operations that wait for this; return whether there are any."""
        woken = tuple(self._wakers.get(name, ()))
        for waker in woken:
            waker.wake()
        return bool(woken)
