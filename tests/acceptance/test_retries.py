"""Retries that outlive their attempt: tries are recorded, and long waits are rows."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, cast
from uuid import UUID

import pytest
import tenacity
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from sqla_durable import Step, StepStatus, Workflow, WorkflowStatus, errors, manage, models
from sqla_durable.asyncio import to_thread
from tests.acceptance.application import AnyWorkflow, Application
from tests.acceptance.shells import Shell
from tests.store import races
from tests.support.domain import Entry

pytestmark = pytest.mark.few_shells

WORKERS = ["worker", "async-worker", "asyncpg-worker", "mixed-worker"]
on_workers = pytest.mark.shells(WORKERS)


class Flaky:
    """Counts its calls, and fails as often as asked."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.calls = 0

    def call(self) -> int:
        self.calls += 1
        if self.calls <= self.failures:
            raise ConnectionError(f"call {self.calls} failed")
        return self.calls

    def write(self, session: Session) -> int:
        session.add(Entry(account="flaky", cents=1))
        session.flush()
        return self.call()


# behaviour: R6
@pytest.mark.parametrize("kind", ["plain", "transactional"])
def test_a_crash_does_not_forget_how_often_a_step_has_failed(shell: Shell, app: Application, kind: str) -> None:
    flaky = Flaky(9)
    make: Callable[..., Any] = app.plain if kind == "plain" else app.transactional
    step = make(flaky.call if kind == "plain" else flaky.write, name="call", stop=tenacity.stop_after_attempt(4))

    async def pay() -> int:
        number: int = await step()
        return number

    workflow = app.workflow(pay)
    workflow_id = _tried(shell, workflow, tries=3)
    with pytest.raises(ConnectionError, match="call 1 failed"):
        shell.finish(workflow, workflow_id)
    assert flaky.calls == 1
    (recorded,) = shell.one(workflow_id).steps
    assert (recorded.status, recorded.tries, recorded.wake_at) == (StepStatus.FAILED, 4, None)
    with shell.sessionmaker() as session:
        assert session.scalars(select(Entry)).all() == []


def test_a_stop_after_a_delay_counts_from_the_first_try_whatever_crashed_since(shell: Shell, app: Application) -> None:
    flaky = Flaky(9)
    step = app.plain(flaky.call, stop=tenacity.stop_after_delay(timedelta(hours=1)))

    async def pay() -> int:
        return await step()

    workflow = app.workflow(pay)
    workflow_id = _tried(shell, workflow, tries=3, began=timedelta(hours=2))
    with pytest.raises(ConnectionError):
        shell.finish(workflow, workflow_id)
    assert flaky.calls == 1


def test_a_try_that_is_not_due_is_waited_for(shell: Shell, app: Application) -> None:
    """Whatever woke the workflow: a crash, an operator, another step that was due before."""
    flaky = Flaky(0)
    step = app.plain(flaky.call, wait=tenacity.wait_none())

    async def pay() -> int:
        return await step()

    workflow = app.workflow(pay)
    workflow_id = _tried(shell, workflow, tries=1, due_in=timedelta(seconds=0.7))
    assert shell.finish(workflow, workflow_id) == 1
    with shell.sessionmaker() as session:
        (recorded,) = session.scalars(select(Step))
        assert recorded.finished_at - recorded.started_at >= timedelta(seconds=0.7)


