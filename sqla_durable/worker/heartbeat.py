"""Holds the worker's lease, and notices which attempts it has lost."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from uuid import UUID

from sqlalchemy.orm import Session

from sqla_durable.store import Fence, workers, workflows
from sqla_durable.worker.attempts import Attempts
from sqla_durable.worker.database import Database, persistently

log = logging.getLogger("sqla_durable.worker")


class Heartbeat:
    """One row in the worker table, extended three times in a lease, on a connection of its own."""

    def __init__(
        self, database: Database, *, worker_id: UUID, queues: Sequence[str], lease: timedelta, name: str | None
    ) -> None:
        self._database = database
        self._worker_id = worker_id
        self._queues = queues
        self._lease = lease
        self._name = name or f"{socket.gethostname()}:{os.getpid()}"

    async def begin(self) -> None:
        """Begin the lease."""
        await self._database.transact(self._beat)

    async def run(self, attempts: Attempts) -> None:
        """Extend the lease until cancelled, and drop the attempts that are no longer this worker's."""
        while True:
            await asyncio.sleep(self._lease.total_seconds() / 3)
            running = attempts.fences
            look = partial(self._beat_and_look, running=running)
            attempts.drop_lost(await persistently(self._database, look, what="heartbeat"), running)

    def renew(self, session: Session) -> None:
        """Begin the lease anew if it has run out, as after a freeze: what nobody has taken over goes on."""
        if not workers.alive(session, self._worker_id):
            log.warning("the lease of this worker has run out; it goes on with what nobody has taken over")
            self._beat(session)

    async def end(self) -> None:
        """End the lease: once nothing extends it any more."""
        await persistently(self._database, lambda session: workers.leave(session, self._worker_id), what="leave")

    def _beat_and_look(self, session: Session, running: list[Fence]) -> set[Fence]:
        """Extend the lease, give what is still this worker's, and forget the long dead.

        In one transaction that writes: a server that has been demoted would answer a mere question from the past.
        """
        self._beat(session)
        workers.forget_dead(session)
        return workflows.still_owned(session, running) if running else set()

    def _beat(self, session: Session) -> None:
        workers.beat(session, worker_id=self._worker_id, name=self._name, queues=self._queues, lease=self._lease)
