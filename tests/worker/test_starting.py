"""What a worker waits for, and what it refuses, at its start."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Generator
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, NullPool, create_engine, event, make_url, select, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Durable, Worker, Workflow, start_many
from sqla_durable.errors import DatabaseUnavailableError, SessionError, UsageError
from sqla_durable.execution.worker import pools
from tests.acceptance.shells import PATIENCE, POLL
from tests.store import races
from tests.support.proxy import Proxy

durable = Durable()


@durable.workflow
def greet(name: str) -> str:
    return f"hello {name}"


@pytest.fixture
def workflow_id(engine: Engine) -> Any:
    with Session(engine) as session:
        workflow = greet.start(session, "Ada")
        session.commit()
        return workflow.id


def worker_of(url: str, driver: str, **options: Any) -> Worker:
    if driver == "sync":
        engine = create_engine(url, poolclass=NullPool)
        return Worker(durable, sessionmaker=sessionmaker(engine), poll_interval=POLL, **options)
    async_engine = create_async_engine(make_url(url).set(drivername=f"postgresql+{driver}"), poolclass=NullPool)
    return Worker(durable, async_sessionmaker=async_sessionmaker(async_engine), poll_interval=POLL, **options)


def warnings_of(caplog: pytest.LogCaptureFixture, said: str) -> bool:
    return any(said in each.getMessage() for each in caplog.records if each.levelno == logging.WARNING)


# behaviour: O6
@pytest.mark.parametrize("driver", ["sync", "psycopg", "asyncpg"])
def test_a_worker_that_is_started_during_an_outage_waits_for_its_end(
    database_url: str, engine: Engine, workflow_id: Any, driver: str, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = Proxy(database_url)
    proxy.cut()

    def open_later() -> None:
        races.wait_until(lambda: warnings_of(caplog, "cannot be reached"), what="a try")
        proxy.open()

    end = threading.Thread(target=open_later)
    end.start()
    with worker_of(proxy.url, driver):
        assert greet.handle(sessionmaker(engine), workflow_id).result(timeout=PATIENCE) == "hello Ada"
    end.join()
    proxy.cut()
    assert warnings_of(caplog, "Trying again for another")


# behaviour: O6
@pytest.mark.parametrize("driver", ["sync", "psycopg", "asyncpg"])
def test_a_worker_on_a_standby_says_so_and_waits_until_it_takes_writes(
    read_only: str, engine: Engine, workflow_id: Any, driver: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(DatabaseUnavailableError, match=r"takes no writes: it is a standby, .*target_session_attrs"):
        worker_of(read_only, driver, start_timeout=timedelta()).run()
    caplog.clear()

    def promote() -> None:
        races.wait_until(lambda: warnings_of(caplog, "takes no writes"), what="a try")
        set_read_only(engine, "off")

    promotion = threading.Thread(target=promote)
    promotion.start()
    with worker_of(read_only, driver):
        assert greet.handle(sessionmaker(engine), workflow_id).result(timeout=PATIENCE) == "hello Ada"
    promotion.join()


@pytest.fixture
def read_only(engine: Engine, database_url: str, workflow_id: Any) -> Generator[str]:
    """A database whose new connections take no writes; those of `engine` do."""
    set_read_only(engine, "on")
    yield database_url
    set_read_only(engine, "off")


def set_read_only(engine: Engine, value: str) -> None:
    with engine.begin() as connection:
        connection.execute(text("SET TRANSACTION READ WRITE"))
        connection.execute(text(f"ALTER DATABASE {engine.url.database} SET default_transaction_read_only = {value}"))


def test_a_worker_that_is_stopped_while_it_waits_leaves_at_once() -> None:
    worker = worker_of("postgresql+psycopg://nobody@/nowhere?host=/nonexistent", "sync")
    worker.stop()
    worker.run()  # leaves, and raises nothing
    worker = worker_of("postgresql+psycopg://nobody@/nowhere?host=/nonexistent", "psycopg")
    worker.stop()
    with pytest.raises(UsageError, match="stopped before it had started"), worker:
        pass


# behaviour: O5
def test_workers_that_share_a_pool_leave_each_other_connections(database_url: str) -> None:
    engine = create_engine(database_url, pool_size=9, max_overflow=0, pool_timeout=5)
    maker = sessionmaker(engine)
    with maker.begin() as session:
        ids = start_many(session, [greet.bind(str(number)) for number in range(60)])
    with ExitStack() as running:
        for _ in range(2):
            running.enter_context(Worker(durable, sessionmaker=maker, poll_interval=POLL, concurrency=3))
        with pytest.raises(
            SessionError,
            match=r"9 connections, and 2 running .* need 7 of them: 2 are left, and .* needs 3, or better 4",
        ):
            Worker(durable, sessionmaker=maker).run()
        other = create_engine(database_url)
        other_maker = sessionmaker(other)
        for each in ids:
            greet.handle(other_maker, each).result(timeout=PATIENCE)
        with other_maker() as session:
            assert len(set(session.scalars(select(Workflow.worker_id)))) >= 1
        other.dispose()
    with Worker(durable, sessionmaker=maker), Worker(durable, sessionmaker=maker):  # what they had is free again
        pass
    engine.dispose()


# behaviour: O5
@pytest.mark.parametrize(("size", "warned"), [(2, True), (3, False)])
def test_pool_in_which_steps_keep_the_heartbeat_waiting_is_named(
    size: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    pools.require_pool(create_engine("postgresql+psycopg://", pool_size=size, max_overflow=0))
    assert any(f"has {size} connection(s), so steps may keep" in each for each in caplog.messages) is warned


# behaviour: O5
async def test_async_workers_that_share_a_pool_are_counted_too(database_url: str) -> None:
    url = make_url(database_url).set(drivername="postgresql+asyncpg")
    engine = create_async_engine(url, pool_size=4, max_overflow=0)
    maker = async_sessionmaker(engine)
    async with Worker(durable, async_sessionmaker=maker):
        with pytest.raises(SessionError, match=r"1 running worker\(s\) of this process need 3 of them: 1 are left"):
            await Worker(durable, async_sessionmaker=maker).serve()
    await asyncio.sleep(0)
    await engine.dispose()


@pytest.mark.parametrize("driver", ["psycopg2", "pg8000"])
def test_a_driver_on_which_no_worker_is_tested_is_refused_by_name(driver: str) -> None:
    pytest.importorskip(driver)
    engine = create_engine(f"postgresql+{driver}://ada@nowhere/x")
    with pytest.raises(SessionError, match=f"uses the driver '{driver}': a worker needs psycopg or asyncpg"):
        Worker(durable, sessionmaker=sessionmaker(engine)).run()


@pytest.mark.parametrize("shell", ["with", "async with"])
async def test_a_worker_that_fails_later_says_so_at_once_and_raises_at_the_end_of_its_block(
    engine: Engine, caplog: pytest.LogCaptureFixture, shell: str
) -> None:
    """An event of the application breaks the claims: the code inside the block would wait for ever, and not know."""
    is_broken = threading.Event()

    @event.listens_for(engine, "before_cursor_execute")
    def refuse(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if is_broken.is_set() and "claimable" in statement:
            raise RuntimeError("no claims today")

    async def fails() -> None:
        is_broken.set()
        with Session(engine) as session:
            greet.start(session, "world")
            session.commit()
        while not any("has failed, and executes nothing any more" in each for each in caplog.messages):
            await asyncio.sleep(0.01)

    async def serve() -> None:
        worker = Worker(durable, sessionmaker=sessionmaker(engine), poll_interval=POLL)
        if shell == "with":
            with worker:
                await asyncio.wait_for(fails(), PATIENCE.total_seconds())
        else:
            async with worker:
                await asyncio.wait_for(fails(), PATIENCE.total_seconds())

    with pytest.raises(RuntimeError, match="no claims today"):
        await serve()


async def test_a_worker_that_has_run_is_refused_before_its_block_is_entered(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    worker = Worker(durable, sessionmaker=sessionmaker(engine), poll_interval=POLL)
    with worker, pytest.raises(UsageError, match="has run already"), worker:
        pytest.fail("entered beside itself")
    with pytest.raises(UsageError, match="has run already"), worker:
        pytest.fail("entered again")
    with pytest.raises(UsageError, match="has run already"):
        async with worker:
            pytest.fail("entered again")
    assert not any("has failed" in each for each in caplog.messages)
