"""Databases of their own for tests, copied from a migrated template in a few milliseconds."""

from __future__ import annotations

import itertools
import os
from collections.abc import Generator
from contextlib import contextmanager

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from pytest_postgresql.janitor import DatabaseJanitor
from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, make_url

from sqla_durable import migrations, models
from tests.support import domain


class Databases:
    """Makes and drops the databases of one xdist worker, which has templates of its own.

    A template in use by one worker cannot be copied by another at the same time.

    Args:
        through: how tests reach their databases, if not as they are made: the URL of a PgBouncer.
    """

    def __init__(self, server_url: str, worker: str, *, through: str | None = None) -> None:
        self._server = make_url(server_url)
        self._through = make_url(through or server_url)
        self._prefix = f"sqla_durable_{os.getpid()}_{worker}"
        self._numbers = itertools.count(1)
        self._templates: dict[str, DatabaseJanitor] = {}

    @contextmanager
    def empty(self) -> Generator[str]:
        """Make an empty database for a while; gives its URL."""
        with self._copy_of(None) as url:
            yield url

    @contextmanager
    def migrated(self, schema: str) -> Generator[str]:
        """Make a database for a while that has our tables in that schema and the domain's in public."""
        if schema not in self._templates:
            self._templates[schema] = self._make_template(schema)
        with self._copy_of(self._templates[schema].dbname) as url:
            yield url

    def close(self) -> None:
        """Drop the templates."""
        for janitor in self._templates.values():
            janitor.drop()

    @contextmanager
    def _copy_of(self, template: str | None) -> Generator[str]:
        with self._janitor(f"{self._prefix}_{next(self._numbers)}", template=template) as janitor:
            yield self._through.set(database=janitor.dbname).render_as_string(hide_password=False)

    def _make_template(self, schema: str) -> DatabaseJanitor:
        janitor = self._janitor(f"{self._prefix}_{schema}", as_template=True)
        janitor.init()
        try:
            self._fill(janitor.dbname, schema)
        except BaseException:
            janitor.drop()  # else every later test fails because the template exists, and hides the reason
            raise
        return janitor

    def _fill(self, database: str, schema: str) -> None:
        engine = create_engine(self._url(database), poolclass=NullPool)
        with translated(engine, schema).begin() as connection:
            migrate(connection, schema)
            domain.Base.metadata.create_all(connection)

    def _janitor(self, name: str, *, template: str | None = None, as_template: bool = False) -> DatabaseJanitor:
        return DatabaseJanitor(
            user=self._server.username or "postgres",
            password=self._server.password,
            host=str(self._server.query.get("host", self._server.host or "")),
            port=self._server.port or 5432,
            dbname=name,
            template_dbname=template,
            as_template=as_template,
        )

    def _url(self, database: str) -> URL:
        return self._server.set(database=database)


def migrate(connection: Connection, schema: str) -> None:
    """Bring our tables into a schema by the migrations that we ship."""
    with Operations.context(MigrationContext.configure(connection)):
        migrations.upgrade(models.REVISION, schema=schema)


def translated(engine: Engine, schema: str) -> Engine:
    """Give the engine with our tables under another schema's name."""
    if schema == models.SCHEMA:
        return engine
    return engine.execution_options(schema_translate_map={models.SCHEMA: schema})
