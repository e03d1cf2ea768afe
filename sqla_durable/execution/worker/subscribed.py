"""The queues that a worker claims from: those that it was given, and those found that fit its patterns."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator
from itertools import chain

from sqla_durable.definitions.queues import fitting

_FORGET_AFTER = 600.0  # seconds since something waited in a queue that fits a pattern


class Subscribed(Collection[str]):
    """The names of the queues that a worker claims from, as far as they are known.

    In a pattern, `*` stands for any text: `mail.*`. A queue that fits one is added by a poll that finds something
    waiting in it, and left out when polls have found nothing there for a while, so that a name for each customer or
    each day does not make every claim longer than the last.

    Attributes:
        given: the names, and patterns, that the worker was given.
        has_patterns: whether there are any of these.
    """

    def __init__(self, given: Iterable[str]) -> None:
        self.given = list(given)
        self._named = dict.fromkeys(each for each in self.given if "*" not in each)
        self.has_patterns = len(self._named) < len(self.given)
        self._found_at: dict[str, float] = {}
        self._fits = fitting(self.given).fullmatch

    def __iter__(self) -> Iterator[str]:
        return chain(self._named, self._found_at)

    def __len__(self) -> int:
        return len(self._named) + len(self._found_at)

    def __contains__(self, name: object) -> bool:
        return name in self._named or name in self._found_at

    def fits(self, name: str) -> bool:
        """Return whether a queue of this name is one of those, or fits a pattern."""
        return self._fits(name) is not None

    def note(self, waiting: Iterable[str]) -> None:
        """Adopt the queues in which a poll found something waiting."""
        now = time.monotonic()
        found = dict.fromkeys((each for each in waiting if each not in self._named and self.fits(each)), now)
        kept = {name: at for name, at in self._found_at.items() if now - at < _FORGET_AFTER}
        self._found_at = kept | found
