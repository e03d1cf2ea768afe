"""What the engine meets in the transaction of a step: obstacles are waited out, lost transactions counted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import pytest
import tenacity
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sqla_durable import Durable, Step, StepStatus, WorkflowStatus, manage, set_event, write_stream
from sqla_durable.asyncio import to_thread
from sqla_durable.errors import StepTimeoutError, TransactionLostError
from sqla_durable.runtime.context import current
from tests.acceptance import either
from tests.acceptance.application import Application
from tests.acceptance.shells import AsyncShell, AsyncWorkerShell, Shell
from tests.store import races
from tests.support import faults
from tests.support.domain import Entry

WORKERS = ["worker", "async-worker", "asyncpg-worker"]
COMMITTING = ["executor", "async-executor", *WORKERS]
on_workers = pytest.mark.shells(WORKERS)
TERMINATE = text("SELECT pg_terminate_backend(pg_backend_pid())")


class Booking:
    """A transactional step that counts how often it is executed."""

    def __init__(self) -> None:
        self.executions: list[str] = []

    def __call__(self, session: Session, account: str) -> str:
        self.executions.append(account)
        session.add(Entry(account=account, cents=1))
        return account


def _accounts(shell: Shell) -> list[str]:
    with shell.sessionmaker() as session:
        return list(session.scalars(select(Entry.account).order_by(Entry.account)))


def _steps(shell: Shell) -> dict[str, Step]:
    with shell.sessionmaker() as session:
        return {each.key: each for each in session.scalars(select(Step))}


# Waited out


# behaviour: O1
def test_what_the_engine_meets_is_waited_out_and_is_no_try(shell: Shell, app: Application) -> None:
    """At the statement of the checkpoint; a full disk also at the step's own; each twice."""
    faults.at_statement(shell.engine, "53100", times=2)
    for state in ("55P03", "57014", "58030"):
        faults.at_statement(shell.engine, state, times=2, table=_step_table(shell), when=f"NEW.key = '{state}'")
    booking = Booking()
    book = app.transactional(booking.__call__, name="book")
    plain = app.plain(lambda: "plain", name="plain")

    async def buy() -> list[str]:
        booked = [await book.options(step_key=each)(each) for each in ("55P03", "57014")]
        return [*booked, await plain.options(step_key="58030")()]

    assert shell.run(app.workflow(buy)) == ["55P03", "57014", "plain"]
    assert booking.executions == ["55P03"] * 5 + ["57014"] * 3
    assert _accounts(shell) == ["55P03", "57014"]
    assert {(each.status, each.tries) for each in _steps(shell).values()} == {(StepStatus.SUCCEEDED, 1)}


# behaviour: O1
@pytest.mark.shells(COMMITTING)
def test_what_a_commit_meets_is_waited_out(shell: Shell, app: Application) -> None:
    for state in ("53100", "55P03"):
        faults.at_commit(shell.engine, state, times=2)
    booking = Booking()
    book = app.transactional(booking.__call__, name="book")

    async def buy() -> str:
        return await book("a")

    assert shell.run(app.workflow(buy)) == "a"
    assert (booking.executions, _accounts(shell)) == (["a"] * 5, ["a"])


@pytest.mark.shells(["async-executor", "worker"])
@pytest.mark.parametrize("state", ["23505", "42P01"])
def test_what_a_deferred_constraint_says_at_commit_is_the_steps_error(
    shell: Shell, app: Application, state: str
) -> None:
    faults.at_commit(shell.engine, state, times=9)
    booking = Booking()
    book = app.transactional(booking.__call__, name="book")

    async def buy() -> str:
        return await book("a")

    with pytest.raises(DBAPIError, match="made for a test"):
        shell.run(app.workflow(buy))
    assert (booking.executions, _accounts(shell)) == (["a"], [])
    assert _steps(shell)["book"].status is StepStatus.FAILED


@pytest.mark.shells(["executor", "asyncpg-worker"])
@pytest.mark.parametrize("state", ["55P03", "57014"])
def test_what_the_flush_of_a_steps_own_writes_meets_is_the_steps_error(
    shell: Shell, app: Application, state: str
) -> None:
    faults.at_statement(shell.engine, state, times=9)
    booking = Booking()
    book = app.transactional(booking.__call__, name="book", stop=tenacity.stop_after_attempt(2))

    async def buy() -> str:
        return await book("a")

    with pytest.raises(DBAPIError, match="made for a test"):
        shell.run(app.workflow(buy))
    assert booking.executions == ["a", "a"]


