"""Looks for what there is to do, once a poll interval: timers, signals, what the dead have left, what waits.

Any worker does it for all queues, and any number of them at any time: each action takes its own rows. Whatever a hint
would have told is found here too, so that a lost one costs a poll interval and nothing else.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from itertools import chain
from typing import Any
from uuid import UUID

from sqlalchemy import Connection

from sqla_durable.definitions.log import Log
from sqla_durable.definitions.retry import LONGEST_BACKOFF
from sqla_durable.execution.worker.claims import Claims
from sqla_durable.execution.worker.cursors import Cursors
from sqla_durable.execution.worker.database import Database, persistently
from sqla_durable.execution.worker.heartbeat import Heartbeat
from sqla_durable.execution.worker.isolation import Isolation
from sqla_durable.models.status import WorkflowStatus
from sqla_durable.store import claims as store_claims
from sqla_durable.store import deferred, failures, signals, timers, workers
from sqla_durable.store.claims import Ranges
from sqla_durable.store.work import Work, find_work

log = Log("sqla_durable.worker")

_LIMIT = 1_000  # rows that one statement changes
_SHORTEST_PAUSE = 0.01  # seconds between two looks, however many timers there are
_RECLAIM_EVERY = 10  # beats: what is seen to be abandoned is reclaimed at once
_WARN_EVERY = 60.0
_SHOWN = 5  # ids in a line of the log
_FORGET_EVERY = 3_600.0
_RENOTIFY_EVERY = 60.0
_FRONT = UUID(int=0)


class Maintenance:
    """Wakes what is due, at its time; takes back what dead workers had; tells `Claims` when something waits."""

    def __init__(
        self,
        database: Database,
        claims: Claims,
        heartbeat: Heartbeat,
        cursors: Cursors,
        isolation: Isolation,
        *,
        worker_id: UUID,
        queues: Sequence[str],
        names: Sequence[str],
        versions: Sequence[str],
        poll_interval: timedelta,
        max_attempts: int,
    ) -> None:
        self._database = database
        self._claims = claims
        self._heartbeat = heartbeat
        self._cursors = cursors
        self._isolation = isolation
        self._worker_id = worker_id
        self._queues = list(queues)
        self._names = list(names)
        self._versions = list(versions)
        self._interval = poll_interval.total_seconds()
        self._max_attempts = max_attempts
        self._patience = heartbeat.lease + LONGEST_BACKOFF
        self._long_ago = max(1.5 * heartbeat.interval, 3 * self._interval)
        self._patient_from = float("-inf")
        self._looked_at = time.monotonic()
        self._reclaimed_at = float("-inf")
        self._forgotten_at = float("-inf")
        self._renotified_at = float("-inf")
        self._renotified_up_to = _FRONT
        self._warned_at = float("-inf")
        self._warned_of_versions_at = float("-inf")
        self._hinted = asyncio.Event()
        self._is_to_look = False
        self._marks = cursors.marks

    def hint(self) -> None:
        """Tell that there may be something, such as a timer that is due sooner than is known here."""
        self._is_to_look = True
        self._hinted.set()

    def hint_of_signals(self) -> None:
        """Tell that there may be signals, and nothing else that is new."""
        self._hinted.set()

    async def run(self) -> None:
        """Look again and again until cancelled."""
        while True:
            self._hinted.clear()
            self._is_to_look = False
            seen = await self._look()
            self._be_patient(time.monotonic())
            await self._act(seen)
            await self._wait(seen)

    async def _look(self) -> Work:
        self._cursors.restart_if_time()
        asked, restarts, self._marks = not self._claims.busy, self._cursors.restarts, self._cursors.marks
        ranges: Ranges = self._cursors.ranges() if asked else {}

        def look_once(connection: Connection) -> tuple[Work, float]:
            began = time.monotonic()  # an outage before it says nothing of how much there is to read
            seen = find_work(
                connection,
                worker_id=self._worker_id,
                ranges=ranges,
                names=self._names,
                versions=self._versions,
                scan_starts=self._marks,
                within=self._interval,
            )
            return seen, time.monotonic() - began

        seen, took = await persistently(self._database, look_once, what="maintenance")
        self._cursors.note_look(seen, restarts=restarts, asked=asked, took=took)
        return seen

    async def _act(self, seen: Work) -> None:
        """Do what was seen, from where it was looked for."""
        if not seen.alive:
            await self._heartbeat.renew()
        undoing = await self._fail_overdue() if seen.overdue else False
        reclaimed = await self._reclaim(seen)
        woken = await self._wake() if seen.due else 0
        woken += await self.deliver() if seen.undelivered else 0
        woken += await self._release_left() if seen.has_orphans else 0
        if seen.claimable or reclaimed or woken or undoing:
            self._claims.hint()
        else:
            await self._warn_of_unknown()
        self._marks = self._cursors.marks
        await self._warn_of_versions()
        await self._renotify()
        await self._forget_dead()

    async def _wait(self, seen: Work) -> None:
        """Wait for the next poll, for the next timer if that is sooner, or for a hint; deliver signals meanwhile."""
        next_due_in = self._interval if seen.next_due_in is None else seen.next_due_in
        await asyncio.sleep(_SHORTEST_PAUSE)
        until = time.monotonic() + min(self._interval, next_due_in)
        while await self._is_hinted(until - time.monotonic()) and not self._is_to_look:
            self._hinted.clear()
            await self.deliver()
            await asyncio.sleep(_SHORTEST_PAUSE)

    async def _is_hinted(self, within: float) -> bool:
        if within <= 0:  # however many hints come
            return False
        with suppress(TimeoutError):
            async with asyncio.timeout(within):
                await self._hinted.wait()
        return self._hinted.is_set()

    async def _wake(self) -> int:
        """Wake what is due; of many, all."""
        woken = count = await self._wake_some()
        while count == _LIMIT:
            self._claims.hint()
            count = await self._wake_some()
            woken += count
        return woken

    async def _wake_some(self) -> int:
        bounds: dict[str, Any] = {"limit": _LIMIT, "since": self._marks.wake_at}
        wake, due = partial(timers.wake_due, **bounds), partial(timers.due, **bounds)
        return sum(await self._isolation.sweep(wake, due, what="wake"))

    async def deliver(self) -> int:
        """Wake those that wait for what has been sent; of many, all."""
        woken = 0
        while True:
            counts = await self._deliver_some()
            delivered, more = sum(each for each, _ in counts), sum(each for _, each in counts)
            woken += more
            if more:
                self._claims.hint()
            if delivered < _LIMIT:
                return woken

    async def _release_left(self) -> int:
        """Let go the held children that their parents have left behind; of many, the others at the next looks."""
        bounds: dict[str, Any] = {"limit": _LIMIT, "since": self._marks.sent_at}
        release, leavers = partial(deferred.start_orphans, **bounds), partial(deferred.parents_of_orphans, **bounds)
        return sum(await self._isolation.sweep(release, leavers, what="release the children of"))

    async def _deliver_some(self) -> list[tuple[int, int]]:
        bounds: dict[str, Any] = {"limit": _LIMIT, "since": self._marks.sent_at}
        deliver, receivers = partial(signals.deliver, **bounds), partial(signals.receivers, **bounds)
        return await self._isolation.sweep(deliver, receivers, what="deliver to")

    async def _fail_overdue(self) -> bool:
        """Fail what has reached its deadline; of many, the others at the next looks. Tell whether some undo first."""
        bounds: dict[str, Any] = {"limit": _LIMIT, "since": self._marks.deadline_at}
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
        is_time = seen.abandoned or now - self._reclaimed_at >= _RECLAIM_EVERY * self._heartbeat.interval
        if not is_time or now < self._patient_from + self._patience:
            return 0
        self._reclaimed_at = now
        reclaimed = await self._reclaim_some()
        _tell(reclaimed)
        if reclaimed:
            self._cursors.restart()  # they stand in their old places
        return len(reclaimed)

    async def _reclaim_some(self) -> list[workers.Reclaimed]:
        bounds: dict[str, Any] = {"limit": _LIMIT, "besides": self._worker_id}
        reclaim = partial(
            workers.reclaim, max_attempts=self._max_attempts, names=self._names, queues=self._queues, **bounds
        )
        return [*chain(*await self._isolation.sweep(reclaim, partial(workers.expired, **bounds), what="reclaim"))]

    def _be_patient(self, now: float) -> None:
        """Give others time to come back before their work is taken over, where this worker has been away for long.

        As in an outage: the leases of living ones have run out too. They get a whole one, as after a beat, from when
        they try again. Half of the time at most is given, however often that happens.
        """
        away = now - self._looked_at > self._long_ago
        if away and now > self._patient_from + 2 * self._patience:
            self._patient_from = now
        self._looked_at = now

    async def _forget_dead(self) -> None:
        if time.monotonic() - self._forgotten_at >= _FORGET_EVERY:
            self._forgotten_at = time.monotonic()
            await persistently(self._database, workers.delete_dead, what="maintenance")

    async def _renotify(self) -> None:
        """Leave the notices that are missing: to a part of what waits each time, then from the front again.

        Senders and children leave notices; an application's own SQL that deletes or ends a child does not.
        """
        if time.monotonic() - self._renotified_at >= _RENOTIFY_EVERY:
            self._renotified_at = time.monotonic()
            bounds: dict[str, Any] = {"limit": _LIMIT, "after": self._renotified_up_to}
            renotify, waiting = partial(signals.renotify, **bounds), partial(signals.waiting, **bounds)
            seen = await self._isolation.sweep(renotify, waiting, what="look at")
            self._renotified_up_to = max((last for last in seen if last is not None), default=_FRONT)

    async def _warn_of_unknown(self) -> None:
        if self._claims.busy or time.monotonic() - self._warned_at < _WARN_EVERY:
            return
        self._warned_at = time.monotonic()
        unknown = await persistently(self._database, self._unknown, what="maintenance")
        if unknown:
            log.warning(
                "workflows named %s wait in the queues %s and are not registered here; a worker that knows them "
                "will claim them. Registered here: %s.",
                ", ".join(map(repr, unknown)),
                ", ".join(map(repr, self._queues)),
                ", ".join(map(repr, self._names)) or "nothing: import the modules that define them",
            )

    async def _warn_of_versions(self) -> None:
        """Name the versions that wait and are not claimed here, however busy this worker is: nobody else may tell."""
        if not self._versions or time.monotonic() - self._warned_of_versions_at < _WARN_EVERY:
            return
        self._warned_of_versions_at = time.monotonic()
        others = await persistently(self._database, self._other_versions, what="maintenance")
        if others:
            log.warning(
                "workflows of the versions %s wait in the queues %s, and this worker claims %s only. If no other "
                "worker claims them, let one do so (versions=), or give them another version.",
                ", ".join(map(repr, others)),
                ", ".join(map(repr, self._queues)),
                ", ".join(map(repr, self._versions)),
            )

    def _other_versions(self, connection: Connection) -> list[str]:
        return store_claims.other_versions(connection, queues=self._queues, versions=self._versions)

    def _unknown(self, connection: Connection) -> list[str]:
        return store_claims.unknown_names(connection, queues=self._queues, names=self._names)


def _tell(reclaimed: list[workers.Reclaimed]) -> None:
    if reclaimed:
        shown = ", ".join(f"{each.name} {each.workflow_id}" for each in reclaimed[:_SHOWN])
        more = ", ..." if len(reclaimed) > _SHOWN else ""
        log.warning("workflows reclaimed from dead workers: %d: %s%s", len(reclaimed), shown, more)
    for each in reclaimed:
        if each.status is WorkflowStatus.SUSPENDED:
            log.warning("workflow %s %s lost several workers in a row: it waits", each.name, each.workflow_id)
        if each.status is WorkflowStatus.FAILED:
            log.error("workflow %s %s failed: too many of its workers died", each.name, each.workflow_id)
