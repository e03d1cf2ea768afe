"""Sagas: what was done is undone in reverse, once, when the workflow fails or is cancelled."""

from __future__ import annotations

import asyncio
import inspect
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
import tenacity
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

import sqla_durable.asyncio as aio
from sqla_durable import Saga, Workflow, WorkflowStatus, errors, manage, parallel
from tests.acceptance import either
from tests.acceptance.application import AnyWorkflow, Application, Form, drive
from tests.acceptance.shells import Shell
from tests.store import races
from tests.support.domain import Entry

pytestmark = pytest.mark.few_shells

WORKERS = pytest.mark.shells(("worker", "async-worker", "asyncpg-worker", "mixed-worker"))


async def awaited(outcome: Any) -> Any:
    """Return the outcome of an operation, in either form."""
    return await outcome if inspect.isawaitable(outcome) else outcome


class Block:
    """A saga as either form writes it, for a story that is a coroutine."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.saga = aio.Saga() if form is Form.ASYNC else Saga()

    async def __aenter__(self) -> Saga | aio.Saga:
        return await self.saga.__aenter__() if isinstance(self.saga, aio.Saga) else self.saga.__enter__()

    async def __aexit__(self, *error: Any) -> None:
        if isinstance(self.saga, aio.Saga):
            await self.saga.__aexit__(*error)
        else:
            self.saga.__exit__(*error)


class Ledger:
    """Steps that book, and steps that take it back."""

    def __init__(self, app: Application, *, broken: str = "") -> None:
        self.tries: list[str] = []

        def do(session: Session, what: str) -> str:
            if what == broken:
                raise LookupError(what)
            session.add(Entry(account=what, cents=1, note="do"))
            return what

        def undo(session: Session, what: str) -> None:
            self.tries.append(what)
            if self.tries.count(what) == 1 and what == "flaky":
                raise ConnectionError(what)
            if what == "hopeless":
                raise ConnectionError(what)
            session.add(Entry(account=what, cents=-1, note="undo"))

        self.do = app.transactional(do)
        self.undo = app.transactional(undo, stop=tenacity.stop_after_attempt(2), wait=tenacity.wait_none())


def booked(shell: Shell) -> list[tuple[str, int]]:
    with shell.sessionmaker() as session:
        return [(each.account, each.cents) for each in session.scalars(select(Entry).order_by(Entry.id))]


def trip(app: Application, ledger: Ledger, *, waits: bool = False) -> AnyWorkflow[[list[str]], str]:
    async def travel(parts: list[str]) -> str:
        async with Block(app.form) as saga:
            for each in parts:
                await ledger.do(each)
                saga.add(ledger.undo.step, each)
            if waits:
                await awaited(either.wait_signal("go"))
        return "travelled"

    return app.workflow(travel)


def test_saga_that_succeeds_undoes_nothing(shell: Shell, app: Application) -> None:
    ledger = Ledger(app)
    assert shell.run(trip(app, ledger), ["flight", "hotel"]) == "travelled"
    assert booked(shell) == [("flight", 1), ("hotel", 1)]


def test_failure_undoes_what_was_done_in_reverse(shell: Shell, app: Application) -> None:
    ledger = Ledger(app, broken="car")
    with pytest.raises(LookupError):
        shell.run(trip(app, ledger), ["flight", "hotel", "car", "boat"])
    assert booked(shell) == [("flight", 1), ("hotel", 1), ("hotel", -1), ("flight", -1)]


def test_compensation_is_retried_by_its_own_policy(shell: Shell, app: Application) -> None:
    ledger = Ledger(app, broken="car")
    with pytest.raises(LookupError):
        shell.run(trip(app, ledger), ["flaky", "car"])
    assert booked(shell) == [("flaky", 1), ("flaky", -1)]


def test_compensation_that_fails_keeps_none_of_the_others(shell: Shell, app: Application) -> None:
    ledger = Ledger(app, broken="car")
    with pytest.raises(errors.CompensationFailedError, match="1 of 3 compensations failed: undo: ConnectionError"):
        shell.run(trip(app, ledger), ["flight", "hopeless", "hotel", "car"])
    assert booked(shell) == [("flight", 1), ("hopeless", 1), ("hotel", 1), ("hotel", -1), ("flight", -1)]


@WORKERS
def test_cancel_undoes_what_was_done(shell: Shell, app: Application) -> None:
    workflow = trip(app, Ledger(app), waits=True)
    workflow_id = shell.begin(workflow, ["flight", "hotel"])
    with shell.background():
        races.wait_until(lambda: shell.one(workflow_id).awaits, what="the suspension")
        with shell.sessionmaker.begin() as session:
            assert manage.cancel(session, workflow_id) == [workflow_id]
        with pytest.raises(errors.WorkflowCancelledError):
            shell.result(workflow, workflow_id)
    assert booked(shell) == [("flight", 1), ("hotel", 1), ("hotel", -1), ("flight", -1)]
    assert shell.one(workflow_id).status is WorkflowStatus.CANCELLED


@WORKERS
def test_second_cancel_changes_nothing_and_a_crash_neither(shell: Shell, app: Application) -> None:
    workflow = trip(app, Ledger(app), waits=True)
    workflow_id = shell.begin(workflow, ["flight", "hotel"])
    with shell.background():
        races.wait_until(lambda: shell.one(workflow_id).awaits, what="the suspension")
    with shell.sessionmaker.begin() as session:
        manage.cancel(session, workflow_id)
    with shell.sessionmaker.begin() as session:
        manage.cancel(session, workflow_id)
    assert (shell.one(workflow_id).status, shell.one(workflow_id).attempt) == (WorkflowStatus.PENDING, 2)
    with pytest.raises(errors.WorkflowCancelledError):
        shell.finish(workflow, workflow_id)
    shell.crashed(workflow_id)
    with pytest.raises(errors.WorkflowCancelledError):
        shell.finish(workflow, workflow_id)
    assert booked(shell) == [("flight", 1), ("hotel", 1), ("hotel", -1), ("flight", -1)]


# behaviour: R7
@pytest.mark.shells(("worker", "async-worker"))
def test_deadline_undoes_what_was_done(shell: Shell, app: Application) -> None:
    workflow = trip(app, Ledger(app), waits=True)
    workflow_id = shell.begin(workflow, ["flaky", "hotel"])
    with shell.background():
        races.wait_until(lambda: shell.one(workflow_id).awaits, what="the suspension")
        overdue(shell, workflow_id)
        with pytest.raises(errors.WorkflowTimeoutError, match="was not finished at its deadline"):
            shell.result(workflow, workflow_id)
        assert booked(shell) == [("flaky", 1), ("hotel", 1), ("hotel", -1), ("flaky", -1)]
        assert shell.one(workflow_id).status is WorkflowStatus.FAILED
        with shell.sessionmaker.begin() as session:
            assert manage.resume(session, workflow_id) == []
            assert manage.retry(session, workflow_id) == []
            assert manage.rewind(session, workflow_id, to_step="saga") == [workflow_id]
            assert session.get_one(Workflow, workflow_id).cancellation == "compensates"


@pytest.mark.shells(("worker", "async-worker"))
def test_deadline_does_not_cut_off_what_a_cancel_undoes(shell: Shell, app: Application) -> None:
    workflow = trip(app, Ledger(app), waits=True)
    workflow_id = shell.begin(workflow, ["flight"])
    with shell.background():
        races.wait_until(lambda: shell.one(workflow_id).awaits, what="the suspension")
    with shell.sessionmaker.begin() as session:
        manage.cancel(session, workflow_id)
    overdue(shell, workflow_id)
    with pytest.raises(errors.WorkflowCancelledError):
        shell.finish(workflow, workflow_id)
    assert booked(shell) == [("flight", 1), ("flight", -1)]


@pytest.mark.shells(("executor", "async-executor"))
def test_executor_undoes_what_it_takes_up_after_the_deadline(shell: Shell, app: Application) -> None:
    ledger = Ledger(app)
    dies = [KeyboardInterrupt]
    helper = app.workflow(_nothing)

    async def travel() -> None:
        async with Block(app.form) as saga:
            await ledger.do("flight")
            saga.add(ledger.undo.step, "flight")
            if dies:
                raise dies.pop()
            saga.add(start_helper)
            await ledger.do("hotel")

    def start_helper() -> Any:
        return either.start_child(helper)  # which has time, although its parent has none left

    workflow = app.workflow(travel)
    workflow_id = shell.begin(workflow)
    with pytest.raises(KeyboardInterrupt):
        shell.finish(workflow, workflow_id)
    overdue(shell, workflow_id)
    with pytest.raises(errors.WorkflowTimeoutError):
        shell.finish(workflow, workflow_id)
    assert booked(shell) == [("flight", 1), ("flight", -1)]
    with shell.sessionmaker() as session:
        child = session.scalars(select(Workflow).where(Workflow.parent_id == workflow_id)).one()
        assert child.deadline_at is None


async def _nothing() -> None:
    pass


def overdue(shell: Shell, workflow_id: UUID) -> None:
    past = func.statement_timestamp() - timedelta(seconds=1)
    with shell.sessionmaker.begin() as session:
        session.execute(update(Workflow).where(Workflow.id == workflow_id).values(deadline_at=past))


@WORKERS
def test_cancel_of_what_has_not_begun_undoes_nothing(shell: Shell, app: Application) -> None:
    workflow_id = shell.begin(trip(app, Ledger(app)), ["flight"])
    with shell.sessionmaker.begin() as session:
        manage.cancel(session, workflow_id)
    assert shell.one(workflow_id).status is WorkflowStatus.CANCELLED


@WORKERS
def test_what_has_been_undone_is_neither_resumed_nor_retried(shell: Shell, app: Application) -> None:
    ledger = Ledger(app, broken="car")
    workflow = trip(app, ledger, waits=True)
    workflow_id, failed = shell.begin(workflow, ["flight"]), shell.begin(workflow, ["hotel", "car"])
    with shell.background():
        races.wait_until(lambda: shell.one(workflow_id).awaits, what="the suspension")
        with shell.sessionmaker.begin() as session:
            manage.cancel(session, workflow_id)
        races.wait_until(lambda: shell.one(workflow_id).finished_at, what="the end of one")
        races.wait_until(lambda: shell.one(failed).finished_at, what="the end of the other")
    with shell.sessionmaker.begin() as session:
        assert manage.resume(session, workflow_id) == []
        assert manage.retry(session, failed) == []
        assert manage.rewind(session, failed, to_step="saga") == [failed]
    assert shell.one(failed).cancellation == "compensates"


def test_saga_is_for_the_code_of_a_workflow() -> None:
    with pytest.raises(errors.UsageError, match=r"Saga\(\) is for the code of a workflow"), Saga():
        pass
    with pytest.raises(errors.UsageError, match="a saga is used as a block"):
        Saga().add(print)


@pytest.mark.shells(("worker", "async-worker"))
def test_compensation_that_was_called_already_is_refused(shell: Shell, app: Application) -> None:
    async def wrong() -> None:
        async with Block(app.form) as saga:
            saga.add(None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

    with pytest.raises(errors.UsageError, match="give the step and its arguments"):
        shell.run(app.workflow(wrong))


@pytest.mark.shells(("worker", "async-worker"))
def test_saga_of_the_other_form_is_refused(shell: Shell, app: Application) -> None:
    async def wrong() -> None:
        if app.form is Form.ASYNC:
            Saga().__enter__()
        else:
            await aio.Saga().__aenter__()

    with pytest.raises(errors.UsageError, match=r"Saga\(\) is for"):
        shell.run(app.workflow(wrong))


@pytest.mark.shells(("worker", "async-worker"))
def test_saga_in_a_branch_is_refused(shell: Shell, app: Application) -> None:
    async def one() -> None:
        async with Block(app.form):
            pass

    async def travel() -> None:
        if app.form is Form.ASYNC:
            await asyncio.gather(one())
        else:
            parallel(lambda: drive(one()))

    with pytest.raises(errors.UsageError, match="a saga was entered in a branch"):
        shell.run(app.workflow(travel))


@WORKERS
def test_children_of_a_map_that_gives_up_undo_what_they_did(shell: Shell, app: Application) -> None:
    ledger = Ledger(app)

    async def travel(part: str) -> None:
        if part == "fails":
            await awaited(either.wait_signal("fail"))
            raise LookupError(part)
        async with Block(app.form) as saga:
            await ledger.do(part)
            saga.add(ledger.undo.step, part)
            await awaited(either.wait_signal("go"))

    child = app.workflow(travel)

    async def all_of() -> None:
        await awaited(either.map_children(child, ["fails", "flight"]))

    workflow = app.workflow(all_of)
    workflow_id = shell.begin(workflow)

    def suspended() -> dict[str, Workflow]:
        with shell.sessionmaker() as session:
            found = session.scalars(select(Workflow).where(Workflow.name == "travel"))
            return {each.input["part"]: each for each in found if each.awaits}

    with shell.background():
        races.wait_until(lambda: len(suspended()) == 2, what="the suspension")
        with shell.client() as client:
            client.signal(suspended()["fails"].id, "fail")
            client.commit()
        with pytest.raises(errors.ChildrenFailedError):
            shell.result(workflow, workflow_id)
        other = next(each for each in all_children(shell) if each.input["part"] == "flight")
        races.wait_until(lambda: shell.one(other.id).finished_at, what="the end of the child")
    assert shell.one(other.id).status is WorkflowStatus.CANCELLED
    assert booked(shell) == [("flight", 1), ("flight", -1)]


def all_children(shell: Shell) -> list[Workflow]:
    with shell.sessionmaker() as session:
        return list(session.scalars(select(Workflow).where(Workflow.name == "travel")))
