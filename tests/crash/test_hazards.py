"""What user code and the database do to a worker: each was, or might be, a way to lose something or to hang."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, create_engine, event, select, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

import sqla_durable.asyncio as aio
from sqla_durable import Durable, Executor, Worker, Workflow, WorkflowStatus, models, run_step
from sqla_durable.execution.worker.database import ThreadDatabase
from sqla_durable.store import claims, workers
from tests.store import races
from tests.support import refusals
from tests.support.domain import Entry

POLL = timedelta(milliseconds=20)


def finished(engine: Engine, workflow_id: UUID) -> Workflow:
    """Wait for a workflow's outcome and give its record."""

    def record() -> Workflow | None:
        with Session(engine) as session:
            found = session.get_one(Workflow, workflow_id)
            _ = found.steps
            return found if found.status.finished else None

    found = races.wait_until(record, what="the workflow's end")
    assert found is not None
    return found


@pytest.fixture
def outcome(session_factory: sessionmaker[Session], engine: Engine) -> Callable[..., Workflow]:
    """Start a workflow without arguments, bring it to its end by a worker, and give its record."""

    def outcome(durable: Durable, name: str, **options: Any) -> Workflow:
        with session_factory() as session:
            (workflow_id,) = races.enqueue(session, name=name)
        settings: dict[str, Any] = {"sessionmaker": session_factory, "poll_interval": POLL, **options}
        with Worker(durable, **settings):
            return finished(engine, workflow_id)

    return outcome


# The writer


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
        assert ticket.done()
    await database.close()


async def test_a_checkpoint_that_another_attempt_recorded_is_lost_and_not_written(engine: Engine) -> None:
    """The loser of an ownership race stops, instead of going on with a value that is not the recorded one."""
    (old,) = races.claimed_fences(engine)
    races.expire_leases(engine)
    (new,) = await asyncio.to_thread(_reclaimed, engine)
    database = ThreadDatabase(engine, limit=30)
    writer = races.writer(database)
    running = asyncio.create_task(writer.run())
    await races.submit(writer, races.checkpoint(new))
    with pytest.raises(BaseException, match=str(old.workflow_id)) as lost:
        await races.submit(writer, races.checkpoint(old, output="2"))
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
            statement.startswith("WITH")
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


# Errors of every kind


class Odd(BaseException):
    """Neither an `Exception` nor anything of ours."""


@pytest.mark.parametrize("odd", [Odd("x"), SystemExit(3)], ids=repr)
@pytest.mark.parametrize("form", ["sync", "async"])
def test_a_base_exception_ends_its_workflow_and_not_the_worker(
    outcome: Callable[..., Workflow], odd: BaseException, form: str
) -> None:
    if form == "async" and isinstance(odd, SystemExit):
        pytest.skip("on the event loop's own thread sys.exit() ends the program, as in any asyncio program")
    durable = Durable()

    def exits() -> None:
        raise odd

    @durable.workflow(name="sync")
    def in_thread() -> None:
        run_step("exits", exits)

    @durable.workflow(name="async")
    async def on_loop() -> None:
        raise odd

    assert outcome(durable, form, max_attempts=2).status is WorkflowStatus.FAILED


def test_a_sync_step_that_exits_does_not_end_the_worker_of_an_async_workflow(outcome: Callable[..., Workflow]) -> None:
    durable = Durable()

    @durable.workflow
    async def exits() -> None:
        await aio.run_step("exit", sys.exit, 3)

    assert outcome(durable, "exits", max_attempts=2).status is WorkflowStatus.FAILED


def test_a_workflow_that_cancels_itself_ends(outcome: Callable[..., Workflow]) -> None:
    """Nothing from outside ended the attempt, so it must not be released and claimed again for ever."""
    durable = Durable()
    executions: list[None] = []

    @durable.workflow
    async def self_cancelled() -> None:
        executions.append(None)
        inner = asyncio.create_task(asyncio.sleep(3600))
        inner.cancel()
        await inner

    record = outcome(durable, "self_cancelled", max_attempts=3)
    assert record.status is WorkflowStatus.FAILED
    assert len(executions) <= 3


