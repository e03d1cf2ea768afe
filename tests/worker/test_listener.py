"""Listening for hints: with each driver, through lost and silent connections, and nothing left open afterwards."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, NullPool, create_engine, event, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import Session

from sqla_durable import Durable
from sqla_durable.api.hints import EVERYWHERE
from sqla_durable.execution.worker.hints import Listener
from tests.support.clusters import free_port
from tests.support.databases import translated
from tests.support.notifications import PATIENCE
from tests.support.proxy import Proxy

durable = Durable()
KINDS = ["sync", "psycopg", "asyncpg"]


@durable.workflow(queue="mail")
def mail() -> None: ...


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def callers(direct_url: str, durable_schema: str) -> Generator[Engine]:
    engine = create_engine(direct_url, poolclass=NullPool)
    yield translated(engine, durable_schema)
    engine.dispose()


@asynccontextmanager
async def engine_of(kind: str, direct_url: str, **options: Any) -> AsyncGenerator[Engine]:
    if kind == "sync":
        engine = create_engine(direct_url, **options)
        yield engine
        engine.dispose()
    else:
        outer = create_async_engine(make_url(direct_url).set(drivername=f"postgresql+{kind}"), **options)
        yield outer.sync_engine
        await outer.dispose()


class Heard:
    """What a listener handed on."""

    def __init__(self) -> None:
        self._queues: asyncio.Queue[str] = asyncio.Queue()
        self.put = self._queues.put_nowait

    async def next(self) -> str:
        return await asyncio.wait_for(self._queues.get(), PATIENCE)


@asynccontextmanager
async def listening(engine: Engine, **options: Any) -> AsyncGenerator[Heard]:
    heard = Heard()
    task = asyncio.create_task(Listener(engine, heard.put, **options).run())
    yield heard
    assert not task.done()
    task.cancel()
    await asyncio.wait([task], timeout=PATIENCE)
    assert task.cancelled()


def start(callers: Engine) -> None:
    with Session(callers) as session:
        mail.start(session)
        session.commit()


def end_listeners(callers: Engine) -> None:
    backends = text(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    with callers.connect() as connection:
        connection.execute(backends)


@pytest.mark.parametrize("durable_schema", ["durable", "tenant_7"], indirect=True)
async def test_listener_asks_for_a_poll_and_then_passes_hints_on(
    kind: str, direct_url: str, callers: Engine, durable_schema: str
) -> None:
    async with engine_of(kind, direct_url) as engine, listening(translated(engine, durable_schema)) as heard:
        assert await heard.next() == EVERYWHERE
        for _ in range(3):
            await asyncio.to_thread(start, callers)
            assert await heard.next() == "q:mail"


async def test_listener_goes_on_after_it_asked_whether_the_server_is_there(
    kind: str, direct_url: str, callers: Engine
) -> None:
    async with engine_of(kind, direct_url) as engine:
        asked = threading.Semaphore(0)

        @event.listens_for(engine, "after_cursor_execute")
        def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
            if statement == "SELECT 1":
                asked.release()

        async with listening(engine, check=timedelta(milliseconds=10)) as heard:
            assert await heard.next() == EVERYWHERE
            for _ in range(3):
                assert await asyncio.to_thread(asked.acquire, timeout=PATIENCE)
            await asyncio.to_thread(start, callers)
            assert await heard.next() == "q:mail"


async def test_ended_connection_is_replaced_and_warned_of_once(
    kind: str, direct_url: str, callers: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    async with engine_of(kind, direct_url) as engine, listening(engine) as heard:
        assert await heard.next() == EVERYWHERE
        await asyncio.to_thread(end_listeners, callers)
        assert await heard.next() == EVERYWHERE
        await asyncio.to_thread(start, callers)
        assert await heard.next() == "q:mail"
    assert [each.levelno for each in caplog.records if "listening for hints" in each.message] == [logging.WARNING]


async def test_silent_connection_is_replaced(kind: str, direct_url: str, callers: Engine) -> None:
    proxy = Proxy(direct_url)
    limits = {"check": timedelta(milliseconds=100), "limit": timedelta(seconds=1)}
    async with engine_of(kind, proxy.url) as engine, listening(engine, **limits) as heard:
        assert await heard.next() == EVERYWHERE
        proxy.forget()
        assert await heard.next() == EVERYWHERE
        await asyncio.to_thread(start, callers)
        assert await heard.next() == "q:mail"
    proxy.cut()


async def test_listener_waits_for_a_server_and_warns_once(
    kind: str, direct_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "sqla_durable.worker")
    nowhere = (
        make_url(direct_url).set(host="127.0.0.1", port=free_port(), query={}).render_as_string(hide_password=False)
    )
    tried = asyncio.Event()

    class Tries(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "listening for hints" in record.getMessage() and record.levelno == logging.DEBUG:
                tried.set()

    handler = Tries()
    logger = logging.getLogger("sqla_durable.worker")
    logger.addHandler(handler)
    async with engine_of(kind, nowhere) as engine, listening(engine):
        await asyncio.wait_for(tried.wait(), PATIENCE)
    logger.removeHandler(handler)
    levels = [each.levelno for each in caplog.records if "listening for hints" in each.message]
    assert levels[:2] == [logging.WARNING, logging.DEBUG]
    assert levels.count(logging.WARNING) == 1


async def test_listener_takes_no_place_in_the_pool_and_closes_its_connection(kind: str, direct_url: str) -> None:
    async with engine_of(kind, direct_url, pool_size=1, max_overflow=0, pool_timeout=PATIENCE) as engine:
        taken: list[Any] = []

        @event.listens_for(engine, "detach")
        def note(connection: Any, _record: object) -> None:
            taken.append(getattr(connection, "driver_connection", connection))

        async with listening(engine) as heard:
            assert await heard.next() == EVERYWHERE
            assert await _answer(engine) == 1
        (own,) = taken
        assert own.is_closed() if kind == "asyncpg" else own.closed
    for thread in threading.enumerate():
        if thread.name == "sqla-durable-listener":
            thread.join(PATIENCE)
            assert not thread.is_alive()


async def test_unknown_driver_is_not_listened_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sqla_durable.worker")
    async with listening(create_engine("sqlite://")):
        await asyncio.sleep(0)
    assert [each.message for each in caplog.records] == [
        "the driver 'pysqlite' is not listened on: workflows are found by polling"
    ]


async def _answer(engine: Engine) -> object:
    if engine.dialect.is_async:
        async with AsyncEngine(engine).connect() as connection:
            return await connection.scalar(text("SELECT 1"))
    with engine.connect() as connection:
        return connection.scalar(text("SELECT 1"))
