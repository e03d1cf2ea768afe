"""Databases that are not migrated, of another age, or not there: each is named, with what to do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker
from uuid_utils.compat import uuid7

from sqla_durable import Executor, Worker, models
from sqla_durable.errors import DatabaseUnavailableError, SchemaError
from tests.acceptance.bad_input import Sessions, bare, ship

pytestmark = pytest.mark.few_shells


@pytest.fixture
def unmigrated(empty_database_url: str) -> Generator[Sessions]:
    engine = create_engine(empty_database_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE mine (id int)"))
    yield sessionmaker(engine)
    engine.dispose()


def _uses(maker: Sessions) -> dict[str, Callable[[], object]]:
    def start() -> None:
        with maker.begin() as session:
            ship.start(session, 1)

    def run() -> None:
        with maker() as session:
            Executor(session).run(ship, 1)

    def wait() -> None:
        ship.handle(maker, uuid7()).result(timeout=timedelta(seconds=1))

    return {"start": start, "executor": run, "worker": Worker(bare, sessionmaker=maker).run, "handle": wait}


UPGRADE = f"sqla_durable.migrations.upgrade({models.REVISION!r})"
USES = pytest.mark.parametrize("use", ["start", "executor", "worker", "handle"])


@USES
def test_unmigrated_database_is_named(unmigrated: Sessions, use: str) -> None:
    with pytest.raises(SchemaError, match=r"the durable tables are not in postgresql.*schema 'durable'") as caught:
        _uses(unmigrated)[use]()
    assert f"Run `alembic upgrade heads` with a revision that calls {UPGRADE}, or without Alembic " in str(caught.value)


def test_callers_transaction_survives_an_unmigrated_database(unmigrated: Sessions) -> None:
    with unmigrated.begin() as session:
        session.execute(text("INSERT INTO mine VALUES (1)"))
        with pytest.raises(SchemaError):
            ship.start(session, 1)
        session.execute(text("INSERT INTO mine VALUES (2)"))
    with unmigrated() as session:
        assert session.scalars(text("SELECT id FROM mine ORDER BY id")).all() == [1, 2]


@USES
@pytest.mark.parametrize(
    ("comment", "expected", "said"),
    [
        ("sqla-durable durable_0000", SchemaError, "are at .*durable_0000.*; this package needs 'durable_0002'"),
        (None, SchemaError, "are at 'an unknown revision'"),
        ("sqla-durable durable_0001", SchemaError, "are at .*durable_0001.*; this package needs 'durable_0002'"),
        ("sqla-durable durable_9999", SchemaError, "are at 'durable_9999', newer than this package"),
        (
            "sqla-durable for durable_0003 and later, at durable_9999",
            SchemaError,
            "are at 'durable_9999', newer than this package",
        ),
    ],
)
def test_schema_of_another_age_is_named(
    session_factory: Sessions, use: str, comment: str | None, expected: type[Exception], said: str
) -> None:
    with session_factory.begin() as session:
        session.execute(text(f"COMMENT ON TABLE durable.workflow IS {'NULL' if comment is None else repr(comment)}"))
    with pytest.raises(expected, match=said):
        _uses(session_factory)[use]()


def test_newer_tables_that_are_for_this_package_too_are_accepted(session_factory: Sessions) -> None:
    """So workers of two releases work side by side, while one takes the place of the other."""
    with session_factory.begin() as session:
        newer = "sqla-durable for durable_0002 and later, at durable_9999"
        session.execute(text(f"COMMENT ON TABLE durable.workflow IS '{newer}'"))
        assert ship.start(session, 1).name == "ship"


def test_missing_schema_of_a_tenant_is_named(engine: Engine) -> None:
    elsewhere = sessionmaker(engine.execution_options(schema_translate_map={"durable": "tenant_9"}))
    with elsewhere() as session, pytest.raises(SchemaError, match="schema 'tenant_9'"):
        ship.start(session, 1)
    with sessionmaker(engine).begin() as session:
        assert ship.start(session, 1).name == "ship"  # and the other schema is not mistaken for it


@pytest.mark.parametrize(
    ("change", "value"),
    [("port", 1), ("database", "not_there"), ("username", "nobody"), ("host", "/nowhere")],
)
def test_worker_with_a_wrong_url_says_which(database_url: str, change: str, value: Any) -> None:
    url = make_url(database_url)
    if change in ("port", "host"):
        url = url.set(host="127.0.0.1" if change == "port" else value, port=1, query={})
    else:
        url = url.set(**{change: value})
    engine = create_engine(url.set(password="secret"))
    with pytest.raises(DatabaseUnavailableError, match=r"(?s)cannot be reached: .*Check the URL") as caught:
        Worker(bare, sessionmaker=sessionmaker(engine), start_timeout=timedelta()).run()
    assert "secret" not in str(caught.value)
    engine.dispose()


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_async_worker_with_a_wrong_url_says_which(database_url: str, driver: str) -> None:
    url = make_url(database_url).set(drivername=f"postgresql+{driver}", database="not_there")

    async def serve() -> None:
        engine = create_async_engine(url)
        try:
            with pytest.raises(DatabaseUnavailableError, match=r"(?s)not_there.*cannot be reached: .*Check the URL"):
                await Worker(bare, async_sessionmaker=async_sessionmaker(engine), start_timeout=timedelta()).serve()
        finally:
            await engine.dispose()

    asyncio.run(serve())
