"""The worker's own transactions end: with their answer, or cut off after their time limit."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, Generator
from typing import Any

import pytest
from sqlalchemy import Engine, NullPool, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import Session

from sqla_durable.retry import is_outage
from sqla_durable.worker.database import (
    Database,
    HeldLoopDatabase,
    HeldThreadDatabase,
    LoopDatabase,
    ThreadDatabase,
    in_short,
    persistently,
)
from tests.store import races

LIMIT = 0.5
KINDS = ["thread", "held thread", "psycopg", "held psycopg", "asyncpg", "held asyncpg"]


def _database(kind: str, url: str, **options: Any) -> tuple[Database, Engine]:
    held, _, form = kind.rpartition(" ")
    if form == "thread":
        engine = create_engine(url, **options)
        return (HeldThreadDatabase if held else ThreadDatabase)(engine, limit=LIMIT), engine
    engine = create_async_engine(make_url(url).set(drivername=f"postgresql+{form}"), **options).sync_engine
    return (HeldLoopDatabase if held else LoopDatabase)(engine, limit=LIMIT), engine


@pytest.fixture(params=KINDS)
async def database(request: pytest.FixtureRequest, database_url: str) -> AsyncGenerator[Database]:
    database, engine = _database(str(request.param), database_url, poolclass=NullPool)
    yield database
    await database.close()
    engine.dispose()


@pytest.fixture
def deaf() -> Generator[str]:
    """The URL of a server that accepts connections and answers nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"postgresql+psycopg://nobody@127.0.0.1:{listener.getsockname()[1]}/none?connect_timeout=3"


def _backend(session: Session) -> int:
    return races.pid_of(session)


def _slow(session: Session) -> None:
    session.execute(text("SELECT pg_sleep(60)"))


async def test_a_transaction_that_gets_no_answer_is_cut_off_and_the_next_one_is_on_another_connection(
    database: Database,
) -> None:
    before = await database.transact(_backend)
    with pytest.raises(DBAPIError) as lost:
        await database.transact(_slow)
    assert is_outage(lost.value)
    assert await database.transact(_backend) != before
    assert database.stuck == 0


async def test_a_transaction_that_is_cancelled_is_waited_for_and_not_for_ever(
    database: Database, engine: Engine
) -> None:
    waiting = asyncio.create_task(database.transact(_slow))
    await asyncio.to_thread(races.wait_until, lambda: _sleeping(engine), what="the statement")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await database.transact(_backend)


@pytest.mark.parametrize("kind", ["held thread", "held psycopg", "held asyncpg"])
async def test_a_held_connection_is_the_same_for_every_transaction(kind: str, database_url: str) -> None:
    database, engine = _database(kind, database_url, poolclass=NullPool)
    assert len({await database.transact(_backend) for _ in range(3)}) == 1
    await database.close()
    engine.dispose()


async def test_an_error_of_a_statement_rolls_back_and_leaves_the_database_usable(database: Database) -> None:
    def broken(session: Session) -> None:
        session.execute(text("CREATE TABLE half_done (id int)"))
        session.execute(text("SELECT 1 / 0"))

    with pytest.raises(DBAPIError, match="division by zero"):
        await database.transact(broken)
    found = await database.transact(lambda session: session.scalar(text("SELECT to_regclass('half_done')::text")))
    assert found is None


@pytest.mark.parametrize("kind", KINDS)
async def test_a_server_that_never_answers_a_connection_holds_nobody_up(kind: str, deaf: str) -> None:
    """Asked twice: with threads, the second has another one than that which is stuck."""
    url = deaf.partition("?")[0] if "asyncpg" in kind else deaf
    database, engine = _database(kind, url, poolclass=NullPool)
    for _ in range(2):
        with pytest.raises((TimeoutError, DBAPIError)):
            await asyncio.wait_for(database.transact(_backend), 30)
    assert database.stuck == (2 if "thread" in kind else 0)
    await database.close()
    engine.dispose()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_connection_that_is_spoilt_is_not_used_again(kind: str, database_url: str) -> None:
    database, engine = _database(kind, database_url, **({} if "asyncpg" in kind else {"pool_size": 3}))
    before = await database.transact(_backend)

    def read_only(session: Session) -> None:
        session.execute(text("DO $$ BEGIN RAISE EXCEPTION 'standby' USING ERRCODE = '25006'; END $$"))

    with pytest.raises(DBAPIError, match="standby"):
        await database.transact(read_only)
    assert await database.transact(_backend) != before
    await database.close()
    if "thread" in kind:
        engine.dispose()
    else:
        await AsyncEngine(engine).dispose()


async def test_prepared_statements_that_a_pooler_mixes_up_are_explained(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    refusals = iter([True, False])

    def mixed_up(session: Session) -> int:
        if next(refusals):
            session.execute(text("DO $$ BEGIN RAISE EXCEPTION 'no _pg3_0' USING ERRCODE = '26000'; END $$"))
        return 7

    assert await persistently(database, mixed_up, what="claim") == 7
    assert "PgBouncer" in caplog.text
    assert "prepare_threshold" in caplog.text


def test_an_error_without_a_text_is_shown_by_its_repr() -> None:
    assert in_short(ConnectionError()) == "ConnectionError()"


def _sleeping(engine: Engine) -> bool:
    statement = text("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%' AND state = 'active'")
    with engine.connect() as connection:
        return bool(connection.execute(statement).scalar_one())
