"""Where the worker's own statements run: on the event loop with an async engine, otherwise in threads.

They use plain sessions of this package on the user's engine, so that events and defaults of the user's own session
class do not reach them, and READ COMMITTED, whatever the engine's default is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from sqla_durable.retry import ObstacleRetry

T = TypeVar("T")

log = logging.getLogger("sqla_durable.worker")

_THREADS = 4


class Database(Protocol):
    """Executes functions of a session, each in a transaction of its own."""

    async def transact(self, statement: Callable[[Session], T]) -> T:
        """Call the function and commit."""
        ...

    def close(self) -> None:
        """Give back what this holds; the engine stays the user's."""


class LoopDatabase:
    """Executes on the event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = AsyncEngine(engine.execution_options(isolation_level="READ COMMITTED"))

    async def transact(self, statement: Callable[[Session], T]) -> T:
        """Call the function and commit."""
        return await _to_its_end(self._transact(statement))

    def close(self) -> None:
        """Nothing is held."""

    async def _transact(self, statement: Callable[[Session], T]) -> T:
        async with AsyncSession(self._engine, expire_on_commit=False) as session, session.begin():
            return await session.run_sync(statement)


class ThreadDatabase:
    """Executes in a few threads."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine.execution_options(isolation_level="READ COMMITTED")
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="sqla-durable-database")

    async def transact(self, statement: Callable[[Session], T]) -> T:
        """Call the function and commit."""
        return await _to_its_end(self._in_thread(statement))

    def close(self) -> None:
        """End the threads; none of them is waiting for user code."""
        self._threads.shutdown(wait=False)

    async def _in_thread(self, statement: Callable[[Session], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._transact, statement)

    def _transact(self, statement: Callable[[Session], T]) -> T:
        with Session(self._engine, expire_on_commit=False) as session, session.begin():
            return statement(session)


async def persistently(database: Database, statement: Callable[[Session], T], *, what: str) -> T:
    """Execute, and try again for as long as the database is out of reach or refuses for reasons of its own."""
    again = ObstacleRetry()
    while True:
        try:
            return await database.transact(statement)
        except Exception as error:
            seconds = again.wait_before_next(error)
            if seconds is None:
                raise
            log.warning("%s: %s; trying again in %.1f s", what, first_line(error), seconds)
            await asyncio.sleep(seconds)


def first_line(error: BaseException) -> str:
    """Give the first line of an error's text; some have none."""
    return next(iter(str(error).splitlines()), "") or repr(error)


async def _to_its_end(transaction: Coroutine[Any, Any, T]) -> T:
    """Wait for a transaction, also when cancelled.

    Cancelled in its middle it would leave a connection in an unknown state, and a commit that nobody knows of.
    """
    task = asyncio.ensure_future(transaction)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
