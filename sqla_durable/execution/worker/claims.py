"""Keeps a worker's slots filled: claims in batches, as long as there may be something to claim.

After a claim that came back short it tries a few times more; then the maintenance or the listener wakes it. A workflow
to which a signal is sent while nothing is in the queues is claimed at once, without being enqueued.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any
from uuid import UUID

from sqlalchemy import Connection
from uuid_utils.compat import uuid7

from sqla_durable.definitions.database_errors import first_line, is_about_data, is_out_of_time, is_transient
from sqla_durable.definitions.log import Log
from sqla_durable.definitions.retry import ObstacleRetry
from sqla_durable.execution.worker.attempts import Attempts
from sqla_durable.execution.worker.cursors import Cursors
from sqla_durable.execution.worker.database import Database, NoConnectionError, persistently
from sqla_durable.execution.worker.heartbeat import Heartbeat
from sqla_durable.execution.worker.hints import Wakeups
from sqla_durable.execution.worker.isolation import Isolation
from sqla_durable.execution.worker.limited_queues import LimitedQueues
from sqla_durable.execution.worker.recorder import Slots
from sqla_durable.execution.worker.settings import CLAIM_PAUSES, CLAIM_SPACING, Settings
from sqla_durable.store import Claimed, Fence, backlog
from sqla_durable.store import claims as store_claims
from sqla_durable.store.claims import Batch
from sqla_durable.store.statements import Subset

log = Log("sqla_durable.worker")

_BATCH = 200
_ROUND = 20  # queues with limits, after which those without have their turn again
_UNREAD = 10  # times in a row that a history is lost with its connection
_ASIDE = 60.0  # seconds until a queue with limits whose rows are refused is claimed from again


class _Unread:
    """Counts how often in a row the history of one workflow, claimed alone, could not be read."""

    def __init__(self) -> None:
        self._last: object = None
        self._times = 0

    def count(self, batch: Batch, error: Exception) -> Fence | None:
        """Count a failure; return the attempt if it is to count as a crash of its workflow."""
        is_alone = len(batch.claimed) == 1 and not isinstance(error, NoConnectionError)
        fence = batch.claimed[0].fence if is_alone else None
        reason = fence and (fence.workflow_id, is_out_of_time(error))
        self._times = self._times + 1 if reason and reason == self._last else 1
        self._last = reason
        return fence if self._times >= (2 if is_out_of_time(error) else _UNREAD) else None


def _is_of_all(error: Exception) -> bool:
    """Return whether claims from another queue would fail too: the database is out of reach, or a pool exhausted."""
    return is_transient(error) or isinstance(error, NoConnectionError)


class _Source:
    """What was seen of the claims from one queue with limits, or from all others, since the last that succeeded.

    Attributes:
        most: how many are claimed at once.
        again: decides when it is tried again.
        unread: counts histories that could not be read.
    """

    def __init__(self) -> None:
        self.most = _BATCH
        self.succeed()

    def succeed(self) -> None:
        """Note that a claim has succeeded: the next one may be larger."""
        self.most = min(2 * self.most, _BATCH)
        self.again, self.unread = ObstacleRetry(), _Unread()


class Claims:
    """Claims workflows of the worker's queues whenever a slot is free.

    A full batch is followed by the next at once. After one that came back short, others may have locked what this one
    skipped: a few more claims follow, then it waits for a hint.
    """

    def __init__(
        self,
        database: Database,
        attempts: Attempts,
        slots: Slots,
        heartbeat: Heartbeat,
        cursors: Cursors,
        limited: LimitedQueues,
        isolation: Isolation,
        wakeups: Wakeups,
        settings: Settings,
    ) -> None:
        self._database = database
        self._attempts = attempts
        self._slots = slots
        self._heartbeat = heartbeat
        self._cursors = cursors
        self._limited = limited
        self._isolation = isolation
        self._wakeup = wakeups.claims
        self._maintenance = wakeups.maintenance
        self._settings = settings
        self._sources: defaultdict[str | None, _Source] = defaultdict(_Source)
        self._left: list[str | None] = []
        self._has_more = False
        self._wanted = _BATCH
        self._batch = Batch([], {})
        self._wakeup.set()

    async def run(self) -> None:
        """Claim until cancelled."""
        pauses = iter(CLAIM_PAUSES)
        while True:
            await self._attempts.slot()
            self._wakeup.clear()
            self._cursors.restart_if_time()
            in_burst, began = self._cursors.in_burst, time.monotonic()
            found, more = await self._claim_round(in_burst=in_burst)
            if found:
                pauses = iter(CLAIM_PAUSES)
            if not more:
                # Also for as long as it took: what it had to skip would have to be skipped again.
                await asyncio.sleep(max(CLAIM_SPACING, time.monotonic() - began))
                if not self._left:
                    await self._wait(next(pauses, None))

    async def _claim_round(self, *, in_burst: bool) -> tuple[bool, bool]:
        """Claim from each queue with limits, and from all others together, in changing order.

        Where there are many queues with limits, from some of them: the others are `_left` for the next rounds.

        Returns:
            Whether anything was claimed, and whether there may be more at once.
        """
        found = False
        if not self._left:
            self._left, self._has_more = self._limited.in_turn(await self._limited_queues()), False
        sources, self._left = self._left[:_ROUND], self._left[_ROUND:]
        if self._limited.has_others and None not in sources:
            sources.append(None)
        for queue in sources:
            if self._slots.free <= 0:
                self._left = []
                return True, True
            claimed = await self._claim(queue)
            found = found or bool(claimed)
            again = len(claimed) >= self._wanted or self._batch.again or (queue is None and in_burst)
            self._has_more = self._has_more or again
        return found, self._has_more and not self._left

    async def _limited_queues(self) -> list[str]:
        """Return the queues with limits in which something may wait; of one alone, its claim finds that out."""
        names = self._limited.names
        if len(names) < 2:
            return names
        chosen = self._settings
        waiting = partial(backlog.waiting, queues=names, names=chosen.names, versions=chosen.versions)
        return await persistently(self._database, waiting, what="claim")

    async def _wait(self, seconds: float | None) -> None:
        """Wait for at most so many seconds, until there may be something in the queues; claim receivers meanwhile."""
        until = None if seconds is None else time.monotonic() + seconds
        self._wakeup.accepts_receivers = True
        try:
            while self._slots.free > 0:
                left = None if until is None else until - time.monotonic()
                if not await self._wakeup.wait(left) or self._wakeup.is_for_anything:
                    break
                self._wakeup.clear()
                await self._claim_receivers(self._wakeup.take_receivers())
        finally:
            self._wakeup.accepts_receivers = False
            if self._wakeup.take_receivers():
                self._maintenance.set_for_signals()

    async def _claim_receivers(self, ids: list[UUID]) -> None:
        """Claim receivers, and begin to execute them; the maintenance delivers to those that this does not claim."""
        token, count = uuid7(), 0
        try:
            with self._heartbeat.claiming(token):
                claimed = await self._with_histories(await self._claim_receivers_once(token, ids))
                self._attempts.begin(claimed)
                count = len(claimed)
        except Exception as error:
            log.debug("claim of receivers: %s; they are delivered", first_line(error))
            await self._heartbeat.release_strays()  # it may have been executed
        if count < len(ids):
            self._maintenance.set_for_signals()

    async def _claim_receivers_once(self, token: UUID, ids: list[UUID]) -> list[Claimed]:
        await self._heartbeat.require_lease()
        chosen = self._settings
        claim = partial(
            store_claims.claim_receivers,
            ids=[each for each in ids if not self._isolation.is_aside(each)],
            worker_id=chosen.worker_id,
            token=token,
            queues=chosen.queues,
            names=chosen.names,
            versions=chosen.versions,
            limit=self._slots.free,
        )
        return await self._database.execute(claim)

    async def _claim(self, queue: str | None) -> list[Claimed]:
        """Claim, and begin to execute what was claimed; less at once after a failure.

        From one queue with limits, or from all that have none.

        If the histories of a batch do not arrive within the time limit, the next batch is smaller. A single history
        that exceeds the limit twice, or loses its connection ten times in a row, counts as a crash of its workflow. An
        exhausted pool never does. A queue with limits whose claim fails is set aside for a while, so that the others do
        not wait for it.
        """
        source, claim = self._sources[queue], self._claim_some
        while True:
            restarts = self._cursors.restarts
            self._wanted = min(self._slots.free, source.most)
            self._batch = Batch([], {})
            try:
                claimed = await claim(queue, self._isolation.part)
            except Exception as error:
                if is_about_data(error) and claim == self._claim_some:
                    log.warning("claim: %s; trying for one workflow after another", first_line(error))
                    claim = self._claim_apart
                    continue
                seconds = await self._note_failure(queue, source, error)
                is_alone = not _is_of_all(error)
                if queue is not None and is_alone:
                    self._limited.set_aside(queue, seconds)
                else:
                    await asyncio.sleep(seconds)
                # The claim may have been executed, and its acknowledgement lost.
                await self._heartbeat.release_strays()
                if queue is not None and is_alone:
                    self._batch = Batch([], {})
                    return []
            else:
                if queue is None:
                    self._cursors.note_claim(self._batch, restarts=restarts, is_full=len(claimed) >= self._wanted)
                source.succeed()
                return claimed

    async def _note_failure(self, queue: str | None, source: _Source, error: Exception) -> float:
        """Note that a claim has failed; return the seconds until it is tried again, or raise the error."""
        source.most = max(1, self._wanted // 2)
        seconds = source.again.wait_before_next(error)
        if seconds is None:
            if queue is None or not is_about_data(error):
                raise error
            seconds = _ASIDE
        where = "" if queue is None else f" from queue {queue!r}"
        log.warning("claim%s: %s; trying again in %.1f s", where, first_line(error), seconds)
        if (crashed := source.unread.count(self._batch, error)) is not None:
            await self._attempts.count_unread(crashed, first_line(error))
        return seconds

    async def _claim_some(self, queue: str | None, part: Subset) -> list[Claimed]:
        """Claim, and begin to execute what was claimed."""
        token = uuid7()
        with self._heartbeat.claiming(token):
            self._batch = await self._claim_once(token, queue, part)
            claimed = await self._with_histories(self._batch.claimed)
            if queue is not None:
                self._limited.begin(queue, claimed)
                self._limited.wake_in(queue, self._batch.retry_in)
            self._attempts.begin(claimed)
        return claimed

    async def _claim_apart(self, queue: str | None, part: Subset) -> list[Claimed]:
        """Claim so that a row or a history that cannot be read fails only its own workflow."""
        await self._heartbeat.release_strays()  # what was claimed, and could not be read
        ids = await self._database.execute(lambda connection: self._claimable(connection, queue, part))
        claimed = await self._isolation.each(ids, partial(self._claim_these, queue), what="claim")
        self._batch = Batch([], {})  # which says nothing of what comes before it
        return [*chain(*claimed)]

    async def _claim_these(self, queue: str | None, ids: Sequence[UUID]) -> list[Claimed]:
        try:
            return await self._claim_some(queue, Subset(ids))
        except Exception as error:
            if is_about_data(error):
                await self._heartbeat.release_strays()
            raise

    def _claimable(self, connection: Connection, queue: str | None, part: Subset) -> list[UUID]:
        wanted: dict[str, Any] = {**self._wanted_of(queue), "subset": part}
        if queue is None:
            return store_claims.claimable(connection, **wanted)
        return store_claims.limited_claimable(connection, **wanted)

    async def _claim_once(self, token: UUID, queue: str | None, part: Subset) -> Batch:
        await self._heartbeat.require_lease()
        claim = store_claims.claim if queue is None else store_claims.claim_limited

        def claim_once(connection: Connection) -> Batch:
            given: dict[str, Any] = {"worker_id": self._settings.worker_id, "token": token, "subset": part}
            return claim(connection, **given, **self._wanted_of(queue))

        return await self._database.execute(claim_once)

    def _wanted_of(self, queue: str | None) -> dict[str, Any]:
        """Return what to claim: from one queue with limits, or from the ranges of the others."""
        chosen = self._settings
        given: dict[str, Any] = {"names": chosen.names, "versions": chosen.versions, "limit": self._wanted}
        if queue is None:
            return {**given, "ranges": self._cursors.ranges()}
        return {**given, "queue": queue, "executing": self._limited.executing(queue)}

    async def _with_histories(self, claimed: list[Claimed]) -> list[Claimed]:
        if not any(each.is_unread for each in claimed):
            return claimed
        return await self._database.execute(lambda connection: store_claims.with_histories(connection, claimed))
