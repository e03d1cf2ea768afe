"""What tests of the verbs need: workflows with histories, made and read without executing anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from sqla_durable import Event, Signal, Step, StepStatus, StreamItem, Workflow, WorkflowStatus
from sqla_durable.definitions.failure import Failure
from sqla_durable.store import Checkpoint, Completion, Fence, attempts
from tests.store import races

OK, FAILED = StepStatus.SUCCEEDED, StepStatus.FAILED
REFUSED = ConnectionError("refused")


def claimed(session: Session, **columns: Any) -> Fence:
    """Start a workflow and claim it."""
    races.enqueue(session, **columns)
    (claim,) = races.claim(session)
    session.commit()
    return claim.fence


def step(fence: Fence, key: str, position: int, status: StepStatus = OK, **values: Any) -> Checkpoint:
    """Make a checkpoint that stands `elapsed` seconds after its beginning."""
    given: dict[str, Any] = {"output": None, "error": None, "delay": None, "elapsed": 0.0} | values
    if status is OK:
        given["output"] = given["output"] or f'"{key}"'
    elif status is FAILED:
        given["error"] = Failure.of(values.get("error", REFUSED)).to_json()
    elif status is StepStatus.RETRYING:
        given["delay"] = 3600.0
    return Checkpoint(fence=fence, key=key, name=key, position=position, status=status, attempt=1, tries=1, **given)


def record(session: Session, checkpoints: Sequence[Checkpoint]) -> None:
    """Record and commit, one after the other."""
    for each in checkpoints:
        races.record(session, [each])
        session.commit()


def shown(session: Session, workflow_id: UUID, key: str | None) -> None:
    """Let a step have set an event, written two items to a stream, and consumed a signal."""
    number = len(session.scalars(select(StreamItem).where(StreamItem.workflow_id == workflow_id)).all())
    items = [
        StreamItem(workflow_id=workflow_id, name="log", number=number + n, value=f"{key} {n}", step_key=key, attempt=1)
        for n in range(2)
    ]
    event = Event(workflow_id=workflow_id, key="progress", value=key or "", step_key=key)
    session.add_all([*items, event, Signal(workflow_id=workflow_id, name="go", payload=key, consumed_by=key)])
    session.commit()


def fail(session: Session, fence: Fence, error: BaseException = REFUSED) -> None:
    """Let the attempt fail by itself."""
    assert attempts.finish(session, Completion(fence, WorkflowStatus.FAILED, error=Failure.of(error).to_json()))
    session.commit()


def succeed(session: Session, fence: Fence) -> None:
    """Let the attempt succeed."""
    assert attempts.finish(session, races.success(fence))
    session.commit()


def child(session: Session, parent_id: UUID, **columns: Any) -> UUID:
    """Start a child."""
    (child_id,) = races.enqueue(session, parent_id=parent_id, parent_key="child", **columns)
    return child_id


def keys(engine: Engine, workflow_id: UUID) -> list[str]:
    """Return the committed keys of a workflow's steps."""
    return races.history_of(engine, workflow_id)


def events(session: Session, workflow_id: UUID) -> list[Any]:
    """Return the values of a workflow's events in their order."""
    return list(session.scalars(select(Event.value).where(Event.workflow_id == workflow_id).order_by(Event.id)))


def items(session: Session, workflow_id: UUID) -> list[tuple[int, Any]]:
    """Return the numbers and values of a workflow's stream."""
    columns = select(StreamItem.number, StreamItem.value).where(StreamItem.workflow_id == workflow_id)
    return [(row.number, row.value) for row in session.execute(columns.order_by(StreamItem.number))]


def outcome(session: Session, workflow_id: UUID, key: str) -> Step:
    """Return a step's record."""
    return session.get_one(Step, (workflow_id, key), populate_existing=True)


def standing(session: Session, workflow_id: UUID) -> Workflow:
    """Return a workflow's record as it is now."""
    return session.get_one(Workflow, workflow_id, populate_existing=True)
