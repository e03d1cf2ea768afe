"""SIGKILL between the tries of a step: they are counted on, over any number of workers."""

from __future__ import annotations

from functools import partial

import pytest
from sqlalchemy import Engine, func, select, update
from sqlalchemy.orm import Session

from sqla_durable import Step, StepStatus, Workflow, WorkflowStatus
from tests.crash import child, ledger
from tests.crash.application import TRIES
from tests.store import races
from tests.support.domain import Entry


@pytest.mark.parametrize("name", ["stubborn", "stubborn_async"])
def test_a_step_is_tried_as_often_as_it_says_whoever_dies_in_between(
    database_url: str, engine: Engine, name: str
) -> None:
    """A worker of its own for each try, killed once the try is recorded and the workflow is a row."""
    # behaviour: R6
    (workflow_id,) = ledger.start(engine, [name])
    for number in range(1, TRIES):
        with child.worker(database_url) as process:
            races.wait_until(partial(_tries, engine, number), what=f"try {number}", seconds=30)
            races.wait_until(lambda: races.status_of(engine, workflow_id) is WorkflowStatus.SUSPENDED)
            process.kill()
            process.join()
        _make_due(engine)
    with child.worker(database_url):
        races.wait_until(lambda: races.status_of(engine, workflow_id).finished, seconds=30)
    with Session(engine) as session:
        (step,) = session.scalars(select(Step))
        assert (step.status, step.tries) == (StepStatus.FAILED, TRIES)
        assert session.scalars(select(func.count()).select_from(Entry)).one() == TRIES
        record = session.get_one(Workflow, workflow_id)
        assert (record.status, record.attempt, record.crashes) == (WorkflowStatus.FAILED, 1, 0)


def _tries(engine: Engine, number: int) -> bool:
    with Session(engine) as session:
        return session.scalars(select(Step.tries)).one_or_none() == number


def _make_due(engine: Engine) -> None:
    now = func.statement_timestamp()
    with Session(engine) as session, session.begin():
        session.execute(update(Step).where(Step.wake_at.is_not(None)).values(wake_at=now))
        session.execute(update(Workflow).where(Workflow.wake_at.is_not(None)).values(wake_at=now))
