"""Engines, pools, databases and schemas as applications have them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, NullPool, create_engine, make_url, select
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

import sqla_durable.asyncio as aio
from sqla_durable import Durable, Executor, Worker, Workflow, WorkflowStatus, start_many
from tests.acceptance.shells import PATIENCE, POLL
from tests.support.databases import Databases, migrate, translated
from tests.support.domain import Entry

Sessions = sessionmaker[Session]
durable = Durable()


@durable.step
def book(session: Session, cents: int) -> int:
    session.add(Entry(account="book", cents=cents, note=None))
    return cents


@durable.step
def notify(cents: int) -> int:
    return cents


@durable.workflow
def pay(cents: int) -> int:
    return notify(book(cents))


asynchronous = Durable()


@asynchronous.step
async def abook(session: AsyncSession, cents: int) -> int:
    session.add(Entry(account="book", cents=cents, note=None))
    return cents


@asynchronous.step
async def anotify(cents: int) -> int:
    return cents


@asynchronous.workflow
async def apay(cents: int) -> int:
    return await anotify(await abook(cents))


def _engine_of(url: str, **options: Any) -> Engine:
    return create_engine(url, **options)


# behaviour: X3
@pytest.mark.parametrize(
    "options",
    [
        {"poolclass": NullPool},
        {"pool_size": 1, "max_overflow": 0, "pool_timeout": 30},
        {"pool_size": 2, "max_overflow": 1, "pool_timeout": 30},
        {"pool_size": 5, "max_overflow": -1},
    ],
    ids=["null", "one", "three", "unbounded"],
)
def test_worker_gets_by_with_any_pool(database_url: str, options: dict[str, Any]) -> None:
    engine = _engine_of(database_url, **options)
    maker = sessionmaker(engine)
    _carry_out(maker, 30)
    engine.dispose()


# behaviour: X3
@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
@pytest.mark.parametrize(
    "options",
    [{"poolclass": NullPool}, {"pool_size": 1, "max_overflow": 0, "pool_timeout": 30}],
    ids=["null", "one"],
)
def test_async_worker_gets_by_with_any_pool(database_url: str, driver: str, options: dict[str, Any]) -> None:
    url = make_url(database_url).set(drivername=f"postgresql+{driver}")

    async def carry_out() -> None:
        engine = create_async_engine(url, **options)
        maker = async_sessionmaker(engine)
        try:
            async with maker.begin() as session:
                ids = await aio.start_many(session, (apay.bind(number) for number in range(30)))
            async with Worker(asynchronous, async_sessionmaker=maker, poll_interval=POLL):
                for number, each in enumerate(ids):
                    assert await apay.handle(maker, each).result(timeout=PATIENCE) == number
            async with maker() as session:
                assert len((await session.scalars(select(Entry))).all()) == 30
        finally:
            await engine.dispose()

    asyncio.run(carry_out())


# behaviour: X3
def test_pool_that_is_exhausted_for_a_while_is_waited_for(database_url: str) -> None:
    engine = _engine_of(database_url, pool_size=1, max_overflow=0, pool_timeout=0.05)
    watching = _engine_of(database_url)
    maker, watcher = sessionmaker(engine), sessionmaker(watching)
    with watcher.begin() as session:
        workflow_id = pay.start(session, 7).id
    worker = Worker(durable, sessionmaker=maker, poll_interval=POLL, lease=timedelta(minutes=5))
    with worker:
        pay.handle(watcher, workflow_id).result(timeout=PATIENCE)
        for number in range(3):
            with _only_connection(engine), watcher.begin() as session:  # nothing is left for the worker
                waiting = pay.start(session, number).id
            assert pay.handle(watcher, waiting).result(timeout=PATIENCE) == number
    engine.dispose()
    watching.dispose()


# behaviour: X4
def test_two_durables_share_one_database(session_factory: Sessions) -> None:
    one, two = Durable(), Durable()
    from_one = one.workflow(lambda: "one", name="first")
    from_two = two.workflow(lambda: "two", name="second")
    with session_factory.begin() as session:
        first, second = from_one.start(session).id, from_two.start(session).id
    with (
        Worker(one, sessionmaker=session_factory, poll_interval=POLL),
        Worker(two, sessionmaker=session_factory, poll_interval=POLL),
    ):
        assert from_one.handle(session_factory, first).result(timeout=PATIENCE) == "one"
        assert from_two.handle(session_factory, second).result(timeout=PATIENCE) == "two"


# behaviour: X4
def test_one_durable_serves_two_databases(session_factory: Sessions, databases: Databases) -> None:
    with databases.migrated("durable") as other_url:
        engine = _engine_of(other_url)
        other = sessionmaker(engine)
        with session_factory.begin() as session:
            here = pay.options(key="k").start(session, 1).id
        with other.begin() as session:
            there = pay.options(key="k").start(session, 2).id
        with (
            Worker(durable, sessionmaker=session_factory, poll_interval=POLL),
            Worker(durable, sessionmaker=other, poll_interval=POLL),
        ):
            assert pay.handle(session_factory, here).result(timeout=PATIENCE) == 1
            assert pay.handle(other, there).result(timeout=PATIENCE) == 2
        assert _entries(session_factory) == [1]
        assert _entries(other) == [2]
        engine.dispose()


def test_two_tenants_in_one_database_know_nothing_of_each_other(engine: Engine) -> None:
    with engine.begin() as connection:
        migrate(connection, "tenant_7")
        migrate(connection, "tenant_8")
    seven, eight = (sessionmaker(translated(engine, schema)) for schema in ("tenant_7", "tenant_8"))
    with seven.begin() as session:
        first = pay.options(key="k").start(session, 7).id
    with eight.begin() as session:
        second = pay.options(key="k").start(session, 8).id
    with Worker(durable, sessionmaker=seven, poll_interval=POLL):
        assert pay.handle(seven, first).result(timeout=PATIENCE) == 7
    with eight() as session:
        assert session.scalars(select(Workflow.status)).all() == [WorkflowStatus.PENDING]
        assert Executor(session).execute(pay, second) == 8
    with sessionmaker(engine)() as session:
        assert session.scalars(select(Workflow)).all() == []
    for maker, expected in ((seven, 7), (eight, 8)):
        with maker() as session:
            assert session.scalars(select(Workflow.output)).all() == [expected]


def test_tenant_of_a_session_is_the_one_that_a_start_uses(engine: Engine) -> None:
    with engine.begin() as connection:
        migrate(connection, "tenant_7")
    with Session(engine) as session:
        session.connection(execution_options={"schema_translate_map": {"durable": "tenant_7"}})
        pay.start(session, 7)
        session.commit()
    with sessionmaker(translated(engine, "tenant_7"))() as session:
        assert session.scalars(select(Workflow.name)).all() == ["pay"]


# behaviour: X5
def test_client_that_only_inserts_needs_no_workflow_code(session_factory: Sessions, database_url: str) -> None:
    script = f"""
