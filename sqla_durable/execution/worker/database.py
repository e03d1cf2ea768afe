"""Where the worker's own statements run: on the event loop with an async engine, otherwise in threads.

Each statement is a transaction of its own, in one round trip: none stays open while the worker does something else,
or when it is frozen. They use connections of the user's engine in AUTOCOMMIT, so that events and defaults of the user's
own session class do not reach them. Each call has a time limit: a connection that swallows everything and answers
nothing is cut off, and the statement tried again on another one.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Generic, Protocol, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from typing_extensions import override

from sqla_durable.definitions.database_errors import first_line, spoils_connection
from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.definitions.log import Log
from sqla_durable.definitions.retry import ObstacleRetry
from sqla_durable.operations.shielding import GracefulTask, mark_retrieved
from sqla_durable.store import schema

T = TypeVar("T")

log = Log("sqla_durable.worker")

_THREADS = 4
_LAST_WAIT = 2.0  # seconds for a transaction to end by itself when nobody wants its answer any more
_CUT_OFF = 1.0  # seconds in which a transaction ends once its connection is cut


class NoConnectionError(TimeoutError):
    """There was no connection within the time limit: the pool is used up, or the server cannot be reached."""


class Database(Protocol):
    """Executes functions of a connection, whose statements are each a transaction of their own.

    Where they cannot be, the function is one transaction, which the server ends if it is idle for long.
    """

    async def execute(self, statement: Callable[[Connection], T]) -> T:
        """Call the function.

        Raises:
            NoConnectionError: there was no connection within the time limit.
            TimeoutError: there was no answer within it.
        """
        ...

    def use_transactions(self) -> None:
        """Execute in READ COMMITTED transactions, where statements by themselves would have another level.

        To be called before the first of them.
        """

    @property
    def stuck(self) -> int:
        """How many threads may still be stuck in connecting."""
        ...

    async def close(self) -> None:
        """Close what this keeps; the engine stays the user's."""


class Cut:
    """One transaction's connection, so that it can be cut off from outside.

    Attributes:
        failed: whether the transaction went on all the same, and nobody waits for it any more.
    """

    def __init__(self) -> None:
        self.failed = False
        self._connection: Any = None
        self._abandoned = False
        self._lock = threading.Lock()

    def attach(self, connection: Connection) -> None:
        """Note the connection, in the thread that uses it.

        Raises:
            TimeoutError: nobody waits for the transaction any more.
        """
        with self._lock:
            if self._abandoned:
                raise TimeoutError("the connection came too late")
            self._connection = connection.connection.driver_connection

    def off(self) -> None:
        """Shut the socket down, so that whoever waits on it gets an error; refuse a connection that opens later."""
        with self._lock:
            self._abandoned = True
            if self._connection is not None:
                shut_down(self._connection)


class _Kept(Generic[T]):
    """The one connection that is kept, while no transaction uses it.

    Transactions may overlap, and one may outlast `end`: a connection that cannot be kept is closed by its user.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection: T | None = None
        self._has_ended = False

    def take(self) -> T | None:
        """Return the connection that is kept, if there is one: it is the caller's until `keep`."""
        with self._lock:
            taken, self._connection = self._connection, None
            return taken

    def keep(self, connection: T) -> bool:
        """Keep a connection and return true; otherwise the caller has to close it."""
        with self._lock:
            if self._has_ended or self._connection is not None:
                return False
            self._connection = connection
            return True

    def end(self) -> T | None:
        """Keep none from now on, and return the one that was kept."""
        with self._lock:
            self._has_ended = True
        return self.take()


