"""Serves one database: assembles the parts of a worker, runs their loops, and leaves in good order.

Each part is given what it needs as values. What is the same for all databases, such as signals of the process and the
start and stop of a worker, is in `worker`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine

from sqla_durable.definitions.log import Log
from sqla_durable.definitions.registry import Registry
from sqla_durable.execution.worker.attempts import Attempts
from sqla_durable.execution.worker.claims import Claims
from sqla_durable.execution.worker.cursors import Cursors
from sqla_durable.execution.worker.database import Databases
from sqla_durable.execution.worker.entry import Sessionmakers
from sqla_durable.execution.worker.heartbeat import Heartbeat
from sqla_durable.execution.worker.hints import HintReceiver, Wakeups
from sqla_durable.execution.worker.isolation import Isolation
from sqla_durable.execution.worker.listener import Listener
from sqla_durable.execution.worker.maintenance import Maintenance
from sqla_durable.execution.worker.recorder import Resources, Sessions, Slots
from sqla_durable.execution.worker.settings import Settings
from sqla_durable.execution.worker.timing import BEATS, LAST_GRACE
from sqla_durable.execution.worker.writer import StreamWriter, Writer
from sqla_durable.operations.suspending import Wakers

log = Log("sqla_durable.worker")


@dataclass(frozen=True, slots=True)
class Stop:
    """Says that the worker is to stop: to threads, and to the event loop.

    Attributes:
        requested: set at once, from any thread.
        on_loop: set on the event loop, soon after.
    """

    requested: threading.Event
    on_loop: asyncio.Event


class Serving:
    """Claims and executes the workflows of one database, until it is to stop.

    Args:
        settings: those of the worker.
        registry: the workflows that it knows.
        databases: where its own statements are executed.
        makers: open the sessions of steps.
        threads: where sync code is executed.
        stop: says that it is to stop.

    Attributes:
        left_behind: how many attempts, and threads, could not be ended.
    """

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        databases: Databases,
        makers: Sessionmakers,
        threads: ThreadPoolExecutor,
        stop: Stop,
    ) -> None:
        self.left_behind = 0
        self._settings = settings
        self._databases = databases
        self._stop = stop
        database = databases.shared
        wakers, wakeups = Wakers(), Wakeups()
        self._writer = Writer(databases.writing, wakeups, wakers)
        self._stream_writer = StreamWriter(database)
        slots = Slots(settings.concurrency)
        resources = Resources(
            database=database,
            writer=self._writer,
            stream_writer=self._stream_writer,
            threads=threads,
            sync_sessions=Sessions.in_threads(makers.sync, places=settings.transactions),
            async_sessions=Sessions.on_loop(makers.asynchronous, places=settings.transactions),
            stopping=stop.requested,
            stopping_on_loop=stop.on_loop,
            loop=asyncio.get_running_loop(),
            slots=slots,
            wakers=wakers,
        )
        isolation = Isolation(database)
        cursors = Cursors(settings.queues, poll_interval=settings.poll_interval.total_seconds())
        self._attempts = Attempts(
            registry, resources, isolation, wakeups.maintenance, max_attempts=settings.max_attempts
        )
        self._heartbeat = Heartbeat(databases.beating, self._attempts, isolation, wakeups.heartbeat, settings)
        self._claims = Claims(
            database, self._attempts, slots, self._heartbeat, cursors, isolation, wakeups.claims, settings
        )
        self._maintenance = Maintenance(database, self._heartbeat, cursors, isolation, wakeups, settings)
        self._hints = HintReceiver(wakeups, wakers, cursors, worker_id=settings.worker_id, queues=settings.queues)

    async def begin(self) -> None:
        """Begin the lease."""
        await self._heartbeat.begin()

    async def run(self, *, listen_on: Engine | None) -> None:
        """Claim and execute until it is to stop, then leave in good order.

        Args:
            listen_on: the engine on whose connection hints are listened for; None: everything is found by polling.
        """
        taking = _tasks(
            claims=self._claims.run(), maintenance=self._maintenance.run(), listener=self._listen(listen_on)
        )
        keeping = _tasks(
            heartbeat=self._heartbeat.run(), writer=self._writer.run(), stream_writer=self._stream_writer.run()
        )
        loops = [*taking, *keeping]
        stopping = asyncio.create_task(self._stop.on_loop.wait(), name="stop")
        try:
            await asyncio.wait([*loops, stopping], return_when=asyncio.FIRST_COMPLETED)
            self._stop.requested.set()
            await _cancelled(taking)
            has_released = await self._in_time(
                self._release(), seconds=self._settings.grace.total_seconds() + LAST_GRACE
            )
        finally:
            self._stop.requested.set()
            self.left_behind = self._attempts.cancel() + sum(each.stuck for each in self._databases.all)
            for task in (*loops, stopping):
                task.cancel()
            outcomes = await asyncio.gather(*loops, return_exceptions=True)
        if has_released:
            await self._in_time(self._heartbeat.end(), seconds=LAST_GRACE)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome

    async def _listen(self, engine: Engine | None) -> None:
        if engine is None:
            await asyncio.Event().wait()
        else:
            await Listener(engine, self._hints.receive, check=self._settings.lease / BEATS).run()

    async def _release(self) -> None:
        await self._attempts.release_all(grace=self._settings.grace.total_seconds())
        async with asyncio.timeout(LAST_GRACE):
            await self._heartbeat.release_strays()
            await self._maintenance.deliver()

    async def _in_time(self, action: Coroutine[Any, Any, None], *, seconds: float) -> bool:
        """Do one of the last things, unless the database is out of reach: others reclaim what is not released."""
        try:
            async with asyncio.timeout(seconds):
                await action
        except TimeoutError:
            log.warning(
                "worker %s: cannot reach the database to leave in good order; what it has not released is reclaimed "
                "when its lease has run out",
                self._settings.worker_id,
            )
            return False
        return True


def _tasks(**loops: Coroutine[Any, Any, None]) -> list[asyncio.Task[None]]:
    """Begin tasks with these names."""
    return [asyncio.create_task(each, name=name) for name, each in loops.items()]


async def _cancelled(loops: list[asyncio.Task[None]]) -> None:
    for each in loops:
        each.cancel()
    await asyncio.wait(loops)
