"""A step that is executed until its result is true: one row, and a row meanwhile."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID

import pytest
import tenacity

from sqla_durable import StepStatus, WorkflowStatus, errors
from sqla_durable.testing import advance
from tests.acceptance.application import Application
from tests.acceptance.shells import Shell
from tests.store import races

pytestmark = pytest.mark.few_shells

WORKERS = pytest.mark.shells(("worker", "async-worker", "asyncpg-worker", "mixed-worker"))
SOON: dict[str, Any] = {"wait": tenacity.wait_none()}
DAILY: dict[str, Any] = {"wait": tenacity.wait_fixed(86_400)}


def test_step_is_executed_until_its_result_is_true(shell: Shell, app: Application) -> None:
    answers = iter([0, None, "", "paid"])
    step = app.plain(lambda: next(answers), name="is_paid")

    async def pay() -> Any:
        return await step.until(**SOON)()

    assert shell.run(app.workflow(pay)) == "paid"
    (row,) = shell.one(shell.only).steps
    assert (row.key, row.status, row.output, row.tries) == ("is_paid", StepStatus.SUCCEEDED, "paid", 4)


def test_last_result_stands_when_it_is_too_late(shell: Shell, app: Application) -> None:
    step = app.plain(lambda: 0, name="is_paid")

    async def pay() -> Any:
        return await step.until(**SOON, timeout=timedelta())()

    assert shell.run(app.workflow(pay)) == 0


def test_error_is_the_business_of_the_steps_own_policy(shell: Shell, app: Application) -> None:
    calls: list[int] = []

    def is_paid() -> bool:
        calls.append(1)
        if len(calls) == 2 or len(calls) >= 4:
            raise ConnectionError("away")
        return False

    bare, patient = app.plain(is_paid), app.plain(is_paid, name="patient", stop=tenacity.stop_after_attempt(4), **SOON)

    async def pay() -> Any:
        try:
            return await bare.until(**SOON)()
        except ConnectionError:
            return await patient.until(**SOON)()

    with pytest.raises(ConnectionError):
        shell.run(app.workflow(pay))
    assert [(row.key, row.tries) for row in shell.one(shell.only).steps] == [("is_paid", 2), ("patient", 4)]


@WORKERS
def test_workflow_is_a_row_between_two_tries(shell: Shell, app: Application) -> None:
    # behaviour: C7
    answers = iter([False, False, True])
    step = app.plain(lambda: next(answers), name="is_paid")

    async def pay() -> Any:
        return await step.until(**DAILY)()

    workflow = app.workflow(pay)
    workflow_id = shell.begin(workflow)
    with shell.background():
        for tries in (1, 2):
            races.wait_until(
                partial(_is_suspended_after, shell, workflow_id, tries), what=f"the suspension after try {tries}"
            )
            with shell.sessionmaker.begin() as session:
                advance(session, timedelta(days=1))
        assert shell.result(workflow, workflow_id) is True


def _is_suspended_after(shell: Shell, workflow_id: UUID, tries: int) -> bool:
    record = shell.one(workflow_id)
    return record.status is WorkflowStatus.SUSPENDED and [row.tries for row in record.steps] == [tries]


def test_what_is_no_tenacity_object_is_refused(app: Application) -> None:
    step = app.plain(lambda: 0, name="is_paid").step
    with pytest.raises(errors.DefinitionError, match="wait=5 is not a tenacity object"):
        step.until(wait=5)  # type: ignore[arg-type]
    with pytest.raises(errors.ArgumentError, match="timeout=5 is not a timedelta"):
        step.until(timeout=5)  # type: ignore[arg-type]
