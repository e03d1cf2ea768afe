"""`cancel` and `resume` of workflows that a worker is executing, in each of the ways a worker executes them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
import tenacity
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from sqla_durable import Step, StepStatus, Workflow, WorkflowStatus, errors, manage
from tests.acceptance.application import AnyWorkflow, Application
from tests.acceptance.shells import Shell
from tests.store import races
from tests.support.domain import Entry

WORKERS = ["worker", "async-worker", "asyncpg-worker", "mixed-worker"]
pytestmark = pytest.mark.shells(WORKERS)


class Gate:
    """A step that waits, once, until the test has done something."""

    def __init__(self) -> None:
        self.entered, self.open = threading.Event(), threading.Event()
        self.calls = 0

    def call(self) -> int:
        self.calls = number = self.calls + 1
        self.entered.set()
        assert self.open.wait(30)
        return number  # its own: another may have come meanwhile

    def write(self, session: Session) -> int:
        session.add(Entry(account="gate", cents=1))
        session.flush()
        return self.call()


def gated(app: Application, gate: Gate, kind: str) -> AnyWorkflow[..., int]:
    """Make a workflow whose second step waits at the gate."""
    make: Callable[..., Any] = app.plain if kind == "plain" else app.transactional
    first, second = app.plain(lambda: 1, name="first"), make(gate.call if kind == "plain" else gate.write, name="gate")

    async def pay() -> int:
        await first()
        number: int = await second()
        return number

    return app.workflow(pay)


def other(app: Application) -> AnyWorkflow[..., int]:
    """Make a workflow that stands beside."""
    step = app.plain(lambda: 7, name="seven")

    async def beside() -> int:
        return await step()

    return app.workflow(beside)


def started(shell: Shell, workflow: AnyWorkflow[..., Any]) -> UUID:
    with shell.sessionmaker.begin() as session:
        return workflow.start(session).id


def accounts(shell: Shell) -> list[str]:
    with shell.sessionmaker() as session:
        return list(session.scalars(select(Entry.account)))


@pytest.mark.parametrize("kind", ["plain", "transactional"])
def test_nothing_of_an_attempt_is_committed_after_the_cancel(shell: Shell, app: Application, kind: str) -> None:
    # behaviour: M1 Q10 T1
    gate = Gate()
    paying, beside = gated(app, gate, kind), other(app)
    with shell.background():
        workflow_id = started(shell, paying)
        assert gate.entered.wait(30)
        with shell.sessionmaker.begin() as session:
            assert manage.cancel(session, workflow_id) == [workflow_id]
        gate.open.set()
        assert shell.result(beside, started(shell, beside)) == 7
        with pytest.raises(errors.WorkflowCancelledError):
            shell.result(paying, workflow_id)
    record = shell.one(workflow_id)
    assert (record.status, record.output) == (WorkflowStatus.CANCELLED, None)
    assert [each.key for each in record.steps] == ["first"]
    assert accounts(shell) == []


@pytest.mark.parametrize("kind", ["plain", "transactional"])
@pytest.mark.parametrize("ending", ["commit", "rollback"])
def test_a_caller_that_holds_its_cancel_open_holds_up_no_other_workflow(
    shell: Shell, app: Application, kind: str, ending: str
) -> None:
    # behaviour: T8
    gate = Gate()
    paying, beside = gated(app, gate, kind), other(app)
    with shell.background():
        workflow_id = started(shell, paying)
        assert gate.entered.wait(30)
        with shell.sessionmaker() as caller:
            manage.cancel(caller, workflow_id)
            gate.open.set()
            for _ in range(3):
                assert shell.result(beside, started(shell, beside)) == 7
            assert shell.one(workflow_id).status is WorkflowStatus.RUNNING
            getattr(caller, ending)()
        races.wait_until(lambda: shell.one(workflow_id).status.finished)
    record = shell.one(workflow_id)
    committed = ending == "commit"
    assert record.status is (WorkflowStatus.CANCELLED if committed else WorkflowStatus.SUCCEEDED)
    assert [each.key for each in record.steps] == (["first"] if committed else ["first", "gate"])
    assert accounts(shell) == ([] if committed or kind == "plain" else ["gate"])
    assert gate.calls == 1


@pytest.mark.parametrize("kind", ["plain", "transactional"])
def test_a_resumed_workflow_goes_on_after_its_last_checkpoint(shell: Shell, app: Application, kind: str) -> None:
    # behaviour: M1 Q10 E2
    gate = Gate()
    paying = gated(app, gate, kind)
    with shell.background():
        workflow_id = started(shell, paying)
        assert gate.entered.wait(30)
        with shell.sessionmaker.begin() as session:
            manage.cancel(session, workflow_id)
        with shell.sessionmaker.begin() as session:
            assert manage.resume(session, workflow_id) == [workflow_id]
        gate.open.set()
        assert shell.result(paying, workflow_id) == 2
    record = shell.one(workflow_id)
    assert (record.attempt, record.crashes) == (2, 0)
    assert [(each.key, each.attempt) for each in record.steps] == [("first", 1), ("gate", 2)]
    assert accounts(shell) == ([] if kind == "plain" else ["gate"])


def test_a_suspended_workflow_that_is_cancelled_does_not_wake_and_is_resumed_with_its_tries(
    shell: Shell, app: Application
) -> None:
    # behaviour: M1 Q7 R6
    calls: list[int] = []

    def call() -> int:
        calls.append(1)
        if len(calls) == 1:
            raise ConnectionError
        return len(calls)

    step = app.plain(call, wait=tenacity.wait_fixed(3600))

    async def pay() -> int:
        return await step()

    paying, beside = app.workflow(pay), other(app)
    with shell.background():
        workflow_id = started(shell, paying)
        races.wait_until(lambda: shell.one(workflow_id).status is WorkflowStatus.SUSPENDED)
        with shell.sessionmaker.begin() as session:
            assert manage.cancel(session, workflow_id) == [workflow_id]
            session.execute(update(Step).values(wake_at=func.statement_timestamp()))
        assert shell.result(beside, started(shell, beside)) == 7
        (tried,) = shell.one(workflow_id).steps
        assert (shell.one(workflow_id).status, tried.status) == (WorkflowStatus.CANCELLED, StepStatus.RETRYING)
        with shell.sessionmaker.begin() as session:
            assert manage.resume(session, workflow_id) == [workflow_id]
        assert shell.result(paying, workflow_id) == 2
    (recorded,) = shell.one(workflow_id).steps
    assert (recorded.tries, recorded.attempt) == (2, 2)


def test_a_failed_workflow_is_not_resumed(shell: Shell, app: Application) -> None:
    def refuse() -> None:
        raise ConnectionError("no")

    step = app.plain(refuse)

    async def pay() -> None:
        await step()

    paying = app.workflow(pay)
    with shell.background():
        workflow_id = started(shell, paying)
        with pytest.raises(ConnectionError):
            shell.result(paying, workflow_id)
        with shell.sessionmaker.begin() as session:
            assert manage.resume(session, workflow_id) == manage.cancel(session, workflow_id) == []
    assert shell.one(workflow_id).status is WorkflowStatus.FAILED


@pytest.mark.shells(["async-worker", "asyncpg-worker"])
def test_an_async_step_of_a_cancelled_workflow_is_ended_by_the_heartbeat_where_no_hint_arrives(
    shell: Shell, app: Application
) -> None:
    # behaviour: S4
    seen: list[str] = []

    @app.durable.step
    async def for_ever() -> None:
        seen.append("entered")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    @app.durable.workflow
    async def pay() -> None:
        await for_ever()

    beside = other(app)
    with shell.background(concurrency=1, lease=timedelta(seconds=0.6), listen=False):
        workflow_id = started(shell, pay)
        races.wait_until(lambda: seen == ["entered"])
        with shell.sessionmaker.begin() as session:
            manage.cancel(session, select(Workflow).where(Workflow.name == "pay"))
        assert shell.result(beside, started(shell, beside)) == 7, "its slot is free again"
    assert seen == ["entered", "cancelled"]
    assert shell.one(workflow_id).steps == []
