"""Workflows, starts, handles, executors and workers as type checkers see them. See `steps` for the wrong calls."""
# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import Coroutine
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, assert_type
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

import sqla_durable.asyncio as aio
from sqla_durable import (
    BoundWorkflow,
    Durable,
    Executor,
    Handle,
    Step,
    Worker,
    Workflow,
    WorkflowStatus,
    start_many,
)

durable = Durable()


@durable.workflow
def checkout(order_id: int, *, discount: Decimal = Decimal(0)) -> str:
    raise NotImplementedError


@durable.workflow(name="acheckout", queue="orders")
async def acheckout(order_id: int, *, discount: Decimal = Decimal(0)) -> str:
    raise NotImplementedError


def starts(session: Session, workflow_id: UUID) -> None:
    assert_type(checkout.start(session, 1), Workflow)
    assert_type(checkout.start(session, order_id=1, discount=Decimal(1)), Workflow)
    assert_type(acheckout.start(session, 1), Workflow)
    keyed = checkout.options(key="order-1", priority=-1, queue="fast", delay=timedelta(days=1))
    assert_type(keyed.start(session, 1), Workflow)
    assert_type(acheckout.options(at=datetime.now(UTC)).start(session, 1), Workflow)
    limited = checkout.options(timeout=timedelta(days=1), deadline=datetime.now(UTC))
    assert_type(limited.options(deadline=timedelta(days=1)).start(session, 1), Workflow)
    debounced = acheckout.options(key="k", debounce=timedelta(seconds=5), longest_wait=timedelta(minutes=1))
    assert_type(debounced.start(session, 1), Workflow)
    assert_type(checkout.options(key="k", unique="unfinished", on_conflict="refuse").start(session, 1), Workflow)
    assert_type(checkout.options(key="k", unique=timedelta(hours=1)).start(session, 1), Workflow)
    assert_type(checkout.bind(1), BoundWorkflow)
    assert_type(start_many(session, [checkout.bind(1), acheckout.bind(2)]), list[UUID])


async def async_starts(session: AsyncSession) -> None:
    assert_type(await checkout.start(session, 1), Workflow)
    assert_type(await acheckout.options(key="k").start(session, order_id=1), Workflow)
    assert_type(await aio.start_many(session, (acheckout.bind(number) for number in range(3))), list[UUID])


async def plain_calls() -> None:
    assert_type(checkout(1), str)
    coroutine: Coroutine[Any, Any, str] = acheckout(1)
    assert_type(await coroutine, str)


async def handles(
    session: Session,
    maker: sessionmaker[Session],
    async_session: AsyncSession,
    async_maker: async_sessionmaker[AsyncSession],
    record: Workflow,
    workflow_id: UUID,
) -> None:
    assert_type(checkout.handle(session, record), Handle[str])
    assert_type(acheckout.handle(maker, workflow_id), Handle[str])
    assert_type(checkout.handle(async_session, record), aio.AsyncHandle[str])
    assert_type(acheckout.handle(async_maker, workflow_id), aio.AsyncHandle[str])
    assert_type(checkout.handle(session, record).result(timeout=timedelta(seconds=1)), str)
    assert_type(await acheckout.handle(async_maker, record).result(), str)


async def executors(session: Session, async_session: AsyncSession, record: Workflow) -> None:
    assert_type(Executor(session).run(checkout, 1), str)
    assert_type(Executor(session, lease=timedelta(minutes=1)).run(checkout, order_id=1, discount=Decimal(1)), str)
    assert_type(Executor.joined(session).run(checkout.options(key="k"), 1), str)
    assert_type(Executor(session).execute(checkout, record), str)
    assert_type(await aio.AsyncExecutor(async_session).run(acheckout, 1), str)
    assert_type(await aio.AsyncExecutor.joined(async_session).execute(acheckout, record.id), str)


async def workers(maker: sessionmaker[Session], async_maker: async_sessionmaker[AsyncSession]) -> None:
    Worker(durable, sessionmaker=maker).run()
    async with Worker(durable, async_sessionmaker=async_maker, queues=["orders"]) as worker:
        assert_type(worker, Worker)
    with Worker(durable, sessionmaker=maker, lease=timedelta(seconds=30)) as worker:
        worker.stop()


def records(session: Session) -> None:
    record = session.scalars(select(Workflow)).one()
    assert_type(record.id, UUID)
    assert_type(record.status, WorkflowStatus)
    assert_type(record.steps, list[Step])
    assert_type(record.finished_at, datetime | None)
    assert_type(record.input, dict[str, Any])


async def wrong_calls(session: Session, async_session: AsyncSession, maker: sessionmaker[Session]) -> None:
    checkout.start(session)  # type: ignore[call-overload]
    checkout.start(session, "one")  # type: ignore[call-overload]
    checkout.start(1)  # type: ignore[call-overload]
    checkout.start(session, 1, key="order-1")  # type: ignore[call-overload]
    await acheckout.start(async_session, discount=1)  # type: ignore[call-overload]
    await checkout.start(session, 1)  # type: ignore[misc]
    checkout.options(delay=3)  # type: ignore[arg-type]
    checkout.options(prio=3)  # type: ignore[call-arg]
    checkout.options(unique="running")  # type: ignore[arg-type]
    checkout.options(on_conflict="ignore")  # type: ignore[arg-type]
    checkout.bind("one")  # type: ignore[arg-type]
    checkout("one")  # type: ignore[arg-type]
    checkout.handle(maker, "1234")  # type: ignore[call-overload]
    checkout.handle(maker, UUID(int=0)).result(timeout=3)  # type: ignore[arg-type]
    await checkout.handle(maker, UUID(int=0)).result()  # type: ignore[misc]
    Executor(async_session)  # type: ignore[arg-type]
    Executor(session).run(acheckout, 1)  # type: ignore[arg-type]
    Executor(session).run(checkout, "one")  # type: ignore[arg-type]
    Executor(session).run(checkout)  # type: ignore[call-arg]
    aio.AsyncExecutor(session)  # type: ignore[arg-type]
    await aio.AsyncExecutor(async_session).run(checkout, 1)  # type: ignore[arg-type]
    number: int = Executor(session).run(checkout, 1)  # type: ignore[assignment]
    del number
    start_many(session, [checkout])  # type: ignore[list-item]
    Worker(sessionmaker=maker)  # type: ignore[call-arg]
    Worker(durable, sessionmaker=session)  # type: ignore[arg-type]
    Worker(durable, sessionmaker=maker, lease=30)  # type: ignore[arg-type]
    durable.workflow(1)  # type: ignore[call-overload]
    durable.workflow(que="orders")  # type: ignore[call-overload]
