"""What a worker finds out about its database before it claims anything, and refuses there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar
from uuid import UUID

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable.definitions.database_errors import first_line, is_read_only, is_unreachable
from sqla_durable.definitions.log import Log
from sqla_durable.errors import DatabaseUnavailableError, SessionError
from sqla_durable.execution.worker.database import Databases
from sqla_durable.operations.transaction import require_transaction
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
            return await begin()
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
