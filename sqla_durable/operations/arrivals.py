"""What operations that wait in memory listen for: signals, updates, outcomes of callbacks, ends of other workflows.

Whoever learns of one in this process rings, and what waits for it looks at once. Nothing depends on that: what is there
is what the tables say, and a wait that hears nothing looks by itself after a while, or is suspended.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable


class Bell:
    """Wakes one operation that waits. Rung from any thread.

    Attributes:
        rung: set when it is rung, for a thread to wait for.
        wake: called when it is rung, from whatever thread.
    """

    def __init__(self) -> None:
        self.rung = threading.Event()
        self.wake: Callable[[], object] | None = None

    def ring(self) -> None:
        """Wake the operation now, or as soon as it waits."""
        self.rung.set()
        wake = self.wake
        if wake is not None:
            wake()


class Arrivals:
    """Which bells are rung for what: for the hint of a signal, or for the id of a workflow that ends."""

    def __init__(self) -> None:
        self._bells: dict[Hashable, list[Bell]] = {}
        self._lock = threading.Lock()

    def listen(self, bell: Bell, names: Iterable[Hashable]) -> None:
        """Ring a bell for each of these names from now on."""
        with self._lock:
            for name in names:
                self._bells.setdefault(name, []).append(bell)

    def leave(self, bell: Bell, names: Iterable[Hashable]) -> None:
        """Ring it for these no longer."""
        with self._lock:
            for name in names:
                bells = self._bells[name]
                bells.remove(bell)
                if not bells:
                    del self._bells[name]

    def ring(self, name: Hashable) -> None:
        """Wake what listens for this."""
        for bell in tuple(self._bells.get(name, ())):
            bell.ring()
