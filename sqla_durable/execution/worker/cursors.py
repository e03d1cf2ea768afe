"""Where the index scans of a worker begin.

While a snapshot is open elsewhere, vacuum cannot remove what is dead in them: reading each from its beginning would
cost more with each workflow that was claimed, woken or delivered since. So a poll begins where the last one found
nothing, and a claim where the last one ended. What was committed late stands before that: now and then all is read.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from sqla_durable.store.claims import FRONT, Batch, Range, Ranges, ScanPosition
from sqla_durable.store.work import FULL_SCAN, LATE_COMMIT, ScanStarts, Work

_EVERY = 10  # polls, of which one reads everything
_LONGEST_POLL = 1.0  # seconds that count as a poll at most
_SHARE = 20  # of the time, one part at most is spent on reading everything
_MOST_PRIORITIES = 16  # of a queue, each of which is a scan from a place of its own
_LONGEST_BURST = 1.0  # seconds after which claims restart where something may have been committed late


@dataclass(slots=True)
class _Queue:
    """What is known of a queue.

    Attributes:
        places: by priority, the place before which nothing waits; None where that is not known.
        reached: the place that the last claim reached, if it took as many as it could.
    """

    places: dict[int, ScanPosition | None] = field(default_factory=lambda: {0: None})
    reached: ScanPosition | None = None

    def pass_until(self, moment: datetime) -> None:
        """Note that nothing has waited here at a time."""
        self.places = {each: _place(each, moment) for each in self.places}

    def take(self, reached: dict[int, ScanPosition], moment: datetime) -> None:
        """Note that a claim took as many as it could, up to these places."""
        last = max(reached)
        for priority in sorted(self.places.keys() | reached.keys()):
            if priority < last:
                self.places[priority] = _place(priority, moment)
        self.places[last] = min(reached[last], _place(last, moment), key=_order)
        self.reached = reached[last]
        # Of too many, those that this claim has not met: without a place, a priority is read from its beginning.
        by_use = sorted(self.places, key=lambda each: (each in reached, -each))
        for each in by_use[: max(0, len(by_use) - _MOST_PRIORITIES)]:
            del self.places[each]

    def ranges(self) -> Iterator[Range]:
        """Read each known priority from its place on, and whatever else there is from its beginning."""
        after = self.reached or FRONT
        for priority, place in sorted(self.places.items()):
            if place is None or priority < after.priority:
                continue
            if priority > after.priority:
                yield Range(after, until=priority)
                after = place
            elif after is FRONT:
                after = place
        yield Range(after)


class Cursors:
    """Where the next poll and the next claim of one worker begin to scan.

    Args:
        queues: those that it claims from; they may change.
        poll_interval: the seconds between two polls.

    Attributes:
        scan_starts: where a poll begins, and what acts between two of them.
        restarts: how many full scans were requested; results of scans that began before the latest are discarded.
    """

    def __init__(self, queues: Collection[str], *, poll_interval: float) -> None:
        self.scan_starts: ScanStarts = FULL_SCAN
        self.restarts = 0
        self._names = queues
        self._queues = {each: _Queue() for each in queues}
        self._every = _EVERY * min(poll_interval, _LONGEST_POLL)
        self._kept: tuple[str, ...] = ()
        self._restart_at = float("-inf")
        self._burst_began = 0.0

    def restart(self) -> None:
        """Let the next poll and the next claim read everything."""
        self.restarts += 1
        self.scan_starts = FULL_SCAN
        for each in self._queues.values():
            each.places = dict.fromkeys(each.places)
            each.reached = None

    def restart_if_time(self) -> None:
        """Let them read everything if that was not done for a while."""
        now = time.monotonic()
        if now >= self._restart_at:
            self._restart_at = now + self._every
            self.restart()

    def note_poll(self, seen: Work, *, restarts: int, asked: bool, took: float) -> None:
        """Adopt what a poll has found out.

        Args:
            seen: what it saw.
            restarts: their number when it began.
            asked: whether it looked for what is claimable.
            took: how many seconds it took; the longer it took to read everything, the more seldom that is done.
        """
        if restarts != self.restarts:
            return
        if self.scan_starts is FULL_SCAN:
            pause = min(_SHARE * took, _EVERY * self._every)
            self._restart_at = max(self._restart_at, time.monotonic() + pause)
        self.scan_starts = seen.scan_starts
        if seen.kept != self._kept:  # what waits in a queue that goes on stands before the places
            self._kept = seen.kept
            self.restart()
        elif asked and not seen.claimable and seen.scan_starts.found_at is not None:
            for each in self._queues.values():
                each.pass_until(seen.scan_starts.found_at)

    @property
    def in_burst(self) -> bool:
        """Whether a claim goes on where the last one ended."""
        return any(each.reached is not None for each in self._queues.values())

    def ranges(self) -> Ranges:
        """Return the parts of the queues in which something may wait."""
        self._queues = {name: self._queues.get(name) or _Queue() for name in self._names}
        return {name: list(queue.ranges()) for name, queue in self._queues.items()}

    def note_claim(self, batch: Batch, *, restarts: int, is_full: bool) -> None:
        """Adopt where a claim has ended; after a full one, the next goes on there for a while."""
        if restarts != self.restarts:
            return
        now = time.monotonic()
        if not self.in_burst:
            self._burst_began = now
        if batch.claimed_at is not None:
            for name, reached in batch.last_positions.items():
                if name in self._queues:  # a poll may have left it out meanwhile
                    self._queues[name].take(reached, batch.claimed_at)
        if not is_full or now - self._burst_began > _LONGEST_BURST:
            for each in self._queues.values():
                each.reached = None
        if not is_full and batch.claimed_at is not None:
            for each in self._queues.values():
                each.pass_until(batch.claimed_at)


def _place(priority: int, moment: datetime) -> ScanPosition:
    return ScanPosition(priority, moment - LATE_COMMIT, UUID(int=0))


def _order(place: ScanPosition) -> tuple[object, UUID]:
    return place.enqueued_at, place.id
