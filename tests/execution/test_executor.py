"""Executing a workflow inline, on the caller's session."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest
import tenacity
from sqlalchemy import event, func, select, text, update
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Durable, Executor, Step, Workflow, WorkflowStatus, heartbeat, models
from sqla_durable.asyncio import AsyncExecutor, to_thread
from sqla_durable.errors import AttemptLostError, EncodingError, SessionError, WorkflowRunningError
from tests.support.domain import Entry, Order

Sessions = sessionmaker[Session]
AsyncSessions = async_sessionmaker[AsyncSession]
durable = Durable()


class PowerCut(BaseException):
    """Ends a step as the end of the process would, but for the session, which the caller still has."""


@durable.step
def book(session: Session, cents: int) -> int:
    session.add(Entry(account="book", cents=cents, note=None))
    return cents


@durable.step
def interfere() -> int:
    return hook()


@durable.workflow
def pay(cents: int) -> int:
    return book(cents) + interfere() + book(cents)


def hook() -> int:
    return 0


@pytest.fixture
def react(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], int]], None]:
    """Let the middle step of the workflow do something."""
    return lambda reaction: monkeypatch.setattr(f"{__name__}.hook", reaction)


def test_each_step_is_visible_to_others_as_soon_as_it_is_done(
    session_factory: Sessions, react: Callable[[Callable[[], int]], None]
) -> None:
    def read_committed() -> int:
        with session_factory() as other:
            assert len(other.scalars(select(Entry)).all()) == 1
            assert other.scalars(select(Step.key)).all() == ["book"]
            record = other.scalars(select(Workflow)).one()
            assert record.status is WorkflowStatus.RUNNING
            assert other.get_one(models.Worker, record.worker_id).name.startswith("executor ")
        return 0

    react(read_committed)
    with session_factory() as session:
        session.add(Order(customer="pending", total_cents=1))
        assert Executor(session).run(pay, 5) == 10
        assert not session.in_transaction()
    with session_factory() as session:
        assert session.scalars(select(Order.customer)).all() == ["pending"]
        assert session.scalars(select(models.Worker)).all() == []


def test_joined_steps_are_visible_to_nobody_until_the_caller_commits(
    session_factory: Sessions, react: Callable[[Callable[[], int]], None]
) -> None:
    def read_committed() -> int:
        with session_factory() as other:
            assert other.scalars(select(Entry)).all() == []
            assert other.scalars(select(Workflow)).all() == []
        return 0

    react(read_committed)
    with session_factory() as session:
        session.add(Order(customer="joined", total_cents=1))
        assert Executor.joined(session).run(pay, 5) == 10
        read_committed()
        session.rollback()
        assert session.scalars(select(Workflow)).all() == []
        assert session.scalars(select(Order)).all() == []
        assert Executor.joined(session).run(pay, 6) == 12
        session.commit()
    with session_factory() as session:
        assert session.scalars(select(Entry.cents)).all() == [6, 6]
        record = session.scalars(select(Workflow)).one()
        assert (record.status, record.output) == (WorkflowStatus.SUCCEEDED, 12)


def test_joined_failure_leaves_the_callers_transaction_usable(
    session_factory: Sessions, react: Callable[[Callable[[], int]], None]
) -> None:
    def fail() -> int:
        raise ValueError("no")

    react(fail)
    with session_factory.begin() as session:
        session.add(Order(customer="before", total_cents=1))
        with pytest.raises(ValueError, match="no"):
            Executor.joined(session).run(pay, 5)
        session.add(Order(customer="after", total_cents=1))
    with session_factory() as session:
        assert session.scalars(select(Order.customer).order_by(Order.id)).all() == ["before", "after"]
        assert session.scalars(select(Workflow.status)).all() == [WorkflowStatus.FAILED]
        assert session.scalars(select(Entry.cents)).all() == [5]


async def test_joined_async_steps_are_rolled_back_with_the_caller(async_session_factory: AsyncSessions) -> None:
    local = Durable()

    @local.step
    async def abook(session: AsyncSession, cents: int) -> int:
        session.add(Entry(account="book", cents=cents, note=None))
        return cents

    @local.workflow
    async def apay(cents: int) -> int:
        return await abook(cents) + await to_thread(book, cents)

    async with async_session_factory() as session:
        assert await AsyncExecutor.joined(session).run(apay, 5) == 10
        assert (await session.scalars(select(func.count()).select_from(Entry))).one() == 2
        await session.rollback()
        assert (await session.scalars(select(Workflow))).all() == []
        assert (await session.scalars(select(Entry))).all() == []


def test_interrupted_workflow_is_released_and_executed_again(
    session_factory: Sessions, react: Callable[[Callable[[], int]], None]
) -> None:
    def cut() -> int:
        raise PowerCut

    react(cut)
    with session_factory() as session, pytest.raises(PowerCut):
        Executor(session).run(pay.options(key="k"), 5)
    with session_factory() as session:
        record = session.scalars(select(Workflow)).one()
        assert (record.status, record.attempt) == (WorkflowStatus.PENDING, 1)
        assert session.scalars(select(models.Worker)).all() == []
    react(lambda: 1)
    with session_factory() as session:
        assert Executor(session).run(pay.options(key="k"), 5) == 11
        assert len(session.scalars(select(Entry)).all()) == 2


# behaviour: E7
def test_running_workflow_of_a_live_lease_is_refused(
    session_factory: Sessions, react: Callable[[Callable[[], int]], None]
) -> None:
    keyed = pay.options(key="k")

    def again() -> int:
        with (
            session_factory() as other,
            pytest.raises(WorkflowRunningError, match=r"is running, .* until .* a shorter lease") as caught,
        ):
            Executor(other).run(keyed, 5)
        with session_factory() as other:
            assert caught.value.workflow_id == other.scalars(select(Workflow.id)).one()
            assert caught.value.lease_expires_at == other.scalars(select(models.Worker.lease_expires_at)).one()
        return 0

    react(again)
    with session_factory() as session:
        assert Executor(session).run(keyed, 5) == 10


# behaviour: E7 R1 R4
def test_expired_executor_loses_its_workflow_and_commits_nothing_more(
    session_factory: Sessions, react: Callable[[Callable[[], int]], None]
) -> None:
    keyed = pay.options(key="k")

    def be_overtaken() -> int:
        react(lambda: 1)
        with session_factory.begin() as other:
            expired = func.statement_timestamp() - timedelta(seconds=1)
            earlier = func.statement_timestamp() - timedelta(seconds=2)
            other.execute(update(models.Worker).values(lease_expires_at=expired, heartbeat_at=earlier))
        with session_factory() as other:
            assert Executor(other).run(keyed, 5) == 11
        return 0

    react(be_overtaken)
    with session_factory() as session, pytest.raises(AttemptLostError, match="is no longer this executor's") as caught:
        Executor(session).run(keyed, 5)
    with session_factory() as session:
        record = session.scalars(select(Workflow)).one()
        assert caught.value.workflow_id == record.id
        assert (record.status, record.attempt, record.output) == (WorkflowStatus.SUCCEEDED, 2, 11)
        assert len(session.scalars(select(Entry)).all()) == 2
        assert [(each.key, each.attempt) for each in record.steps] == [("book", 1), ("interfere", 2), ("book#2", 2)]


# behaviour: M1
def test_cancelled_workflow_commits_nothing_more(
    session_factory: Sessions, react: Callable[[Callable[[], int]], None]
) -> None:
    def cancel() -> int:
        with session_factory.begin() as other:
            record = other.scalars(select(Workflow)).one()
            record.status, record.finished_at = WorkflowStatus.CANCELLED, record.started_at
        return 0

    react(cancel)
    with session_factory() as session, pytest.raises(AttemptLostError):
        Executor(session).run(pay, 5)
    with session_factory() as session:
        assert session.scalars(select(Step.key)).all() == ["book"]
        assert len(session.scalars(select(Entry)).all()) == 1


def test_record_that_the_session_holds_shows_the_outcome(session_factory: Sessions) -> None:
    for make in (Executor, Executor.joined):
        with session_factory() as session:
            record = pay.start(session, 5)
            assert make(session).execute(pay, record) == 10
            assert (record.status, record.output) == (WorkflowStatus.SUCCEEDED, 10)
            session.commit()


def test_session_inside_a_begin_block_is_refused_or_joined(session_factory: Sessions) -> None:
    with session_factory.begin() as session:
        with pytest.raises(SessionError, match=r"is inside `with session.begin\(\)`.*or use joined\(session\)"):
            Executor(session).run(pay, 5)
        assert Executor.joined(session).run(pay, 5) == 10


def test_suspended_workflow_is_not_executed_before_its_time(session_factory: Sessions) -> None:
    with session_factory() as session:
        record = pay.options(delay=timedelta(hours=1)).start(session, 5)
        session.commit()
        with pytest.raises(
            WorkflowRunningError, match=r"is suspended and waits until \S+ \S+: let the time pass with"
        ) as caught:
            Executor(session).execute(pay, record)
        assert caught.value.lease_expires_at is None


calls: list[Any] = []


@durable.step
async def book_in_turn(session: AsyncSession, cents: int) -> int:
    calls.append(cents)
    session.add(Entry(account="book", cents=cents, note=None))
    await session.flush()
    return cents


@durable.workflow
async def book_at_once(tasks: list[int]) -> list[int]:
    branches.extend(asyncio.create_task(book_in_turn(each)) for each in tasks)
    return await asyncio.gather(*branches)


branches: list[asyncio.Task[int]] = []


async def test_cancel_during_a_commit_leaves_the_session_to_the_step_that_follows(async_engine: AsyncEngine) -> None:
    calls.clear()
    branches.clear()
    cancelled: list[int] = []

    def cancel_what_commits(_: Session) -> None:
        if calls and not cancelled:
            cancelled.append(calls[-1])
            asyncio.get_running_loop().call_soon(branches[cancelled[0]].cancel)

    async with AsyncSession(async_engine) as session:
        event.listen(session.sync_session, "before_commit", cancel_what_commits)
        assert await AsyncExecutor(session).run(book_at_once, [0, 1, 2, 3]) == [0, 1, 2, 3]
    assert len(cancelled) == 1
    async with AsyncSession(async_engine) as session:
        assert sorted(await session.scalars(select(Entry.cents))) == [0, 1, 2, 3]
        assert set(await session.scalars(select(Step.status))) == {"succeeded"}


@durable.step(stop=tenacity.stop_after_attempt(3), wait=tenacity.wait_none())
def charge() -> str:
    calls.append("charge")
    return "refused"


@durable.step(stop=tenacity.stop_after_attempt(3), wait=tenacity.wait_none())
def report() -> str:
    calls.append("report")
    heartbeat("kept")
    heartbeat("refused")  # sent when the function has returned
    return "reported"


@durable.workflow
def order(*, reports: bool) -> str:
    return report() if reports else charge()


@durable.workflow
async def order_async(*, reports: bool) -> str:
    return await to_thread(report) if reports else await to_thread(charge)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("reports", [False, True])
async def test_plain_step_is_not_executed_again_when_the_database_refuses_its_result_or_its_details(
    session_factory: Sessions, async_engine: AsyncEngine, is_async: bool, joined: bool, reports: bool
) -> None:
    calls.clear()
    with session_factory() as session:
        column = "details" if reports else "output"
        refuses = f"ADD CONSTRAINT refuses CHECK ({column} IS DISTINCT FROM '\"refused\"')"
        session.execute(text(f"ALTER TABLE durable.step {refuses}"))
        session.commit()
        async with AsyncSession(async_engine) as async_session:
            executor = (Executor.joined if joined else Executor)(session)
            async_executor = (AsyncExecutor.joined if joined else AsyncExecutor)(async_session)
            running: Awaitable[str] = (
                async_executor.run(order_async, reports=reports)
                if is_async
                else asyncio.to_thread(lambda: executor.run(order, reports=reports))
            )
            with pytest.raises(EncodingError, match="the database refuses"):
                await running
    assert calls == ["report" if reports else "charge"]
