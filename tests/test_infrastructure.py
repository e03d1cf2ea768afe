import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable.models import Workflow
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