from sqlalchemy import create_engine
from sqlalchemy.orm import Session
from sqla_durable.models import Workflow
with Session(create_engine({database_url!r})) as session:
    session.add(Workflow(name="pay", input={{"cents": 7}}, key="client"))
    session.commit()
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=60)
    with session_factory() as session:
        record = session.scalars(select(Workflow)).one()
        assert Executor(session).execute(pay, record) == 7


@pytest.mark.parametrize("isolation_level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_engine_of_a_stricter_isolation_level_works(database_url: str, isolation_level: Any) -> None:
    engine = _engine_of(database_url, isolation_level=isolation_level)
    maker = sessionmaker(engine)
    _carry_out(maker, 20)
    with maker() as session:
        assert Executor(session).run(pay, 7) == 7
    engine.dispose()


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_async_engine_of_a_stricter_isolation_level_works(database_url: str, driver: str) -> None:
    async def carry_out() -> None:
        url = make_url(database_url).set(drivername=f"postgresql+{driver}")
        engine: AsyncEngine = create_async_engine(url, isolation_level="SERIALIZABLE")
        maker = async_sessionmaker(engine)
        try:
            async with maker.begin() as session:
                ids = [(await apay.options(key=str(n)).start(session, n)).id for n in range(10)]
            async with Worker(asynchronous, async_sessionmaker=maker, poll_interval=POLL):
                for number, each in enumerate(ids):
                    assert await apay.handle(maker, each).result(timeout=PATIENCE) == number
        finally:
            await engine.dispose()

    asyncio.run(carry_out())


def _only_connection(engine: Engine) -> Connection:
    """Take the pool's only connection, when the worker that uses it gives it back."""
    while True:
        with suppress(PoolTimeoutError):
            return engine.connect()


def _carry_out(maker: Sessions, count: int) -> None:
    with maker.begin() as session:
        ids = start_many(session, (pay.bind(number) for number in range(count)))
    with Worker(durable, sessionmaker=maker, poll_interval=POLL):
        for number, each in enumerate(ids):
            assert pay.handle(maker, each).result(timeout=PATIENCE) == number
    assert sorted(_entries(maker)) == list(range(count))


def _entries(maker: Sessions) -> list[int]:
    with maker() as session:
        return list(session.scalars(select(Entry.cents)))
