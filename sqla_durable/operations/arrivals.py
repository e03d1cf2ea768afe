"""Wakes operations that wait in memory: for signals, updates, outcomes of callbacks, and ends of other workflows.

Whatever in this process learns of one wakes the operations that wait for it, and they look at the tables at once.
Correctness does not depend on that: an operation that is not woken looks after a while, or its workflow is suspended.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable


class Waker:
    """Wakes one operation that waits, from any thread.

    Attributes:
        woken: set when the operation is woken; what a thread waits for.
        on_wake: called when the operation is woken, from whatever thread.
    """

    def __init__(self) -> None:
        self.woken = threading.Event()
        self.on_wake: Callable[[], object] | None = None

    def wake(self) -> None:
        """Wake the operation now, or as soon as it waits."""
        self.woken.set()
        on_wake = self.on_wake  # the event loop may reset it at any time
        if on_wake is not None:
            on_wake()


class Arrivals:
    """Which operations wait for what: the payload of a signal's hint, or the id of a workflow that ends."""

    def __init__(self) -> None:
        self._wakers: dict[Hashable, list[Waker]] = {}
        self._lock = threading.Lock()

    def subscribe(self, waker: Waker, names: Iterable[Hashable]) -> None:
        """Wake an operation for each of these names from now on."""
        with self._lock:
            for name in names:
                self._wakers.setdefault(name, []).append(waker)

    def unsubscribe(self, waker: Waker, names: Iterable[Hashable]) -> None:
        """Wake it for these no longer."""
        with self._lock:
            for name in names:
                wakers = self._wakers[name]
                wakers.remove(waker)
                if not wakers:
                    del self._wakers[name]

    def announce(self, name: Hashable) -> None:
        """Wake what waits for this."""
        for waker in tuple(self._wakers.get(name, ())):
            waker.wake()
