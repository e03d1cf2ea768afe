"""What a worker lost, claimed again or left when it stopped: every workflow has one owner, or is released."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from datetime import timedelta
from uuid import UUID

import pytest
from sqlalchemy import Engine, event, select, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

import sqla_durable.asyncio as aio
from sqla_durable import Durable, Executor, Worker, Workflow, WorkflowStatus, models, run_step
from sqla_durable.store import claims, workers
from tests.crash.outcomes import POLL, finished
from tests.store import races

# Ownership inside one worker


def test_a_worker_that_claims_again_what_it_lost_keeps_both_attempts_apart(
    session_factory: sessionmaker[Session], engine: Engine
) -> None:
    """Another worker reclaimed the workflow and released it, while the old attempt here is still in a step."""
    durable = Durable()
    gates = [threading.Event(), threading.Event()]
    entered = [threading.Event(), threading.Event()]
    left = threading.Event()
    attempts: Iterator[int] = iter(range(2))

    def hold() -> None:
        number = next(attempts)
        entered[number].set()
        gates[number].wait(races.PATIENCE)

    @durable.workflow
    def twice() -> None:
        try:
            run_step("hold", hold)
            run_step("after", int)
        finally:
            left.set()

    @durable.workflow
    def small() -> None: ...

    with session_factory() as session:
        (workflow_id,) = races.enqueue(session, name="twice")
    worker = Worker(
        durable, sessionmaker=session_factory, poll_interval=POLL, concurrency=3, grace=timedelta(seconds=0.1)
    )
    with worker:
        assert entered[0].wait(races.PATIENCE)
        _reclaim(engine)
        assert entered[1].wait(races.PATIENCE)
        gates[0].set()
        assert left.wait(races.PATIENCE)
        with session_factory() as session:  # once these are done, the old attempt is gone
            others = [races.enqueue(session, name="small")[0] for _ in range(5)]
        for each in others:
            finished(engine, each)
        worker.stop()
        races.wait_until(lambda: races.status_of(engine, workflow_id) is WorkflowStatus.PENDING, what="the release")
        gates[1].set()
    with session_factory() as session:
        record = session.get_one(Workflow, workflow_id)
        assert (record.status, record.attempt) == (WorkflowStatus.PENDING, 2)
        assert record.steps == []


def _reclaim(engine: Engine) -> None:
    """Reclaim everything in one transaction, as if no worker were alive for a moment."""
    with Session(engine) as session:
        session.execute(text("CREATE TEMPORARY TABLE live ON COMMIT DROP AS SELECT * FROM durable.worker"))
        session.execute(text("DELETE FROM durable.worker"))
        assert workers.reclaim(session, max_attempts=10, limit=10)
        session.execute(text("INSERT INTO durable.worker SELECT * FROM live"))
        session.commit()


def test_a_worker_whose_lease_ran_out_goes_on_with_what_was_not_reclaimed(
    session_factory: sessionmaker[Session], engine: Engine
) -> None:
    """Otherwise it would reclaim its own workflows with every poll, until their attempts are used up."""
    durable = Durable()
    entered, gate = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        gate.wait(races.PATIENCE)

    @durable.workflow
    def long() -> None:
        run_step("hold", hold)

    with session_factory() as session:
        (workflow_id,) = races.enqueue(session, name="long")
    with Worker(durable, sessionmaker=session_factory, poll_interval=POLL) as worker:
        assert entered.wait(races.PATIENCE)
        races.expire_leases(engine)
        races.wait_until(lambda: _is_alive(engine, worker.id), what="the lease's renewal")
        gate.set()
        record = finished(engine, workflow_id)
    assert (record.status, record.attempt) == (WorkflowStatus.SUCCEEDED, 1)


def _is_alive(engine: Engine, worker_id: UUID) -> bool:
    with Session(engine) as session:
        return races.is_alive(session, worker_id)


def test_a_row_that_nobody_executes_under_a_live_lease_is_released(
    session_factory: sessionmaker[Session], engine: Engine
) -> None:
    """A claim's COMMIT may take effect after the worker looked for what it had claimed."""
    durable = Durable()

    @durable.workflow
    def small() -> int:
        return 1

    with Worker(durable, sessionmaker=session_factory, poll_interval=POLL, lease=timedelta(seconds=1)) as worker:
        with session_factory() as session:
            workflow = Workflow(name="small", queue="elsewhere")
            session.add(workflow)
            session.flush()
            claims.claim_one(session, workflow.id, worker_id=worker.id, token=worker.id)
            session.execute(text("UPDATE durable.workflow SET queue = 'default'"))
            workflow_id = workflow.id
            session.commit()
        record = finished(engine, workflow_id)
    assert (record.status, record.attempt) == (WorkflowStatus.SUCCEEDED, 1)