# behaviour: O1
@pytest.mark.shells(COMMITTING)
def test_a_cancel_that_stays_open_and_is_rolled_back_fails_no_step(
    shell: Shell, app: Application, caplog: pytest.LogCaptureFixture
) -> None:
    """It holds the workflow's row: while the step sets an event, at its checkpoint, and while it writes a stream."""
    with Session(shell.engine) as other:
        executions: list[int] = []

        def book(session: Session) -> int:
            executions.append(1)
            count = len(executions)
            execution = current()
            assert execution is not None
            if count == 1:
                manage.cancel(other, execution.workflow_id)
            session.add(Entry(account="a", cents=1))
            session.flush()  # before there is a limit, which a busy machine may exceed
            if count == 4:
                other.rollback()
            else:
                session.execute(text(f"SET LOCAL {'statement' if count == 2 else 'lock'}_timeout = '50ms'"))
            if count in (1, 4):
                set_event("booked", 1, session=session)
            if count in (3, 4):
                write_stream("bookings", 1, session=session)
            return count

        step = app.transactional(book)

        async def buy() -> int:
            return await step()

        assert shell.run(app.workflow(buy)) == 4
    assert _accounts(shell) == ["a"]
    assert _steps(shell)["book"].tries == 1
    said = [each.getMessage() for each in caplog.records if each.name == "sqla_durable.step"]
    assert [message.rpartition(" ")[2] for message in said] == ["1", "2"]
    assert all("step 'book'" in message for message in said)


@pytest.mark.shells(["async-worker", "asyncpg-worker"])
def test_steps_whose_slow_commits_hold_up_each_other_all_succeed(shell: Shell) -> None:
    """Three at a time lock the row of their workflow, with a lock_timeout that is shorter than a COMMIT."""
    assert isinstance(shell, AsyncWorkerShell)
    faults.slow_commit(shell.engine, 0.15)
    durable: Durable = shell.app.durable

    @durable.step
    async def book(session: AsyncSession, number: int) -> int:
        await session.execute(text("SET LOCAL lock_timeout = '50ms'"))
        session.add(Entry(account=str(number), cents=1))
        return number

    @durable.workflow
    async def buy() -> list[int]:
        return await asyncio.gather(*(book(number) for number in range(3)))

    assert shell.run(buy) == [0, 1, 2]
    assert _accounts(shell) == ["0", "1", "2"]


@pytest.mark.shells(["worker"])
def test_a_compensation_waits_an_obstacle_out(shell: Shell) -> None:
    durable = shell.app.durable
    faults.at_statement(shell.engine, "55P03", times=2, table="durable.step", when="NEW.name = 'undo'")

    @durable.step
    def book(session: Session) -> None:
        session.add(Entry(account="booked", cents=1))

    @durable.step
    def undo(session: Session) -> None:
        session.add(Entry(account="undone", cents=1))

    @durable.workflow
    def buy() -> None:
        with either.Saga() as saga:
            book()
            saga.add(undo)
            raise ValueError("sold out")

    with pytest.raises(ValueError, match="sold out"):
        shell.run(buy)
    assert _accounts(shell) == ["booked", "undone"]
    assert _steps(shell)["undo"].tries == 1


# behaviour: O1
@pytest.mark.shells(["async-worker", "async-executor"])
def test_a_sync_step_of_an_async_workflow_waits_obstacles_out(shell: Shell) -> None:
    assert isinstance(shell, AsyncShell)
    faults.at_statement(shell.engine, "55P03", times=2, table="durable.step", when="NEW.name = 'book'")
    faults.at_commit(shell.engine, "53100", times=2)
    durable, executions = shell.app.durable, list[int]()

    @durable.step
    def book(session: Session) -> int:
        executions.append(1)
        session.add(Entry(account="a", cents=1))
        if isinstance(shell, AsyncWorkerShell) and len(executions) == 1:
            session.execute(TERMINATE)  # an executor gives that to its caller
        return 7

    @durable.workflow
    async def buy() -> int:
        return await to_thread(book)

    workflow_id = shell.begin(buy)
    if isinstance(shell, AsyncWorkerShell):
        with shell.background():
            assert shell.result(buy, workflow_id) == 7
    else:
        assert shell.finish(buy, workflow_id) == 7
    assert _accounts(shell) == ["a"]
    assert _steps(shell)["book"].tries == 1 + isinstance(shell, AsyncWorkerShell)


def _step_table(shell: Shell) -> str:
    return f"{shell.schema}.step"


# Lost


def _waits_until_ended(shell: Shell, session: Session) -> None:
    """Wait, between two statements of a step, until the server has ended its connection."""
    pid = races.pid_of(session)
    alive = text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid")
    with shell.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        races.wait_until(lambda: connection.scalar(alive, {"pid": pid}) == 0, what="the end of the connection")


def _limits_transactions(shell: Shell) -> bool:
    """Return whether the server has `transaction_timeout`."""
    with shell.engine.connect() as connection:
        return int(connection.scalar(text("SHOW server_version_num")) or 0) >= 170000


def _loses_its_session(shell: Shell, executions: list[int]) -> Callable[[Session], int]:
    """A step that loses its session every time, each time in another way; the last one it does not notice."""

    has_limit = _limits_transactions(shell)

    def lose(session: Session) -> int:
        executions.append(1)
        session.add(Entry(account="lost", cents=1))
        session.flush()
        match len(executions) % 4:
            case 1:
                session.execute(text("SET LOCAL idle_in_transaction_session_timeout = '20ms'"))
                _waits_until_ended(shell, session)
            case 2:
                session.execute(text("SET LOCAL transaction_timeout = '50ms'") if has_limit else TERMINATE)
                session.execute(text("SELECT pg_sleep(10)"))
            case 3:
                session.execute(TERMINATE)
            case _:
                with suppress(DBAPIError):
                    session.execute(TERMINATE)
                return 1
        session.execute(text("SELECT 1"))
        return 0

    return lose


