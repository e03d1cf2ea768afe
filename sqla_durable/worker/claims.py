"""Keeps a worker's slots filled: reclaims from the dead, wakes what is due, claims in batches."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable.retry import LONGEST_BACKOFF, ObstacleRetry
from sqla_durable.status import WorkflowStatus
from sqla_durable.store import Claimed, crashes, queues, workers, workflows
from sqla_durable.worker.attempts import Attempts
from sqla_durable.worker.database import Database, in_short, persistently

log = logging.getLogger("sqla_durable.worker")

_BATCH = 200
_MAINTAIN_LIMIT = 1_000
_WARN_EVERY = 60.0
_RECONCILE_EVERY = 5.0


@dataclass(frozen=True, slots=True)
class Maintained:
    """What one transaction of maintenance did, and when it began; it counts once it is committed."""

    at: float
    reclaimed: list[crashes.Reclaimed]


class Claims:
    """Claims workflows of these queues and names whenever a slot is free.

    A full batch is followed by the next at once; otherwise the next poll comes after `poll_interval`.
    """

    def __init__(
        self,
        database: Database,
        attempts: Attempts,
        *,
        worker_id: UUID,
        queues: Sequence[str],
        names: Sequence[str],
        poll_interval: timedelta,
        max_attempts: int,
        renew: Callable[[Session], None],
        lease: timedelta,
    ) -> None:
        self._database = database
        self._renew = renew
        self._attempts = attempts
        self._worker_id = worker_id
        self._queues = list(queues)
        self._names = list(names)
        self._interval = poll_interval.total_seconds()
        self._max_attempts = max_attempts
        self._patience = lease.total_seconds() / 3 + LONGEST_BACKOFF
        self._long_ago = max(lease.total_seconds() / 2, 3 * self._interval)
        self._patient_from = float("-inf")
        self._maintained_at: float | None = None
        self._reconciled_at = time.monotonic()
        self._warned_at = float("-inf")

    async def run(self) -> None:
        """Claim until cancelled."""
        while True:
            wanted = min(self._attempts.free, _BATCH)
            claimed = await self._poll(wanted) if wanted else []
            self._attempts.begin(claimed)
            if len(claimed) < wanted:
                await asyncio.sleep(self._interval)
            elif self._attempts.free == 0:
                await self._wait_for_slot()

    async def release_strays(self) -> None:
        """Hand back what a claim took and no attempt is executing: its acknowledgement was lost, or came too late."""
        await persistently(self._database, self._release_strays, what="claim")

    async def _wait_for_slot(self) -> None:
        """Wait until a slot is free, or until it is time to look after dead workers and timers again."""
        self._attempts.slot_freed.clear()
        try:
            async with asyncio.timeout(self._interval):
                await self._attempts.slot_freed.wait()
        except TimeoutError:
            self._note(await persistently(self._database, self._maintain, what="maintenance"))

    async def _poll(self, limit: int) -> list[Claimed]:
        again = ObstacleRetry()
        while True:
            try:
                claimed, maintained = await self._database.transact(lambda session: self._claim(session, limit))
                self._note(maintained)
                return await self._with_histories(claimed)
            except Exception as error:
                seconds = again.wait_before_next(error)
                if seconds is None:
                    raise
                log.warning("claim: %s; trying again in %.1f s", in_short(error), seconds)
                await asyncio.sleep(seconds)
                await self.release_strays()

    async def _with_histories(self, claimed: list[Claimed]) -> list[Claimed]:
        if not any(each.started for each in claimed):
            return claimed
        return await self._database.transact(lambda session: queues.with_histories(session, claimed))

    def _claim(self, session: Session, limit: int) -> tuple[list[Claimed], Maintained | None]:
        due = self._maintained_at is None or time.monotonic() - self._maintained_at >= self._interval
        maintained = self._maintain(session) if due else None
        claimed = queues.claim(
            session,
            worker_id=self._worker_id,
            token=uuid7(),
            queues=self._queues,
            names=self._names,
            limit=limit,
        )
        if not claimed and time.monotonic() - self._warned_at > _WARN_EVERY:
            self._warn_of_unknown(session)
        return claimed, maintained

    def _maintain(self, session: Session) -> Maintained:
        """Take back what dead workers had, and wake what is due: any worker does it, for all queues."""
        now = time.monotonic()
        self._renew(session)  # first: a claim without a live lease would be reclaimed at once
        reclaimed = self._reclaim(session) if now >= self._patient_since(now) + self._patience else []
        workflows.wake_due(session, limit=_MAINTAIN_LIMIT)
        if now - self._reconciled_at >= _RECONCILE_EVERY:
            self._release_strays(session)
        return Maintained(now, reclaimed)

    def _reclaim(self, session: Session) -> list[crashes.Reclaimed]:
        return crashes.reclaim(
            session,
            max_attempts=self._max_attempts,
            limit=_MAINTAIN_LIMIT,
            names=self._names,
            queues=self._queues,
        )

    def _patient_since(self, now: float) -> float:
        """Tell since when others are given time to come back, before their work is taken over.

        Where this worker could not maintain for long, as in an outage, the leases of living ones have run out too. Half
        of the time at most is given, however often that happens.
        """
        away = self._maintained_at is not None and now - self._maintained_at > self._long_ago
        if away and now > self._patient_from + 2 * self._patience:
            self._patient_from = now
        return self._patient_from

    def _note(self, maintained: Maintained | None) -> None:
        """Note and tell what has been committed."""
        if maintained is not None:
            self._maintained_at = maintained.at
            self._tell(maintained.reclaimed)

    def _tell(self, reclaimed: list[crashes.Reclaimed]) -> None:
        if reclaimed:
            log.warning("workflows reclaimed from dead workers: %d", len(reclaimed))
        for each in reclaimed:
            if each.status is WorkflowStatus.SUSPENDED:
                log.warning("workflow %s %s lost several workers in a row: it waits", each.name, each.workflow_id)
            if each.status is WorkflowStatus.FAILED:
                log.error("workflow %s %s failed: too many of its workers died", each.name, each.workflow_id)

    def _release_strays(self, session: Session) -> None:
        """Release what is running here by the tables only; no claim is on its way while this looks.

        Now and then, too: the server may carry out a COMMIT long after its connection was lost.
        """
        self._reconciled_at = time.monotonic()
        known = set(self._attempts.fences)
        strays = [each for each in workers.running_of(session, self._worker_id) if each not in known]
        if strays:
            log.warning("%d workflows are claimed by this worker and not executed; they are handed back", len(strays))
            workflows.release_unlocked(session, strays)

    def _warn_of_unknown(self, session: Session) -> None:
        self._warned_at = time.monotonic()
        unknown = workflows.unknown_names(session, queues=self._queues, names=self._names)
        if unknown:
            log.warning(
                "workflows named %s wait in the queues %s and are not registered here; a worker that knows them "
                "will claim them. Registered are %s.",
                ", ".join(map(repr, unknown)),
                ", ".join(map(repr, self._queues)),
                ", ".join(map(repr, self._names)),
            )
