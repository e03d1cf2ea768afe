"""`Worker`: its settings, its start and its graceful stop; the parts are in the modules beside this one."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Coroutine, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, Self
from uuid import UUID

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker
from uuid_utils.compat import uuid7

import sqla_durable.execution.worker.entry as entry
import sqla_durable.execution.worker.settings as settings
from sqla_durable.api.callers import explain_missing_rights
from sqla_durable.api.durable import Durable
from sqla_durable.api.polling import refuse_event_loop
from sqla_durable.definitions.checks import require_duration, require_text
from sqla_durable.definitions.log import Log, worker_name
from sqla_durable.errors import DatabaseUnavailableError, DefinitionError, UsageError
from sqla_durable.execution.worker.attempts import Attempts
from sqla_durable.execution.worker.background import Background
from sqla_durable.execution.worker.claims import Claims
from sqla_durable.execution.worker.cursors import Cursors
from sqla_durable.execution.worker.database import Database, Databases, open_databases
from sqla_durable.execution.worker.gatherer import Gatherer
from sqla_durable.execution.worker.heartbeat import BEATS, Heartbeat
from sqla_durable.execution.worker.isolation import Isolation
from sqla_durable.execution.worker.listener import Listener
from sqla_durable.execution.worker.maintenance import Maintenance
from sqla_durable.execution.worker.runtimes import Surroundings
from sqla_durable.execution.worker.writer import Writer
from sqla_durable.operations.arrivals import Arrivals
from sqla_durable.store import hints, schema
from sqla_durable.store.workers import DEFAULT_MAX_ATTEMPTS, MOST_CRASHES

log = Log("sqla_durable.worker")

_LAST_GRACE = 5.0  # seconds after the grace in which the database must be reached to leave in good order


class Worker:
    """Claims workflows from queues and executes them, sync and async ones together.

    ```python
    worker = Worker(durable, sessionmaker=SessionLocal)
    worker.run()                      # until SIGTERM or SIGINT
    ```

    A worker runs once. Entering it as a context manager waits until it has started, or raises what kept it from that.

    In an application that has an event loop, `async with worker:` runs it beside; `with worker:` runs it in a thread.
    A worker that dies is replaced by any other: what it had claimed is claimed again when its lease has run out, and
    goes on after the last checkpoint. Its transactional steps take effect exactly once, its plain steps at least once.

    Args:
        durable: the workflows it knows. Rows of other names stay for workers that know them.
        sessionmaker: opens the sessions of steps that take a `Session`; by default the one of `durable`.
        async_sessionmaker: likewise for `AsyncSession`. With both, they must lead to the same database.
        queues: the queues it claims from; by default those of the workflows it knows, and `default`.
        versions: claim only what was started by these versions of the code, and what has no version; by default
            everything. See `Durable(version=...)`; a version that waits and is not claimed here is named in the log.
        concurrency: how many workflows it executes at once.
        transactions: how many transactional steps of each kind hold a connection at once; by default what the
            engine's pool can give, less the few connections that the worker needs for itself.
        lease: how long its workflows stay its own after its last heartbeat; it beats three times in a lease.
        poll_interval: how long it waits between two looks for what to do, where no hint comes sooner.
        grace: how long a stop waits for steps that are being executed before it hands their workflows back.
        start_timeout: how long it waits at its start for a database that cannot be reached, as in an outage or a
            failover; later ones are waited out without an end.
        listen: whether it listens for hints, on a connection beside the pool; without, it finds things a poll later. By
            default unless the driver keeps no prepared statements, as behind a pooler in transaction mode, where no
            hint arrives.
        max_attempts: how many attempts in a row may lose their worker without recording a step before the workflow
            fails.
        name: what the worker table shows; by default host and process id.

    Raises:
        SessionError: there is no sessionmaker, or none for a kind of session that a step takes.
        DefinitionError: an annotation of a workflow or step cannot be stored as JSON.
        ArgumentError: a duration is none, or longer than a hundred years, or the name cannot be stored.
        ValueError: another setting is out of range.
    """

    def __init__(
        self,
        durable: Durable,
        *,
        sessionmaker: sessionmaker[Session] | None = None,
        async_sessionmaker: async_sessionmaker[AsyncSession] | None = None,
        queues: Iterable[str] | None = None,
        versions: Iterable[str] | None = None,
        concurrency: int = 100,
        transactions: int | None = None,
        lease: timedelta = timedelta(seconds=30),
        poll_interval: timedelta = timedelta(seconds=1),
        grace: timedelta = timedelta(seconds=20),
        start_timeout: timedelta = timedelta(seconds=60),
        listen: bool | None = None,
        max_attempts: int = DEFAULT_MAX_ATTEMPTS,
        name: str | None = None,
    ) -> None:
        if not isinstance(durable, Durable):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise DefinitionError(f"a worker takes the Durable object whose workflows it executes, got {durable!r}.")
        self.id: UUID = uuid7()
        self.durable = durable
        self.sessionmaker = sessionmaker or durable.sessionmaker
        self.async_sessionmaker = async_sessionmaker or durable.async_sessionmaker
        self.queues = settings.chosen_queues(durable, queues)
        self.versions = settings.chosen_versions(versions)
        self.concurrency = settings.at_least(concurrency, 1, "concurrency")
        self.transactions = transactions if transactions is None else settings.at_least(transactions, 1, "transactions")
        self.lease = settings.positive(lease, "lease")
        self.poll_interval = settings.positive(poll_interval, "poll_interval")
        require_duration(grace, "grace")
        self.grace = grace
        require_duration(start_timeout, "start_timeout")
        self.start_timeout = start_timeout
        self.listen = listen
        self.max_attempts = settings.within(max_attempts, 1, MOST_CRASHES, "max_attempts")
        if name is not None:
            require_text(name, what="name of the worker")
        self.name = name
        self.left_behind = 0
        self._is_direct = True
        self._places = 1
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = threading.Event()
        self._stopping = asyncio.Event()
        self._started: Future[None] = Future()
        self._background: Background | None = None
        self._task: asyncio.Task[None] | None = None
        settings.require_sessionmakers(durable, self.sessionmaker, self.async_sessionmaker)
        settings.require_codecs(durable)

    def run(self) -> None:
        """Run until `stop` is called or, in the main thread, SIGTERM or SIGINT arrives; then leave in good order.

        A second signal ends the process at once; its workflows are claimed again when the lease has run out.

        Raises:
            SchemaError: the tables and this package do not fit together.
            DatabaseUnavailableError: the database could not be reached at the start, for `start_timeout`. Later outages
                are waited out.
            SessionError: an engine is in AUTOCOMMIT, or has another driver than psycopg or asyncpg; its pool has no
                connections left beside those of other workers; or the two sessionmakers lead to two databases.
            UsageError: an event loop is running in this thread.
            UsageError: this worker has run already.
        """
        refuse_event_loop("Worker.run()", "await Worker.serve(), or use `async with worker:`")
        with asyncio.Runner() as runner:
            runner.run(self._serve_until_signal())

    async def serve(self) -> None:
        """Run on the running event loop until `stop` is called. See `run`; signals are the caller's."""
        if self._loop is not None or self._started.done():
            raise UsageError(f"{self!r} has run already, and a worker runs once: make a new one.")
        self._loop = asyncio.get_running_loop()
        threads = ThreadPoolExecutor(self.concurrency, thread_name_prefix="sqla-durable")
        named = worker_name.set(settings.shown_name(self.name))
        try:
            databases = self._databases()
            try:
                await self._serve(databases, threads)
            finally:
                for each in databases.all:
                    await each.close()
        finally:
            worker_name.reset(named)
            self._loop = None
            settings.give_back(self.id)
            threads.shutdown(wait=False, cancel_futures=True)

    def stop(self) -> None:
        """Ask the worker to leave in good order; returns at once. Callable from any thread."""
        self._stop.set()
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended in between
                self._loop.call_soon_threadsafe(self._stopping.set)

    def refuse_start(self, error: BaseException) -> None:
        """Tell whoever waits for the start that there will be none."""
        if not self._started.done():
            self._started.set_exception(error)

    def __enter__(self) -> Self:
        self._background = Background(self)
        self._background.start()
        self._started.result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._background is not None  # noqa: S101 (set on entry)
        self._background.stop()

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self.serve(), name="sqla-durable worker")
        await asyncio.wait([self._task, asyncio.wrap_future(self._started)], return_when=asyncio.FIRST_COMPLETED)
        if self._task.done():
            await self._task
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if self._task is not None:
            await self._task

    async def _serve_until_signal(self) -> None:
        worker_name.set(settings.shown_name(self.name))  # for the handlers too
        loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            for each in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(each, self._on_signal, loop)
        try:
            await self.serve()
        except DatabaseUnavailableError:
            if not self._stop.is_set():
                raise
            log.warning("worker %s: stopped before it could reach the database", self.id)

    def _on_signal(self, loop: asyncio.AbstractEventLoop) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(each)
        log.info("worker %s: stopping; steps that are being executed have %s", self.id, self.grace)
        self.stop()

    async def _serve(self, databases: Databases, threads: ThreadPoolExecutor) -> None:
        writer = Writer(databases.writing)
        surroundings = self._surroundings(databases.shared, writer, threads)
        attempts = Attempts(
            self.durable.registry,
            surroundings,
            databases.shared,
            concurrency=self.concurrency,
            max_attempts=self.max_attempts,
        )
        heartbeat = Heartbeat(
            databases.beating,
            attempts,
            worker_id=self.id,
            queues=self.queues,
            lease=self.lease,
            name=settings.shown_name(self.name),
        )
        await self._begin(databases, heartbeat)
        self._started.set_result(None)
        cursors = Cursors(self.queues, poll_interval=self.poll_interval.total_seconds())
        claims = self._claims(databases.shared, attempts, heartbeat, cursors)
        maintenance = self._maintenance(databases.shared, claims, heartbeat, cursors, attempts.isolation)
        writer.on_asked = maintenance.hint
        writer.on_ended = surroundings.arrivals.announce
        listening = self._listen(claims, maintenance, heartbeat, cursors, surroundings.arrivals)
        taking = _tasks(claims=claims.run(), maintenance=maintenance.run(), listener=listening)
        keeping = _tasks(heartbeat=heartbeat.run(), writer=writer.run(), gatherer=surroundings.gatherer.run())
        loops = [*taking, *keeping]
        stopping = asyncio.create_task(self._stopping.wait(), name="stop")
        if self._stop.is_set():
            self._stopping.set()
        try:
            await asyncio.wait([*loops, stopping], return_when=asyncio.FIRST_COMPLETED)
            surroundings.stopping.set()
            await _ended(taking)
            handed_back = await self._leaving(
                self._hand_back(attempts, heartbeat, maintenance), seconds=self._grace + _LAST_GRACE
            )
        finally:
            surroundings.stopping.set()
            self.left_behind = attempts.cancel() + sum(each.stuck for each in databases.all)
            for task in (*loops, stopping):
                task.cancel()
            outcomes = await asyncio.gather(*loops, return_exceptions=True)
        if handed_back:
            await self._leaving(heartbeat.end(), seconds=_LAST_GRACE)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome

    @property
    def _grace(self) -> float:
        return self.grace.total_seconds()

    async def _hand_back(self, attempts: Attempts, heartbeat: Heartbeat, maintenance: Maintenance) -> None:
        await attempts.hand_back(grace=self._grace)
        async with asyncio.timeout(_LAST_GRACE):
            await heartbeat.release_strays()
            await maintenance.deliver()

    async def _leaving(self, farewell: Coroutine[Any, Any, None], *, seconds: float) -> bool:
        """Do one of the last things, unless the database is out of reach: others reclaim what is not handed back."""
        try:
            async with asyncio.timeout(seconds):
                await farewell
        except TimeoutError:
            log.warning(
                "worker %s: cannot reach the database to leave in good order; what it has not handed back is reclaimed "
                "when its lease has run out",
                self.id,
            )
            return False
        return True

    async def _begin(self, databases: Databases, heartbeat: Heartbeat) -> None:
        async def begin() -> None:
            self._is_direct = await entry.prepare(databases)
            await heartbeat.begin()
            makers = entry.Sessionmakers(self.sessionmaker, self.async_sessionmaker)
            await entry.require_transactions(makers)
            await entry.require_one_database(makers, self.id)

        if self._stop.is_set():
            self._stopping.set()
        url = settings.engine_of(self.sessionmaker, self.async_sessionmaker).url
        shown, seconds = url.render_as_string(hide_password=True), self.start_timeout.total_seconds()
        with explain_missing_rights("worker", user=url.username or "the worker"):
            await entry.begin_within(begin, url=shown, seconds=seconds, stopping=self._stopping)
        if not list(self.durable.registry):
            log.warning("no workflows are registered here: is the module that defines them imported?")
        log.info(
            "worker %s: claims %s from %s",
            self.id,
            ", ".join(each.name for each in self.durable.registry) or "nothing",
            ", ".join(self.queues),
        )

    def _databases(self) -> Databases:
        """Give where the worker's own statements are executed."""
        for each in self._engines():
            settings.require_driver(each)
        engine = settings.engine_of(self.sessionmaker, self.async_sessionmaker)
        settings.require_pool(engine)
        self._places = min(map(settings.pool_capacity, self._engines()))
        return open_databases(
            engine,
            hold=settings.reserve(engine, self.id),
            limit=settings.time_limit(self.lease),
            beat_limit=settings.heartbeat_limit(self.lease),
        )

    def _engines(self) -> list[Engine]:
        """Return the engines of steps of either kind."""
        engines = [schema.engine_of(each().sync_session) for each in [self.async_sessionmaker] if each is not None]
        return engines + [schema.engine_of(each()) for each in [self.sessionmaker] if each is not None]

    def _claims(self, database: Database, attempts: Attempts, heartbeat: Heartbeat, cursors: Cursors) -> Claims:
        return Claims(
            database,
            attempts,
            heartbeat,
            cursors,
            worker_id=self.id,
            names=[each.name for each in self.durable.registry],
            versions=self.versions,
        )

    def _maintenance(
        self, database: Database, claims: Claims, heartbeat: Heartbeat, cursors: Cursors, isolation: Isolation
    ) -> Maintenance:
        return Maintenance(
            database,
            claims,
            heartbeat,
            cursors,
            isolation,
            worker_id=self.id,
            queues=self.queues,
            names=[each.name for each in self.durable.registry],
            versions=self.versions,
            poll_interval=self.poll_interval,
            max_attempts=self.max_attempts,
        )

    async def _listen(
        self, claims: Claims, maintenance: Maintenance, heartbeat: Heartbeat, cursors: Cursors, arrivals: Arrivals
    ) -> None:
        """Hand hints on: for a queue, for what this worker is executing, and for everything else, timers too."""

        def on_hint(payload: str) -> None:
            match hints.read(payload):
                case hints.Kind.QUEUE, queue:
                    if queue in self.queues:
                        claims.hint()
                case hints.Kind.WORKER, worker_id:
                    if worker_id == str(self.id):
                        heartbeat.hint()
                case hints.Kind.SENT, _:
                    maintenance.hint_of_signals()
                    arrivals.announce(payload)
                case hints.Kind.LATE, _:
                    cursors.restart()
                    maintenance.hint()
                case _:
                    maintenance.hint()

        engine = settings.engine_of(self.sessionmaker, self.async_sessionmaker)
        if self._is_direct if self.listen is None else self.listen:
            await Listener(engine, on_hint, check=self.lease / BEATS).run()
        else:
            await asyncio.Event().wait()

    def _surroundings(self, database: Database, writer: Writer, threads: ThreadPoolExecutor) -> Surroundings:
        places = self.transactions or self._places
        return Surroundings(
            database=database,
            writer=writer,
            gatherer=Gatherer(database),
            threads=threads,
            sessionmaker=self.sessionmaker,
            async_sessionmaker=self.async_sessionmaker,
            sync_places=threading.Semaphore(places),
            async_places=asyncio.Semaphore(places),
            stopping=self._stop,
            stopping_async=self._stopping,
            loop=asyncio.get_running_loop(),
            arrivals=Arrivals(),
        )


def _tasks(**loops: Coroutine[Any, Any, None]) -> list[asyncio.Task[None]]:
    """Begin tasks with these names."""
    return [asyncio.create_task(each, name=name) for name, each in loops.items()]


async def _ended(loops: list[asyncio.Task[None]]) -> None:
    for each in loops:
        each.cancel()
    await asyncio.wait(loops)
