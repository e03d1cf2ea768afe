"""Steps that are executed for longer than a beat: a worker says with its heartbeat which, and since when."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator
from datetime import timedelta

import pytest
from sqlalchemy import Engine, NullPool, func, select, text, update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

import sqla_durable.asyncio as aio
from sqla_durable import Durable, Executor, RunningStep, Worker, Workflow, errors, models, running_steps
from tests.acceptance.shells import PATIENCE, POLL
from tests.store import races

LEASE = timedelta(seconds=0.6)
durable = Durable()
over = threading.Event()


@durable.step
def sync_plain() -> None:
    over.wait(30)


@durable.step
def sync_transactional(session: Session) -> None:
    session.execute(text("SELECT 1"))
    over.wait(30)


@durable.step
async def async_plain() -> None:
    await asyncio.to_thread(over.wait, 30)


@durable.step
async def async_transactional(session: AsyncSession) -> None:
    await session.execute(text("SELECT 1"))
    await asyncio.to_thread(over.wait, 30)


@durable.step
def short() -> None: ...


@durable.workflow
def sync_workflow(transactional: bool) -> None:
    short()
    (sync_transactional if transactional else sync_plain)()


@durable.workflow
async def async_workflow(transactional: bool) -> None:
    await aio.to_thread(short)
    await (async_transactional if transactional else async_plain)()


@durable.workflow
async def sync_step_of_async_workflow(transactional: bool) -> None:
    await aio.to_thread(sync_transactional if transactional else sync_plain)


@pytest.fixture
def worker(engine: Engine) -> Generator[None]:
    over.clear()
    made = async_sessionmaker(create_async_engine(engine.url, poolclass=NullPool))
    sync = sessionmaker(engine)
    with Worker(durable, sessionmaker=sync, async_sessionmaker=made, name="ada", lease=LEASE, poll_interval=POLL):
        yield
        over.set()


@pytest.mark.parametrize("transactional", [False, True])
@pytest.mark.parametrize("workflow", [sync_workflow, async_workflow, sync_step_of_async_workflow])
def test_long_step_is_seen_with_the_heartbeat_until_it_ends(
    engine: Engine, worker: None, workflow: object, transactional: bool
) -> None:
    assert isinstance(workflow, (type(sync_workflow), type(async_workflow)))
    with Session(engine) as session:
        workflow_id = workflow.start(session, transactional).id
        session.commit()
        before = session.execute(select(func.statement_timestamp())).scalar_one()

        def read() -> list[RunningStep]:
            session.rollback()
            return running_steps(session, workflow_id)

        (step,) = races.wait_until(read, what="the heartbeat")
        prefix = "async" if workflow is async_workflow else "sync"
        assert step.step == f"{prefix}_{'transactional' if transactional else 'plain'}"
        assert (step.try_number, step.worker) == (1, "ada")
        assert before - timedelta(seconds=2) < step.since < step.seen_at - LEASE / 3
        assert step.seen_at < step.lease_expires_at
        over.set()
        races.wait_until(lambda: not read(), what="the end of the step")
        races.wait_until(lambda: doing(engine) is None, what="a heartbeat without it")


def test_lease_is_extended_although_the_database_refuses_the_report_on_the_steps(engine: Engine, worker: None) -> None:
    with Session(engine) as session:  # as one that is not in UTF-8 refuses the key of a step
        session.execute(text("ALTER TABLE durable.worker ADD CONSTRAINT silent CHECK (doing IS NULL)"))
        workflow_id = sync_workflow.start(session, False).id
        session.commit()
        long = models.Worker.heartbeat_at > Workflow.started_at + LEASE
        beaten = select(Workflow.id).join(models.Worker, models.Worker.id == Workflow.worker_id).where(long)

        def read() -> object:
            session.rollback()
            return session.scalars(beaten).all()

        races.wait_until(read, what="a heartbeat of a long step")
    over.set()
    assert sync_workflow.handle(sessionmaker(engine), workflow_id).result(timeout=PATIENCE) is None


def doing(engine: Engine) -> object:
    with Session(engine) as session:
        return session.scalars(select(models.Worker.doing)).one()


async def test_async_session_sees_them_when_the_worker_is_dead(engine: Engine) -> None:
    with Session(engine) as session:
        workflow_id = sync_workflow.start(session, False).id
        session.commit()
        worker = models.Worker(name="dead", queues=[], lease_expires_at=func.statement_timestamp() + PATIENCE, doing={})
        worker.doing = {str(workflow_id): {"charge#2": [3, 30.5], "pay": [1, 40]}}
        session.add(worker)
        session.flush()
        running = {"status": "running", "worker_id": worker.id, "token": worker.id, "started_at": func.now()}
        session.execute(update(Workflow).values(running))
        session.commit()
        heartbeat_at = worker.heartbeat_at
    async_engine = create_async_engine(engine.url, poolclass=NullPool)
    async with AsyncSession(async_engine) as async_session:
        pay, charge = await aio.running_steps(async_session, workflow_id)
    assert (pay.step, charge.step, charge.try_number) == ("pay", "charge#2", 3)
    assert charge.since == heartbeat_at - timedelta(seconds=30.5)


def test_nothing_is_executed_by_nobody(engine: Engine) -> None:
    with Session(engine) as session:
        assert running_steps(session, sync_workflow.start(session, False)) == []
        with pytest.raises(errors.ArgumentError, match="is no workflow"):
            running_steps(session, "text")  # type: ignore[arg-type]


def test_executor_says_nothing_of_its_steps(engine: Engine) -> None:
    found: list[list[RunningStep]] = []
    inner = Durable()

    @inner.step
    def read() -> None:
        with Session(engine) as session:
            found.append(running_steps(session, session.scalars(select(Workflow.id)).one()))

    @inner.workflow
    def reading() -> None:
        read()

    with Session(engine) as session:
        Executor(session).run(reading)
    assert found == [[]]
