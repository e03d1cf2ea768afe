"""Where the bench works: a schema of its own on the given server, made and dropped by it, and what it asks there."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Engine, Row, create_engine, text
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.schema import CreateSchema, DropSchema

from sqla_durable.api.start import BoundWorkflow, start_many
from sqla_durable.models import SCHEMA, metadata
from sqla_durable.tools.bench.application import Base
from sqla_durable.tools.bench.errors import BenchError

OURS = "made by sqla-durable bench"
"""The comment of a schema that a bench made, and that a bench may therefore drop."""

MARK = "/* sqla-durable bench */"
"""What the bench's own questions begin with, so that they can be told from those of the worker."""

_LOCK = int.from_bytes(b"benc")
# Each status is a literal, so that each count has its partial index.
_UNFINISHED = """
SELECT (SELECT count(*) FROM {schema}.workflow WHERE status = 'pending')
    + (SELECT count(*) FROM {schema}.workflow WHERE status = 'running')
    + (SELECT count(*) FROM {schema}.workflow WHERE status = 'suspended' AND wake_at IS NOT NULL)
"""
_NAME = re.compile(r"[a-z_][a-z0-9_]{0,62}")


@dataclass(frozen=True, slots=True)
class Place:
    """A schema with our tables and the bench's own.

    Attributes:
        url: the database, with its password.
        schema: the name of the schema.
        engine: leads there, through a `schema_translate_map`.
    """

    url: str
    schema: str
    engine: Engine

    @property
    def sessions(self) -> sessionmaker[Session]:
        """Opens sessions there."""
        return sessionmaker(self.engine)

    def ask(self, question: str, **parameters: Any) -> list[Row[Any]]:
        """Ask something in a transaction that is rolled back, so that it does not count as a commit."""
        with self.engine.connect() as connection:
            return list(connection.execute(text(f"{MARK} {question.format(schema=self.schema)}"), parameters))

    def do(self, *statements: str, **parameters: Any) -> None:
        """Execute statements, each in a transaction of its own."""
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            for each in statements:
                connection.execute(text(f"{MARK} {each.format(schema=self.schema)}"), parameters)

    def now(self) -> datetime:
        """Give the database's clock."""
        moment: datetime = self.ask("SELECT clock_timestamp()")[0][0]
        return moment

    def empty(self) -> None:
        """Remove all workflows and entries."""
        self.do("TRUNCATE {schema}.workflow, {schema}.bench_entry CASCADE")

    def fill(self, bound: Iterable[BoundWorkflow]) -> int:
        """Start workflows in one transaction; gives how many."""
        with self.sessions.begin() as session:
            return len(start_many(session, bound))

    def unfinished(self) -> int:
        """Count what is not finished, by the partial indexes."""
        return int(self.ask(_UNFINISHED)[0][0])


@contextmanager
def place(url: str, schema: str) -> Generator[Place]:
    """Make the schema for a while, and drop it whatever happens.

    Args:
        url: a database in which the role may create schemas.
        schema: its name; what another bench has left under it is dropped.

    Raises:
        BenchError: there is such a schema that no bench made, another bench is using it, or it is no plain name.
    """
    if _NAME.fullmatch(schema) is None:
        raise BenchError(f"{schema!r} is no name for the schema: small letters, digits and underscores, at most 63.")
    engine = create_engine(url, connect_args={"application_name": "sqla-durable bench"})
    try:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            _reserve(connection, schema)
            try:
                yield _make(connection, engine, url, schema)
            finally:
                connection.execute(DropSchema(schema, cascade=True, if_exists=True))
    finally:
        engine.dispose()


def in_schema(engine: Engine, schema: str) -> Engine:
    """Lead an engine to the schema; to translate the name costs a little at each statement, so not in vain."""
    return engine if schema == SCHEMA else engine.execution_options(schema_translate_map={SCHEMA: schema})


def _reserve(connection: Connection, schema: str) -> None:
    """Keep other benches away for as long as the connection lasts."""
    found = text(
        "SELECT obj_description(oid, 'pg_namespace') IS NOT DISTINCT FROM :ours FROM pg_namespace WHERE nspname = :name"
    )
    if connection.scalar(found, {"ours": OURS, "name": schema}) is False:
        raise BenchError(
            f"the schema {schema!r} exists and was not made by a bench: it is left as it is. Name another one, "
            "which the bench makes and drops: --schema NAME."
        )
    lock = text("SELECT pg_try_advisory_lock(:key, hashtext(:name))")
    if not connection.scalar(lock, {"key": _LOCK, "name": schema}):
        raise BenchError(f"another bench is using the schema {schema!r}: wait for its end, or name another one.")


def _make(connection: Connection, engine: Engine, url: str, schema: str) -> Place:
    """Make the schema and the tables, in the place of what a killed bench has left."""
    translated = in_schema(engine, schema)
    connection.execute(DropSchema(schema, cascade=True, if_exists=True))
    with translated.begin() as making:
        making.execute(CreateSchema(schema))
        making.execute(text(f"COMMENT ON SCHEMA {schema} IS '{OURS}'"))
        metadata.create_all(making)
        Base.metadata.create_all(making)
    return Place(url, schema, translated)
