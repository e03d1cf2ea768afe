"""The statement with which operators change what waits: its queue, its priority, or when it becomes due."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.models.base import Text, WorkflowStatus
from sqla_durable.store.inbox import is_deferred
from sqla_durable.store.selecting import Selection, ids_to_refresh, lock_selected
from sqla_durable.store.statements import (
    WORKFLOW,
    Condition,
    Statement,
    execute,
    interval,
    is_among,
    materialized,
    parameter,
    pg,
    refresh_loaded,
    status_literal,
)

_WAITING = (WorkflowStatus.PENDING, WorkflowStatus.SUSPENDED)


@dataclass(frozen=True, slots=True)
class Changes:
    """What is to be changed of workflows that wait: at most one of `at` and `delay`, which is in seconds."""

    queue: str | None
    priority: int | None
    at: datetime | None
    delay: float | None

    @property
    def is_timed(self) -> bool:
        """Whether it is to be changed when they become due."""
        return self.at is not None or self.delay is not None


def change(session: Session, wanted: Selection, given: Changes) -> list[UUID]:
    """Change the queue, the priority or the time of those of the workflows that wait; return their ids.

    They are pending or suspended; their time is changed only before they start. Waits for the locks of their rows.
    """
    waits = is_changeable(is_timed=given.is_timed)
    locked = lock_selected(session, wanted, lambda meant: sa.and_(meant, waits))
    if locked:
        execute(session, _CHANGE, {**asdict(given), "ids": locked})
    refresh_loaded(session, ids_to_refresh(wanted, locked))
    return locked


def is_changeable(*, is_timed: bool) -> Condition:
    """Return whether a workflow waits; with `is_timed`, for its start."""
    waits = sa.or_(*(WORKFLOW.c.status == status_literal(each) for each in _WAITING))
    return sa.and_(waits, WORKFLOW.c.started_at.is_(None), ~is_deferred()) if is_timed else waits


def _change_statement() -> Any:
    """Change workflows, whose rows are locked."""
    now = pg.statement_timestamp()
    queue, priority = parameter("queue", Text()), parameter("priority", sa.SmallInteger())
    moment = sa.func.coalesce(
        parameter("at", sa.DateTime(timezone=True)), now + interval(parameter("delay", sa.Float()))
    )
    is_timed, is_later = moment.is_not(None), sa.func.coalesce(moment > now, sa.false())
    is_due, was_pending = sa.and_(is_timed, ~is_later), WORKFLOW.c.status == status_literal(WorkflowStatus.PENDING)
    status = sa.case(
        (is_due, WorkflowStatus.PENDING.value), (is_later, WorkflowStatus.SUSPENDED.value), else_=WORKFLOW.c.status
    )
    new_queue = sa.func.coalesce(queue, WORKFLOW.c.queue)
    values = {
        "queue": new_queue,
        "priority": sa.func.coalesce(priority, WORKFLOW.c.priority),
        "place": sa.case((new_queue == WORKFLOW.c.queue, WORKFLOW.c.place)),  # a place is one of its queue
        "status": status,
        "wake_at": sa.case((is_later, moment), (is_due, sa.null()), else_=WORKFLOW.c.wake_at),
        "enqueued_at": sa.case((sa.and_(is_due, ~was_pending), now), else_=WORKFLOW.c.enqueued_at),
    }
    columns = [value.label(name) for name, value in values.items()]
    found = materialized(sa.select(WORKFLOW.c.id, *columns).where(is_among(WORKFLOW.c.id)), "found")
    changed = sa.update(WORKFLOW).where(WORKFLOW.c.id == found.c.id)
    return changed.values({name: found.c[name] for name in values}).returning(WORKFLOW.c.id)


_CHANGE = Statement(_change_statement)
