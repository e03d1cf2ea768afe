"""`delete`: what goes, what stays, and who refuses."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Column, Engine, ForeignKey, Integer, MetaData, Table, func, inspect, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

import sqla_durable.asyncio as aio
from sqla_durable import Event, Signal, Step, StreamItem, Workflow, manage
from sqla_durable.errors import WorkflowReferencedError
from sqla_durable.models import Base
from tests.manage import histories
from tests.manage.histories import step
from tests.store import races
from tests.support.domain import Order


def finished(session: Session, **columns: Any) -> Any:
    fence = histories.claimed(session, **columns)
    histories.succeed(session, fence)
    return fence.workflow_id


def left(session: Session, model: Any = Workflow) -> int:
    return session.execute(select(func.count()).select_from(model)).scalar_one()


@pytest.mark.parametrize("durable_schema", ["durable", "tenant_7"], indirect=True)
def test_a_finished_workflow_goes_with_everything_that_is_its(session: Session) -> None:
    # behaviour: M1
    fence = histories.claimed(session)
    histories.record(session, [step(fence, "a", 1)])
    histories.shown(session, fence.workflow_id, "a")
    histories.succeed(session, fence)
    session.add(order := Order(customer="Ada", total_cents=1, workflow_id=fence.workflow_id))
    session.flush()
    assert manage.delete(session, fence.workflow_id) == [fence.workflow_id]
    session.commit()
    assert [left(session, each) for each in (Workflow, Step, Event, StreamItem, Signal)] == [0] * 5
    assert order.workflow_id is None


def test_what_is_not_finished_is_left_alone(session: Session) -> None:
    # behaviour: M1
    running = histories.claimed(session).workflow_id
    done = finished(session)
    (pending,) = races.enqueue(session)
    assert manage.delete(session, select(Workflow)) == [done]
    assert manage.delete(session, [running, pending]) == []
    manage.cancel(session, [running, pending])
    assert manage.delete(session, [running, pending]) == sorted([running, pending])
    assert left(session) == 0


def test_a_record_that_the_session_knows_is_gone_from_it_and_back_after_a_rollback(session: Session) -> None:
    record = session.get_one(Workflow, finished(session))
    manage.delete(session, record)
    assert inspect(record).deleted
    assert session.get(Workflow, record.id) is None
    session.rollback()
    assert session.get(Workflow, record.id) is record


def test_a_tree_goes_as_a_whole_and_what_is_detached_stays(session: Session) -> None:
    # behaviour: M1
    parent = finished(session)
    child = histories.child(session, parent)
    grandchild = histories.child(session, child)
    alone = histories.child(session, parent, detached=True)
    manage.cancel(session, [child, grandchild])
    session.commit()
    assert manage.delete(session, parent) == sorted([parent, child, grandchild])
    session.commit()
    assert session.scalars(select(Workflow.id)).all() == [alone]
    assert histories.standing(session, alone).parent_id is None


def test_a_tree_with_somebody_who_goes_on_stays(session: Session) -> None:
    parent = finished(session)
    child = histories.child(session, parent)
    grandchild = histories.child(session, child)
    manage.cancel(session, child)
    histories.child(session, grandchild, detached=True)
    beside = finished(session)
    going_on = histories.child(session, grandchild)
    assert manage.delete(session, [parent, beside]) == [beside]
    assert going_on


def test_a_child_stays_until_its_parent_is_finished(session: Session) -> None:
    parent = histories.claimed(session)
    child = histories.child(session, parent.workflow_id)
    manage.cancel(session, child)
    assert manage.delete(session, child) == manage.delete(session, select(Workflow)) == []
    histories.succeed(session, parent)
    assert manage.delete(session, child) == [child]


def referring(engine: Engine, **options: Any) -> Table:
    """Make a table of the application's whose foreign key keeps workflows."""
    metadata = MetaData()
    workflow = Base.metadata.tables["durable.workflow"]
    key: Column[int] = Column("id", Integer, primary_key=True)
    reference: Column[UUID] = Column("workflow_id", ForeignKey(workflow.c.id, **options))
    table = Table("invoice", metadata, key, reference)
    table.create(engine)
    return table


@pytest.mark.parametrize("options", [{}, {"ondelete": "RESTRICT"}])
def test_a_foreign_key_of_the_application_refuses_and_the_transaction_goes_on(
    engine: Engine, session: Session, options: Any
) -> None:
    # behaviour: M1
    invoice = referring(engine, **options)
    first, second = finished(session), finished(session)
    session.execute(invoice.insert().values(workflow_id=second))
    record = session.get_one(Workflow, first)
    session.add(Order(customer="Ada", total_cents=1))
    with pytest.raises(WorkflowReferencedError, match="invoice"):
        manage.delete(session, [first, second])
    assert not inspect(record).deleted
    assert manage.delete(session, first) == [first]
    session.commit()
    assert left(session, Order) == 1
    assert session.scalars(select(Workflow.id)).all() == [second]


@pytest.mark.parametrize("async_driver", ["psycopg", "asyncpg"], indirect=True)
async def test_an_async_session_awaits_the_same(
    engine: Engine, async_session_factory: async_sessionmaker[AsyncSession]
) -> None:
    invoice = referring(engine)
    with Session(engine) as session:
        first, second = finished(session), finished(session)
        session.execute(invoice.insert().values(workflow_id=second))
        session.commit()
    async with async_session_factory() as caller:
        with pytest.raises(WorkflowReferencedError, match="invoice"):
            await aio.manage.delete(caller, second)
        assert await aio.manage.delete(caller, [first]) == [first]
        await caller.commit()


def test_it_waits_for_a_transaction_that_refers_to_the_workflow(engine: Engine, session: Session) -> None:
    workflow_id = finished(session)
    with races.transaction(engine) as referrer, races.transaction(engine) as operator:
        referrer.session.add(Order(customer="Ada", total_cents=1, workflow_id=workflow_id))
        referrer.session.flush()
        deleting = operator.begin_blocked(lambda session: manage.delete(session, workflow_id))
        referrer.session.commit()
        assert deleting.result() == [workflow_id]
        operator.session.commit()
    assert session.scalars(select(Order.workflow_id)).all() == [None]
