"""Deadlines of workflows: from the start and from the first claim, whatever happens in between."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
import tenacity
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from sqla_durable import Durable, StartOptions, Workflow, WorkflowStatus, errors, manage
from sqla_durable.store import failures
from tests.acceptance.application import AnyWorkflow, Application
from tests.acceptance.shells import Shell
from tests.store import races
from tests.support.domain import Entry

pytestmark = pytest.mark.few_shells

WORKERS = ("worker", "async-worker", "asyncpg-worker", "mixed-worker")
on_workers = pytest.mark.shells(WORKERS)
HOUR = timedelta(hours=1)
AGO = func.statement_timestamp() - timedelta(seconds=1)


class Counting:
    """A workflow of one step that counts its calls, and waits at a gate if `at_gate` is set."""

    def __init__(self, app: Application, *, gated: bool = False, failing: bool = False) -> None:
        self.calls = 0
        self.entered, self.open = threading.Event(), threading.Event()
        self._gated, self._failing = gated, failing
        step = app.transactional(self.write, wait=tenacity.wait_fixed(3600))

        async def pay() -> int:
            return await step()

        self.workflow: AnyWorkflow[[], int] = app.workflow(pay)

    def write(self, session: Session) -> int:
        self.calls += 1
        session.add(Entry(account="counted", cents=1))
        session.flush()
        if self._failing:
            raise ConnectionError("not yet")
        if self._gated:
            self.entered.set()
            assert self.open.wait(30)
        return self.calls


# behaviour: R7
def test_what_is_past_its_deadline_is_not_begun(shell: Shell, app: Application) -> None:
    counting = Counting(app)
    past = datetime.now(UTC) - HOUR
    workflow_id = _started(shell, counting.workflow.options(deadline=past))
    with pytest.raises(errors.WorkflowTimeoutError, match=r"'pay'.*was not finished at its deadline") as raised:
        shell.finish(counting.workflow, workflow_id)
    assert isinstance(raised.value, TimeoutError)
    record = shell.one(workflow_id)
    assert (record.status, record.started_at, record.token, counting.calls) == (WorkflowStatus.FAILED, None, None, 0)
    assert (record.error or {})["type"] == "sqla_durable.errors:WorkflowTimeoutError"
    with pytest.raises(errors.WorkflowTimeoutError):
        shell.result(counting.workflow, workflow_id)


# behaviour: R7
def test_a_timeout_counts_from_the_first_claim_and_not_from_the_next(shell: Shell, app: Application) -> None:
    counting = Counting(app)
    workflow_id = _started(shell, counting.workflow.options(timeout=HOUR))
    assert shell.one(workflow_id).deadline_at is None
    assert shell.finish(counting.workflow, workflow_id) == 1
    first = shell.one(workflow_id)
    assert first.started_at is not None
    assert first.deadline_at == first.started_at + HOUR
    shell.crashed(workflow_id)
    assert shell.finish(counting.workflow, workflow_id) == 1
    assert shell.one(workflow_id).deadline_at == first.deadline_at


# behaviour: R7
def test_a_deadline_that_came_while_nobody_was_there_ends_what_is_recovered(shell: Shell, app: Application) -> None:
    counting = Counting(app)
    workflow_id = _started(shell, counting.workflow.options(timeout=HOUR))
    assert shell.finish(counting.workflow, workflow_id) == 1
    shell.crashed(workflow_id)
    _overdue(shell, workflow_id)
    with pytest.raises(errors.WorkflowTimeoutError):
        shell.finish(counting.workflow, workflow_id)
    assert shell.one(workflow_id).steps[0].output == 1


def test_of_timeout_and_deadline_the_earlier_one_counts(shell: Shell, app: Application) -> None:
    counting = Counting(app)
    later = _started(shell, counting.workflow.options(timeout=HOUR, deadline=9 * HOUR))
    sooner = _started(shell, counting.workflow.options(timeout=9 * HOUR, deadline=HOUR))
    for each in (later, sooner):
        shell.finish(counting.workflow, each)
        record = shell.one(each)
        assert record.deadline_at is not None
        assert record.started_at is not None
        assert record.deadline_at - record.started_at <= HOUR


@pytest.mark.parametrize("way", ["start", "keyed", "many"])
@pytest.mark.parametrize("deadline", [HOUR, datetime(2100, 1, 1, tzinfo=UTC)])
def test_limits_are_stored_in_every_way_to_start(
    shell: Shell, app: Application, way: str, deadline: timedelta | datetime
) -> None:
    workflow = Counting(app).workflow.options(timeout=9 * HOUR, deadline=deadline)
    with shell.client() as client:
        match way:
            case "start":
                client.start(workflow)
            case "keyed":
                client.start(workflow.options(key="k"))
            case _:
                client.start_many([workflow.bind()])
        client.commit()
    with shell.sessionmaker() as session:
        record = session.scalars(select(Workflow)).one()
        assert (record.status, record.timeout) == (WorkflowStatus.PENDING, 9 * HOUR)
        assert record.deadline_at is not None
        expected = deadline if isinstance(deadline, datetime) else record.created_at + deadline
        assert abs(record.deadline_at - expected) < timedelta(seconds=5)


@on_workers
def test_nothing_of_an_attempt_is_committed_after_the_deadline(shell: Shell, app: Application) -> None:
    counting = Counting(app, gated=True)
    with shell.background():
        workflow_id = _started(shell, counting.workflow.options(timeout=HOUR))
        assert counting.entered.wait(30)
        _overdue(shell, workflow_id)
        with shell.sessionmaker.begin() as session:  # as a worker does whose event loop is not blocked by the gate
            failures.fail_overdue(session, limit=9)  # or the worker's own maintenance has been faster
        counting.open.set()
        with pytest.raises(errors.WorkflowTimeoutError):
            shell.result(counting.workflow, workflow_id)
    assert shell.one(workflow_id).steps == []
    with shell.sessionmaker() as session:
        assert session.scalars(select(Entry)).all() == []


# behaviour: S4
@pytest.mark.shells(("async-worker", "asyncpg-worker"))
def test_an_async_step_is_ended_by_the_heartbeat_after_the_deadline(shell: Shell, app: Application) -> None:
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

    with shell.background(lease=timedelta(seconds=0.6)):
        workflow_id = _started(shell, pay.options(timeout=timedelta(seconds=0.5)))
        with pytest.raises(errors.WorkflowTimeoutError):
            shell.result(pay, workflow_id)
        races.wait_until(lambda: seen == ["entered", "cancelled"])


@on_workers
@pytest.mark.parametrize("why", ["suspended", "delayed", "unserved"])
def test_what_waits_fails_at_its_deadline_without_being_woken(shell: Shell, app: Application, why: str) -> None:
    counting = Counting(app, failing=True)
    more: dict[str, dict[str, Any]] = {
        "delayed": {"delay": 9 * HOUR},
        "unserved": {"queue": "nobody's"},
        "suspended": {},
    }
    with shell.background():
        workflow_id = _started(shell, counting.workflow.options(deadline=HOUR, **more[why]))
        if why == "suspended":
            races.wait_until(lambda: shell.one(workflow_id).status is WorkflowStatus.SUSPENDED)
        _overdue(shell, workflow_id)
        with pytest.raises(errors.WorkflowTimeoutError):
            shell.result(counting.workflow, workflow_id)
    record = shell.one(workflow_id)
    assert (record.status, record.wake_at) == (WorkflowStatus.FAILED, None)
    assert counting.calls == (1 if why == "suspended" else 0)


@on_workers
def test_a_resumed_workflow_has_its_time_limit_again(shell: Shell, app: Application) -> None:
    counting = Counting(app)
    workflow_id = _started(shell, counting.workflow.options(deadline=HOUR, timeout=HOUR, delay=9 * HOUR))
    _overdue(shell, workflow_id)
    with shell.background():
        with pytest.raises(errors.WorkflowTimeoutError):
            shell.result(counting.workflow, workflow_id)
        with shell.sessionmaker.begin() as session:
            assert manage.resume(session, workflow_id) == [workflow_id]
            lifted = session.get_one(Workflow, workflow_id)
            now = session.scalars(select(func.now())).one()
            assert lifted.deadline_at is not None
            assert abs(lifted.deadline_at - now - HOUR) < timedelta(minutes=1)  # its time limit, from now
            assert (lifted.error, lifted.attempt) == (None, 2)
        assert shell.result(counting.workflow, workflow_id) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"timeout": 5}, "timedelta"),
        ({"timeout": timedelta()}, "must be positive"),
        ({"deadline": timedelta(seconds=-1)}, "must be positive"),
        ({"deadline": 5}, "timedelta"),
        ({"deadline": datetime(2030, 1, 1)}, "time zone"),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(errors.ArgumentError, match=words):
        StartOptions(**options)


def test_limits_given_as_arguments_are_refused_with_where_they_belong() -> None:
    workflow: Callable[..., Any] = Durable().workflow(lambda: None, name="pay").bind
    with pytest.raises(errors.ArgumentError, match=r"pay\.options\(deadline=\.\.\., timeout=\.\.\.\)"):
        workflow(timeout=HOUR, deadline=HOUR)


def _started(shell: Shell, workflow: AnyWorkflow[[], Any]) -> UUID:
    with shell.sessionmaker.begin() as session:
        return workflow.start(session).id


def _overdue(shell: Shell, workflow_id: UUID) -> None:
    with shell.sessionmaker.begin() as session:
        session.execute(update(Workflow).where(Workflow.id == workflow_id).values(deadline_at=AGO))
