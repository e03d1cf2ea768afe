"""Steps that were called beside another, which ended the workflow's attempt before they were done."""

from __future__ import annotations

import asyncio
import threading
from datetime import timedelta

import pytest
import tenacity
from sqlalchemy import Engine, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Durable, Executor, Step, Worker, Workflow, WorkflowStatus, current, errors, manage
from sqla_durable.asyncio import AsyncExecutor, to_thread
from tests.acceptance.shells import POLL
from tests.store import races
from tests.support import refusals
from tests.support.domain import Entry


@pytest.mark.parametrize("ending", ["records", "waits"])
async def test_an_orphan_of_an_executor_leaves_its_callers_session_alone(
    async_session_factory: async_sessionmaker[AsyncSession], ending: str
) -> None:
    """The caller goes on with its session once `run` has raised, and what it writes is its own to commit."""
    durable = Durable()
    go_on = asyncio.Event()
    ended = asyncio.Event()

    @durable.step
    async def fails() -> None:
        raise LookupError("no such order")

    @durable.step(stop=tenacity.stop_after_attempt(2), wait=tenacity.wait_fixed(0.05))
    async def slow() -> int:
        try:
            await go_on.wait()
            if ending == "waits":
                raise ConnectionError
            return 1
        finally:
            ended.set()

    @durable.workflow
    async def both() -> None:
        await asyncio.gather(fails(), slow())

    async with async_session_factory() as session:
        with pytest.raises(LookupError):
            await AsyncExecutor(session).run(both)
        session.add(Entry(account="the caller's", cents=1))
        await session.flush()
        go_on.set()
        await ended.wait()
        for _ in range(20):
            await asyncio.sleep(0.01)  # for the orphan to do what it must not
        assert session.in_transaction()
        await session.rollback()
    async with async_session_factory() as session:
        assert (await session.scalars(select(Entry))).all() == []
        assert [each.key for each in await session.scalars(select(Step))] == ["fails"]


def test_a_stop_waits_for_a_step_that_is_executed_beside_the_one_that_ended(
    engine: Engine, session_factory: sessionmaker[Session]
) -> None:
    durable = Durable()
    executed, go_on = threading.Event(), threading.Event()
    calls: list[str] = []

    @durable.step
    def short() -> int:
        assert executed.wait(30)
        return 1

    @durable.step
    def beside() -> int:
        calls.append("beside")
        executed.set()
        assert go_on.wait(30)
        return 2

    @durable.step
    def after() -> int:
        return 3

    @durable.workflow
    async def both() -> list[int]:
        running = asyncio.ensure_future(to_thread(beside))
        return [await to_thread(short), await to_thread(after), await running]

    with session_factory.begin() as session:
        workflow_id = both.start(session).id
    worker = Worker(durable, sessionmaker=session_factory, poll_interval=POLL, grace=timedelta(seconds=20))
    with worker:
        assert executed.wait(30)
        worker.stop()
        assert races.status_of(engine, workflow_id) is WorkflowStatus.RUNNING
        go_on.set()
    assert worker.left_behind == 0
    assert "beside" in races.history_of(engine, workflow_id)
    with Worker(durable, sessionmaker=session_factory, poll_interval=POLL):
        assert both.handle(session_factory, workflow_id).result(timeout=timedelta(seconds=60)) == [1, 3, 2]
    assert calls == ["beside"]


def test_a_step_that_cancels_its_own_workflow_is_counted_and_stopped(
    engine: Engine, session_factory: sessionmaker[Session]
) -> None:
    """Its cancel is rolled back with it, because its checkpoint is refused; it does not go on for ever."""
    durable = Durable()
    calls: list[int] = []

    @durable.step
    def give_up(session: Session) -> None:
        calls.append(1)
        execution = current()
        assert execution is not None
        manage.cancel(session, execution.workflow_id)

    @durable.workflow
    def quits() -> None:
        give_up()

    with session_factory.begin() as session:
        workflow_id = quits.start(session).id
    with Worker(durable, sessionmaker=session_factory, poll_interval=POLL, max_attempts=2):
        races.wait_until(lambda: races.status_of(engine, workflow_id).finished, seconds=30)
    with session_factory() as session:
        record = session.get_one(Workflow, workflow_id)
        assert (record.status, record.crashes) == (WorkflowStatus.FAILED, 2)
    assert len(calls) == 2


def test_an_executor_does_not_try_a_step_again_after_its_workflow_was_cancelled(
    engine: Engine, session_factory: sessionmaker[Session]
) -> None:
    durable = Durable()
    calls: list[int] = []

    @durable.step(wait=tenacity.wait_fixed(0.3))
    def call() -> None:
        calls.append(1)
        with session_factory.begin() as other:
            manage.cancel(other, select(Workflow))
        raise ConnectionError

    @durable.workflow
    def pay() -> None:
        call()

    with session_factory() as session, pytest.raises(errors.AttemptLostError):
        Executor(session).run(pay)
    assert len(calls) == 1


@pytest.mark.parametrize("wait", [0.0, 3600.0])
def test_a_try_that_the_database_refuses_to_record_fails_its_workflow(
    engine: Engine, session_factory: sessionmaker[Session], wait: float
) -> None:
    """It is neither suspended nor tried for ever."""
    durable = Durable()

    @durable.step(wait=tenacity.wait_fixed(wait))
    def call() -> None:
        raise ConnectionError

    refusals.refuse(engine, "call")

    @durable.workflow
    def pay() -> None:
        call()

    with session_factory.begin() as session:
        workflow_id = pay.start(session).id
    refused = pytest.raises(errors.EncodingError, match="the database refuses what the workflow records")
    with Worker(durable, sessionmaker=session_factory, poll_interval=POLL), refused:
        pay.handle(session_factory, workflow_id).result(timeout=timedelta(seconds=60))
