"""What the store finds out of a driver's connection."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from sqlalchemy import NullPool, create_engine, make_url
from sqlalchemy.ext.asyncio import create_async_engine

from sqla_durable.store.schema import autocommit, keeps_statements

ASYNCPG: dict[str, Any] = {
    "statement_cache_size": 0,
    "prepared_statement_cache_size": 0,
    "prepared_statement_name_func": lambda: f"__asyncpg_{uuid.uuid4()}__",
}


@pytest.mark.parametrize(
    ("arguments", "keeps"), [({"prepare_threshold": 5}, True), ({"prepare_threshold": None}, False)]
)
def test_psycopg_keeps_statements_unless_that_is_turned_off(
    database_url: str, arguments: dict[str, Any], keeps: bool
) -> None:
    engine = create_engine(database_url, connect_args=arguments, poolclass=NullPool)
    with engine.connect() as connection:
        assert keeps_statements(connection) is keeps
    engine.dispose()


@pytest.mark.parametrize(
    ("driver", "arguments", "keeps"),
    [
        ("asyncpg", {"prepared_statement_cache_size": 100}, True),
        ("asyncpg", ASYNCPG, False),
        ("psycopg", {"prepare_threshold": 5}, True),
        ("psycopg", {"prepare_threshold": None}, False),
    ],
)
async def test_so_do_the_drivers_of_async_engines(
    database_url: str, driver: str, arguments: dict[str, Any], keeps: bool
) -> None:
    url = make_url(database_url).set(drivername=f"postgresql+{driver}")
    engine = create_async_engine(url, connect_args=arguments, poolclass=NullPool)
    async with engine.connect() as connection:
        assert await connection.run_sync(keeps_statements) is keeps
    await engine.dispose()


@pytest.mark.parametrize(("driver", "level"), [("psycopg", "AUTOCOMMIT"), ("asyncpg", "READ COMMITTED")])
async def test_a_statement_is_alone_but_with_asyncpg(database_url: str, driver: str, level: str) -> None:
    engine = create_async_engine(make_url(database_url).set(drivername=f"postgresql+{driver}"), poolclass=NullPool)
    assert autocommit(engine.sync_engine).get("isolation_level", "READ COMMITTED") == level
    await engine.dispose()
