"""Serves one database: checks it, assembles the parts of a worker, runs their loops, and leaves in good order.

Each part is given what it needs as values. What is the same for all databases, such as signals of the process and the
start and stop of a worker, is in `worker`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar
from uuid import UUID

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable.definitions.database_errors import first_line, is_read_only, is_unreachable
from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.definitions.log import Log
from sqla_durable.definitions.registry import Registry
from sqla_durable.errors import DatabaseUnavailableError, SessionError
from sqla_durable.execution.worker.attempts import Attempts
from sqla_durable.execution.worker.blobs import Blobs
from sqla_durable.execution.worker.claims import Claims
from sqla_durable.execution.worker.cursors import Cursors
from sqla_durable.execution.worker.database import Databases
from sqla_durable.execution.worker.heartbeat import Heartbeat
from sqla_durable.execution.worker.hints import HintReceiver, Listener, Wakeups
from sqla_durable.execution.worker.isolation import Isolation
from sqla_durable.execution.worker.limited_queues import LimitedQueues, declare_queues
from sqla_durable.execution.worker.maintenance import Maintenance
from sqla_durable.execution.worker.recorder import Resources, Sessions, Slots
from sqla_durable.execution.worker.retention import Retention
from sqla_durable.execution.worker.schedules import Schedules
from sqla_durable.execution.worker.settings import BEATS, LAST_GRACE, Settings
from sqla_durable.execution.worker.writer import StreamWriter, Writer
from sqla_durable.operations.suspending import Wakers
from sqla_durable.operations.transaction import require_transaction
from sqla_durable.runtime.waiting import InThread, OnLoop
from sqla_durable.store import schema, workers
from sqla_durable.store.schema import keeps_statements

T = TypeVar("T")

log = Log("sqla_durable.worker")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 5.0  # seconds between two tries to reach the database


@dataclass(frozen=True, slots=True)
class Sessionmakers:
    """What opens the sessions of steps, of either kind."""

    sync: sessionmaker[Session] | None
    asynchronous: async_sessionmaker[AsyncSession] | None


async def prepare(databases: Databases) -> bool:
    """Choose how the worker's statements are executed; return whether notifications can arrive.

    Raises:
        SchemaError: the tables and this package do not fit together.
    """
    is_direct = await databases.shared.execute(keeps_statements)
    if not is_direct and await databases.shared.execute(_is_asyncpg):
        databases.use_transactions()
    await databases.shared.execute(_require_schema)
    if not await databases.shared.execute(schema.is_read_committed):
        databases.use_transactions()
    return is_direct


async def begin_within(begin: Callable[[], Awaitable[T]], *, url: str, seconds: float, stopping: asyncio.Event) -> T:
    """Begin, and try again while the database cannot be reached, as in an outage or a failover.

    Args:
        begin: what needs the database.
        url: the database, for messages.
        seconds: after which it is given up.
        stopping: set when the worker is to stop.

    Raises:
        DatabaseUnavailableError: it could not be reached for so long, or until the worker was to stop.
    """
    until, pause = time.monotonic() + seconds, _FIRST_PAUSE
    while True:
        try:
            return await _unless_stopped(begin, stopping, url)
        except (DBAPIError, OSError) as error:
            if not is_unreachable(error):
                raise
            unavailable = _unavailable(error, url)
            left = until - time.monotonic()
            if left <= 0 or stopping.is_set():
                raise unavailable from error
            log.warning("%s Trying again for another %.0f s.", unavailable, left)
        with suppress(TimeoutError):
            async with asyncio.timeout(min(pause, left)):
                await stopping.wait()
        pause = min(2 * pause, _LONGEST_PAUSE)


async def _unless_stopped(begin: Callable[[], Awaitable[T]], stopping: asyncio.Event, url: str) -> T:
    """Begin; give it up soon after the worker is to stop, as it may wait for locks of others without an end.

    Raises:
        DatabaseUnavailableError: the worker was to stop before it had begun.
    """
    beginning, stop = asyncio.ensure_future(begin()), asyncio.ensure_future(stopping.wait())
    try:
        await asyncio.wait([beginning, stop], return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait([beginning], timeout=LAST_GRACE)
        if beginning.done():
            return beginning.result()
    finally:
        for each in (beginning, stop):
            each.cancel()
        await asyncio.wait([beginning, stop])
    raise DatabaseUnavailableError(
        f"the worker was stopped before it had begun in the database {url}: another transaction may have kept it "
        "waiting, such as one that changes a queue or a schedule and stays open."
    )


def _unavailable(error: BaseException, url: str) -> DatabaseUnavailableError:
    if is_read_only(error):
        return DatabaseUnavailableError(
            f"the database {url} takes no writes: it is a standby, or default_transaction_read_only is on there. Give "
            "the worker the primary, or a URL with all servers and target_session_attrs=read-write."
        )
    return DatabaseUnavailableError(
        f"the database {url} cannot be reached: {first_line(error)}. Check the URL, and that the server is running."
    )


async def require_transactions(makers: Sessionmakers) -> None:
    """Refuse engines in AUTOCOMMIT before any step meets them.

    Raises:
        SessionError: one of them is.
    """
    if makers.sync is not None:
        with makers.sync() as session:
            await asyncio.to_thread(_begun, session, require_transaction)
    if makers.asynchronous is not None:
        async with makers.asynchronous() as session:
            await session.run_sync(_begun, require_transaction)


async def require_one_database(makers: Sessionmakers, worker_id: UUID) -> None:
    """Refuse two sessionmakers that lead to two databases: the lease must be visible through both.

    Raises:
        SessionError: it is not.
    """
    if makers.sync is None or makers.asynchronous is None:
        return
    with makers.sync() as session:
        visible = await asyncio.to_thread(_begun, session, partial(workers.exists, worker_id=worker_id))
    if not visible:
        raise SessionError(
            "sessionmaker and async_sessionmaker lead to different databases or schemas: the worker's lease is "
            "not visible through both. Bind them to the same one."
        )


def _begun(session: Session, function: Callable[[Session], T]) -> T:
    """Call a function in a transaction of the session, which may be one that begins none by itself."""
    session.begin()
    return function(session)


def _is_asyncpg(connection: Connection) -> bool:
    return connection.dialect.driver == "asyncpg"


def _require_schema(connection: Connection) -> None:
    with Session(connection) as session:
        schema.require(session)


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
        self._registry = registry
        self._stop = stop
        database, wakers, wakeups = databases.shared, Wakers(), Wakeups()
        self._writer = Writer(databases.writing, wakeups, wakers)
        self._stream_writer = StreamWriter(database)
        slots = Slots(settings.concurrency)
        resources = self._resources(makers, threads, slots, wakers)
        isolation = Isolation(database)
        cursors = Cursors(settings.queues, poll_interval=settings.poll_interval.total_seconds())
        limited = LimitedQueues(settings.queues, wakeups.claims)
        self._attempts = Attempts(
            registry, resources, isolation, limited, wakeups.maintenance, max_attempts=settings.max_attempts
        )
        self._heartbeat = Heartbeat(databases.beating, self._attempts, isolation, wakeups.heartbeat, settings)
        self._claims = Claims(
            databases.claiming, self._attempts, slots, self._heartbeat, cursors, limited, isolation, wakeups, settings
        )
        self._schedules = Schedules(databases, registry, settings.queues, wakeups.claims)
        self._retention = Retention(databases, registry)
        self._blobs = Blobs(database, settings.blobs)
        self._maintenance = Maintenance(
            database,
            self._heartbeat,
            cursors,
            limited,
            isolation,
            self._schedules,
            self._retention,
            wakeups,
            settings,
            self._stop_if_idle,
        )
        self._hints = HintReceiver(wakeups, wakers, cursors, worker_id=settings.worker_id, queues=settings.queues)

    @property
    def holds_lease(self) -> bool:
        """Whether the worker's lease holds. Callable from any thread."""
        return self._heartbeat.holds_lease

    def _resources(self, makers: Sessionmakers, threads: ThreadPoolExecutor, slots: Slots, wakers: Wakers) -> Resources:
        stop, places, loop = self._stop, self._settings.transactions, asyncio.get_running_loop()
        return Resources(
            database=self._databases.shared,
            transacting=self._databases.transacting,
            writer=self._writer,
            stream_writer=self._stream_writer,
            threads=threads,
            sync_sessions=Sessions.in_threads(makers.sync, places=places),
            async_sessions=Sessions.on_loop(makers.asynchronous, places=places),
            stopping=stop.requested,
            loop=loop,
            waiting_on_loop=OnLoop(stopping=stop.on_loop),
            waiting_in_threads=InThread(stopping=stop.requested, loop=loop),
            slots=slots,
            wakers=wakers,
        )

    async def begin(self) -> None:
        """Begin the lease, and bring what the code declares into the tables: queues, schedules, retention."""
        await self._heartbeat.begin()
        await declare_queues(self._databases.transacting, self._registry.queues())
        await self._schedules.declare()
        await self._retention.declare()

    def _stop_if_idle(self) -> None:
        """Stop, because nothing waits, if nothing is executed either."""
        if not self._attempts.fences and not self._heartbeat.is_claiming:
            self._stop.on_loop.set()

    async def run(self, *, listen_on: Engine | None) -> None:
        """Claim and execute until it is to stop, then leave in good order.

        Args:
            listen_on: the engine on whose connection hints are listened for; None: everything is found by polling.
        """
        taking = _tasks(
            claims=self._claims.run(),
            maintenance=self._maintenance.run(),
            retention=self._retention.run(),
            blobs=self._blobs.run(),
            listener=self._listen(listen_on),
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