# Stopping


@pytest.mark.parametrize("form", ["task_group", "gather", "plain"])
async def test_a_stop_in_parallel_steps_releases_the_workflow_as_it_was(
    async_session_factory: async_sessionmaker[AsyncSession], engine: Engine, form: str
) -> None:
    """A task group wraps what unwinds the code in an exception group."""
    durable = Durable()
    entered, gate = threading.Event(), asyncio.Event()

    @durable.step
    async def waits() -> None:
        entered.set()
        await gate.wait()

    @durable.step
    async def after() -> None: ...

    @durable.workflow(name="task_group")
    async def in_group() -> None:
        async with asyncio.TaskGroup() as group:
            await group.create_task(waits())
            group.create_task(after())
            group.create_task(after())

    @durable.workflow(name="gather")
    async def gathered() -> None:
        await asyncio.gather(waits(), waits())
        await asyncio.gather(after(), after())

    @durable.workflow(name="plain")
    async def plain() -> None:
        await waits()
        await after()

    with Session(engine) as session:
        (workflow_id,) = races.enqueue(session, name=form)
    worker = Worker(durable, async_sessionmaker=async_session_factory, poll_interval=POLL)
    async with worker:
        assert await asyncio.to_thread(entered.wait, races.PATIENCE)
        worker.stop()
        await asyncio.sleep(0)
        gate.set()
    with Session(engine) as session:
        record = session.get_one(Workflow, workflow_id)
        assert (record.status, record.attempt) == (WorkflowStatus.PENDING, 1)
        assert len(record.steps) >= 1


def test_a_stop_releases_async_workflows_beside_sync_ones_that_are_left_behind(
    session_factory: sessionmaker[Session], engine: Engine
) -> None:
    durable = Durable()
    gate = threading.Event()
    entered = threading.Barrier(5)

    @durable.workflow
    def stuck() -> None:
        def wait() -> None:
            entered.wait(races.PATIENCE)
            gate.wait(races.PATIENCE)

        run_step("wait", wait)

    @durable.workflow
    async def patient() -> None:
        async def forever() -> None:
            await asyncio.to_thread(entered.wait, races.PATIENCE)
            await asyncio.Event().wait()

        await aio.run_step("forever", forever)

    with session_factory() as session:
        ids = [races.enqueue(session, name=name)[0] for name in ("stuck", "patient", "stuck", "patient")]
    with Worker(durable, sessionmaker=session_factory, poll_interval=POLL, grace=timedelta(seconds=0.1)) as worker:
        entered.wait(races.PATIENCE)
        worker.stop()
        races.wait_until(
            lambda: all(races.status_of(engine, each) is WorkflowStatus.PENDING for each in ids), what="the release"
        )
        gate.set()
    with session_factory() as session:
        records = session.scalars(select(Workflow)).all()
        assert {(each.status, each.attempt) for each in records} == {(WorkflowStatus.PENDING, 1)}
        assert session.scalars(select(models.Worker)).all() == []


def test_a_claim_on_its_way_when_the_worker_stops_is_released(
    session_factory: sessionmaker[Session], engine: Engine
) -> None:
    durable = Durable()

    @durable.workflow
    def small() -> int:
        return 1

    with session_factory() as session:
        (workflow_id,) = races.enqueue(session, name="small")
    worker = Worker(durable, sessionmaker=session_factory, poll_interval=POLL)

    @event.listens_for(engine, "before_cursor_execute")
    def stop_during_claim(_c: object, _cursor: object, statement: str, *_: object) -> None:
        if "claimable" in statement:
            worker.stop()
            threading.Event().wait(0.3)  # let the loop act on it while this claim is on its way

    with worker:
        races.wait_until(lambda: not worker._thread.is_alive(), what="the stop")  # type: ignore[union-attr]
    with session_factory() as session:
        record = session.get_one(Workflow, workflow_id)
        assert (record.status, record.attempt) == (WorkflowStatus.PENDING, 1)


def test_an_executor_leaves_no_lease_behind(session_factory: sessionmaker[Session]) -> None:
    durable = Durable()

    @durable.workflow
    def small() -> int:
        return 1

    for _ in range(3):
        with session_factory() as session:
            assert Executor(session).run(small.options(key="k")) == 1
    with session_factory() as session:
        assert session.scalars(select(models.Worker)).all() == []
