"""The naive way, for comparison: one workflow at a time by plain ORM code, and a commit for whatever happens."""

from __future__ import annotations

import time

from sqlalchemy import select
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable.models import Step, Workflow
from sqla_durable.models.status import StepStatus, WorkflowStatus
from sqla_durable.tools.bench import application
from sqla_durable.tools.bench.figures import Reference
from sqla_durable.tools.bench.place import Place

NAIVE = "naive: one at a time, 3 commits"


def naive(place: Place, count: int) -> Reference:
    """Measure it, in workflows a second."""
    place.empty()
    place.fill(application.one_step.bind(number) for number in range(count))
    with place.sessions(expire_on_commit=False) as session:
        began = time.perf_counter()
        for _ in range(count):
            _one(session)
        return Reference(NAIVE, count / (time.perf_counter() - began))


def _one(session: Session) -> None:
    workflow = _claim(session)
    session.commit()
    output = workflow.input["number"] + 1
    session.add(_checkpoint(workflow, output))
    session.commit()
    workflow.status, workflow.output, workflow.finished_at = WorkflowStatus.SUCCEEDED, output, workflow.started_at
    session.commit()


def _claim(session: Session) -> Workflow:
    pending = select(Workflow).where(Workflow.status == WorkflowStatus.PENDING, Workflow.queue == "default")
    oldest = pending.order_by(Workflow.priority, Workflow.enqueued_at, Workflow.id).limit(1)
    workflow = session.scalars(oldest.with_for_update(skip_locked=True)).one()
    workflow.status = WorkflowStatus.RUNNING
    workflow.token = workflow.worker_id = uuid7()
    workflow.started_at = workflow.enqueued_at
    return workflow


def _checkpoint(workflow: Workflow, output: int) -> Step:
    return Step(
        workflow_id=workflow.id,
        key="increment",
        name="increment",
        position=1,
        status=StepStatus.SUCCEEDED,
        output=output,
        attempt=1,
        started_at=workflow.enqueued_at,
    )
