"""Through a real PgBouncer in transaction mode: as the docs advise, and as one does who has not read them.

`pytest --pgbouncer tests/acceptance tests/worker` puts all their engines behind one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Any

import pytest
from sqlalchemy import create_engine, make_url, select
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from sqla_durable import Worker, Workflow, WorkflowStatus, start_many
from tests.acceptance.shells import POLL
from tests.acceptance.test_databases import apay, asynchronous, durable, pay
from tests.store import races
from tests.support import pgbouncer

COUNT = 200
DRIVERS = pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])


@pytest.fixture(scope="module")
def bouncer(server_url: str) -> Generator[pgbouncer.Bouncer]:
    """Two connections to the server for all: transactions of one client change between them."""
    try:
        bouncer = pgbouncer.start(server_url, default_pool_size="2")
    except pgbouncer.UnavailableError as error:
        pytest.skip(str(error))
    yield bouncer
    bouncer.stop()


@DRIVERS
def test_workers_behind_pgbouncer_do_all_work_without_prepared_statements(
    bouncer: pgbouncer.Bouncer, database_url: str, driver: str
) -> None:
    assert _outcomes(bouncer, database_url, driver, pgbouncer.CONNECT_ARGS[driver]()) == {WorkflowStatus.SUCCEEDED}


@DRIVERS
def test_prepared_statements_that_pgbouncer_mixes_up_fail_no_workflow(
    bouncer: pgbouncer.Bouncer, database_url: str, driver: str, request: pytest.FixtureRequest
) -> None:
    if request.config.getoption("--pgbouncer"):
        pytest.skip("the settings that are forgotten here are made for every engine")
    assert WorkflowStatus.FAILED not in _outcomes(bouncer, database_url, driver, {})


def _outcomes(
    bouncer: pgbouncer.Bouncer, database_url: str, driver: str, connect_args: dict[str, Any]
) -> set[WorkflowStatus]:
    """Start workflows past the bouncer, let a worker behind it execute them, and give where they stand."""
    direct = create_engine(database_url)
    maker = sessionmaker(direct)
    workflow = pay if driver == "psycopg" else apay
    with maker.begin() as session:
        start_many(session, (workflow.bind(number) for number in range(COUNT)))
    url = bouncer.url(str(make_url(database_url).database)).set(drivername=f"postgresql+{driver}")

    def decided() -> bool:
        with maker() as session:
            standing = set(session.scalars(select(Workflow.status)))
        return WorkflowStatus.FAILED in standing or standing == {WorkflowStatus.SUCCEEDED}

    if driver == "psycopg":
        engine = create_engine(url, connect_args=connect_args)
        with Worker(durable, sessionmaker=sessionmaker(engine), poll_interval=POLL):
            races.wait_until(decided, what="the end of all", seconds=60)
        engine.dispose()
    else:
        asyncio.run(_work_on_loop(url, connect_args, decided))
    with maker() as session:
        standing = set(session.scalars(select(Workflow.status)))
    direct.dispose()
    return standing


async def _work_on_loop(url: Any, connect_args: dict[str, Any], decided: Any) -> None:
    engine = create_async_engine(url, connect_args=connect_args)
    async with Worker(asynchronous, async_sessionmaker=async_sessionmaker(engine), poll_interval=POLL):
        await asyncio.to_thread(races.wait_until, decided, what="the end of all", seconds=60)
    await engine.dispose()
