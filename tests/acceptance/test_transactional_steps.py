"""Steps that take a session: their writes and their checkpoint are one commit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from uuid import UUID

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from sqla_durable import Step, StepStatus, Workflow, WorkflowStatus, current
from sqla_durable.definitions.failure import RecordedDriverError
from sqla_durable.errors import (
    AttemptLostError,
    EncodingError,
    SessionError,
    UsageError,
)
from tests.acceptance.application import Application
from tests.acceptance.shells import Shell
from tests.support.domain import Entry

calls: list[str] = []


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    calls.clear()


class SoldOut(Exception):
    """What a step of the stories raises."""


def book(session: Session, account: str, cents: int) -> int:
    calls.append(account)
    session.add(Entry(account=account, cents=cents, note=None))
    return cents


def book_and_fail(session: Session, account: str) -> int:
    book(session, account, 1)
    session.flush()
    raise SoldOut(account)


# behaviour: T1
def test_writes_and_checkpoint_commit_together(shell: Shell, app: Application) -> None:
    booked = app.transactional(book)

    async def transfer(cents: int) -> int:
        return await booked("cash", -cents) + await booked("stock", cents)

    transferring = app.workflow(transfer)
    assert shell.run(transferring, 500) == 0
    with shell.sessionmaker() as session:
        steps = session.scalars(select(Step).order_by(Step.position)).all()
        entries = session.scalars(select(Entry).order_by(Entry.id)).all()
        assert [(each.key, each.position, each.output) for each in steps] == [("book", 1, -500), ("book#2", 2, 500)]
        assert [(each.account, each.cents) for each in entries] == [("cash", -500), ("stock", 500)]
        # The transactions that wrote them are the same.
        entry_xids = session.scalars(text("SELECT xmin::text FROM entry ORDER BY id")).all()
        step_xids = session.scalars(select(text("step.xmin::text")).select_from(Step).order_by(Step.position)).all()
        assert entry_xids == step_xids
        assert all(each.started_at <= each.finished_at and each.tries == 1 for each in steps)


# behaviour: T2 E2
def test_recorded_step_is_not_run_again(shell: Shell, app: Application) -> None:
    booked = app.transactional(book)

    async def transfer(cents: int) -> int:
        return await booked("cash", -cents) + await booked("stock", cents)

    transferring = app.workflow(transfer)
    assert shell.run(transferring, 500) == 0
    workflow_id = _only_workflow(shell)
    shell.crashed(workflow_id)
    assert shell.finish(transferring, workflow_id) == 0
    assert calls == ["cash", "stock"]
    assert _entries(shell) == [("cash", -500), ("stock", 500)]
    assert shell.one(workflow_id).attempt == 2


# behaviour: T3 E3
def test_failed_step_leaves_no_writes_and_its_error_is_recorded(shell: Shell, app: Application) -> None:
    failing = app.transactional(book_and_fail)
    booked = app.transactional(book)

    async def buy(account: str) -> str:
        try:
            await failing(account)
        except SoldOut as error:
            await booked("refund", 1)
            return f"{type(error).__name__} {error.args}"
        return "bought"

    buying = app.workflow(buy)
    first = shell.run(buying, "stock")
    assert first == "SoldOut ('stock',)"
    assert _entries(shell) == [("refund", 1)]
    workflow_id = _only_workflow(shell)
    with shell.sessionmaker() as session:
        step = session.get_one(Step, (workflow_id, "book_and_fail"))
        assert step.status is StepStatus.FAILED
        assert step.error is not None
        assert step.error["type"] == f"{SoldOut.__module__}:SoldOut"
        assert "raise SoldOut(account)" in step.error["traceback"]
    shell.crashed(workflow_id)
    assert shell.finish(buying, workflow_id) == first
    assert calls == ["stock", "refund"]


# behaviour: T3
def test_error_of_the_database_in_a_step_is_the_steps_error(shell: Shell, app: Application) -> None:
    def break_constraint(session: Session) -> None:
        session.add(Entry(account="stock", cents=1, note=None))
        session.flush()
        session.execute(text("INSERT INTO entry (id, account) VALUES (1, NULL)"))

    breaking = app.transactional(break_constraint)

    async def broken() -> None:
        await breaking()

    with pytest.raises(IntegrityError, match="violates not-null constraint") as caught:
        shell.run(app.workflow(broken))
    assert isinstance(caught.value.orig, RecordedDriverError)
    assert caught.value.orig.sqlstate == "23502"
    assert _entries(shell) == []
    record = shell.one(_only_workflow(shell))
    assert record.status is WorkflowStatus.FAILED
    assert [each.status for each in _steps(shell)] == [StepStatus.FAILED]


# behaviour: T4
@pytest.mark.shells(("executor", "worker", "async-executor", "async-worker", "asyncpg-worker"))
@pytest.mark.parametrize("state", ["40001", "40P01"])
def test_conflicts_are_tried_again_and_leave_one_effect(shell: Shell, app: Application, state: str) -> None:
    booked = app.transactional(_conflicting(state, times=2))

    async def buy() -> int:
        return await booked()

    assert shell.run(app.workflow(buy)) == 3
    assert calls == ["conflict"] * 3
    assert _entries(shell) == [("conflict", 3)]
    assert [each.tries for each in _steps(shell)] == [1], "a try that the database undid is none"


# behaviour: T4
@pytest.mark.shells(("executor", "worker", "async-executor", "async-worker", "asyncpg-worker"))
def test_other_errors_of_the_database_are_not_tried_again(shell: Shell, app: Application) -> None:
    booked = app.transactional(_conflicting("23514", times=2))

    async def buy() -> int:
        return await booked()

    with pytest.raises(Exception, match="made for a test"):
        shell.run(app.workflow(buy))
    assert calls == ["conflict"]


# behaviour: T4
@pytest.mark.shells(("joined", "async-joined"))
def test_conflict_in_a_joined_executor_is_the_callers_to_try_again(shell: Shell, app: Application) -> None:
    booked = app.transactional(_conflicting("40001", times=1))

    async def buy() -> int:
        return await booked()

    with pytest.raises(Exception, match="made for a test"):
        shell.run(app.workflow(buy))
    assert calls == ["conflict"]


def _conflicting(state: str, *, times: int) -> Callable[[Session], int]:
    def conflict(session: Session) -> int:
        book(session, "conflict", len(calls) + 1)
        session.flush()
        if len(calls) <= times:
            session.execute(text(f"DO $$ BEGIN RAISE EXCEPTION 'made for a test' USING ERRCODE = '{state}'; END $$"))
        return len(calls)

    return conflict


# behaviour: T6
@pytest.mark.shells(("worker", "async-worker", "mixed-worker", "asyncpg-worker"))  # an executor's is the caller's own
def test_session_is_not_usable_outside_its_step(shell: Shell, app: Application) -> None:
    kept: list[Session] = []

    def keep(session: Session) -> None:
        kept.append(session)

    keeping = app.transactional(keep)

    async def leak() -> str:
        await keeping()
        try:
            kept[0].execute(select(1))
        except Exception as error:
            return str(error)
        return "usable"

    assert "close" in shell.run(app.workflow(leak))


# behaviour: T10
@pytest.mark.shells(("worker", "async-worker", "mixed-worker", "executor", "async-executor"))
def test_step_is_one_connection(shell: Shell, app: Application) -> None:
    def pids(session: Session) -> list[int]:
        first = session.scalars(select(func.pg_backend_pid())).one()
        session.add(Entry(account="a", cents=1, note=None))
        session.flush()
        return [first, session.scalars(select(func.pg_backend_pid())).one()]

    asking = app.transactional(pids)

    async def ask() -> list[int]:
        return await asking()

    assert len(set(shell.run(app.workflow(ask)))) == 1


# behaviour: T11
def test_rolled_back_savepoint_of_the_step_keeps_the_checkpoint(shell: Shell, app: Application) -> None:
    def with_savepoint(session: Session) -> str:
        book(session, "kept", 1)
        try:
            with session.begin_nested():
                book(session, "rolled back", 2)
                session.flush()
                raise SoldOut
        except SoldOut:
            pass
        with session.begin_nested():
            book(session, "released", 3)
        nested = session.begin_nested()
        book(session, "by hand", 4)
        nested.rollback()
        return "done"

    step = app.transactional(with_savepoint)

    async def save() -> str:
        return await step()

    assert shell.run(app.workflow(save)) == "done"
    assert _entries(shell) == [("kept", 1), ("released", 3)]
    assert [each.key for each in _steps(shell)] == ["with_savepoint"]


# behaviour: T12
@pytest.mark.parametrize(
    ("end", "swallowed", "message"),
    [
        (Session.commit, False, "committed its session, but its checkpoint must commit with its writes: return"),
        (
            Session.rollback,
            False,
            "rolled back or closed its session, .* leave both to the engine, or use begin_nested",
        ),
        (Session.rollback, True, "rolled back or closed its session, .* leave both to the engine, or use begin_nested"),
        (Session.close, False, "rolled back or closed its session, .* leave both to the engine, or use begin_nested"),
        (Session.close, True, "rolled back or closed its session, .* leave both to the engine, or use begin_nested"),
    ],
    ids=["commit", "rollback", "rollback-swallowed", "close", "close-swallowed"],
)
def test_step_that_ends_its_own_transaction_gets_a_clear_error(
    shell: Shell, app: Application, end: Callable[[Session], None], message: str, swallowed: bool
) -> None:
    def meddle(session: Session) -> str:
        book(session, "lost", 1)
        session.flush()
        try:
            end(session)
        except UsageError:
            if not swallowed:
                raise
        return "done"

    step = app.transactional(meddle)

    async def meddling() -> str:
        return await step()

    workflow = app.workflow(meddling)
    if "Joined" in type(shell).__name__ and end is not Session.commit:
        # The caller's own transaction is gone, with everything in it: there is nothing left to record in.
        with pytest.raises(AttemptLostError, match="a step has rolled back or closed the session"):
            shell.run(workflow)
        assert _entries(shell) == []
        assert _steps(shell) == []
        return
    with pytest.raises(UsageError, match=rf"step 'meddle' .*{message}"):
        shell.run(workflow)
    assert _entries(shell) == []
    assert [each.status for each in _steps(shell)] == [StepStatus.FAILED]


# behaviour: T12
def test_commit_of_a_step_whose_refusal_it_swallows_is_still_one_transaction(shell: Shell, app: Application) -> None:
    def stubborn(session: Session) -> str:
        book(session, "stubborn", 1)
        with suppress(UsageError):
            session.commit()
        raise SoldOut

    step = app.transactional(stubborn)

    async def insist() -> str:
        return await step()

    with pytest.raises(SoldOut):
        shell.run(app.workflow(insist))
    assert _entries(shell) == []


def test_failed_flush_that_the_step_swallows_is_a_clear_error(shell: Shell, app: Application) -> None:
    def swallow(session: Session) -> str:
        session.add(Entry(account=None, cents=1, note=None))
        with suppress(IntegrityError):
            session.flush()
        return "done"

    step = app.transactional(swallow)

    async def swallowing() -> str:
        return await step()

    with pytest.raises(UsageError, match=r"went on after a failed flush.*flush inside begin_nested"):
        shell.run(app.workflow(swallowing))
    assert _entries(shell) == []


# behaviour: E5
def test_result_of_a_step_that_cannot_be_stored_leaves_no_writes(shell: Shell, app: Application) -> None:
    def nothing_to_store(session: Session) -> object:
        book(session, "lost", 1)
        return object()

    step = app.transactional(nothing_to_store)

    async def wrong() -> None:
        await step()

    with pytest.raises(EncodingError, match=r"result of step 'nothing_to_store'.*cannot be stored.*unknown type"):
        shell.run(app.workflow(wrong))
    assert _entries(shell) == []
    assert shell.one(_only_workflow(shell)).status is WorkflowStatus.FAILED


def test_current_returns_workflow_step_and_attempt(shell: Shell, app: Application) -> None:
    def ask(_session: Session) -> list[str | int | None]:
        execution = current()
        assert execution is not None
        assert execution.idempotency_key is not None
        return [
            execution.workflow,
            execution.attempt,
            execution.step,
            execution.try_number,
            execution.idempotency_key.removeprefix(str(execution.workflow_id)),
        ]

    asking = app.transactional(ask)

    async def where() -> list[list[str | int | None]]:
        execution = current()
        assert execution is not None
        here: list[str | int | None] = [execution.workflow, execution.attempt, execution.step, execution.try_number]
        return [here, await asking(), await asking(), await asking.options(step_key="named")()]

    assert current() is None
    assert shell.run(app.workflow(where)) == [
        ["where", 1, None, None],
        ["where", 1, "ask", 1, "/ask"],
        ["where", 1, "ask#2", 1, "/ask#2"],
        ["where", 1, "named", 1, "/named"],
    ]
    assert current() is None


# behaviour: S5
@pytest.mark.shells(("executor",))
def test_outside_a_workflow_a_transactional_step_takes_the_callers_session(shell: Shell, app: Application) -> None:
    booked: Callable[..., int] = app.transactional(book).step  # type: ignore[assignment]  # the sync form
    with shell.sessionmaker() as session:
        assert booked(session, "plain", 7) == 7
        assert booked(session, cents=8, account="named") == 8
        session.rollback()
    assert _entries(shell) == []
    with pytest.raises(UsageError, match=r"step 'book' takes a Session.*pass one, book\(session, ...\)"):
        booked("plain", 7)


def test_session_given_to_a_step_in_a_workflow_is_refused(shell: Shell, app: Application) -> None:
    booked = app.transactional(book)

    async def give() -> int:
        with shell.sessionmaker() as session:
            return await booked(session, "mine", 1)  # type: ignore[arg-type,call-arg]  # what the error is about

    with pytest.raises(SessionError, match=r"its session is injected there.*without"):
        shell.run(app.workflow(give))
    assert _entries(shell) == []


def _steps(shell: Shell) -> list[Step]:
    with shell.sessionmaker() as session:
        return list(session.scalars(select(Step).order_by(Step.position)))


def _entries(shell: Shell) -> list[tuple[str, int]]:
    with shell.sessionmaker() as session:
        return [(each.account, each.cents) for each in session.scalars(select(Entry).order_by(Entry.id))]


def _only_workflow(shell: Shell) -> UUID:
    with shell.sessionmaker() as session:
        return session.scalars(select(Workflow.id)).one()
