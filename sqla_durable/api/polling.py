"""Looking again and again for what others commit, in short transactions that hold nothing open in between."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeAlias, TypeVar

from sqlalchemy import Engine
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable.definitions.checks import require_duration
from sqla_durable.errors import SessionError
from sqla_durable.store import schema
from sqla_durable.store.schema import alone

T = TypeVar("T")

Source: TypeAlias = "Session | sessionmaker[Session] | AsyncSession | async_sessionmaker[AsyncSession]"
"""Where to look: the engine of a session, which is not used itself, or of a sessionmaker."""

SHORTEST, LONGEST = 0.001, 0.25  # seconds
_SHARE = 0.25
"""A pause is this share of the time waited so far, so that what comes is seen with little delay, soon or late."""


def pauses(timeout: timedelta | None, *, shortest: float = SHORTEST) -> Iterator[float]:
    """Give the seconds of the pauses between looks, until the time is up.

    Raises:
        ArgumentError: the timeout is no timedelta.
    """
    if timeout is not None:
        require_duration(timeout, "timeout")
    began = time.monotonic()
    while timeout is None or time.monotonic() < began + timeout.total_seconds():
        yield max(shortest, min(_SHARE * (time.monotonic() - began), LONGEST))


@contextmanager
def noting_pool() -> Generator[None]:
    """Add to the error of a pool that is used up why a connection was needed."""
    try:
        yield
    except PoolTimeoutError as error:
        error.add_note(
            "This looks from outside, with a connection of its own from the pool: close the session before, or raise "
            "pool_size."
        )
        raise


def session_of(source: Source, *, what: str) -> Session | AsyncSession:
    """Return a session of the source, for its engine; scoped sessions and the like are sources too.

    Raises:
        SessionError: there is none.
    """
    found: object = source() if callable(source) else source
    if not isinstance(found, (Session, AsyncSession)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise SessionError(f"{what} takes a Session, an AsyncSession or a sessionmaker first, got {source!r}.")
    return found


@dataclass(frozen=True, slots=True)
class Outlook:
    """An engine on which to look, each time in a session and a transaction of its own."""

    engine: Engine
    is_async: bool

    @classmethod
    def of(cls, source: Source, *, what: str) -> Outlook:
        """Find the engine.

        Raises:
            SessionError: there is none, or it is not PostgreSQL.
        """
        session = session_of(source, what=what)
        if isinstance(session, AsyncSession):
            return cls(alone(schema.engine_of(session.sync_session)), is_async=True)
        return cls(alone(schema.engine_of(session)), is_async=False)

    def look(self, statement: Callable[[Session], T]) -> T:
        """Call a function of a session."""
        with noting_pool(), Session(self.engine) as session:
            return _required(session, statement)

    async def look_async(self, statement: Callable[[Session], T]) -> T:
        """Call a function of the session inside an `AsyncSession`."""
        with noting_pool():
            async with AsyncSession(AsyncEngine(self.engine)) as session:
                return await session.run_sync(_required, statement)


def _required(session: Session, statement: Callable[[Session], T]) -> T:
    schema.require(session)
    return statement(session)
