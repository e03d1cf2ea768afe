"""The schema that a benchmark works in: created and dropped by it, filled by it, and queried by it.

Queries of the benchmark begin with a mark and run in transactions that are rolled back, so that they do not count.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Engine, Row, create_engine, text
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.schema import CreateSchema, DropSchema

from sqla_durable import (
    BoundWorkflow,
    start_many,
)
from sqla_durable.models import SCHEMA, metadata
from sqla_durable.tools.bench.application import Base
from sqla_durable.tools.bench.report import (
    BenchError,
)

COMMENT = "made by sqla-durable bench"
"""The comment of a schema that a benchmark created, and that a benchmark may therefore drop."""

QUERY_MARK = "/* sqla-durable bench */"
"""The beginning of each query of the benchmark, which distinguishes it from the statements of the workers."""

_LOCK_KEY = int.from_bytes(b"benc")
# Each status is a literal, so that each count has its partial index.
_UNFINISHED = """
SELECT (SELECT count(*) FROM {schema}.workflow WHERE status = 'pending')
    + (SELECT count(*) FROM {schema}.workflow WHERE status = 'running')
    + (SELECT count(*) FROM {schema}.workflow WHERE status = 'suspended' AND wake_at IS NOT NULL)
"""
_PLAIN_NAME = re.compile(r"[a-z_][a-z0-9_]{0,62}")


@dataclass(frozen=True, slots=True)
class BenchSchema:
    """A schema with the tables of sqla-durable and those of the benchmark.

    Attributes:
        url: the database, with its password.
        name: the name of the schema.
        engine: an engine whose `schema_translate_map` leads to this schema.
    """

    url: str
    name: str
    engine: Engine

    @property
    def sessions(self) -> sessionmaker[Session]:
        """Opens sessions on the schema."""
        return sessionmaker(self.engine)

    def query(self, statement: str, **parameters: Any) -> list[Row[Any]]:
        """Execute a query in a transaction that is rolled back, so that it does not count as a commit."""
        with self.engine.connect() as connection:
            return list(connection.execute(text(f"{QUERY_MARK} {statement.format(schema=self.name)}"), parameters))

    def execute(self, *statements: str, **parameters: Any) -> None:
        """Execute statements, each in a transaction of its own."""
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            for each in statements:
                connection.execute(text(f"{QUERY_MARK} {each.format(schema=self.name)}"), parameters)

    def database_time(self) -> datetime:
        """Return the time on the database's clock."""
        moment: datetime = self.query("SELECT clock_timestamp()")[0][0]
        return moment

    def clear(self) -> None:
        """Delete all workflows and entries."""
        self.execute("TRUNCATE {schema}.workflow, {schema}.bench_entry CASCADE")

    def start(self, bound: Iterable[BoundWorkflow]) -> int:
        """Start workflows in one transaction; return how many."""
        with self.sessions.begin() as session:
            return len(start_many(session, bound))

    def count_unfinished(self) -> int:
        """Return how many workflows are not finished, read from the partial indexes."""
        return int(self.query(_UNFINISHED)[0][0])


@contextmanager
def bench_schema(url: str, name: str) -> Generator[BenchSchema]:
    """Create the schema, and drop it when the block ends, whatever happens.

    Args:
        url: a database in which the role may create schemas.
        name: its name; what a killed benchmark left in a schema of this name is dropped.

    Raises:
        BenchError: a schema of this name exists that no benchmark created, another benchmark is using it, or the name
            would need quotes.
    """
    if _PLAIN_NAME.fullmatch(name) is None:
        raise BenchError(
            f"{name!r} is no name for the schema: use lower-case letters, digits and underscores, at most 63 in all."
        )
    engine = create_engine(url, connect_args={"application_name": "sqla-durable bench"})
    try:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            _lock(connection, name)
            try:
                yield _create(connection, engine, url, name)
            finally:
                connection.execute(DropSchema(name, cascade=True, if_exists=True))
    finally:
        engine.dispose()


def in_schema(engine: Engine, name: str) -> Engine:
    """Return the engine with the schema's name translated, but not for the default name: that would cost time."""
    return engine if name == SCHEMA else engine.execution_options(schema_translate_map={SCHEMA: name})


def _lock(connection: Connection, name: str) -> None:
    """Lock the schema against other benchmarks for as long as the connection lasts."""
    found = text(
        "SELECT obj_description(oid, 'pg_namespace') IS NOT DISTINCT FROM :ours FROM pg_namespace WHERE nspname = :name"
    )
    if connection.scalar(found, {"ours": COMMENT, "name": name}) is False:
        raise BenchError(
            f"the schema {name!r} exists and was not created by a benchmark: it is left as it is. Name another one, "
            "which the benchmark creates and drops: --schema NAME."
        )
    lock = text("SELECT pg_try_advisory_lock(:key, hashtext(:name))")
    if not connection.scalar(lock, {"key": _LOCK_KEY, "name": name}):
        raise BenchError(f"another benchmark is using the schema {name!r}: wait for its end, or name another one.")