def test_a_step_that_raises_stop_iteration_does_not_hang_its_workflow(outcome: Callable[..., Workflow]) -> None:
    """A future does not take a StopIteration from a thread: Python 3.11 drops it, and the await never ends."""
    durable = Durable()

    def first_of_none() -> int:
        return next(iter(list[int]()))

    @durable.workflow
    async def stops() -> int:
        return await aio.to_thread(durable.step(first_of_none))

    assert outcome(durable, "stops").status is WorkflowStatus.FAILED


def test_an_error_with_arguments_that_json_does_not_hold_ends_its_workflow(outcome: Callable[..., Workflow]) -> None:
    durable = Durable()

    class Uncomparable:
        def __eq__(self, other: object) -> bool:
            raise RuntimeError("no")

    @durable.workflow
    def fails() -> None:
        raise ValueError({1: "a", 2: "b"}, Uncomparable())

    record = outcome(durable, "fails", max_attempts=2)
    assert record.error is not None
    assert record.error["type"] == "builtins:ValueError"
    assert record.attempt == 1


# Sessions


def test_a_session_that_cannot_be_made_frees_its_slot(engine: Engine, outcome: Callable[..., Workflow]) -> None:
    durable = Durable()
    failures = iter(range(3))

    class Flaky(Session):
        def __init__(self, **options: Any) -> None:
            if "close_resets_only" in options and next(failures, None) is not None:
                raise RuntimeError("no session today")
            super().__init__(**options)

    @durable.step
    def write(session: Session) -> None:
        session.add(Entry(account="a", cents=1))

    @durable.workflow
    def tries() -> None:
        for _ in range(3):
            with pytest.raises(RuntimeError, match="no session today"):
                write()
        write()

    made = sessionmaker(engine, class_=Flaky)
    assert outcome(durable, "tries", sessionmaker=made, transactions=1).status is WorkflowStatus.SUCCEEDED


def test_an_error_after_the_commit_does_not_contradict_the_checkpoint(
    engine: Engine, outcome: Callable[..., Workflow]
) -> None:
    """A listener of the user's raises when everything is committed: the first run must see what a replay will."""
    durable = Durable()
    seen: list[str] = []

    class Loud(Session):
        pass

    @event.listens_for(Loud, "after_commit")
    def raise_after_commit(session: Session) -> None:
        raise RuntimeError("after the commit")

    @durable.step
    def write(session: Session) -> str:
        session.add(Entry(account="a", cents=1))
        return "written"

    @durable.workflow
    def commits() -> None:
        try:
            seen.append(write())
        except RuntimeError as error:
            seen.append(str(error))

    # The handle and the worker's own statements use plain sessions, so only the step meets the listener.
    record = outcome(durable, "commits", sessionmaker=sessionmaker(engine, class_=Loud))
    assert [(each.key, each.output) for each in record.steps] == [("write", "written")]
    assert seen == ["written"]


def test_a_step_that_writes_only_to_another_database_is_refused(
    engine: Engine, empty_database_url: str, outcome: Callable[..., Workflow]
) -> None:
    """Its checkpoint is in ours: two commits, and a crash between them."""
    durable = Durable()
    other = create_engine(empty_database_url)
    Entry.metadata.tables["entry"].create(other)

    @durable.step
    def elsewhere(session: Session) -> None:
        session.add(Entry(account="a", cents=1))
        session.flush()

    @durable.workflow
    def two_databases() -> None:
        elsewhere()

    both = sessionmaker(binds={Entry: other, models.Base: engine})
    record = outcome(durable, "two_databases", sessionmaker=both)
    with other.connect() as connection:
        assert connection.execute(select(Entry.id)).all() == []
    other.dispose()
    assert record.status is WorkflowStatus.FAILED
    assert record.error is not None
    assert record.error["type"] == "sqla_durable.errors:UsageError"


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


def test_an_engine_in_autocommit_is_refused(database_url: str, engine: Engine) -> None:
    """Without transactions there is no exactly-once: the business write would stand without its checkpoint."""
    durable = Durable()

    @durable.workflow
    def small() -> int:
        return 1

    careless = create_engine(database_url, isolation_level="AUTOCOMMIT")
    with Session(careless) as session, pytest.raises(Exception, match="AUTOCOMMIT"):
        Executor(session).run(small)
    careless.dispose()