@on_workers
def test_a_long_wait_suspends_the_workflow(shell: Shell, app: Application) -> None:
    flaky = Flaky(1)
    step = app.plain(flaky.call, wait=tenacity.wait_fixed(3600))

    async def pay() -> int:
        return await step()

    workflow = app.workflow(pay)
    with shell.background():
        workflow_id = _started(shell, workflow)
        races.wait_until(lambda: shell.one(workflow_id).status is WorkflowStatus.SUSPENDED)
        suspended = shell.one(workflow_id)
        assert (suspended.token, suspended.worker_id, suspended.attempt) == (None, None, 1)
        (tried,) = suspended.steps
        assert (tried.status, tried.tries) == (StepStatus.RETRYING, 1)
        assert tried.error is not None
        assert tried.error["message"] == "call 1 failed"
        assert "Traceback" in tried.error["traceback"]
        assert suspended.wake_at is not None
        assert tried.wake_at is not None
        assert abs(suspended.wake_at - tried.wake_at) < timedelta(seconds=5)
        _make_due(shell, workflow_id)
        assert shell.result(workflow, workflow_id) == 2
    assert flaky.calls == 2
    (recorded,) = shell.one(workflow_id).steps
    assert (recorded.status, recorded.tries, recorded.error) == (StepStatus.SUCCEEDED, 2, None)


@on_workers
def test_a_workflow_that_is_woken_too_early_is_suspended_again(shell: Shell, app: Application) -> None:
    flaky = Flaky(1)
    step = app.plain(flaky.call, wait=tenacity.wait_fixed(3600))

    async def pay() -> int:
        return await step()

    workflow = app.workflow(pay)
    with shell.background():
        workflow_id = _started(shell, workflow)
        races.wait_until(lambda: shell.one(workflow_id).status is WorkflowStatus.SUSPENDED)
        first = shell.one(workflow_id)
        with shell.sessionmaker.begin() as session:
            session.execute(update(Workflow).values(wake_at=func.statement_timestamp()))
        races.wait_until(lambda: (shell.one(workflow_id).wake_at or first.created_at) > _in(minutes=30))
    assert flaky.calls == 1


@pytest.mark.shells(["async-worker", "asyncpg-worker"])
def test_a_step_that_waits_does_not_end_one_that_is_executed_beside_it(shell: Shell, app: Application) -> None:
    """The workflow is suspended when the other has ended; then only the one that failed is tried again."""
    flaky = Flaky(1)
    step = app.plain(flaky.call, wait=tenacity.wait_fixed(3600))
    go_on = threading.Event()
    finished: list[int] = []

    @app.durable.step
    def beside() -> int:
        assert go_on.wait(30)
        finished.append(1)
        return 7

    async def pay() -> list[int]:
        return list(await asyncio.gather(cast("Callable[[], Awaitable[int]]", step.step)(), to_thread(beside)))

    workflow = app.workflow(pay)
    with shell.background():
        workflow_id = _started(shell, workflow)
        races.wait_until(lambda: len(shell.one(workflow_id).steps) == 1)
        assert shell.one(workflow_id).status is WorkflowStatus.RUNNING
        go_on.set()
        races.wait_until(lambda: shell.one(workflow_id).status is WorkflowStatus.SUSPENDED, seconds=30)
        _make_due(shell, workflow_id)
        assert shell.result(workflow, workflow_id) == [2, 7]
    assert finished == [1]


def test_try_again_asks_for_another_try_whatever_the_predicate_says(shell: Shell, app: Application) -> None:
    calls: list[int] = []

    def call() -> int:
        calls.append(1)
        if len(calls) < 3:
            raise tenacity.TryAgain
        return len(calls)

    step = app.plain(call, retry=tenacity.retry_if_exception_type(KeyError), wait=tenacity.wait_none())

    async def pay() -> int:
        return await step()

    assert shell.run(app.workflow(pay)) == 3


def test_a_stop_may_read_the_length_of_the_next_wait(shell: Shell, app: Application) -> None:
    flaky = Flaky(9)
    step = app.plain(flaky.call, stop=tenacity.stop_before_delay(10), wait=tenacity.wait_fixed(3600))

    async def pay() -> int:
        return await step()

    with pytest.raises(ConnectionError):
        shell.run(app.workflow(pay))
    assert flaky.calls == 1


