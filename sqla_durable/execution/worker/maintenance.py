"""Polls for what there is to do: timers that are due, signals, workflows of dead workers, and what is pending.

Any number of workers do so at the same time, each for all queues: every action locks its own rows. Whatever a hint says
is found here too, so a lost one costs a poll interval and nothing else.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any
from uuid import UUID

from sqlalchemy import Connection

from sqla_durable.definitions.log import Log
from sqla_durable.definitions.retry import LONGEST_BACKOFF
from sqla_durable.execution.worker.cursors import Cursors
from sqla_durable.execution.worker.database import Database, persistently
from sqla_durable.execution.worker.heartbeat import Heartbeat
from sqla_durable.execution.worker.hints import Wakeups
from sqla_durable.execution.worker.isolation import Isolation
from sqla_durable.execution.worker.limited_queues import LimitedQueues
from sqla_durable.execution.worker.retention import Retention
from sqla_durable.execution.worker.schedules import Schedules
from sqla_durable.execution.worker.settings import (
    FORGET_EVERY,
    RECLAIM_EVERY,
    RENOTIFY_EVERY,
    SHORTEST_POLL,
    WARN_EVERY,
    Settings,
)
from sqla_durable.models.base import WorkflowStatus
from sqla_durable.store import backlog, deferred, failures, signals, timers, workers
from sqla_durable.store.claims import Ranges
from sqla_durable.store.work import Work, find_work

log = Log("sqla_durable.worker")

_LIMIT = 1_000  # rows that one statement changes
_SHOWN = 5  # ids in a line of the log
_FRONT = UUID(int=0)


class Maintenance:
    """Wakes what is due, at its time; reclaims what dead workers had; wakes the claims when something is pending."""

    def __init__(
        self,
        database: Database,
        heartbeat: Heartbeat,
        cursors: Cursors,
        limited: LimitedQueues,
        isolation: Isolation,
        schedules: Schedules,
        retention: Retention,
        wakeups: Wakeups,
        settings: Settings,
        on_empty: Callable[[], None],
    ) -> None:
        self._database = database
        self._schedules = schedules
        self._retention = retention
        self._heartbeat = heartbeat
        self._cursors = cursors
        self._limited = limited
        self._isolation = isolation
        self._wakeup = wakeups.maintenance
        self._claims = wakeups.claims
        self._settings = settings
        self._on_empty = on_empty
        self._interval = settings.poll_interval.total_seconds()
        self._patience = heartbeat.lease + LONGEST_BACKOFF
        self._long_ago = max(1.5 * heartbeat.interval, 3 * self._interval)
        self._asked = False  # whether the last poll looked for what waits
        self._patient_from = float("-inf")
        self._polled_at = time.monotonic()
        self._reclaimed_at = float("-inf")
        self._forgotten_at = float("-inf")
        self._renotified_at = float("-inf")
        self._renotified_up_to = _FRONT
        self._warned_at = float("-inf")
        self._warned_of_versions_at = float("-inf")
        self._scan_starts = cursors.scan_starts

    async def run(self) -> None:
        """Poll until cancelled."""
        self._polled_at = time.monotonic()  # the start may have waited for the database
        while True:
            self._wakeup.clear()
            seen = await self._poll()
            self._be_patient(time.monotonic())
            await self._act(seen)
            await self._wait(seen)

    async def _poll(self) -> Work:
        if self._settings.queues.has_patterns:
            self._settings.queues.note(await persistently(self._database, backlog.queue_names, what="maintenance"))
        self._cursors.restart_if_time()
        asked, restarts, self._scan_starts = not self._claims_follow, self._cursors.restarts, self._cursors.scan_starts
        self._asked = asked
        ranges: Ranges = self._cursors.ranges() if asked else {}

        def poll_once(connection: Connection) -> tuple[Work, float]:
            began = time.monotonic()  # an outage before it says nothing of how much there is to read
            seen = find_work(
                connection,
                worker_id=self._settings.worker_id,
                ranges=ranges,
                names=self._settings.names,
                versions=self._settings.versions,
                scan_starts=self._scan_starts,
                within=self._interval,
            )
            return seen, time.monotonic() - began

        seen, took = await persistently(self._database, poll_once, what="maintenance")
        self._cursors.note_poll(seen, restarts=restarts, asked=asked, took=took)
        self._limited.note(seen.kept, seen.limited)
        return seen

    @property
    def _claims_follow(self) -> bool:
        """Whether a claim follows without a hint."""
        return self._cursors.in_burst or self._claims.is_for_anything

    async def _act(self, seen: Work) -> None:
        """Act on what the poll found; scan from where the poll began."""
        if not seen.alive:
            await self._heartbeat.renew()
        undoing = await self._fail_overdue() if seen.overdue else False
        reclaimed = await self._reclaim(seen)
        woken = await self._wake() if seen.due else 0
        woken += await self.deliver() if seen.undelivered else 0
        woken += await self._start_orphans() if seen.has_orphans else 0
        if seen.ticks:
            await self._schedules.fire()
        if seen.prunes:
            self._retention.wake()
        if seen.claimable or seen.waiting or reclaimed or woken or undoing:
            self._claims.set()
        else:
            await self._warn_of_unknown()
            if self._settings.until_empty and self._asked and not self._claims_follow:
                self._on_empty()
        self._scan_starts = self._cursors.scan_starts
        await self._warn_of_versions()
        await self._renotify()
        await self._forget_dead()

    async def _wait(self, seen: Work) -> None:
        """Wait for the next poll, for the next timer if that is sooner, or for a hint; deliver signals meanwhile."""
        next_due_in = self._interval if seen.next_due_in is None else seen.next_due_in
        await asyncio.sleep(SHORTEST_POLL)
        until = time.monotonic() + min(self._interval, next_due_in)
        while await self._wakeup.wait(until - time.monotonic()) and not self._wakeup.is_for_anything:
            self._wakeup.clear()
            await self.deliver()
            await asyncio.sleep(SHORTEST_POLL)

    async def _wake(self) -> int:
        """Wake everything that is due, in batches."""
        woken = count = await self._wake_some()
        while count == _LIMIT:
            self._claims.set()
            count = await self._wake_some()
            woken += count
        return woken

    async def _wake_some(self) -> int:
        bounds: dict[str, Any] = {"limit": _LIMIT, "since": self._scan_starts.wake_at}
        wake, due = partial(timers.wake_due, **bounds), partial(timers.due, **bounds)
        return sum(await self._isolation.sweep(wake, due, what="wake"))

    async def deliver(self) -> int:
        """Deliver everything that was sent, in batches, and wake what waits for it."""
        woken = 0
        while True:
            counts = await self._deliver_some()
            delivered, more = sum(each for each, _ in counts), sum(each for _, each in counts)
            woken += more
            if more:
                self._claims.set()
            if delivered < _LIMIT:
                return woken

    async def _start_orphans(self) -> int:
        """Start the deferred children whose parents have ended; at most 1,000 a poll."""
        bounds: dict[str, Any] = {"limit": _LIMIT, "since": self._scan_starts.sent_at}
        start, parents = partial(deferred.start_orphans, **bounds), partial(deferred.parents_of_orphans, **bounds)
        return sum(await self._isolation.sweep(start, parents, what="start the children of"))

    async def _deliver_some(self) -> list[tuple[int, int]]:
        bounds: dict[str, Any] = {"limit": _LIMIT, "since": self._scan_starts.sent_at}
        deliver, receivers = partial(signals.deliver, **bounds), partial(signals.receivers, **bounds)
        return await self._isolation.sweep(deliver, receivers, what="deliver to")

    async def _fail_overdue(self) -> bool:
        """Fail what has reached its deadline; of many, the rest at the next polls. Return whether some undo first."""
        bounds: dict[str, Any] = {"limit": _LIMIT, "since": self._scan_starts.deadline_at}
        fail, found = partial(failures.fail_overdue, **bounds), partial(failures.overdue_ids, **bounds)
        overdue = [*chain(*await self._isolation.sweep(fail, found, what="fail"))]
        await self._heartbeat.notify(each.worker_id for each in overdue if each.worker_id is not None)
        for each in overdue:
            what = "undoes what it did, and fails" if each.compensates else "failed"
            log.warning("workflow %s %s %s: it was not finished at its deadline", each.name, each.workflow_id, what)
        return any(each.compensates for each in overdue)

    async def _reclaim(self, seen: Work) -> int:
        """Reclaim what dead workers had; now and then also what belongs to workers whose rows are gone."""
        now = time.monotonic()
        is_time = seen.abandoned or now - self._reclaimed_at >= RECLAIM_EVERY * self._heartbeat.interval
        if not is_time or now < self._patient_from + self._patience:
            return 0
        self._reclaimed_at = now
        reclaimed = await self._reclaim_some()
        _log_reclaimed(reclaimed)
        if reclaimed:
            self._cursors.restart()  # they stand in their old places
        return len(reclaimed)

    async def _reclaim_some(self) -> list[workers.Reclaimed]:
        chosen = self._settings
        bounds: dict[str, Any] = {"limit": _LIMIT, "asking": chosen.worker_id}
        reclaim = partial(
            workers.reclaim, max_attempts=chosen.max_attempts, names=chosen.names, queues=chosen.queues.given, **bounds
        )
        return [*chain(*await self._isolation.sweep(reclaim, partial(workers.expired, **bounds), what="reclaim"))]

    def _be_patient(self, now: float) -> None:
        """Delay reclaiming where this worker has not polled for long, so that other workers can renew their leases.

        In an outage the leases of live workers run out too. They get one more lease, counted from this worker's first
        poll. At most half of the time is spent waiting so, however often it happens.
        """
        away = now - self._polled_at > self._long_ago
        if away and now > self._patient_from + 2 * self._patience:
            self._patient_from = now
        self._polled_at = now

    async def _forget_dead(self) -> None:
        if time.monotonic() - self._forgotten_at >= FORGET_EVERY:
            self._forgotten_at = time.monotonic()
            await persistently(self._database, workers.delete_dead, what="maintenance")

    async def _renotify(self) -> None:
        """Write the notices that are missing: for a part of what waits each time, then from the front again.

        Senders and children write notices; an application's own SQL that deletes or ends a child does not.
        """
        if time.monotonic() - self._renotified_at >= RENOTIFY_EVERY:
            self._renotified_at = time.monotonic()
            bounds: dict[str, Any] = {"limit": _LIMIT, "after": self._renotified_up_to}
            renotify, waiting = partial(signals.renotify, **bounds), partial(signals.waiting, **bounds)
            seen = await self._isolation.sweep(renotify, waiting, what="check")
            self._renotified_up_to = max((last for last in seen if last is not None), default=_FRONT)

    async def _warn_of_unknown(self) -> None:
        if self._claims_follow or time.monotonic() - self._warned_at < WARN_EVERY:
            return
        self._warned_at = time.monotonic()
        unknown = await persistently(self._database, self._unknown, what="maintenance")
        if unknown:
            log.warning(
                "workflows named %s wait in the queues %s and are not registered here; a worker that knows them "
                "will claim them. Registered here: %s.",
                ", ".join(map(repr, unknown)),
                ", ".join(map(repr, self._settings.queues)),
                ", ".join(map(repr, self._settings.names)) or "nothing: import the modules that define them",
            )

    async def _warn_of_versions(self) -> None:
        """Log the versions that wait and are not claimed here, however busy this worker is: nobody else may do so."""
        if not self._settings.versions or time.monotonic() - self._warned_of_versions_at < WARN_EVERY:
            return
        self._warned_of_versions_at = time.monotonic()
        others = await persistently(self._database, self._other_versions, what="maintenance")
        if others:
            log.warning(
                "workflows of the versions %s wait in the queues %s, and this worker claims %s only. If no other "
                "worker claims them, let one do so (versions=), or give them another version.",
                ", ".join(map(repr, others)),
                ", ".join(map(repr, self._settings.queues)),
                ", ".join(map(repr, self._settings.versions)),
            )

    def _other_versions(self, connection: Connection) -> list[str]:
        return backlog.other_versions(connection, queues=self._settings.queues, versions=self._settings.versions)

    def _unknown(self, connection: Connection) -> list[str]:
        return backlog.unknown_names(connection, queues=self._settings.queues, names=self._settings.names)


def _log_reclaimed(reclaimed: list[workers.Reclaimed]) -> None:
    if reclaimed:
        shown = ", ".join(f"{each.name} {each.workflow_id}" for each in reclaimed[:_SHOWN])
        more = ", ..." if len(reclaimed) > _SHOWN else ""
        log.warning("workflows reclaimed from dead workers: %d: %s%s", len(reclaimed), shown, more)
    for each in reclaimed:
        if each.status is WorkflowStatus.SUSPENDED:
            log.warning("workflow %s %s is suspended: it lost several workers in a row", each.name, each.workflow_id)
        if each.status is WorkflowStatus.FAILED:
            log.error("workflow %s %s failed: too many of its workers died", each.name, each.workflow_id)
