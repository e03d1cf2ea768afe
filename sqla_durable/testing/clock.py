"""Moving the time: what a workflow waits for comes sooner, without anybody waiting for it."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sqla_durable.api.callers import require_session
from sqla_durable.definitions.checks import require_duration
from sqla_durable.errors import SessionError
from sqla_durable.store import schema, timers


def advance(session: Session, duration: timedelta) -> int:
    """Bring every time that workflows wait for nearer, as if so much time had passed, in the caller's transaction.

    ```python
    with SessionLocal.begin() as session:
        advance(session, timedelta(days=14))
    ```

    Timers, time limits, delayed starts and the next tries of steps, of workflows that are parked, and callbacks; what a
    worker waits for in memory, for a moment, it goes on waiting for. Locks the rows of the workflows that wait.

    Args:
        session: a session on the tables, of a database that is for tests.
        duration: how much time is to pass.

    Returns:
        How many workflows had a time to wait for, or a deadline.

    Raises:
        ArgumentError: the duration is no timedelta.
        SchemaError, SessionError: the session's database does not hold the tables; or this is no `Session`.
    """
    require_duration(duration, "duration")
    given: object = session
    if isinstance(given, AsyncSession):
        raise SessionError(
            "advance() takes a Session: of an AsyncSession, await session.run_sync(advance, timedelta(...))."
        )
    require_session(given)
    schema.require(session)
    session.flush()
    return timers.advance(session, duration.total_seconds())
