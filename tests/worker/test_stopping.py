"""A graceful stop: what runs is finished or released, and another worker goes on from the last checkpoint."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, event, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Durable, Worker, Workflow, WorkflowStatus, models
from sqla_durable.asyncio import to_thread
from tests.acceptance.shells import PATIENCE, POLL
from tests.support.domain import Entry

Sessions = sessionmaker[Session]
AsyncSessions = async_sessionmaker[AsyncSession]
NO_GRACE = timedelta()


class Pipeline:
    """Sync workflows of three steps, of which the second can be blocks."""

    def __init__(self) -> None:
        self.durable = durable = Durable()
        self.in_second = threading.Event()
        self.go_on = threading.Event()
        self.calls: list[str] = []

        @durable.step
        def first(session: Session) -> int:
            self.calls.append("first")
            session.add(Entry(account="first", cents=1, note=None))
            return 1

        @durable.step
        def second() -> int:
            self.calls.append("second")
            self.in_second.set()
            assert self.go_on.wait(60)
            return 2

        @durable.step
        def third(session: Session) -> int:
            self.calls.append("third")
            session.add(Entry(account="third", cents=3, note=None))
            return 3

        @durable.workflow
        def pipeline() -> list[int]:
            return [first(), second(), third()]

        self.workflow = pipeline


def test_step_in_execution_is_finished_within_the_grace_and_the_rest_is_released(
    session_factory: Sessions,
) -> None:
    pipeline = Pipeline()
    workflow_id = _start(session_factory, pipeline)
    worker = Worker(pipeline.durable, sessionmaker=session_factory, poll_interval=POLL)
    with worker:
        assert pipeline.in_second.wait(60)
        worker.stop()
        pipeline.go_on.set()
    assert pipeline.calls == ["first", "second"]
    assert worker.left_behind == 0
    _assert_released(session_factory, workflow_id, ["first", "second"])
    with Worker(pipeline.durable, sessionmaker=session_factory, poll_interval=POLL):
        assert pipeline.workflow.handle(session_factory, workflow_id).result(timeout=PATIENCE) == [1, 2, 3]
    assert pipeline.calls == ["first", "second", "third"]
    with session_factory() as session:
        assert session.scalars(select(Entry.account).order_by(Entry.id)).all() == ["first", "third"]
        assert session.get_one(Workflow, workflow_id).attempt == 1
        assert session.scalars(select(models.Worker)).all() == []


def test_step_that_outlasts_the_grace_is_released_and_commits_nothing_more(session_factory: Sessions) -> None:
    pipeline = Pipeline()
    workflow_id = _start(session_factory, pipeline)
    worker = Worker(pipeline.durable, sessionmaker=session_factory, poll_interval=POLL, grace=NO_GRACE)
    with worker:
        assert pipeline.in_second.wait(60)
    assert worker.left_behind == 1
    _assert_released(session_factory, workflow_id, ["first"])
    other = Pipeline()
    other.go_on.set()
    with Worker(other.durable, sessionmaker=session_factory, poll_interval=POLL):
        assert other.workflow.handle(session_factory, workflow_id).result(timeout=PATIENCE) == [1, 2, 3]
    assert other.calls == ["second", "third"]
    pipeline.go_on.set()  # the old thread goes on now, and finds that it owns nothing
    for thread in threading.enumerate():
        if thread.name.startswith("sqla-durable"):
            thread.join(30)
    assert pipeline.calls == ["first", "second"]
    with session_factory() as session:
        assert session.scalars(select(Entry.account).order_by(Entry.id)).all() == ["first", "third"]


async def test_async_step_that_outlasts_the_grace_is_cancelled_and_released(
    async_session_factory: AsyncSessions, session_factory: Sessions
) -> None:
    durable = Durable()
    in_second = asyncio.Event()
    calls: list[str] = []
    blocks = True

    @durable.step
    async def first(session: AsyncSession) -> int:
        calls.append("first")
        session.add(Entry(account="first", cents=1, note=None))
        return 1

    @durable.step
    async def second(session: AsyncSession) -> int:
        calls.append("second")
        session.add(Entry(account="second", cents=2, note=None))
        await session.flush()
        if blocks:
            in_second.set()
            await asyncio.Event().wait()
        return 2

    @durable.workflow
    async def pipeline() -> list[int]:
        return [await first(), await second()]

    async with async_session_factory.begin() as session:
        workflow_id = (await pipeline.start(session)).id
    async with Worker(durable, async_sessionmaker=async_session_factory, poll_interval=POLL, grace=NO_GRACE):
        await asyncio.wait_for(in_second.wait(), 60)
    _assert_released(session_factory, workflow_id, ["first"])
    with session_factory() as reader:
        assert reader.scalars(select(Entry.account)).all() == ["first"]
    blocks = False
    async with Worker(durable, async_sessionmaker=async_session_factory, poll_interval=POLL):
        handle = pipeline.handle(async_session_factory, workflow_id)
        assert await handle.result(timeout=PATIENCE) == [1, 2]
    assert calls == ["first", "second", "second"]


async def test_finished_but_unrecorded_plain_step_is_recorded_before_the_workflow_is_released(
    async_session_factory: AsyncSessions, session_factory: Sessions
) -> None:
    durable = Durable()
    worker = Worker(durable, async_sessionmaker=async_session_factory, poll_interval=POLL)

    @durable.step
    async def first() -> int:
        worker.stop()
        return 1

    @durable.step
    async def second() -> int:
        raise AssertionError("the worker is stopping")

    @durable.workflow
    async def pipeline() -> int:
        return await first() + await second()

    worker = Worker(durable, async_sessionmaker=async_session_factory, poll_interval=POLL)
    async with async_session_factory.begin() as session:
        workflow_id = (await pipeline.start(session)).id
    await worker.serve()
    _assert_released(session_factory, workflow_id, ["first"])


async def test_claim_that_is_on_its_way_when_the_worker_stops_is_released(
    async_engine: AsyncEngine, async_session_factory: AsyncSessions, session_factory: Sessions
) -> None:
    durable = Durable()

    @durable.workflow
    async def never() -> None:
        raise AssertionError("the worker is stopping")

    worker = Worker(durable, async_sessionmaker=async_session_factory, poll_interval=POLL)
    async with async_session_factory.begin() as session:
        workflow_id = (await never.start(session)).id
    _at_first_claim(async_engine.sync_engine, worker.stop)
    await worker.serve()
    _assert_released(session_factory, workflow_id, [])


def test_claim_that_is_on_its_way_in_a_thread_is_released(engine: Engine, session_factory: Sessions) -> None:
    durable = Durable()

    @durable.workflow
    def never() -> None: ...

    worker = Worker(durable, sessionmaker=session_factory, poll_interval=POLL)
    with session_factory.begin() as session:
        workflow_id = never.start(session).id
    _at_first_claim(engine, worker.stop)
    worker.run()
    with session_factory() as session:
        record = session.get_one(Workflow, workflow_id)
        assert record.status in (WorkflowStatus.PENDING, WorkflowStatus.SUCCEEDED)
        assert record.attempt == 1
        assert session.scalars(select(models.Worker)).all() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_a_worker_in_good_order(session_factory: Sessions, number: signal.Signals) -> None:
    durable = Durable()

    @durable.workflow
    def raise_signal() -> str:
        signal.raise_signal(number)
        return "finished"

    with session_factory.begin() as session:
        workflow_id = raise_signal.start(session).id
    Worker(durable, sessionmaker=session_factory, poll_interval=POLL).run()
    with session_factory() as session:
        record = session.get_one(Workflow, workflow_id)
        assert record.status in (WorkflowStatus.SUCCEEDED, WorkflowStatus.PENDING)
        assert session.scalars(select(models.Worker)).all() == []
    assert signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, signal.default_int_handler)


def test_stop_before_the_start_ends_it_at_once(session_factory: Sessions) -> None:
    worker = Worker(Durable(), sessionmaker=session_factory)
    worker.stop()
    worker.run()
    with session_factory() as session:
        assert session.scalars(select(models.Worker)).all() == []


def test_running_worker_shows_itself_and_what_it_executes(session_factory: Sessions) -> None:
    pipeline = Pipeline()
    workflow_id = _start(session_factory, pipeline)
    worker = Worker(pipeline.durable, sessionmaker=session_factory, poll_interval=POLL, name="mine", queues=["default"])
    with worker:
        assert pipeline.in_second.wait(60)
        with session_factory() as session:
            shown = session.scalars(select(models.Worker)).one()
            assert (shown.id, shown.name, shown.queues) == (worker.id, "mine", ["default"])
            assert shown.lease_expires_at - shown.heartbeat_at == worker.lease
            assert [each.id for each in shown.workflows] == [workflow_id]
            record = session.get_one(Workflow, workflow_id)
            assert record.worker is shown
        pipeline.go_on.set()
        pipeline.workflow.handle(session_factory, workflow_id).result(timeout=PATIENCE)


def test_sync_and_async_workflows_run_together(session_factory: Sessions) -> None:
    durable = Durable()
    together = threading.Barrier(2)

    @durable.step
    def meet() -> str:
        together.wait(60)
        return "met"

    @durable.workflow
    def sync_one() -> str:
        return meet()

    @durable.workflow
    async def async_one() -> str:
        return await to_thread(meet)

    with session_factory.begin() as session:
        sync_id, async_id = sync_one.start(session).id, async_one.start(session).id
    with Worker(durable, sessionmaker=session_factory, poll_interval=POLL):
        assert sync_one.handle(session_factory, sync_id).result(timeout=PATIENCE) == "met"
        assert async_one.handle(session_factory, async_id).result(timeout=PATIENCE) == "met"


def _start(maker: Sessions, pipeline: Pipeline) -> UUID:
    with maker.begin() as session:
        return pipeline.workflow.start(session).id


def _assert_released(maker: Sessions, workflow_id: UUID, steps: list[str]) -> None:
    with maker() as session:
        record = session.get_one(Workflow, workflow_id)
        assert record.status is WorkflowStatus.PENDING
        assert record.attempt == 1
        assert record.token is None
        assert [each.key for each in record.steps] == steps
        assert session.scalars(select(models.Worker)).all() == []


def _at_first_claim(engine: Engine, react: Callable[[], None]) -> None:
    """Call `react` once, when a claim has been executed and is not yet committed."""
    claimed: list[bool] = []

    @event.listens_for(engine, "after_cursor_execute")
    def _executed(_connection: Any, cursor: Any, statement: str, *_rest: Any) -> None:
        if "claimable" in statement and cursor.rowcount and not claimed:
            claimed.append(True)
            react()
