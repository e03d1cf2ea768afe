"""Databases for tests: copies of a template that is migrated once, and moving the time in one of them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Self
from uuid import uuid4

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, NullPool, create_engine, make_url
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sqla_durable import migrations, models
from sqla_durable.api.sessions import require_session
from sqla_durable.definitions.checks import require_duration
from sqla_durable.errors import SessionError
from sqla_durable.store import schema, timers


def migrate(connection: Connection) -> None:
    """Create the tables of the package, by the migrations that it contains."""
    with Operations.context(MigrationContext.configure(connection)):
        migrations.upgrade(models.REVISION)


class Databases:
    """Creates databases on a server, and drops them.

    Args:
        server_url: the URL of any database of the server, whose role may create others.
        migrate: creates the tables of the template, once; its transaction is committed.
    """

    def __init__(self, server_url: str, migrate: Callable[[Connection], None]) -> None:
        self._server = make_url(server_url)
        self._admin = create_engine(self._server, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        self._prefix = f"sqla_durable_{uuid4().hex[:12]}"
        self._count = 0
        self._migrate = migrate

    def __enter__(self) -> Self:
        self._create(self._prefix)
        try:
            with create_engine(self._url(self._prefix), poolclass=NullPool).begin() as connection:
                self._migrate(connection)
        except BaseException:
            self._drop(self._prefix)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._drop(self._prefix)

    @contextmanager
    def copied(self) -> Generator[str]:
        """Create a copy of the template and yield its URL; drop the copy when the block ends."""
        self._count += 1
        name = f"{self._prefix}_{self._count}"
        self._create(name, f"TEMPLATE {self._prefix} STRATEGY file_copy")
        try:
            yield self._url(name)
        finally:
            self._drop(name)

    def _create(self, name: str, options: str = "") -> None:
        self._execute(f"CREATE DATABASE {name} {options}")

    def _drop(self, name: str) -> None:
        self._execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def _execute(self, statement: str) -> None:
        with self._admin.connect() as connection:
            connection.exec_driver_sql(statement)

    def _url(self, database: str) -> str:
        return self._server.set(database=database).render_as_string(hide_password=False)


def advance(session: Session, duration: timedelta) -> int:
    """Move the time forward for everything that waits, in the caller's transaction.

    ```python
    with SessionLocal.begin() as session:
        advance(session, timedelta(days=14))
    ```

    It moves the timers, time limits, delayed starts and next tries of suspended workflows, and the time limits of
    callbacks. Short waits that a worker keeps in memory are not shortened. Locks the rows of the workflows that wait.

    Args:
        session: a session on a database for tests.
        duration: how much time passes.

    Returns:
        How many workflows waited for a time or had a deadline.

    Raises:
        ArgumentError: the duration is not a timedelta.
        SchemaError, SessionError: the session's database does not have the tables; or it is not a `Session`.
    """
    require_duration(duration, "duration")
    checked: object = session
    if isinstance(checked, AsyncSession):
        raise SessionError(
            "advance() takes a Session: with an AsyncSession, await session.run_sync(advance, timedelta(...))."
        )
    require_session(checked)
    schema.require(session)
    session.flush()
    return timers.advance(session, duration.total_seconds())