def _create(connection: Connection, engine: Engine, url: str, name: str) -> BenchSchema:
    """Create the schema and the tables, in place of what a killed benchmark left."""
    translated = in_schema(engine, name)
    connection.execute(DropSchema(name, cascade=True, if_exists=True))
    with translated.begin() as creating:
        creating.execute(CreateSchema(name))
        creating.execute(text(f"COMMENT ON SCHEMA {name} IS '{COMMENT}'"))
        metadata.create_all(creating)
        Base.metadata.create_all(creating)
    return BenchSchema(url, name, translated)


# Ids in the order of time, as uuid7 makes them, and older than any id of today.
_ID = "('{prefix}' || lpad(to_hex(number), 28, '0'))::uuid"
_NUMBERS = "generate_series(1, :count) AS number"
_PENDING = f"""
INSERT INTO {{schema}}.workflow (id, name, input, created_at, enqueued_at)
SELECT {_ID.format(prefix="0190")}, 'one_step', jsonb_build_object('number', number), moment, moment
FROM {_NUMBERS}, LATERAL (SELECT statement_timestamp() - (:count - number) * interval '1 ms' AS moment) AS enqueued
"""  # noqa: S608 (all of it is written here)
_FINISHED = f"""
INSERT INTO {{schema}}.workflow
    (id, name, status, input, output, token, worker_id, created_at, enqueued_at, started_at, finished_at)
SELECT {_ID.format(prefix="0180")}, 'one_step', 'succeeded', jsonb_build_object('number', number),
    to_jsonb(number + 1), {_ID.format(prefix="0181")}, {_ID.format(prefix="0182")}, moment, moment, moment, moment
FROM {_NUMBERS}, LATERAL (SELECT statement_timestamp() - interval '1 day' AS moment) AS past
"""  # noqa: S608 (all of it is written here)
_SUSPENDED = f"""
INSERT INTO {{schema}}.workflow
    (id, name, status, input, awaits, wake_at, created_at, enqueued_at, started_at)
SELECT {_ID.format(prefix="0180")}, 'signal_time', 'suspended', '{{{{}}}}', '[{{{{"signal": "go"}}}}]',
    CASE number % 2 WHEN 0 THEN statement_timestamp() + interval '30 days' END, moment, moment, moment
FROM {_NUMBERS}, LATERAL (SELECT statement_timestamp() - interval '1 day' AS moment) AS past
"""  # noqa: S608 (all of it is written here)
_STEPS = f"""
INSERT INTO {{schema}}.step (workflow_id, key, name, position, status, output, attempt, started_at, finished_at)
SELECT {_ID.format(prefix="0180")}, 'increment', 'increment', 1, 'succeeded', to_jsonb(number + 1), 1, moment, moment
FROM {_NUMBERS}, LATERAL (SELECT statement_timestamp() - interval '1 day' AS moment) AS past
"""  # noqa: S608 (all of it is written here)
_VACUUM = "VACUUM (ANALYZE) {schema}.workflow", "VACUUM (ANALYZE) {schema}.step"


def insert_pending(schema: BenchSchema, count: int) -> None:
    """Insert pending workflows of one step, by one statement."""
    schema.execute(_PENDING, count=count)
    schema.execute(*_VACUUM)


def insert_finished(schema: BenchSchema, count: int) -> None:
    """Insert succeeded workflows with their checkpoints, by one statement each."""
    schema.execute("ALTER TABLE {schema}.workflow DISABLE TRIGGER workflow_new_check")  # a new row is never finished
    schema.execute(_FINISHED, _STEPS, count=count)
    schema.execute("ALTER TABLE {schema}.workflow ENABLE TRIGGER workflow_new_check", *_VACUUM)


def insert_suspended(schema: BenchSchema, count: int) -> None:
    """Insert workflows that wait for a signal, every second one for thirty days at most, by one statement."""
    schema.execute("ALTER TABLE {schema}.workflow DISABLE TRIGGER workflow_new_check")  # a new row has not begun
    schema.execute(_SUSPENDED, count=count)
    schema.execute("ALTER TABLE {schema}.workflow ENABLE TRIGGER workflow_new_check", *_VACUUM)


def suspended_id(number: int) -> UUID:
    """Return the id of the workflow with a number from 1 on."""
    return UUID(f"0180{number:028x}")
