"""The worker's writer and what the database does to it: no checkpoint is lost, contradicted or overtaken."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Engine, event, select, text
from sqlalchemy.orm import Session, sessionmaker

import sqla_durable.asyncio as aio
from sqla_durable import Durable, Worker, Workflow, WorkflowStatus, run_step
from sqla_durable.execution.worker.database import ThreadDatabase
from sqla_durable.store import workers
from tests.crash.outcomes import POLL, finished, run
from tests.store import races
from tests.support import refusals


@pytest.fixture
def outcome(session_factory: sessionmaker[Session], engine: Engine) -> Callable[..., Workflow]:
    return partial(run, session_factory, engine)


async def test_steps_at_the_same_time_wait_for_the_same_checkpoint(engine: Engine) -> None:
    """A checkpoint is durable before the next effect, for each of the next steps."""
    durable = Durable()
    called: list[str] = []
    locking = races.Transaction(engine)
    called_while_locked: list[str] = []

    @durable.step
    async def first() -> None:
        with Session(engine) as session:
            races.lock(locking.session, session.scalars(select(Workflow.id)).one())

    @durable.step
    async def second() -> None:
        called.append("second")

    @durable.step
    async def third() -> None:
        called.append("third")

    @durable.workflow
    async def fan_out() -> None:
        await first()
        both = [asyncio.create_task(second()), asyncio.create_task(third())]
        for _ in range(50):
            await asyncio.sleep(0)
        called_while_locked.extend(called)
        locking.session.rollback()
        await asyncio.gather(*both)

    with Session(engine) as session:
        (workflow_id,) = races.enqueue(session, name="fan_out")
    async with Worker(durable, sessionmaker=sessionmaker(engine), poll_interval=POLL):
        record = await asyncio.to_thread(finished, engine, workflow_id)
    assert record.status is WorkflowStatus.SUCCEEDED
    assert called_while_locked == []
    assert sorted(called) == ["second", "third"]


@pytest.mark.parametrize("turns", [0, 1, 5, 50])
def test_a_workflow_does_not_succeed_without_a_checkpoint_that_was_refused(
    outcome: Callable[..., Workflow], engine: Engine, turns: int
) -> None:
    """The completion may be submitted before, while and after the database refuses the checkpoint."""
    durable = Durable()
    refusals.refuse(engine)

    async def one() -> int:
        return 1

    @durable.workflow
    async def unrecordable() -> int:
        await aio.run_step("fine", one)
        await aio.run_step(refusals.UNSTORABLE, one)
        for _ in range(turns):
            await asyncio.sleep(0.0005)
        return 1

    record = outcome(durable, "unrecordable")
    assert record.status is WorkflowStatus.FAILED
    assert record.error is not None
    assert record.error["type"] == "sqla_durable.errors:EncodingError"
    assert [each.key for each in record.steps] in (["fine"], [])


def test_a_sync_workflow_does_not_succeed_without_a_refused_checkpoint(
    outcome: Callable[..., Workflow], engine: Engine
) -> None:
    durable = Durable()
    refusals.refuse(engine)

    @durable.workflow
    def unrecordable(pause: float = 0.0) -> int:
        run_step(refusals.UNSTORABLE, int)
        threading.Event().wait(pause)
        return 1

    record = outcome(durable, "unrecordable")
    assert record.error is not None
    assert (record.status, record.error["type"]) == (WorkflowStatus.FAILED, "sqla_durable.errors:EncodingError")


def test_a_row_that_the_database_refuses_fails_its_own_workflow_only(
    session_factory: sessionmaker[Session], engine: Engine
) -> None:
    durable = Durable()
    refusals.refuse(engine)
    gate = threading.Barrier(20)

    @durable.workflow
    def mixed(bad: bool) -> int:
        gate.wait(races.PATIENCE)  # so that all of them record at once
        return run_step(refusals.UNSTORABLE if bad else "fine", int)

    with session_factory() as session:
        good = [races.enqueue(session, name="mixed", input={"bad": False})[0] for _ in range(19)]
        (bad,) = races.enqueue(session, name="mixed", input={"bad": True})
    with Worker(durable, sessionmaker=session_factory, poll_interval=POLL):
        assert {finished(engine, each).status for each in good} == {WorkflowStatus.SUCCEEDED}
        assert finished(engine, bad).status is WorkflowStatus.FAILED


def test_a_cancelled_statement_of_the_writer_fails_no_workflow(
    session_factory: sessionmaker[Session], engine: Engine
) -> None:
    """`pg_cancel_backend`, `statement_timeout` and a full disk say nothing about the values."""
    durable = Durable()

    @durable.workflow
    def small() -> int:
        return run_step("one", int)

    with session_factory() as session:
        (workflow_id,) = races.enqueue(session, name="small")
    with races.transaction(engine) as other:
        other.session.execute(text("LOCK TABLE durable.step IN SHARE MODE"))
        with Worker(durable, sessionmaker=session_factory, poll_interval=POLL):
            for _ in range(3):
                blocked = races.wait_until(lambda: races.blocked_statements(engine), what="the writer being blocked")
                with engine.begin() as connection:
                    connection.execute(text("SELECT pg_cancel_backend(:pid)"), {"pid": next(iter(blocked))})
                races.wait_until(partial(_other_than, engine, blocked))
            other.session.rollback()
            assert finished(engine, workflow_id).status is WorkflowStatus.SUCCEEDED


def _other_than(engine: Engine, blocked: dict[int, object]) -> bool:
    return races.blocked_statements(engine) != blocked


async def test_a_writer_that_ends_in_the_middle_of_a_commit_leaves_nobody_waiting(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    database = ThreadDatabase(engine, limit=30)
    writer = races.writer(database)
    running = asyncio.create_task(writer.run())
    with races.transaction(engine) as other:
        other.session.execute(text("LOCK TABLE durable.step IN SHARE MODE"))
        ticket = races.submit(writer, races.checkpoint(fence))
        await asyncio.to_thread(races.wait_until, lambda: races.blocked_statements(engine))
        running.cancel()
        await asyncio.sleep(0)
        other.session.rollback()
        await asyncio.wait([running])
        assert ticket.is_settled
    await database.close()


async def test_a_checkpoint_that_another_attempt_recorded_is_lost_and_not_written(engine: Engine) -> None:
    """The loser of an ownership race stops, instead of going on with a value that is not the recorded one."""
    (old,) = races.claimed_fences(engine)
    races.expire_leases(engine)
    (new,) = await asyncio.to_thread(_reclaimed, engine)
    database = ThreadDatabase(engine, limit=30)
    writer = races.writer(database)
    running = asyncio.create_task(writer.run())
    await races.settled(races.submit(writer, races.checkpoint(new)))
    with pytest.raises(BaseException, match=str(old.workflow_id)) as lost:
        await races.settled(races.submit(writer, races.checkpoint(old, output="2")))
    assert type(lost.value).__name__ == "AttemptLost"
    running.cancel()
    await database.close()


def _reclaimed(engine: Engine) -> list[Any]:
    with Session(engine) as session:
        workers.reclaim(session, max_attempts=10, limit=10)
        claimed = races.claim(session, 10)
        session.commit()
    return [each.fence for each in claimed]


@pytest.mark.parametrize("form", ["sync", "async"])
def test_a_completion_never_overtakes_its_checkpoint(
    session_factory: sessionmaker[Session], engine: Engine, form: str
) -> None:
    """The row is locked for the statement that records the checkpoint and free for the one that finishes."""
    durable = Durable()
    locking = races.Transaction(engine)

    def hold() -> None:
        with Session(engine) as session:
            races.lock(locking.session, session.scalars(select(Workflow.id)).one())

    def one() -> int:
        return 1

    @durable.workflow(name="sync")
    def in_thread() -> int:
        durable.step(hold)()
        return durable.step(one)()

    @durable.workflow(name="async")
    async def on_loop() -> int:
        await aio.to_thread(durable.step(hold))
        return await aio.to_thread(durable.step(one))

    releases: list[str] = []

    @event.listens_for(engine, "after_cursor_execute")
    def release_between(_c: object, _cursor: object, statement: str, *_: object) -> None:
        """Unlock the row right after a statement for checkpoints has passed it over."""
        if (
            statement.startswith(("WITH", "INSERT"))
            and "INSERT INTO durable.step" in statement
            and locking.session.in_transaction()
        ):
            releases.append(statement)
            locking.session.rollback()

    with session_factory() as session:
        (workflow_id,) = races.enqueue(session, name=form)
    with Worker(durable, sessionmaker=session_factory, poll_interval=POLL):
        record = finished(engine, workflow_id)
    assert releases
    assert record.status is WorkflowStatus.SUCCEEDED
    assert [each.key for each in record.steps] == ["hold", "one"]
