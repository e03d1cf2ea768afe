"""`Worker`: its settings, its start, and its stop on a signal or from another thread.

What it does for a database is in `serving`; the parts of that are in the modules beside it. All of them are imported
when a worker serves: a program that only defines one, such as a web application, does not need them.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Self
from uuid import UUID

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker
from uuid_utils.compat import uuid7

import sqla_durable.execution.worker.pools as pools
import sqla_durable.execution.worker.settings as settings
from sqla_durable.api.durable import Durable
from sqla_durable.api.polling import refuse_event_loop
from sqla_durable.api.sessions import explain_missing_rights
from sqla_durable.definitions.checks import require_text
from sqla_durable.definitions.log import Log, worker_name
from sqla_durable.errors import DatabaseUnavailableError, DefinitionError, UsageError
from sqla_durable.execution.worker.database import Databases, open_databases
from sqla_durable.execution.worker.subscribed import Subscribed
from sqla_durable.store import schema
from sqla_durable.store.workers import DEFAULT_MAX_ATTEMPTS, MOST_CRASHES

if TYPE_CHECKING:
    from sqla_durable.execution.worker.serving import Serving, Sessionmakers

log = Log("sqla_durable.worker")


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
        queues: the queues it claims from, or patterns of their names such as "mail.*", where `*` stands for any text;
            by default those of the workflows it knows, those that `Durable.queue` declares, and `default`.
        versions: claim only what was started by these versions of the code, and what has no version; by default
            everything. See `Durable(version=...)`; a version that waits and is not claimed here is named in the log.
        concurrency: how many workflows it executes at once.
        transactions: how many transactional steps of each kind hold a connection at once; by default what the
            engine's pool can give, less the few connections that the worker needs for itself.
        lease: how long its workflows remain its own after its last heartbeat; it beats three times in a lease.
        poll_interval: how long it waits between two polls for what to do, where no hint comes sooner.
        grace: how long a stop waits for steps that are being executed before it releases their workflows.
        start_timeout: how long it waits at its start for a database that cannot be reached, as in an outage or a
            failover; later ones are waited out without an end.
        listen: whether it listens for hints, on a connection beside the pool; without, it finds all a poll later. By
            default unless the driver keeps no prepared statements, as behind a pooler in transaction mode, where no
            hint arrives.
        max_attempts: how many attempts in a row may lose their worker without recording a step before the workflow
            fails.
        name: what the worker table shows; by default host and process id.
        until_empty: whether it stops by itself when nothing waits in its queues that it knows, and it executes nothing:
            what is suspended is left to others, and so is what waits in a paused queue.

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
        until_empty: bool = False,
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
        self.grace = settings.duration(grace, "grace")
        self.start_timeout = settings.duration(start_timeout, "start_timeout")
        self.listen = listen
        self.max_attempts = settings.within(max_attempts, 1, MOST_CRASHES, "max_attempts")
        if name is not None:
            require_text(name, what="name of the worker")
        self.name = name
        self.until_empty = until_empty
        self.left_behind = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._serving: Serving | None = None
        self._stop = threading.Event()
        self._stopping = asyncio.Event()
        self._started: Future[None] = Future()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None  # what ended it in that thread
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
        self._require_first_run()
        self._loop = asyncio.get_running_loop()
        threads = ThreadPoolExecutor(self.concurrency, thread_name_prefix="sqla-durable")
        named = worker_name.set(settings.shown_name(self.name))
        try:
            self._require_engines()
            chosen = self._settings()  # before connections of the pool are reserved
            databases = self._databases()
            try:
                await self._serve(databases, chosen, threads)
            finally:
                for each in databases.all:
                    await each.close()
        finally:
            worker_name.reset(named)
            self._loop = None
            pools.release_reserved(self.id)
            threads.shutdown(wait=False, cancel_futures=True)

    def stop(self) -> None:
        """Ask the worker to leave in good order; returns at once. Callable from any thread."""
        self._stop.set()
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended in between
                self._loop.call_soon_threadsafe(self._stopping.set)

    @property
    def is_serving(self) -> bool:
        """Whether it has started, is not being stopped, and its lease holds, as it does not in an outage.

        Callable from any thread; for the probe of a service that routes or counts what is ready.
        """
        serving = self._serving
        return self._loop is not None and serving is not None and serving.holds_lease and not self._stop.is_set()

    def responds(self, *, within: timedelta = timedelta(seconds=5)) -> bool:
        """Return whether its event loop answers in time, and is not blocked by code of yours; True while it has none.

        Callable from any thread but the loop's own, and waits; for the probe of a service that restarts what is stuck.
        """
        answered = threading.Event()
        try:
            loop = self._loop
            if loop is not None:
                loop.call_soon_threadsafe(answered.set)
        except RuntimeError:  # the loop has ended in between
            return True
        return loop is None or answered.wait(within.total_seconds())

    def __enter__(self) -> Self:
        self._require_first_run()
        self._thread = threading.Thread(target=self._run_in_thread, name="sqla-durable worker", daemon=True)
        self._thread.start()
        self._started.result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._thread is not None  # noqa: S101 (set on entry)
        self.stop()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _require_first_run(self) -> None:
        if self._loop is not None or self._started.done():
            raise UsageError(f"{self!r} has run already, and a worker runs once: make a new one.")

    def _run_in_thread(self) -> None:
        try:
            self.run()
        except BaseException as error:
            self._error = error
            self._log_failure(error)
            self._refuse_start(error)
        else:
            self._refuse_start(UsageError("the worker was stopped before it had started."))

    def _log_failure(self, error: BaseException) -> None:
        """Log an error that is raised at the end of the `with` block only; one at its beginning is not logged."""
        if self._started.done():
            log.error("worker %s: has failed, and executes nothing any more", self.id, exc_info=error)

    def _refuse_start(self, error: BaseException) -> None:
        """Raise an error where the start is waited for."""
        if not self._started.done():
            self._started.set_exception(error)

    async def __aenter__(self) -> Self:
        self._require_first_run()
        self._task = asyncio.create_task(self.serve(), name="sqla-durable worker")
        await asyncio.wait([self._task, asyncio.wrap_future(self._started)], return_when=asyncio.FIRST_COMPLETED)
        if self._task.done():
            await self._task
        self._task.add_done_callback(self._log_end)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if self._task is not None:
            await self._task

    def _log_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log_failure(error)

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

    async def _serve(self, databases: Databases, chosen: settings.Settings, threads: ThreadPoolExecutor) -> None:
        from sqla_durable.execution.worker.serving import Serving, Sessionmakers, Stop
        from sqla_durable.runtime.tasks import hosting

        makers, stop = Sessionmakers(self.sessionmaker, self.async_sessionmaker), Stop(self._stop, self._stopping)
        serving = Serving(chosen, self.durable.registry, databases, makers, threads, stop)
        is_direct = await self._begin(databases, makers, serving)
        self._serving = serving
        self._started.set_result(None)
        if self._stop.is_set():
            self._stopping.set()
        listens = is_direct if self.listen is None else self.listen
        try:
            with hosting():
                await serving.run(listen_on=self._engine if listens else None)
        finally:
            self.left_behind = serving.left_behind
        log.info("worker %s: stopped", self.id)

    async def _begin(self, databases: Databases, makers: Sessionmakers, serving: Serving) -> bool:
        """Begin the lease, once the database can be reached; return whether hints can arrive."""
        from sqla_durable.execution.worker.serving import (
            begin_within,
            prepare,
            require_one_database,
            require_transactions,
        )

        async def begin() -> bool:
            is_direct = await prepare(databases)
            await serving.begin()
            await require_transactions(makers)
            await require_one_database(makers, self.id)
            return is_direct

        if self._stop.is_set():
            self._stopping.set()
        url = self._engine.url
        shown, seconds = url.render_as_string(hide_password=True), self.start_timeout.total_seconds()
        with explain_missing_rights("worker", user=url.username or "the worker"):
            is_direct = await begin_within(begin, url=shown, seconds=seconds, stopping=self._stopping)
        names = [each.name for each in self.durable.registry]
        if not names:
            log.warning("no workflows are registered here: is the module that defines them imported?")
        log.info("worker %s: claims %s from %s", self.id, ", ".join(names) or "nothing", ", ".join(self.queues))
        return is_direct

    def _settings(self) -> settings.Settings:
        return settings.Settings(
            worker_id=self.id,
            name=settings.shown_name(self.name),
            queues=Subscribed(self.queues),
            names=[each.name for each in self.durable.registry],
            versions=self.versions,
            concurrency=self.concurrency,
            transactions=self.transactions or min(map(pools.pool_capacity, self._engines())),
            lease=self.lease,
            poll_interval=self.poll_interval,
            grace=self.grace,
            max_attempts=self.max_attempts,
            until_empty=self.until_empty,
            blobs=self.durable.options.blobs,
        )

    @property
    def _engine(self) -> Engine:
        """The engine of the worker's own statements."""
        return settings.engine_of(self.sessionmaker, self.async_sessionmaker)

    def _require_engines(self) -> None:
        for each in self._engines():
            settings.require_driver(each)
        pools.require_pool(self._engine)

    def _databases(self) -> Databases:
        """Open where the worker's own statements are executed."""
        engine = self._engine
        return open_databases(
            engine,
            hold=pools.reserve(engine, self.id),
            limit=settings.time_limit(self.lease),
            beat_limit=settings.heartbeat_limit(self.lease),
        )

    def _engines(self) -> list[Engine]:
        """Return the engines of steps of either kind."""
        engines = [schema.engine_of(each().sync_session) for each in [self.async_sessionmaker] if each is not None]
        return engines + [schema.engine_of(each()) for each in [self.sessionmaker] if each is not None]
