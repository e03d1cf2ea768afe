"""What an operator is to know of a workflow that does not start: its queue, what is before it, who could claim it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sqla_durable.models.base import WorkflowStatus
from sqla_durable.store.places import OTHER, UNTIL_FINISHED, is_keyed, keeps, kinds_kept, noted_place, total
from sqla_durable.store.statements import (
    QUEUE,
    QUEUE_KEY,
    QUEUE_USE,
    WORKER,
    WORKFLOW,
    Condition,
    count_rows,
    execute,
    integer,
    pg,
    scalar,
    status_literal,
)

MOST_AHEAD = 1_000
"""How many workflows before another are counted."""

_MOST_HOLDERS = 5
_SETTINGS = "concurrency", "per_worker", "per_key", "rate", "rate_period", "key_rate", "key_rate_period", "fifo"


class Holder(NamedTuple):
    """A workflow that takes a place: what it is, and since when it runs where."""

    workflow_id: UUID
    name: str
    status: WorkflowStatus
    started_at: datetime | None
    worker: str | None


class LiveWorker(NamedTuple):
    """A worker with a live lease; `names`, `versions` and `slots` are None for one of an older package.

    `queues` are names and patterns. `executing` is how many workflows it executes, and `of_queue` how many of these are
    of the queue in question.
    """

    name: str
    queues: Sequence[str]
    names: Sequence[str] | None
    versions: Sequence[str] | None
    slots: int | None
    executing: int
    of_queue: int


def situation(session: Session, workflow_id: UUID) -> sa.RowMapping | None:
    """Read a workflow with the settings of its queue and key; None if there is no such workflow. Takes no lock."""
    own = "id", "name", "status", "queue", "by", "priority", "enqueued_at", "version", "wake_at", "deadline_at", "place"
    wanted = (
        sa.select(
            *(WORKFLOW.c[each] for each in own),
            *(QUEUE.c[each] for each in _SETTINGS),
            QUEUE.c.paused_at,
            QUEUE_KEY.c.paused_at.label("key_paused_at"),
            is_keyed().label("is_keyed"),
            pg.statement_timestamp().label("read_at"),
        )
        .select_from(
            WORKFLOW.outerjoin(QUEUE, QUEUE.c.name == WORKFLOW.c.queue).outerjoin(
                QUEUE_KEY, sa.and_(QUEUE_KEY.c.queue == WORKFLOW.c.queue, QUEUE_KEY.c.by == WORKFLOW.c.by)
            )
        )
        .where(WORKFLOW.c.id == workflow_id)
    )
    return execute(session, wanted).mappings().one_or_none()


def holders(session: Session, of: sa.RowMapping, *, in_key: bool) -> tuple[int, list[Holder]]:
    """Return how many workflows besides one take a place of its queue, or of its key, and the first of them."""
    runs = OTHER.c.status == status_literal(WorkflowStatus.RUNNING)
    noted = sa.select(noted_place()).where(QUEUE.c.name == of["queue"]).scalar_subquery()
    kept = sa.and_(keeps(noted), sa.or_(*kinds_kept(noted)))
    if not in_key:  # with `fifo`, what keeps the place of its key keeps none of its queue
        kept = sa.and_(kept, noted == UNTIL_FINISHED, OTHER.c.place == UNTIL_FINISHED)
    conditions = [OTHER.c.queue == of["queue"], OTHER.c.id != of["id"], sa.or_(runs, kept)]
    if in_key:
        conditions.append(OTHER.c.by == of["by"])
    number = scalar(session, sa.select(count_rows()).select_from(OTHER).where(*conditions))
    columns = OTHER.c.id, OTHER.c.name, OTHER.c.status, OTHER.c.started_at, WORKER.c.name
    first = (
        sa.select(*columns)
        .select_from(OTHER.outerjoin(WORKER, sa.and_(WORKER.c.id == OTHER.c.worker_id, runs)))
        .where(*conditions)
        .order_by(OTHER.c.started_at)
        .limit(_MOST_HOLDERS)
    )
    return number, [Holder._make(row) for row in execute(session, first)]


def ahead(session: Session, of: sa.RowMapping, *, in_key: bool) -> int:
    """Return how many pending workflows come before one, in its queue or in its key; `MOST_AHEAD` at most."""
    position = OTHER.c.priority, OTHER.c.enqueued_at, OTHER.c.id
    own = [sa.literal(of[each.name], each.type) for each in position]
    conditions: list[Condition] = [
        OTHER.c.queue == of["queue"],
        OTHER.c.status == status_literal(WorkflowStatus.PENDING),
        sa.tuple_(*position) < sa.tuple_(*own),
    ]
    if in_key:
        conditions.append(OTHER.c.by == of["by"])
    before = sa.select(OTHER.c.id).where(*conditions).limit(integer(MOST_AHEAD)).subquery("before")
    return int(scalar(session, sa.select(count_rows()).select_from(before)))


def used(session: Session, queue: str, period: timedelta, by: str | None = None) -> tuple[int, datetime | None]:
    """Return how many starts a rate counts now, and when the oldest of them counts no longer."""
    since = pg.statement_timestamp() - sa.literal(period, sa.Interval())
    conditions = [QUEUE_USE.c.queue == queue, QUEUE_USE.c.used_at > since]
    if by is not None:
        conditions.append(QUEUE_USE.c.by == by)
    wanted = sa.select(total(QUEUE_USE.c.number), pg.min(QUEUE_USE.c.used_at)).where(*conditions)
    row: Any = execute(session, wanted).one()
    return row[0], None if row[1] is None else row[1] + period


def live_workers(session: Session, queue: str) -> list[LiveWorker]:
    """Return the workers with a live lease, and how many workflows each executes, and of a queue."""
    runs = OTHER.c.worker_id == WORKER.c.id, OTHER.c.status == status_literal(WorkflowStatus.RUNNING)
    executing = sa.select(count_rows()).select_from(OTHER).where(*runs)
    counts = executing.scalar_subquery(), executing.where(OTHER.c.queue == queue).scalar_subquery()
    columns = WORKER.c.name, WORKER.c.queues, WORKER.c.names, WORKER.c.versions, WORKER.c.slots
    wanted: Any = sa.select(*columns, *counts).where(WORKER.c.lease_expires_at > pg.statement_timestamp())
    return [LiveWorker._make(row) for row in execute(session, wanted.order_by(WORKER.c.name))]