def test_an_outcome_that_calls_for_another_try_is_recorded_without_an_error(shell: Shell, app: Application) -> None:
    calls: list[int] = []

    def poll() -> str:
        calls.append(1)
        return "ready" if len(calls) > 1 else "pending"

    step = app.plain(
        poll, retry=tenacity.retry_if_result(lambda state: state == "pending"), wait=tenacity.wait_fixed(0.05)
    )

    async def pay() -> str:
        return await step()

    workflow = app.workflow(pay)
    assert shell.run(workflow) == "ready"
    (recorded,) = _steps(shell)
    assert (recorded.tries, recorded.output, recorded.error) == (2, "ready", None)


@pytest.mark.shells(["executor", "async-executor"])
def test_an_executor_keeps_its_lease_while_a_step_waits(shell: Shell, app: Application) -> None:
    leases: list[bool] = []
    alive = select(models.Worker.lease_expires_at > func.statement_timestamp())

    def call(session: Session) -> int:
        leases.append(session.scalars(alive).one())
        if len(leases) == 1:
            raise ConnectionError
        return len(leases)

    step = app.transactional(call, wait=tenacity.wait_fixed(2))

    async def pay() -> int:
        return await step()

    shell.lease = timedelta(seconds=1)
    assert shell.run(app.workflow(pay)) == 2
    assert leases == [True, True]


@on_workers
def test_a_step_that_fails_for_ever_leaves_its_slot_to_others(shell: Shell, app: Application) -> None:
    flaky = Flaky(10**9)
    step = app.plain(flaky.call, wait=tenacity.wait_none())
    good = app.plain(Flaky(0).call, name="good")

    async def poison() -> int:
        return await step()

    async def pay() -> int:
        return await good()

    poisonous, paying = app.workflow(poison), app.workflow(pay)
    with shell.background(concurrency=1):
        poison_id = _started(shell, poisonous)
        races.wait_until(lambda: flaky.calls > 0)
        ids = [_started(shell, paying) for _ in range(3)]
        for each in ids:
            shell.result(paying, each)
        assert not shell.one(poison_id).status.finished
        with shell.sessionmaker.begin() as session:
            assert manage.cancel(session, poison_id) == [poison_id]
        with pytest.raises(errors.WorkflowCancelledError):
            shell.result(poisonous, poison_id)
    (tried,) = shell.one(poison_id).steps
    assert tried.status is StepStatus.RETRYING


def _started(shell: Shell, workflow: AnyWorkflow[..., Any]) -> UUID:
    with shell.sessionmaker.begin() as session:
        return workflow.start(session).id


def _tried(
    shell: Shell,
    workflow: AnyWorkflow[..., Any],
    *,
    tries: int,
    began: timedelta = timedelta(seconds=1),
    due_in: timedelta = timedelta(),
) -> UUID:
    """Start a workflow of one step whose tries of an earlier attempt are recorded."""
    with shell.sessionmaker.begin() as session:
        now = session.scalars(select(func.statement_timestamp())).one()
        record = workflow.start(session)
        session.flush()
        session.execute(update(Workflow).values(started_at=now, attempt=2))
        session.add(
            Step(
                workflow_id=record.id,
                key="call",
                name="call",
                position=1,
                status=StepStatus.RETRYING,
                error={"type": "builtins:ConnectionError", "message": "recorded"},
                attempt=1,
                tries=tries,
                started_at=now - began,
                finished_at=now,
                wake_at=now + due_in,
            )
        )
        return record.id


def _make_due(shell: Shell, workflow_id: UUID) -> None:
    with shell.sessionmaker.begin() as session:
        session.execute(update(Step).where(Step.wake_at.is_not(None)).values(wake_at=func.statement_timestamp()))
        session.execute(update(Workflow).where(Workflow.id == workflow_id).values(wake_at=func.statement_timestamp()))


def _steps(shell: Shell) -> list[Step]:
    with shell.sessionmaker() as session:
        return list(session.scalars(select(Step)))


def _in(*, minutes: float) -> datetime:
    return datetime.now(UTC) + timedelta(minutes=minutes)