# behaviour: O2
@on_workers
def test_a_step_that_loses_its_session_every_time_is_counted_logged_and_ends(
    shell: Shell, app: Application, caplog: pytest.LogCaptureFixture
) -> None:
    executions: list[int] = []
    step = app.transactional(_loses_its_session(shell, executions), stop=tenacity.stop_after_attempt(4))

    async def buy() -> int:
        return await step()

    with pytest.raises(TransactionLostError) as lost:
        shell.run(app.workflow(buy))
    assert (lost.value.step, lost.value.count, len(executions)) == ("lose", 4, 4)
    assert "idle_in_transaction_session_timeout" in str(lost.value)
    record = shell.one(shell.only)
    assert (record.status, record.crashes, record.attempt) == (WorkflowStatus.FAILED, 0, 1)
    assert (record.steps[0].status, record.steps[0].tries) == (StepStatus.FAILED, 4)
    assert _accounts(shell) == []
    said = [each.getMessage() for each in caplog.records if each.name == "sqla_durable.step"]
    assert len(said) == 3
    assert all(str(record.id) in line and "step 'lose'" in line for line in said)
    second = "transaction_timeout" if _limits_transactions(shell) else "ended its server process"
    named = ["idle_in_transaction_session_timeout", second, "ended its server process"]
    assert all(each in line or "or one of idle_in_transaction" in line for each, line in zip(named, said, strict=True))


# behaviour: O2
@pytest.mark.shells(["worker"])
def test_losses_are_counted_over_attempts_and_end_without_a_policy(shell: Shell, app: Application) -> None:
    executions: list[int] = []

    def lose(session: Session) -> None:
        executions.append(1)
        session.execute(TERMINATE)

    step = app.transactional(lose)

    async def buy() -> None:
        await step()

    workflow = app.workflow(buy)
    workflow_id = shell.begin(workflow)
    with shell.background():
        races.wait_until(lambda: _losses(shell) >= 2, what="the second loss")
    assert _steps(shell)["lose"].tries == _losses(shell)
    with shell.sessionmaker.begin() as session:  # as if it had lost 19 by now
        session.execute(text("""UPDATE durable.step SET error = jsonb_set(error, '{state,count}', '19')"""))
    before = len(executions)
    with pytest.raises(TransactionLostError, match="20 times in a row"):
        shell.finish(workflow, workflow_id)
    assert len(executions) == before + 1


def _losses(shell: Shell) -> int:
    with shell.sessionmaker() as session:
        error = session.scalars(select(Step.error)).one_or_none()
        return int(error["state"]["count"]) if error else 0


# behaviour: O2
def losing_once() -> Callable[[Session], int]:
    """Return a step whose first execution loses its connection; it returns how often it was executed."""
    executions: list[int] = []

    def lose_once(session: Session) -> int:
        executions.append(1)
        session.add(Entry(account="a", cents=1))
        if len(executions) == 1:
            session.execute(TERMINATE)
        return len(executions)

    return lose_once


@on_workers
def test_one_loss_ends_no_step_whatever_its_policy_says(shell: Shell, app: Application) -> None:
    lose_once = losing_once()
    step = app.transactional(
        lose_once, retry=tenacity.retry_if_exception_type(KeyError), stop=tenacity.stop_after_attempt(1)
    )

    async def buy() -> int:
        return await step()

    assert shell.run(app.workflow(buy)) == 2
    assert _accounts(shell) == ["a"]
    assert _steps(shell)["lose_once"].tries == 2


@pytest.mark.shells(["worker"])
def test_a_total_timeout_ends_a_step_that_loses_its_session(shell: Shell, app: Application) -> None:
    def lose(session: Session) -> None:
        session.execute(TERMINATE)

    step = app.transactional(lose, total_timeout=timedelta(seconds=0.3))

    async def buy() -> None:
        await step()

    with pytest.raises(StepTimeoutError, match="the timeout of all its tries"):
        shell.run(app.workflow(buy))


@pytest.mark.shells(["executor", "async-executor"])
def test_an_executor_gives_a_loss_to_its_caller_and_leaves_the_workflow_to_the_next(
    shell: Shell, app: Application
) -> None:
    lose_once = losing_once()
    step = app.transactional(lose_once)

    async def buy() -> int:
        return await step()

    workflow = app.workflow(buy)
    workflow_id = shell.begin(workflow)
    with pytest.raises(DBAPIError):
        shell.finish(workflow, workflow_id)
    assert shell.one(workflow_id).status is WorkflowStatus.PENDING
    assert shell.finish(workflow, workflow_id) == 2
    assert _accounts(shell) == ["a"]
