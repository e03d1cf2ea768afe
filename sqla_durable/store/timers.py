"""The statements on timers: wake what is due, read the database's clock, and let time pass in tests."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sqla_durable.models.base import WorkflowStatus
from sqla_durable.store.callbacks import is_callback
from sqla_durable.store.statements import (
    ALL,
    BEGINNING,
    LIMIT,
    STEP,
    SUSPECT_CRASHES,
    WORKFLOW,
    Connectable,
    Restriction,
    Statement,
    Subset,
    execute,
    interval,
    materialized,
    parameter,
    pg,
    scalar,
    scalars,
    scan_start,
    status_literal,
    subset_forms,
    text_literal,
)

_PASSED = interval(parameter("seconds", sa.Float()))


def wake_due(connectable: Connectable, *, limit: int, since: str = BEGINNING, subset: Subset = ALL) -> int:
    """Enqueue suspended workflows that are due, behind what waits in their queues; return how many.

    Of those that crashed several times in a row only one: together they would be executed by the same worker again, and
    the one that kills it would crash the others once more.

    They are enqueued as of now, however long they have been due: claims do not read again what was enqueued before.
    What was due before `since` is skipped.
    """
    parameters = {"limit": limit, "since": since, **subset.parameters}
    return len(scalars(connectable, subset.form_of(_WAKE_DUE, _WAKE_PART), parameters).all())


def due(connectable: Connectable, *, limit: int, since: str = BEGINNING, subset: Subset = ALL) -> list[UUID]:
    """Return the ids of the workflows that this would enqueue."""
    return subset.find_ids(connectable, _DUE, {"limit": limit, "since": since})


def now(connectable: Connectable) -> datetime:
    """Return the time on the database's clock."""
    found: datetime = scalar(connectable, _NOW)
    return found


def advance(session: Session, seconds: float) -> int:
    """Move all times that workflows wait for closer; return how many workflows had a time or a deadline."""
    moved: set[UUID] = set()
    for moving in (_TIMERS, _DEADLINES, _STEPS):
        moved.update(scalars(session, moving, {"seconds": seconds}))
    for statement in (_CALLBACKS, _LOOP_TIMERS):
        execute(session, statement, {"seconds": seconds})
    return len(moved)


def _wake_due_statement(within: Restriction) -> tuple[Any, Any]:
    is_due = sa.and_(
        within(WORKFLOW.c.id),
        WORKFLOW.c.status == status_literal(WorkflowStatus.SUSPENDED),
        WORKFLOW.c.wake_at.between(scan_start(), pg.statement_timestamp()),
    )
    suspect = WORKFLOW.c.crashes >= SUSPECT_CRASHES
    # Of those that are not locked: one that is locked must not delay the others.
    first = materialized(
        sa.select(WORKFLOW.c.id)
        .where(is_due, suspect)
        .order_by(WORKFLOW.c.wake_at, WORKFLOW.c.id)
        .limit(1)
        .with_for_update(key_share=True, skip_locked=True),
        "first",
    )
    due = materialized(
        sa.select(WORKFLOW.c.id)
        .where(is_due, sa.or_(~suspect, WORKFLOW.c.id == sa.select(first.c.id).scalar_subquery()))
        .order_by(WORKFLOW.c.wake_at)
        .limit(LIMIT)
        .with_for_update(key_share=True, skip_locked=True, of=WORKFLOW),
        "due",
    )
    woken = (
        sa.update(WORKFLOW)
        .where(WORKFLOW.c.id == due.c.id)
        .values(
            status=WorkflowStatus.PENDING,
            enqueued_at=pg.statement_timestamp(),
            wake_at=sa.null(),
            awaits=sa.null(),
        )
        .returning(WORKFLOW.c.id)
    )
    return woken, sa.select(due.c.id)


_WAKE_DUE, _WAKE_PART, _DUE = subset_forms(Statement, _wake_due_statement)
_NOW = sa.select(pg.statement_timestamp())
_TIMERS = Statement(
    lambda: (
        sa.update(WORKFLOW)
        .where(WORKFLOW.c.status == status_literal(WorkflowStatus.SUSPENDED), WORKFLOW.c.wake_at.is_not(None))
        .values(wake_at=WORKFLOW.c.wake_at - _PASSED)
        .returning(WORKFLOW.c.id)
    )
)
_DEADLINES = Statement(
    lambda: (
        sa.update(WORKFLOW)
        .where(WORKFLOW.c.finished_at.is_(None), WORKFLOW.c.deadline_at.is_not(None))
        .values(deadline_at=WORKFLOW.c.deadline_at - _PASSED)
        .returning(WORKFLOW.c.id)
    )
)
_STEPS = Statement(
    lambda: (
        sa.update(STEP)
        .where(STEP.c.wake_at.is_not(None))
        .values(wake_at=STEP.c.wake_at - _PASSED)
        .returning(STEP.c.workflow_id)
    )
)
_EACH = pg.jsonb_each_text(STEP.c.details["#timers"]).table_valued("key", "value")
_LOOP_TIMERS = Statement(
    lambda: (
        sa.update(STEP)
        .where(STEP.c.details.has_key(text_literal("#timers")))
        .values(
            details=pg.jsonb_build_object(
                text_literal("#timers"),
                sa.select(
                    pg.jsonb_object_agg(
                        _EACH.c.key, sa.cast(_EACH.c.value, sa.Float) - parameter("seconds", sa.Float())
                    )
                ).scalar_subquery(),
            )
        )
    )
)
_CALLBACKS = Statement(
    lambda: (
        sa.update(STEP)
        .where(is_callback())
        .values(started_at=STEP.c.started_at - _PASSED, finished_at=STEP.c.finished_at - _PASSED)
    )
)