class LoopDatabase:
    """Executes on the event loop."""

    stuck = 0

    def __init__(self, engine: Engine, *, limit: float) -> None:
        self._given = engine
        self._engine = AsyncEngine(engine.execution_options(isolation_level="AUTOCOMMIT"))
        self._limit = limit

    def use_transactions(self) -> None:
        """Execute in READ COMMITTED transactions."""
        self._engine = AsyncEngine(self._given.execution_options(isolation_level="READ COMMITTED"))

    async def execute(self, statement: Callable[[Connection], T]) -> T:
        """Call the function."""
        cut = Cut()
        return await _to_its_end(self._transact(_attached(statement, cut)), cut, limit=self._limit)

    async def close(self) -> None:
        """Do nothing: no connection is kept."""

    async def _transact(self, statement: Callable[[Connection], T]) -> T:
        async with self._engine.connect() as connection:
            return await connection.run_sync(_ended, statement)


class KeepingLoopDatabase(LoopDatabase):
    """Executes on the event loop, on one connection that it keeps: others cannot use up the pool before it."""

    def __init__(self, engine: Engine, *, limit: float) -> None:
        super().__init__(engine, limit=limit)
        self._kept = _Kept[AsyncConnection]()

    @override
    async def close(self) -> None:
        connection = self._kept.end()
        if connection is not None:
            await connection.close()

    @override
    async def _transact(self, statement: Callable[[Connection], T]) -> T:
        connection = self._kept.take() or await self._engine.connect()
        try:
            value = await connection.run_sync(_ended, statement)
        except BaseException:
            await connection.close()
            raise
        if not self._kept.keep(connection):
            await connection.close()
        return value


