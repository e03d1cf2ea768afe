"""The user's own code holds every connection of the worker's pool: the lease must not depend on what it leaves over."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Durable, Worker, Workflow, WorkflowStatus
from tests.crash.test_outage import elapse
from tests.store import races

LEASE = timedelta(seconds=1)
POLL = timedelta(seconds=0.05)
HOG_FOR = 4 * LEASE.total_seconds()
POOL: dict[str, Any] = {"pool_size": 5, "max_overflow": 0, "pool_timeout": 30}


def test_a_lease_is_kept_while_plain_steps_hold_every_connection_of_the_pool(database_url: str, engine: Engine) -> None:
    """Five steps hold the five connections for four leases; another worker waits for the lease to run out."""
    tight = create_engine(database_url, **POOL)
    durable = Durable()

    @durable.step
    def hog() -> None:
        with tight.connect() as connection:
            connection.execute(text("SELECT 1"))
            elapse(HOG_FOR)

    @durable.workflow
    def hogging() -> None:
        hog()

    ids = _start(engine, "hogging")
    options: dict[str, Any] = {"lease": LEASE, "poll_interval": POLL}
    with Worker(durable, sessionmaker=sessionmaker(tight), **options):
        races.wait_until(lambda: tight.pool.checkedout() == 5, what="an exhausted pool")  # type: ignore[attr-defined]
        with Worker(durable, sessionmaker=sessionmaker(engine), **options):
            races.wait_until(lambda: _outcomes(engine).keys() == {WorkflowStatus.SUCCEEDED}, seconds=30)
    tight.dispose()
    assert _outcomes(engine) == {WorkflowStatus.SUCCEEDED: [1] * len(ids)}


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
async def test_a_lease_is_kept_while_async_plain_steps_hold_every_connection_of_the_pool(
    async_engine: AsyncEngine, engine: Engine, driver: str
) -> None:
    url = async_engine.url.set(drivername=f"postgresql+{driver}")
    tight = create_async_engine(url, **POOL)
    durable = Durable()

    @durable.step
    async def hog() -> None:
        async with tight.connect() as connection:
            await connection.execute(text("SELECT 1"))
            await asyncio.sleep(HOG_FOR)

    @durable.workflow
    async def hogging() -> None:
        await hog()

    ids = _start(engine, "hogging")
    options: dict[str, Any] = {"lease": LEASE, "poll_interval": POLL}
    async with Worker(durable, async_sessionmaker=async_sessionmaker(tight), **options):
        await _until(lambda: tight.pool.checkedout() == 5)  # type: ignore[attr-defined]
        async with Worker(durable, async_sessionmaker=async_sessionmaker(async_engine), **options):
            await _until(lambda: _outcomes(engine).keys() == {WorkflowStatus.SUCCEEDED})
    await tight.dispose()
    assert _outcomes(engine) == {WorkflowStatus.SUCCEEDED: [1] * len(ids)}


def _start(engine: Engine, name: str) -> list[Any]:
    with Session(engine) as session:
        return races.enqueue(session, 5, name=name)


def _outcomes(engine: Engine) -> dict[WorkflowStatus, list[int]]:
    """Return the attempts of the workflows of each status."""
    outcomes: dict[WorkflowStatus, list[int]] = {}
    with Session(engine) as session:
        for status, attempt in session.execute(select(Workflow.status, Workflow.attempt)):
            outcomes.setdefault(status, []).append(attempt)
    return outcomes


async def _until(condition: Any) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)
