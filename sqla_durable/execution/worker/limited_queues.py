"""What a worker knows of its queues with limits: which they are, and what it executes of each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterable, Sequence

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
        has_others: whether the claim of all others may find anything.
        queue_of: the queue of each attempt that has a place in one of them.
    """

    def __init__(self, queues: Collection[str], claims: Wakeup) -> None:
        self._queues = queues
        self._claims = claims
        self._names: list[str] = []
        self.has_others = True
        self._turn = 0
        self.queue_of: dict[Fence, str] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._aside: dict[str, float] = {}

    def note(self, kept: Iterable[str], limited: Iterable[str]) -> None:
        """Adopt what a poll saw: which queues the claim of all others leaves alone, and which of these have limits."""
        self._names = sorted({*limited}.intersection(self._queues))
        self.has_others = not {*kept}.issuperset(self._queues)

    @property
    def names(self) -> list[str]:
        """Those queues, in order, without those that are set aside."""
        if not self._aside:
            return self._names
        now = time.monotonic()
        self._aside = {each: until for each, until in self._aside.items() if until > now}
        return [each for each in self._names if each not in self._aside]

    def set_aside(self, queue: str, seconds: float) -> None:
        """Leave a queue whose claims fail alone for a while; then its turn comes again."""
        self._aside[queue] = time.monotonic() + seconds
        asyncio.get_running_loop().call_later(seconds, self._claims.set)

    def in_turn(self, waiting: Iterable[str]) -> list[str | None]:
        """Return the queues to claim from, each time with another one as the first; None stands for all others."""
        sources: list[str | None] = [*waiting, *([None] if self.has_others else [])]
        self._turn += 1
        first = self._turn % len(sources) if sources else 0
        return sources[first:] + sources[:first]

    def executing(self, queue: str) -> int:
        """Return how many workflows of a queue are executed here."""
        return sum(each == queue for each in self.queue_of.values())

    def begin(self, queue: str, claimed: Iterable[Claimed]) -> None:
        """Note what was claimed from a queue, before it is executed."""
        self.queue_of.update((each.fence, queue) for each in claimed)

    def end(self, fence: Fence) -> None:
        """Note that an attempt of a queue with limits has ended, and wake the claims: a place may be free."""
        del self.queue_of[fence]
        self._claims.set()

    def wake_in(self, queue: str, seconds: float | None) -> None:
        """Wake the claims when a rate of a queue has room again; None, which says nothing, leaves that as it was."""
        if seconds is None:
            return
        if queue in self._timers:
            self._timers[queue].cancel()
        self._timers[queue] = asyncio.get_running_loop().call_later(max(seconds, 0.0), self._claims.set)


async def declare_queues(database: Database, declared: Sequence[QueueDeclaration]) -> None:
    """Bring the settings of queues that the code declares into the table, in one transaction."""

    def declare(connection: Connection) -> list[str]:
        return [each.name for each in declared if queues.put(connection, each.name, each.options)]

    for each in await persistently(database, declare, what="queues"):
        log.info("queue %r has the settings that the code declares now", each)
