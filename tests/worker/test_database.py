"""The worker's own transactions end: with their answer, or cut off after their time limit."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, Generator
from datetime import timedelta
from functools import partial
from typing import Any, cast

import pytest
import sqlalchemy as sa
from sqlalchemy import Connection, Engine, NullPool, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session

from sqla_durable import Durable, Worker
from sqla_durable.definitions.database_errors import first_line, is_obstacle, is_outage
from sqla_durable.execution.worker.database import (
    Database,
    KeepingLoopDatabase,
    KeepingThreadDatabase,
    LoopDatabase,
    ThreadDatabase,
    persistently,
)
from sqla_durable.models import storage
from sqla_durable.store.driver import DriverStatement
from sqla_durable.store.schema import is_read_committed
from tests.store import races

durable = Durable()

LIMIT = 0.5
KINDS = ["thread", "keeping thread", "psycopg", "keeping psycopg", "asyncpg", "keeping asyncpg"]


@durable.step
async def add(number: int, more: int) -> int:
    return number + more


@durable.workflow
async def increase(number: int) -> int:
    return await add(number, 1)


def _database(kind: str, url: str, **options: Any) -> tuple[Database, Engine]:
    keeping, _, form = kind.rpartition(" ")
    if form == "thread":
        engine = create_engine(url, **options)
        return (KeepingThreadDatabase if keeping else ThreadDatabase)(engine, limit=LIMIT), engine
    engine = create_async_engine(make_url(url).set(drivername=f"postgresql+{form}"), **options).sync_engine
    return (KeepingLoopDatabase if keeping else LoopDatabase)(engine, limit=LIMIT), engine


@pytest.fixture(params=KINDS)
async def database(request: pytest.FixtureRequest, database_url: str, engine: Engine) -> AsyncGenerator[Database]:
    """Closed before `engine`, at whose end the threads of workers are waited for."""
    database, own = _database(str(request.param), database_url, poolclass=NullPool)
    yield database
    await database.close()
    own.dispose()


@pytest.fixture
def deaf() -> Generator[str]:
    """The URL of a server that accepts connections and answers nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"postgresql+psycopg://nobody@127.0.0.1:{listener.getsockname()[1]}/none?connect_timeout=3"


def _backend(connection: Connection) -> int:
    return int(connection.execute(text("SELECT pg_backend_pid()")).scalar_one())


def _slow(connection: Connection) -> None:
    connection.execute(text("SELECT pg_sleep(60)"))


async def test_a_call_that_gets_no_answer_is_cut_off_and_the_next_one_is_on_another_connection(
    database: Database,
) -> None:
    before = await database.execute(_backend)
    with pytest.raises(TimeoutError, match=r"no answer from the database within 0\.5 s") as lost:
        await database.execute(_slow)
    assert is_obstacle(lost.value)
    assert is_outage(cast("DBAPIError", lost.value.__cause__))
    assert await database.execute(_backend) != before
    assert database.stuck == 0


async def test_a_call_that_is_cancelled_is_waited_for_and_not_for_ever(database: Database, engine: Engine) -> None:
    waiting = asyncio.create_task(database.execute(_slow))
    await asyncio.to_thread(races.wait_until, lambda: _sleeping(engine), what="the statement")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await database.execute(_backend)


@pytest.mark.parametrize("kind", ["keeping thread", "keeping psycopg", "keeping asyncpg"])
async def test_a_reserved_connection_is_the_same_for_every_transaction(kind: str, database_url: str) -> None:
    database, engine = _database(kind, database_url, poolclass=NullPool)
    assert len({await database.execute(_backend) for _ in range(3)}) == 1
    await database.close()
    engine.dispose()


@pytest.mark.parametrize("closes_first", [False, True])
@pytest.mark.parametrize("kind", ["keeping thread", "keeping psycopg", "keeping asyncpg"])
async def test_transactions_that_overlap_each_other_and_the_end_leave_no_connection_behind(
    kind: str, closes_first: bool, database_url: str, engine: Engine
) -> None:
    """As when a worker claims after its lease has run out, while its heartbeat is under way."""
    database, own = _database(kind, database_url)
    database._limit = 30  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    with engine.connect() as holder:
        holder.execute(_LOCK)
        both = [asyncio.create_task(database.execute(_wait_for_lock)) for _ in range(2)]
        expected = 1 if "thread" in kind else 2  # a keeping thread is one
        await asyncio.to_thread(races.wait_until, lambda: _blocked(engine) == expected, what="the statements")
        closing = asyncio.create_task(database.close()) if closes_first else None
        if closing is not None and "thread" not in kind:
            await closing
        holder.rollback()
    await asyncio.gather(*both)
    await (closing or database.close())
    left = own.pool.checkedout()  # type: ignore[attr-defined]
    await (asyncio.to_thread(own.dispose) if "thread" in kind else AsyncEngine(own).dispose())
    assert left == 0


_LOCK = text("SELECT pg_advisory_xact_lock(1)")


def _wait_for_lock(connection: Connection) -> None:
    connection.execute(_LOCK)


def _blocked(engine: Engine) -> int:
    with engine.connect() as connection:
        waiting = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
        return int(connection.execute(waiting).scalar_one())


async def test_each_statement_is_a_transaction_of_its_own_and_none_is_left_open(
    database: Database, engine: Engine
) -> None:
    def write(connection: Connection) -> int:
        connection.execute(text("CREATE TABLE first (id int)"))
        with engine.connect() as other:
            assert other.execute(text("SELECT to_regclass('first')")).scalar_one() is not None
        state, pid = text("SELECT state FROM pg_stat_activity WHERE pid = :pid"), _backend(connection)
        with engine.connect() as other:
            assert other.execute(state, {"pid": pid}).scalar_one() == "idle"
        return pid

    assert await database.execute(write)


