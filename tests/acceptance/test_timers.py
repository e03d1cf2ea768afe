"""Time and chance: what waits is a row, and what was asked once is the same on every replay."""

from __future__ import annotations

import inspect
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import func, select

from sqla_durable import (
    StepStatus,
    Workflow,
    WorkflowStatus,
    current_time,
    errors,
    new_uuid,
    random_number,
    sleep,
    sleep_until,
)
from sqla_durable.testing import advance
from tests.acceptance import either
from tests.acceptance.application import Application
from tests.acceptance.shells import Shell
from tests.store import races

pytestmark = pytest.mark.few_shells

WORKERS = pytest.mark.shells(("worker", "async-worker", "asyncpg-worker", "mixed-worker"))
FORTNIGHT = timedelta(days=14)


async def awaited(outcome: Any) -> Any:
    """Return the outcome of an operation, in either form."""
    return await outcome if inspect.isawaitable(outcome) else outcome


def test_short_sleep_is_over_and_recorded(shell: Shell, app: Application) -> None:
    async def nap() -> str:
        await awaited(either.sleep(timedelta(milliseconds=20)))
        await awaited(either.sleep(timedelta(seconds=-5)))
        await awaited(either.sleep_until(datetime(1990, 1, 1, tzinfo=UTC), step_key="long ago"))
        return "awake"

    assert shell.run(app.workflow(nap)) == "awake"
    record = shell.one(shell.only)
    assert [(each.key, each.status) for each in record.steps] == [
        ("sleep", StepStatus.SUCCEEDED),
        ("sleep#2", StepStatus.SUCCEEDED),
        ("long ago", StepStatus.SUCCEEDED),
    ]
    assert all(each.wake_at is None for each in record.steps)


@WORKERS
def test_long_sleep_is_a_row_that_outlives_its_worker(shell: Shell, app: Application) -> None:
    # behaviour: C7
    calls: list[str] = []

    def call(what: str) -> str:
        calls.append(what)
        return what

    step = app.plain(call)

    async def trial() -> list[str]:
        return [await step("before"), str(await awaited(either.sleep(FORTNIGHT))), await step("after")]

    workflow = app.workflow(trial)
    workflow_id = shell.begin(workflow)
    with shell.background():
        races.wait_until(lambda: shell.one(workflow_id).status is WorkflowStatus.SUSPENDED, what="the suspension")
    suspended = shell.one(workflow_id)
    assert suspended.worker_id is None
    assert suspended.wake_at is not None
    assert _from_now(shell, suspended.wake_at) == pytest.approx(FORTNIGHT.total_seconds(), abs=60)
    assert [each.status for each in suspended.steps] == [StepStatus.SUCCEEDED, StepStatus.WAITING]
    with shell.sessionmaker.begin() as session:
        advance(session, FORTNIGHT)
    assert shell.finish(workflow, workflow_id) == ["before", "None", "after"]
    assert calls == ["before", "after"]


@WORKERS
def test_sleep_is_not_started_again_by_another_attempt(shell: Shell, app: Application) -> None:
    async def trial() -> None:
        await awaited(either.sleep(FORTNIGHT))

    workflow_id = shell.begin(app.workflow(trial))
    with shell.background():
        races.wait_until(lambda: shell.one(workflow_id).status is WorkflowStatus.SUSPENDED, what="the suspension")
    until = shell.one(workflow_id).steps[0].wake_at
    shell.crashed(workflow_id)
    with shell.background():
        races.wait_until(lambda: shell.one(workflow_id).status is WorkflowStatus.SUSPENDED, what="the suspension")
    again = shell.one(workflow_id)
    assert again.attempt == 2
    assert until is not None
    assert again.wake_at is not None
    assert again.steps[0].wake_at == until
    assert abs(again.wake_at - until) < timedelta(seconds=30)


def test_facts_are_the_same_on_every_replay(shell: Shell, app: Application) -> None:
    fail = [True]

    def fragile() -> None:
        if fail:
            raise LookupError

    step = app.plain(fragile)

    async def ask() -> tuple[datetime, UUID, float]:
        facts = (
            await awaited(either.current_time()),
            await awaited(either.new_uuid()),
            await awaited(either.random_number()),
        )
        await step()
        return facts

    workflow = app.workflow(ask)
    with pytest.raises(LookupError):
        shell.run(workflow)
    asked = {each.key: each.output for each in shell.one(shell.only).steps}
    fail.clear()
    _forget(shell, "fragile")
    shell.crashed(shell.only)
    moment, identity, number = shell.finish(workflow, shell.only)
    assert moment == datetime.fromisoformat(str(asked["current_time"]))
    assert (str(identity), number) == (asked["new_uuid"], asked["random_number"])
    assert abs(_from_now(shell, moment)) < 60


def test_facts_outside_a_workflow_are_asked_each_time() -> None:
    assert current_time().tzinfo is not None
    assert new_uuid() != new_uuid()
    assert 0 <= random_number() < 1


def test_sleep_outside_a_workflow_is_refused() -> None:
    with pytest.raises(errors.UsageError, match=r"sleep\(\) is for the code of a workflow, and was called outside"):
        sleep(FORTNIGHT)


def test_sleep_in_a_step_is_refused(shell: Shell, app: Application) -> None:
    step = app.plain(lambda: str(either.sleep(FORTNIGHT)), name="careless")

    async def trial() -> str:
        return await step()

    with pytest.raises(
        errors.UsageError, match=r"sleep\(\) was called in step 'careless', which is executed as a whole"
    ):
        shell.run(app.workflow(trial))


@pytest.mark.parametrize("duration", [5, 1.5, "5s", None])
def test_sleep_takes_a_timedelta(duration: Any) -> None:
    with pytest.raises(errors.ArgumentError, match="is not a timedelta"):
        sleep(duration)


@pytest.mark.parametrize("moment", [datetime(2030, 1, 1), "2030-01-01", None])
def test_sleep_until_takes_a_time_with_a_zone(moment: Any) -> None:
    with pytest.raises(errors.ArgumentError, match=r"is not a datetime|has no time zone"):
        sleep_until(moment)


def _from_now(shell: Shell, moment: datetime) -> float:
    with shell.sessionmaker() as session:
        return (moment - session.scalars(select(func.now())).one()).total_seconds()


def _forget(shell: Shell, key: str) -> None:
    with shell.sessionmaker.begin() as session:
        for each in session.get_one(Workflow, shell.only).steps:
            if each.key == key:
                session.delete(each)
