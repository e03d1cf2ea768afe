"""Databases for tests: a template that is migrated once, and a copy of it for each test."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import TracebackType
from typing import Self
from uuid import uuid4

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, NullPool, create_engine, make_url

from sqla_durable import migrations, models


def migrate(connection: Connection) -> None:
    """Make our tables, by the migrations that the package ships."""
    with Operations.context(MigrationContext.configure(connection)):
        migrations.upgrade(models.REVISION)


class Databases:
    """Makes databases on a server, and drops them.

    Args:
        server_url: the URL of any database of the server, whose role may create others.
        migrate: makes the tables of the template, once; its transaction is committed.
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
        """Make a copy of the template for a while; give its URL."""
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
