"""Statements that are given to the driver as text: the same rows and errors as SQLAlchemy's own execution."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy import Connection, Engine, ExceptionContext, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session

from sqla_durable.definitions.database_errors import is_about_data, is_engine_error, is_outage
from sqla_durable.execution.worker.database import LoopDatabase
from sqla_durable.models import SCHEMA
from sqla_durable.models.base import Text
from sqla_durable.store import Fence, attempts
from sqla_durable.store.driver import DriverStatement
from sqla_durable.store.statements import WORKFLOW, parameter, text_literal
from tests.store import races

FOUND = DriverStatement(
    lambda: sa.select(
        WORKFLOW.c.id, sa.cast(parameter("number", Text()), sa.Integer()), sa.literal("child"), text_literal("%")
    )
)


@contextmanager
def autocommitting(engine: Engine) -> Generator[Connection]:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        yield connection


def rows_of(connection: Connection, /, **parameters: Any) -> list[tuple[UUID, int, str, str]]:
    rows = FOUND.rows(connection, {"number": "7", **parameters})
    return [(UUID(str(first)), *rest) for first, *rest in rows]


@pytest.mark.parametrize("async_driver", ["psycopg", "asyncpg"], indirect=True)
async def test_rows_are_the_same_by_the_drivers_cursor_and_by_sqlalchemy(
    engine: Engine, async_engine: AsyncEngine
) -> None:
    (fence,) = races.claimed_fences(engine)
    expected = [(fence.workflow_id, 7, "child", "%")]
    with autocommitting(engine) as alone, engine.connect() as in_transaction:
        assert rows_of(alone) == rows_of(in_transaction) == expected
    async with async_engine.connect() as connection:
        assert await connection.run_sync(rows_of) == expected
    async with async_engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        assert await connection.run_sync(rows_of) == expected


def test_what_is_watched_is_seen_and_what_is_not_costs_sqlalchemy_nothing(engine: Engine) -> None:
    seen: list[str] = []

    def see(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        seen.append(statement)

    with autocommitting(engine) as connection:
        rows_of(connection)
        assert not connection.in_transaction()  # SQLAlchemy begins one with whatever it executes
    with autocommitting(engine) as connection:
        event.listen(connection, "before_cursor_execute", see)
        rows_of(connection)
        assert connection.in_transaction()
    event.listen(engine, "before_cursor_execute", see)
    with autocommitting(engine) as connection:
        rows_of(connection)
    assert len(seen) == 2


@pytest.mark.parametrize("name", ["begin", "do_execute"])
def test_an_event_that_may_set_the_role_or_execute_otherwise_sees_the_statement(engine: Engine, name: str) -> None:
    seen: list[str] = []

    def see(*_: object) -> None:
        seen.append(name)

    with autocommitting(engine) as connection:  # before the event, which sees the first statements of a dialect too
        event.listen(engine, name, see)
        rows_of(connection)
    assert seen == [name]


def test_a_statement_is_logged_however_the_log_was_turned_on(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """`echo` is one way; the level of SQLAlchemy's logger is the other."""
    caplog.set_level(logging.INFO, "sqlalchemy.engine")
    with autocommitting(engine) as connection:
        rows_of(connection)
    assert any("workflow" in each for each in caplog.messages)


def test_two_tenants_of_one_engine_have_texts_of_their_own(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    with engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA tenant_7"))
        connection.execute(text('CREATE TABLE tenant_7.workflow AS SELECT * FROM "durable".workflow LIMIT 0'))
    tenant = engine.execution_options(schema_translate_map={SCHEMA: "tenant_7"})
    for _ in range(2):
        with autocommitting(engine) as one, autocommitting(tenant) as other:
            assert [each[0] for each in rows_of(one)] == [fence.workflow_id]
            assert rows_of(other) == []


def test_the_error_of_a_bad_row_is_sqlalchemys_and_the_connection_stays_usable(engine: Engine) -> None:
    with autocommitting(engine) as connection:
        with pytest.raises(DBAPIError) as raised:
            rows_of(connection, number="seven")
        assert is_about_data(raised.value)
        assert is_engine_error(raised.value)
        assert rows_of(connection) == []


@pytest.mark.parametrize("async_driver", ["psycopg", "asyncpg"], indirect=True)
async def test_what_was_executed_and_cannot_be_read_is_not_executed_again(
    engine: Engine, async_engine: AsyncEngine
) -> None:
    """psycopg reads no year above 9999; a claim that was repeated would take other workflows."""
    with engine.begin() as connection:
        connection.execute(text("CREATE SEQUENCE executed"))
    unreadable = DriverStatement(
        lambda: sa.select(
            sa.func.nextval("executed"),
            sa.cast(parameter("far", Text()), sa.DateTime(timezone=True)) + sa.text("interval '9000 years'"),
        )
    )

    def execute(connection: Connection) -> None:
        with suppress(DBAPIError, OverflowError):  # the latter is asyncpg's
            unreadable.rows(connection, {"far": "2026-01-01"})

    with autocommitting(engine) as connection:
        execute(connection)
    async with async_engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection_:
        await connection_.run_sync(execute)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT last_value FROM executed")).scalar_one() == 2


def test_a_handler_of_errors_sees_those_of_the_engine_too(engine: Engine) -> None:
    seen: list[str] = []

    @event.listens_for(engine, "handle_error")
    def see(context: ExceptionContext) -> None:
        seen.append(str(context.statement))

    with autocommitting(engine) as connection, suppress(DBAPIError):
        rows_of(connection, number="seven")
    assert len(seen) == 1


def test_a_connection_that_was_lost_is_an_outage_and_is_not_used_again(engine: Engine) -> None:
    with autocommitting(engine) as connection:
        backend = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
        with engine.begin() as other:
            other.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": backend})
        with pytest.raises(DBAPIError) as raised:
            rows_of(connection)
        assert is_outage(raised.value)
        assert raised.value.connection_invalidated


def test_a_batch_that_is_executed_again_after_its_first_answer_was_lost_reports_what_it_did_not_write(
    engine: Engine,
) -> None:
    """Whoever asks finds it written by the same attempt, as after any lost answer."""
    (fence,) = races.claimed_fences(engine)
    for unwritten in (set[tuple[Fence, str]](), {(fence, "charge")}):
        with autocommitting(engine) as connection:
            assert attempts.write_batch(connection, [races.checkpoint(fence)]).checkpoints == unwritten


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_an_engine_that_overrules_autocommit_loses_no_commit(
    engine: Engine, async_engine: AsyncEngine, level: str
) -> None:
    """Its connections are in transactions, whatever their options say."""
    (fence,) = races.claimed_fences(engine)
    overruling = async_engine.sync_engine.execution_options(isolation_level=level)
    database = LoopDatabase(overruling, limit=30)
    assert not await database.execute(lambda connection: attempts.write_batch(connection, [races.checkpoint(fence)]))
    assert races.history_of(engine, fence.workflow_id) == ["charge"]


def test_in_a_transaction_it_is_undone_with_it(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session:
        assert not attempts.write_batch(session, [races.checkpoint(fence)])
        session.rollback()
    assert races.history_of(engine, fence.workflow_id) == []