class ThreadDatabase:
    """Executes in a few threads."""

    def __init__(self, engine: Engine, *, limit: float, threads: int = _THREADS) -> None:
        self._given = engine
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._limit = limit
        self._size = threads
        self.stuck = 0
        self._threads = self._new_threads()

    async def execute(self, statement: Callable[[Connection], T]) -> T:
        """Call the function."""
        cut = Cut()
        try:
            return await _to_its_end(self._in_thread(_attached(statement, cut)), cut, limit=self._limit)
        finally:
            if cut.failed:
                # The thread is stuck where nothing can wake it, in the middle of connecting: others get its place.
                self.stuck += 1
                self._threads.shutdown(wait=False)
                self._threads = self._new_threads()

    def use_transactions(self) -> None:
        """Execute in READ COMMITTED transactions."""
        self._engine = self._given.execution_options(isolation_level="READ COMMITTED")

    async def close(self) -> None:
        """End the threads; none of them is waiting for user code."""
        self._threads.shutdown(wait=False)

    def _new_threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._size, thread_name_prefix="sqla-durable-database")

    async def _in_thread(self, statement: Callable[[Connection], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._transact, statement)

    def _transact(self, statement: Callable[[Connection], T]) -> T:
        with self._engine.connect() as connection:
            return _ended(connection, statement)


class KeepingThreadDatabase(ThreadDatabase):
    """Executes in one thread, on one connection that it keeps: others cannot use up the pool before it."""

    def __init__(self, engine: Engine, *, limit: float) -> None:
        super().__init__(engine, limit=limit, threads=1)
        self._kept = _Kept[Connection]()

    @override
    async def close(self) -> None:
        await asyncio.wait(
            [asyncio.get_running_loop().run_in_executor(self._threads, self._close_kept)], timeout=_CUT_OFF
        )
        await super().close()

    @override
    def _transact(self, statement: Callable[[Connection], T]) -> T:
        connection = self._kept.take() or self._engine.connect()
        try:
            value = _ended(connection, statement)
        except BaseException:
            connection.close()
            raise
        if not self._kept.keep(connection):
            connection.close()
        return value

    def _close_kept(self) -> None:
        connection = self._kept.end()
        if connection is not None:
            connection.close()


@dataclass(frozen=True, slots=True)
class Databases:
    """Where a worker's own statements are executed.

    Attributes:
        shared: maintenance and what else there is.
        beating, writing, claiming: the heartbeat, the writer and the claims, each on a connection that it keeps where
            the pool has enough.
        transacting: what takes more than one statement.
    """

    shared: Database
    transacting: Database
    beating: Database
    writing: Database
    claiming: Database

    @property
    def all(self) -> set[Database]:
        """Each of them once."""
        return {self.shared, self.transacting, self.beating, self.writing, self.claiming}

    def use_transactions(self) -> None:
        """Execute in READ COMMITTED transactions."""
        for each in self.all:
            each.use_transactions()


def open_databases(engine: Engine, *, hold: int, limit: float, beat_limit: float) -> Databases:
    """Choose how statements are executed on this engine.

    Args:
        hold: how many of the pool's connections may be kept: the first for the heartbeat, the second for the writer,
            the third for the claims.
        limit, beat_limit: the seconds after which a call, or one of the heartbeat's, is cut off.
    """
    shared, keeping = (
        (LoopDatabase, KeepingLoopDatabase) if engine.dialect.is_async else (ThreadDatabase, KeepingThreadDatabase)
    )
    database = shared(engine, limit=limit)
    beating = keeping(engine, limit=beat_limit) if hold else database
    writing, claiming = (keeping(engine, limit=limit) if hold > each else database for each in (1, 2))
    transacting = shared(engine, limit=limit)
    transacting.use_transactions()
    return Databases(database, transacting, beating, writing, claiming)


async def persistently(database: Database, statement: Callable[[Connection], T], *, what: str) -> T:
    """Execute, and try again for as long as the database is out of reach or refuses for reasons of its own."""
    again: ObstacleRetry | None = None
    while True:
        try:
            return await database.execute(statement)
        except Exception as error:
            again = again or ObstacleRetry()
            seconds = again.wait_before_next(error)
            if seconds is None:
                raise
            log.warning("%s: %s; trying again in %.1f s", what, first_line(error), seconds)
            await asyncio.sleep(seconds)


def _attached(statement: Callable[[Connection], T], cut: Cut) -> Callable[[Connection], T]:
    def execute(connection: Connection) -> T:
        cut.attach(connection)
        if connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
            schema.limit_idle(connection)
        return statement(connection)

    return execute


def _ended(connection: Connection, statement: Callable[[Connection], T]) -> T:
    """Call the function, and end what SQLAlchemy takes for a transaction; in AUTOCOMMIT the server has none."""
    try:
        value = statement(connection)
        connection.commit()
    except BaseException as error:
        # Before the connection goes back to its pool, where the next one would get it.
        (connection.invalidate if spoils_connection(error) else connection.rollback)()
        raise
    return value


async def _to_its_end(transaction: Coroutine[Any, Any, T], cut: Cut, *, limit: float) -> T:
    """Wait for a transaction, also when cancelled, but not for ever.

    Cancelled in its middle it would leave a connection in an unknown state, and a commit that nobody knows of.
    """
    task = GracefulTask(transaction)
    try:
        ended = await _is_over(task, limit)
    except asyncio.CancelledError:
        task.add_done_callback(mark_retrieved)
        if not await _is_over(task, min(limit, _LAST_WAIT)):
            await _cut_off(task, cut)
        raise
    if ended:
        return task.result()
    if not await _cut_off(task, cut):
        raise NoConnectionError(f"no connection to the database within {limit:.1f} s")
    try:
        return task.result()
    except Exception as error:
        raise TimeoutError(f"no answer from the database within {limit:.1f} s") from error


async def _is_over(task: GracefulTask[Any], seconds: float) -> bool:
    return bool((await asyncio.wait([task], timeout=seconds))[0])


async def _cut_off(task: GracefulTask[Any], cut: Cut) -> bool:
    """Cut a transaction's connection off, and return whether it has ended by that; if not, nobody waits for it."""
    cut.off()
    if await _is_over(task, _CUT_OFF):
        return True
    cut.failed = True
    task.add_done_callback(mark_retrieved)
    task.cancel_now()
    return False


def shut_down(connection: Any) -> None:
    """Shut the socket of a driver's connection down, so that whoever waits on it, in any thread, gets an error."""
    with suppress(Exception):  # the driver may have closed it already, and says so in its own way
        if not hasattr(connection, "fileno"):
            connection.terminate()  # asyncpg
            return
        with socket.socket(fileno=os.dup(connection.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)
