from __future__ import annotations

from dataclasses import dataclass

import pytest
from sqlalchemy import Engine, NullPool, create_engine, select, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable.models import Workflow
from tests.store import races
from tests.support.databases import Databases
from tests.support.domain import Order


@pytest.mark.parametrize("durable_schema", ["durable", "tenant_7"], indirect=True)
def test_order_and_workflow_meet_in_a_fresh_database(
    session_factory: sessionmaker[Session], durable_schema: str
) -> None:
    with session_factory.begin() as session:
        session.add(Order(customer="Ada", total_cents=500, workflow=Workflow(name="checkout")))
    with session_factory() as session:
        order = session.scalars(select(Order)).one()
        assert order.workflow is not None
        assert order.workflow.name == "checkout"
        assert session.scalar(text(f"SELECT count(*) FROM {durable_schema}.workflow")) == 1


@pytest.mark.parametrize("durable_schema", ["durable", "tenant_7"], indirect=True)
@pytest.mark.parametrize("async_driver", ["psycopg", "asyncpg"], indirect=True)
async def test_order_and_workflow_meet_over_an_async_driver(
    async_session_factory: async_sessionmaker[AsyncSession],
) -> None:
    async with async_session_factory.begin() as session:
        session.add(Order(customer="Ada", total_cents=500, workflow=Workflow(name="checkout")))
    async with async_session_factory() as session:
        assert (await session.scalars(select(Workflow.name))).one() == "checkout"


@pytest.mark.parametrize("time", range(3))
def test_every_test_has_a_database_of_its_own(engine: Engine, time: int) -> None:
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE mine (id int)"))


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("INSERT INTO durable.workflow (name, input) VALUES ('checkout', '{}')", True),
        ("CREATE TEMPORARY TABLE mine (id int)", True),
        ("CREATE TABLE mine (id int)", False),
        ("ALTER TABLE durable.workflow ALTER COLUMN name SET DEFAULT 'checkout'", False),
        ("COMMENT ON TABLE durable.workflow IS 'mine'", False),
        ("DO $$BEGIN EXECUTE format('ALTER DATABASE %I SET jit = off', current_database()); END$$", False),
        ("DO $$BEGIN EXECUTE format('ALTER DATABASE %I CONNECTION LIMIT 7', current_database()); END$$", False),
    ],
)
def test_database_is_used_again_if_nothing_but_rows_has_changed(
    server_url: str, worker_id: str, written: str, kept: bool
) -> None:
    databases = Databases(server_url, f"{worker_id}_again")
    first, second, third = (used(databases, each) for each in ("SELECT 1", written, "SELECT 1"))
    databases.close()
    assert (first.rows, second.rows, third.rows) == (0, 0, 0)
    assert second.oid == first.oid
    assert (third.oid == second.oid) is kept


def test_database_is_renamed_unless_nobody_has_connected(server_url: str, worker_id: str) -> None:
    databases = Databases(server_url, f"{worker_id}_named")

    def name(*, connects: bool = False) -> str:
        with databases.migrated("durable") as url:
            if connects:
                create_engine(url, poolclass=NullPool).connect().close()
        return url

    races.wait_until(lambda: name() == name(), what="the count of the session that made it blank")
    names = [name(), name(connects=True), name()]
    databases.close()
    assert names[0] == names[1] != names[2]


@dataclass(frozen=True)
class Use:
    oid: int
    rows: int


def used(databases: Databases, statement: str) -> Use:
    """Execute a statement in the next database; return which that is, and how many workflows were there before."""
    with databases.migrated("durable") as url:
        engine = create_engine(url, poolclass=NullPool)
        with engine.begin() as connection:
            oid = connection.scalar(text("SELECT oid::int8 FROM pg_database WHERE datname = current_database()"))
            rows = connection.scalar(text("SELECT count(*) FROM durable.workflow"))
            connection.execute(text(statement))
    assert oid is not None
    assert rows is not None
    return Use(oid, rows)
