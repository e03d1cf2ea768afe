"""A worker process of a supervisor: it stops when the supervisor asks for it, and checks the number of connections.

All processes share one limit, that of the server, and each knows how many there are.
"""

from __future__ import annotations

import asyncio

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from sqla_durable.definitions.log import Log, worker_name
from sqla_durable.execution.worker import Worker
from sqla_durable.execution.worker.settings import engine_of, shown_name
from sqla_durable.store.schema import keeps_statements
from sqla_durable.tools.cli.supervisor import Link
from sqla_durable.tools.cli.target import Sessionmakers

log = Log("sqla_durable.worker")


def connect(link: Link, worker: Worker, opened: Sessionmakers, count: int) -> None:
    """Let the supervisor stop the worker, and report to it when the worker has started."""
    tasks: list[asyncio.Task[None]] = []

    def stop(reason: str) -> None:
        worker_name.set(shown_name(worker.name))  # of this thread
        log.info("worker %s: stopping, %s; steps that are being executed have %s", worker.id, reason, worker.grace)
        worker.stop()

    def report(_: object) -> None:
        link.report()
        link.keep_reporting(answers=worker.responds, serves=lambda: worker.is_serving)
        if link.number == 1:  # one warning is enough
            tasks.append(asyncio.get_running_loop().create_task(check_connections(opened, count)))

    link.stop = stop
    worker._started.add_done_callback(report)  # pyright: ignore[reportPrivateUsage] (it has no public name)


_ACCEPTED = text(
    "SELECT sum(setting::int * CASE name WHEN 'max_connections' THEN 1 ELSE -1 END) FROM pg_catalog.pg_settings "
    "WHERE name IN ('max_connections', 'superuser_reserved_connections', 'reserved_connections')"
)


async def check_connections(opened: Sessionmakers, count: int) -> None:
    """Warn if all processes together may open more connections than the server accepts."""
    wanted = count * (sum(map(_most_connections, _engines(opened))) + 1)  # and the listener
    engine = engine_of(opened.sync, opened.asynchronous)
    try:
        if opened.asynchronous is None:
            accepted = await asyncio.to_thread(_accepted_by, engine)
        else:
            async with AsyncEngine(engine).connect() as connection:
                accepted = await connection.run_sync(_accepted)
    except (SQLAlchemyError, OSError) as error:
        log.debug("max_connections could not be read: %s", error)
        return
    if accepted is not None and wanted > accepted:
        log.warning(
            "%d worker processes may open %s connections, and the server accepts %d (max_connections, less what is "
            "reserved): use fewer processes, give their engines a smaller pool_size, or raise max_connections",
            count,
            wanted,
            accepted,
        )


def _engines(opened: Sessionmakers) -> list[Engine]:
    sync = [] if opened.sync is None else [engine_of(opened.sync, None)]
    return sync + ([] if opened.asynchronous is None else [engine_of(None, opened.asynchronous)])


def _most_connections(engine: Engine) -> float:
    """Return how many connections a pool opens at most; 0 where there is no pool that says so."""
    size = getattr(engine.pool, "size", None)
    if size is None:
        return 0
    overflow = int(getattr(engine.pool, "_max_overflow", 0))
    return float("inf") if overflow < 0 else size() + overflow


def _accepted_by(engine: Engine) -> int | None:
    with engine.connect() as connection:
        return _accepted(connection)


def _accepted(connection: Connection) -> int | None:
    """Return how many connections the server accepts; None if there is a pooler in between, which has limits too."""
    if not keeps_statements(connection):
        return None
    return int(connection.scalar(_ACCEPTED) or 0)