@pytest.mark.parametrize("kind", KINDS)
async def test_where_statements_by_themselves_would_be_serializable_they_are_read_committed_transactions(
    kind: str, database_url: str, engine: Engine
) -> None:
    with engine.connect() as connection, connection.begin():
        name = connection.engine.url.database
        connection.execute(text(f"ALTER DATABASE \"{name}\" SET default_transaction_isolation = 'serializable'"))
    by_itself, first = _database(kind, database_url, poolclass=NullPool)
    assert not await by_itself.execute(is_read_committed)
    await by_itself.close()
    first.dispose()
    database, own = _database(kind, database_url, poolclass=NullPool)
    database.use_transactions()
    level = text(
        "SELECT current_setting('transaction_isolation'), current_setting('idle_in_transaction_session_timeout')"
    )
    found = await database.execute(lambda connection: connection.execute(level).one())
    assert tuple(found) == ("read committed", "5s")
    await database.close()
    own.dispose()


async def test_an_error_of_a_statement_leaves_the_database_usable(database: Database) -> None:
    with pytest.raises(DBAPIError, match="division by zero"):
        await database.execute(lambda connection: connection.execute(text("SELECT 1 / 0")))
    assert await database.execute(_backend)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_server_that_never_answers_a_connection_holds_nobody_up(kind: str, deaf: str) -> None:
    """Asked twice: with threads, the second has another one than that which is stuck."""
    url = deaf.partition("?")[0] if "asyncpg" in kind else deaf
    database, engine = _database(kind, url, poolclass=NullPool)
    for _ in range(2):
        with pytest.raises((TimeoutError, DBAPIError)):
            await asyncio.wait_for(database.execute(_backend), 30)
    assert database.stuck == (2 if "thread" in kind else 0)
    await database.close()
    engine.dispose()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_connection_that_is_spoilt_is_not_used_again(kind: str, database_url: str) -> None:
    database, engine = _database(kind, database_url, **({} if "asyncpg" in kind else {"pool_size": 3}))
    before = await database.execute(_backend)

    def read_only(connection: Connection) -> None:
        connection.execute(text("DO $$ BEGIN RAISE EXCEPTION 'standby' USING ERRCODE = '25006'; END $$"))

    with pytest.raises(DBAPIError, match="standby"):
        await database.execute(read_only)
    assert await database.execute(_backend) != before
    await database.close()
    if "thread" in kind:
        engine.dispose()
    else:
        await AsyncEngine(engine).dispose()


async def test_prepared_statements_that_a_pooler_mixes_up_are_explained(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    refusals = iter([True, False])

    def mixed_up(connection: Connection) -> int:
        if next(refusals):
            connection.execute(text("DO $$ BEGIN RAISE EXCEPTION 'no _pg3_0' USING ERRCODE = '26000'; END $$"))
        return 7

    assert await persistently(database, mixed_up, what="claim") == 7
    assert "PgBouncer" in caplog.text
    assert "prepare_threshold" in caplog.text


def test_an_error_without_a_text_is_shown_by_its_repr() -> None:
    assert first_line(ConnectionError()) == "ConnectionError()"


def _sleeping(engine: Engine) -> bool:
    statement = text("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%' AND state = 'active'")
    with engine.connect() as connection:
        return bool(connection.execute(statement).scalar_one())


async def test_a_statement_that_was_prepared_for_another_type_is_executed_on_a_new_connection(
    database: Database, engine: Engine
) -> None:
    """A deploy may change the type of a column while the worker keeps its connections."""
    kinds = DriverStatement(lambda: sa.select(sa.column("kind", sa.Text())).select_from(sa.table("changing")))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE changing AS SELECT text 'plain' AS kind"))
    for _ in range(10):  # psycopg prepares the sixth of them
        await database.execute(partial(kinds.rows, parameters={}))
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE changing ALTER COLUMN kind TYPE varchar(5)"))
    rows = await persistently(database, partial(kinds.rows, parameters={}), what="test")
    assert [tuple(each) for each in rows] == [("plain",)]


@pytest.mark.parametrize("async_driver", ["psycopg", "asyncpg"], indirect=True)
async def test_a_worker_survives_a_change_of_the_types_that_it_reads(engine: Engine, async_engine: AsyncEngine) -> None:
    maker = async_sessionmaker(async_engine)

    async def result() -> int:
        with Session(engine) as session:
            workflow_id = increase.start(session, 6).id
            session.commit()
        engine.dispose()
        return await increase.handle(maker, workflow_id).result(timeout=timedelta(seconds=races.PATIENCE))

    def alter() -> None:
        with engine.begin() as connection:
            for each in storage.drop_statements():  # PostgreSQL alters no column of a view
                connection.execute(text(each))
            connection.execute(text('ALTER TABLE "durable".workflow ALTER COLUMN queue TYPE varchar(300)'))
            connection.execute(text('ALTER TABLE "durable".step ALTER COLUMN key TYPE varchar(3000)'))

    async with Worker(durable, async_sessionmaker=maker, poll_interval=timedelta(milliseconds=50)):
        for _ in range(10):
            assert await result() == 7
        # In a thread: it waits for statements of the worker, which go on on this event loop.
        await asyncio.to_thread(alter)
        assert await result() == 7
