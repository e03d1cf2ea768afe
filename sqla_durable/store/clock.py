"""The statements by which tests let time pass."""

from __future__ import annotations

from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sqla_durable.models.status import WorkflowStatus
from sqla_durable.store._rows import STEP, WORKFLOW, execute, interval, parameter, pg, scalars, status, words
from sqla_durable.store.callbacks import is_callback

_PASSED = interval(parameter("seconds", sa.Float()))


def advance(session: Session, seconds: float) -> int:
    """Bring nearer whatever a workflow waits for; return how many workflows had a time to wait for, or a deadline."""
    moved: set[UUID] = set()
    for moving in (_TIMERS, _DEADLINES, _STEPS):
        moved.update(scalars(session, moving, {"seconds": seconds}))
    for statement in (_CALLBACKS, _LOOP_TIMERS):
        execute(session, statement, {"seconds": seconds})
    return len(moved)


_TIMERS = (
    sa.update(WORKFLOW)
    .where(WORKFLOW.c.status == status(WorkflowStatus.SUSPENDED), WORKFLOW.c.wake_at.is_not(None))
    .values(wake_at=WORKFLOW.c.wake_at - _PASSED)
    .returning(WORKFLOW.c.id)
)
_DEADLINES = (
    sa.update(WORKFLOW)
    .where(WORKFLOW.c.finished_at.is_(None), WORKFLOW.c.deadline_at.is_not(None))
    .values(deadline_at=WORKFLOW.c.deadline_at - _PASSED)
    .returning(WORKFLOW.c.id)
)
_STEPS = (
    sa.update(STEP)
    .where(STEP.c.wake_at.is_not(None))
    .values(wake_at=STEP.c.wake_at - _PASSED)
    .returning(STEP.c.workflow_id)
)
_EACH = pg.jsonb_each_text(STEP.c.details["#timers"]).table_valued("key", "value")
_LOOP_TIMERS = (
    sa.update(STEP)
    .where(STEP.c.details.has_key(words("#timers")))
    .values(
        details=pg.jsonb_build_object(
            words("#timers"),
            sa.select(
                pg.jsonb_object_agg(_EACH.c.key, sa.cast(_EACH.c.value, sa.Float) - parameter("seconds", sa.Float()))
            ).scalar_subquery(),
        )
    )
)
_CALLBACKS = (
    sa.update(STEP)
    .where(is_callback())
    .values(started_at=STEP.c.started_at - _PASSED, finished_at=STEP.c.finished_at - _PASSED)
)
