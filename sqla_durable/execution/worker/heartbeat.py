"""Extends the worker's lease, and compares what is claimed by this worker with what it is executing."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from functools import partial
from uuid import UUID

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from sqla_durable.definitions.database_errors import is_about_data
from sqla_durable.definitions.log import Log
from sqla_durable.execution.worker.attempts import Attempts
from sqla_durable.execution.worker.database import Database, persistently
from sqla_durable.execution.worker.hints import Wakeup
from sqla_durable.execution.worker.isolation import Isolation
from sqla_durable.execution.worker.settings import BEATS, COMPARE_ALL_EVERY, HINT_SPACING, Settings
from sqla_durable.models.base import WorkflowStatus
from sqla_durable.store import Fence, hints, workers
from sqla_durable.store import attempts as store_attempts

log = Log("sqla_durable.worker")


class Heartbeat:
    """One row in the worker table, extended three times in a lease, on a connection of its own.

    Attributes:
        lease: the seconds that a beat is good for.
        interval: the seconds between two beats.
    """

    def __init__(
        self, database: Database, attempts: Attempts, isolation: Isolation, wakeup: Wakeup, settings: Settings
    ) -> None:
        self._database = database
        self._attempts = attempts
        self._isolation = isolation
        self._wakeup = wakeup
        self._settings = settings
        self._worker_id = settings.worker_id
        self._valid_until = float("-inf")
        self._claiming: UUID | None = None
        self._claimed_meanwhile: set[UUID] = set()
        self._compares_all_at = float("-inf")
        self.lease = settings.lease.total_seconds()
        self.interval = self.lease / BEATS

    async def begin(self) -> None:
        """Begin the lease."""
        began = time.monotonic()
        await self._database.execute(self._beat())
        self._extended(began)

    async def run(self) -> None:
        """Extend the lease until cancelled; drop what is no longer this worker's, release what it does not know.

        At each beat, and as soon as a hint says that something was taken from this worker.
        """
        beats_at = time.monotonic() + self.interval
        while True:
            is_hinted = await self._wakeup.wait(beats_at - time.monotonic())
            self._wakeup.clear()
            if time.monotonic() >= beats_at:
                await self._extend()
                beats_at = time.monotonic() + self.interval
            await self._compare()
            if is_hinted:
                await asyncio.sleep(HINT_SPACING)

    async def notify(self, workers: Iterable[UUID]) -> None:
        """Hint to other workers, and to this one, that something may have been taken from them."""
        others = set(workers)
        if self._worker_id in others:
            self._wakeup.set()
        if others := others - {self._worker_id}:
            notify = partial(send_hints, payloads=[hints.to_worker(each) for each in others])
            await persistently(self._database, notify, what="hint")

    async def require_lease(self) -> None:
        """Renew the lease if it has run out, as after a freeze; workflows that nobody has reclaimed continue."""
        if time.monotonic() >= self._valid_until:
            await self.renew()

    async def renew(self) -> None:
        """Renew the lease: it has run out, or somebody has deleted it."""
        log.warning("the lease of this worker has run out; it goes on with what nobody has reclaimed")
        await self._extend()

    @property
    def holds_lease(self) -> bool:
        """Whether its last beat is recent enough for the lease to hold. Callable from any thread."""
        return time.monotonic() < self._valid_until

    @property
    def is_claiming(self) -> bool:
        """Whether a claim is on its way: what it takes is not executed yet."""
        return self._claiming is not None

    @contextmanager
    def claiming(self, token: UUID) -> Generator[None]:
        """Note which claim is on its way, so that its workflows are not released as unknown."""
        self._claiming = token
        self._claimed_meanwhile.add(token)
        try:
            yield
        finally:
            self._claiming = None

    async def release_strays(self) -> None:
        """Release what was claimed and no attempt executes: the acknowledgement was lost, or came too late."""
        known = set(self._attempts.fences)
        await self._release_unknown(await self._running_here(), known)

    async def end(self) -> None:
        """End the lease, once nothing extends it any more, and hint to others to claim what was released."""
        await persistently(self._database, self._leave, what="leave")
        # By itself: where statements are in transactions, NOTIFY would hold its lock until the DELETE is on disk.
        await persistently(self._database, partial(send_hints, payloads=[hints.LATE]), what="leave")

    async def _compare(self) -> None:
        """Now and then, because the server may carry out a claim long after its connection was lost."""
        running = self._attempts.fences
        if time.monotonic() >= self._compares_all_at:
            self._compares_all_at = time.monotonic() + COMPARE_ALL_EVERY * self.interval
            owned = await self._running_here()
            await self._release_unknown(owned, set(running))
        else:
            still_owned = partial(store_attempts.still_owned, fences=running)
            owned = await persistently(self._database, still_owned, what="heartbeat") if running else set[Fence]()
        if missing := [each for each in running if each not in owned]:
            # What its own attempt has finished is not lost, however late the acknowledgement comes.
            finished_by = partial(store_attempts.finished_by, fences=missing)
            ends = await persistently(self._database, finished_by, what="heartbeat")
            own = {each for each, end in ends.items() if end is not WorkflowStatus.CANCELLED}
            self._attempts.drop(each for each in missing if each not in own)

    async def _running_here(self) -> set[Fence]:
        self._claimed_meanwhile = set() if self._claiming is None else {self._claiming}
        running_of = partial(workers.attempts_of, worker_id=self._worker_id)
        return set(await persistently(self._database, running_of, what="heartbeat"))

    async def _release_unknown(self, owned: set[Fence], known: set[Fence]) -> None:
        """Release what the tables say this worker executes and it does not, except what a claim is just taking."""
        unknown = owned - known - set(self._attempts.fences)
        strays = [each for each in unknown if each.token not in self._claimed_meanwhile]
        strays = [each for each in strays if not self._isolation.is_aside(each.workflow_id)]
        if strays:
            log.warning("%d workflows are claimed by this worker and not executed; they are released", len(strays))
            await self._attempts.release(strays)

    def _leave(self, connection: Connection) -> None:
        workers.end_lease(connection, self._worker_id)

    def _extended(self, began: float) -> None:
        self._valid_until = began + self.lease

    async def _extend(self) -> None:
        """Extend the lease; if the database refuses what is shown of the steps, such as a key's text, without that."""
        began = time.monotonic()
        try:
            await persistently(self._database, self._beat(), what="heartbeat")
        except DBAPIError as error:
            if not is_about_data(error):
                raise
            await persistently(self._database, self._beat(shows_steps=False), what="heartbeat")
        self._extended(began)

    def _beat(self, *, shows_steps: bool = True) -> Callable[[Connection], None]:
        """Return the statement, which shows the steps that have been executed for longer than a beat."""
        doing = self._attempts.steps_longer_than(self.interval) if shows_steps else None
        return partial(
            workers.beat,
            worker_id=self._worker_id,
            name=self._settings.name,
            queues=self._settings.queues.given,
            names=self._settings.names,
            versions=self._settings.versions,
            slots=self._settings.concurrency,
            lease=self._settings.lease,
            doing=json.dumps(doing) if doing else None,
        )


def send_hints(connection: Connection, payloads: Sequence[str]) -> None:
    """Hint to the workers that listen for these payloads."""
    channel = hints.channel_on(connection)
    hints.notify(connection, [(channel, each) for each in payloads])
