"""Databases of their own for tests: a copy of a migrated template, or one that another test has left as it found it."""

from __future__ import annotations

import gc
import itertools
import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, LiteralString

import psycopg
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from psycopg import sql
from pytest_postgresql.janitor import DatabaseJanitor
from sqlalchemy import Connection, Engine, NullPool, create_engine, make_url

from sqla_durable import migrations, models
from tests.support import blank, domain


@dataclass(frozen=True)
class Template:
    """A database to copy.

    Attributes:
        idle: copies that are as blank as it is, and what had been written in each of them before that.
    """

    name: str
    content: blank.Blank
    idle: dict[str, blank.Written] = field(default_factory=dict[str, blank.Written])


class Databases:
    """Makes and drops the databases of one xdist worker, which has templates of its own.

    A template in use by one worker cannot be copied by another at the same time. No name comes twice: whoever a test
    leaves behind knows none of a later test's.

    Args:
        through: how tests reach their databases, if not as they are made: the URL of a PgBouncer, which stays connected
            to what they have used, so that none is used again.
    """

    def __init__(self, server_url: str, worker: str, *, through: str | None = None) -> None:
        self._server = make_url(server_url)
        self._through = make_url(through or server_url)
        self._reused = through is None
        self._prefix = f"sqla_durable_{os.getpid()}_{worker}"
        self._numbers = itertools.count(1)
        self._templates: dict[str, Template] = {}
        self._connection: psycopg.Connection[Any] | None = None

    @contextmanager
    def empty(self) -> Generator[str]:
        """Yield the URL of an empty database, which is dropped afterwards."""
        janitor = DatabaseJanitor(
            user=self._server.username or "postgres",
            password=self._server.password,
            host=str(self._server.query.get("host", self._server.host or "")),
            port=self._server.port or 5432,
            dbname=self._new_name(),
        )
        with janitor:
            yield self._url(janitor.dbname)

    @contextmanager
    def migrated(self, schema: str, *, used: bool = True) -> Generator[str]:
        """Yield the URL of a database that has our tables in that schema and the domain's in public.

        Args:
            used: whether other tests may have used it; those that measure want one of which that is not so.
        """
        template = self._template(schema)
        before: blank.Written | None = None
        if used and template.idle:
            name, before = template.idle.popitem()
        else:
            name = self._copy_of(template)
        self._is_left(name)  # by the session that has made it blank, which is counted by then
        sessions = self._sessions(name)
        try:
            yield self._url(name)
            self._expect_none_open(name)
        finally:
            if before is not None and self._is_left(name) and self._sessions(name) == sessions:
                template.idle[name] = before  # nobody has connected, as where arguments are refused
            else:
                self._return(template, name, before)

    def close(self) -> None:
        """Drop the templates and what was made from them."""
        for template in self._templates.values():
            for name in (*template.idle, template.name):
                self._drop(name)
        if self._connection is not None:
            self._connection.close()

    def _template(self, schema: str) -> Template:
        if schema not in self._templates:
            self._templates[schema] = self._make_template(schema)
        return self._templates[schema]

    def _make_template(self, schema: str) -> Template:
        name = f"{self._prefix}_{schema}"
        self._execute("CREATE DATABASE {}", name)
        try:
            return Template(name, self._fill(name, schema))
        except BaseException:
            self._drop(name)  # else every later test fails because the template exists, and hides the reason
            raise

    def _fill(self, database: str, schema: str) -> blank.Blank:
        engine = create_engine(self._server.set(database=database), poolclass=NullPool)
        with translated(engine, schema).begin() as connection:
            migrate(connection, schema)
            domain.Base.metadata.create_all(connection)
        with self._connected(database) as own:
            return blank.read(own)

    def _copy_of(self, template: Template) -> str:
        name = self._new_name()
        # The files are copied as they are, and not every page written to the log as well.
        self._execute("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy", name, template.name)
        return name

    def _return(self, template: Template, name: str, before: blank.Written | None) -> None:
        """Keep a database for another test, under another name, or drop it if it is not what it was."""
        if self._reused and self._is_left(name) and (new := self._renamed(name)) is not None:
            name = new
            with self._connected(name) as own:
                written = blank.make_blank(own, template.content, before)
            if written is not None:
                template.idle[name] = written
                return
        self._drop(name)

    def _renamed(self, name: str) -> str | None:
        """Rename a database and return its new name, or None if somebody is connected, such as a sender of hints."""
        new = self._new_name()
        try:
            self._execute("ALTER DATABASE {} RENAME TO {}", name, new)
        except psycopg.errors.ObjectInUse:
            return None
        return new

    def _is_left(self, name: str) -> bool:
        """Return whether nobody is connected; a backend ends a moment after its client."""
        connected = "SELECT FROM pg_stat_activity WHERE datname = %s AND backend_type = 'client backend'"
        for _ in range(20):
            if self._admin().execute(connected, [name]).fetchone() is None:
                return True
            time.sleep(0.005)
        return False

    def _expect_none_open(self, name: str) -> None:
        """Expect that this process has closed its connections: whichever test runs when one is deleted would fail."""
        if not self._is_left(name):
            found: list[Any] = [each for each in gc.get_objects() if isinstance(each, psycopg.Connection)]
            left = [each for each in found if not each.closed and each.info.dbname == name]
            assert not left, f"a test closes what it has connected; {len(left)} open: {left}"

    def _sessions(self, name: str) -> object:
        """Return how many sessions there have been, and when a crash made the server forget; a backend counts its own.

        It does so before it ends.
        """
        counted = "SELECT pg_stat_get_db_sessions(oid), pg_stat_get_db_stat_reset_time(oid) FROM pg_database"
        return self._admin().execute(f"{counted} WHERE datname = %s", [name]).fetchone()

    def _drop(self, name: str) -> None:
        self._execute("DROP DATABASE IF EXISTS {} WITH (FORCE)", name)

    def _execute(self, command: LiteralString, *names: str) -> None:
        self._admin().execute(sql.SQL(command).format(*map(sql.Identifier, names)))

    def _admin(self) -> psycopg.Connection[Any]:
        """Return the connection that makes databases."""
        if self._connection is None or self._connection.closed:
            self._connection = self._connected("postgres")
        return self._connection

    def _connected(self, database: str) -> psycopg.Connection[Any]:
        url = self._server.set(drivername="postgresql", database=database)
        return psycopg.connect(url.render_as_string(hide_password=False), autocommit=True)

    def _new_name(self) -> str:
        return f"{self._prefix}_{next(self._numbers)}"

    def _url(self, database: str) -> str:
        return self._through.set(database=database).render_as_string(hide_password=False)


def migrate(connection: Connection, schema: str) -> None:
    """Bring our tables into a schema by the migrations that we ship."""
    with Operations.context(MigrationContext.configure(connection)):
        migrations.upgrade(models.REVISION, schema=schema)


def translated(engine: Engine, schema: str) -> Engine:
    """Return the engine with our tables under another schema's name."""
    if schema == models.SCHEMA:
        return engine
    return engine.execution_options(schema_translate_map={models.SCHEMA: schema})
