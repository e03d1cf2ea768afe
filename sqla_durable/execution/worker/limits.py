"""What a worker knows of its queues with limits: which they are, and what it executes of each."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence

from sqlalchemy import Connection

from sqla_durable.definitions.log import Log
from sqla_durable.definitions.queues import QueueDeclaration
from sqla_durable.execution.worker.database import Database, persistently
from sqla_durable.execution.worker.hints import Wakeup
from sqla_durable.store import Claimed, Fence, queues

log = Log("sqla_durable.worker")


class LimitedQueues:
    """The queues with limits that a worker claims from, each by claims of its own.

    Its claims are woken when a place is free again here, or a rate has room again; places that other workers free are
    found by the next poll.

    Attributes:
        places: the queue of each attempt that has a place in one.
    """

    def __init__(self, queues: Iterable[str], claims: Wakeup) -> None:
        self._queues = frozenset(queues)
        self._claims = claims
        self._names: list[str] = []
        self._others = True
        self._turn = 0
        self.places: dict[Fence, str] = {}
        self._executing: Counter[str] = Counter()
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def note(self, kept: Iterable[str], limited: Iterable[str]) -> None:
        """Adopt what a poll saw: which queues ordinary claims leave alone, and which of these have limits."""
        self._names = sorted(self._queues.intersection(limited))
        self._others = not self._queues <= {*kept}

    @property
    def names(self) -> list[str]:
        """The queues with limits, of which another one is the first each time."""
        self._turn += 1
        first = self._turn % len(self._names) if self._names else 0
        return self._names[first:] + self._names[:first]

    @property
    def is_even(self) -> bool:
        """Whether it is the turn of the other queues to be the first."""
        return self._turn % 2 == 0

    @property
    def has_others(self) -> bool:
        """Whether the worker has queues without limits too."""
        return self._others

    def executing(self, queue: str) -> int:
        """Return how many workflows of a queue are executed here."""
        return self._executing[queue]

    def begin(self, queue: str, claimed: Iterable[Claimed]) -> None:
        """Note what was claimed from a queue, before it is executed."""
        for each in claimed:
            self.places[each.fence] = queue
            self._executing[queue] += 1

    def end(self, fence: Fence) -> None:
        """Note that an attempt that had a place has ended."""
        self._executing[self.places.pop(fence)] -= 1
        self._claims.set()

    def retry_in(self, queue: str, seconds: float | None) -> None:
        """Wake the claims when a rate of a queue has room again."""
        timer = self._timers.pop(queue, None)
        if timer is not None:
            timer.cancel()
        if seconds is not None:
            self._timers[queue] = asyncio.get_running_loop().call_later(max(seconds, 0.0), self._claims.set)


async def declare_queues(database: Database, declared: Sequence[QueueDeclaration]) -> None:
    """Bring the settings of queues that the code declares into the table, in one transaction."""

    def declare(connection: Connection) -> list[str]:
        return [each.name for each in declared if queues.put(connection, each.name, each.options)]

    for each in await persistently(database, declare, what="queues"):
        log.info("queue %r has the settings that the code declares now", each)
