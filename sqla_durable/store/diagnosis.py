"""What stands still in our tables, as an operator is to see it: each function is one statement that only reads.

Each reads by the partial indexes of what is unfinished, and `MOST` rows at most, so that it costs little beside a
million workflows. `patience` is how long something may wait before it is reported: workers act within seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Session

from sqla_durable.models.base import Text, WorkflowStatus
from sqla_durable.store.catalogue import Rows
from sqla_durable.store.places import KEY_UNLESS_FAILED, OTHER
from sqla_durable.store.schedules import UNDECLARED
from sqla_durable.store.statements import (
    ONE,
    ORDER_IN_QUEUE,
    QUEUE,
    QUEUE_KEY,
    SCHEDULE,
    SIGNAL,
    WORKER,
    WORKFLOW,
    Condition,
    Expression,
    Statement,
    count_rows,
    execute,
    integer,
    materialized,
    must_compensate,
    parameter,
    pg,
    status_literal,
    text_literal,
)

MOST = 1_000
"""How many rows are read of each kind."""

HEAD = 100
"""How many rows are read of each queue."""


def workers(session: Session) -> Rows:
    """Return all workers: what they claim, whether their lease is live, and for how long it has been over."""
    return execute(session, _WORKERS).all()


def holders(session: Session) -> Rows:
    """Return who executes what is running: the worker, with its lease if it has a row, and how many workflows."""
    return execute(session, _HOLDERS).all()


def heads(session: Session, queues: Sequence[str], patience: timedelta) -> Rows:
    """Return what has been pending for long near the head of each queue that is not paused, by name and version."""
    return execute(session, _HEADS, {"queues": list(queues), "patience": patience}).all()


def due_timers(session: Session, patience: timedelta) -> Rows:
    """Return suspended workflows whose time came long ago."""
    return execute(session, _DUE_TIMERS, {"patience": patience}).all()


def overdue(session: Session, patience: timedelta) -> Rows:
    """Return unfinished workflows whose deadline passed long ago."""
    return execute(session, _OVERDUE, {"patience": patience}).all()


def undelivered(session: Session, patience: timedelta) -> Rows:
    """Return signals and notices that were sent long ago and that no worker has delivered."""
    return execute(session, _UNDELIVERED, {"patience": patience}).all()


def waits_over(session: Session, patience: timedelta) -> Rows:
    """Return workflows that wait for children that ended long ago, among those that have waited longest."""
    return execute(session, _WAITS_OVER, {"patience": patience}).all()


def paused_queues(session: Session, patience: timedelta) -> Rows:
    """Return the queues that were paused long ago, with how many workflows wait in each."""
    return execute(session, _PAUSED_QUEUES, {"patience": patience}).all()


def paused_keys(session: Session, patience: timedelta) -> Rows:
    """Return the keys that were paused long ago, with how many workflows wait for each."""
    return execute(session, _PAUSED_KEYS, {"patience": patience}).all()


def blocked_keys(session: Session, patience: timedelta) -> Rows:
    """Return the workflows that failed long ago and keep those of their key from starting."""
    return execute(session, _BLOCKED_KEYS, {"patience": patience}).all()


def schedules(session: Session, patience: timedelta) -> Rows:
    """Return the schedules that have been due for long, and those that the code no longer declares."""
    return execute(session, _SCHEDULES, {"patience": patience}).all()


_LONG_AGO = pg.statement_timestamp() - parameter("patience", sa.Interval())
_PENDING = status_literal(WorkflowStatus.PENDING)
_RUNNING = status_literal(WorkflowStatus.RUNNING)
_SUSPENDED = status_literal(WorkflowStatus.SUSPENDED)
_FAILED = status_literal(WorkflowStatus.FAILED)


def _workers_statement() -> Any:
    over_for = pg.statement_timestamp() - WORKER.c.lease_expires_at
    is_alive = WORKER.c.lease_expires_at > pg.statement_timestamp()
    columns = WORKER.c.id, WORKER.c.name, WORKER.c.queues, WORKER.c.names, WORKER.c.versions
    return sa.select(*columns, over_for.label("over_for"), is_alive.label("is_alive")).order_by(WORKER.c.name)


def _holders_statement() -> Any:
    over_for = pg.statement_timestamp() - WORKER.c.lease_expires_at
    return (
        sa.select(WORKFLOW.c.worker_id, WORKER.c.name, over_for.label("over_for"), count_rows().label("workflows"))
        .select_from(WORKFLOW.outerjoin(WORKER, WORKER.c.id == WORKFLOW.c.worker_id))
        .where(WORKFLOW.c.status == _RUNNING)
        .group_by(WORKFLOW.c.worker_id, WORKER.c.id)
        .order_by(WORKFLOW.c.worker_id)
    )


def _heads_statement() -> Any:
    queues = parameter("queues", ARRAY(Text()))
    given = pg.unnest(queues).table_valued("name").render_derived("given")
    columns = WORKFLOW.c.name, WORKFLOW.c.version, WORKFLOW.c.enqueued_at
    pending = sa.select(*columns).where(WORKFLOW.c.status == _PENDING, WORKFLOW.c.queue == given.c.name)
    head = pending.order_by(*ORDER_IN_QUEUE).limit(integer(HEAD)).lateral("head")
    paused = sa.select(QUEUE.c.name).where(QUEUE.c.name == given.c.name, QUEUE.c.paused_at.is_not(None))
    return (
        sa.select(
            given.c.name.label("queue"),
            head.c.name.label("workflow"),
            head.c.version,
            count_rows().label("workflows"),
            pg.min(head.c.enqueued_at).label("since"),
        )
        .select_from(given.join(head, sa.true()))
        .where(head.c.enqueued_at < _LONG_AGO, ~paused.exists())
        .group_by(given.c.name, head.c.name, head.c.version)
        .order_by(given.c.name, head.c.name, head.c.version)
    )


def _workflows(since: Expression, *conditions: Condition) -> Any:
    """Select some workflows in the order of a time that an index has."""
    columns = WORKFLOW.c.id, WORKFLOW.c.name, since.label("since")
    return sa.select(*columns).where(*conditions, since < _LONG_AGO).order_by(since).limit(integer(MOST))


def _overdue_statement() -> Any:
    has_deadline = WORKFLOW.c.finished_at.is_(None), WORKFLOW.c.deadline_at.is_not(None)
    return _workflows(WORKFLOW.c.deadline_at, *has_deadline, ~must_compensate())


def _undelivered_statement() -> Any:
    columns = SIGNAL.c.workflow_id, SIGNAL.c.name, SIGNAL.c.created_at.label("since")
    is_old = SIGNAL.c.delivered_at.is_(None), SIGNAL.c.created_at < _LONG_AGO
    return sa.select(*columns).where(*is_old).order_by(SIGNAL.c.created_at).limit(integer(MOST))


def _waits_over_statement() -> Any:
    """Look at those without a time, which would otherwise wake them: the oldest ones, by their ids."""
    endless = WORKFLOW.c.status == _SUSPENDED, WORKFLOW.c.wake_at.is_(None), WORKFLOW.c.awaits.is_not(None)
    oldest = sa.select(WORKFLOW.c.id, WORKFLOW.c.name, WORKFLOW.c.awaits).where(*endless)
    # In the order of the index of what is suspended: by the id alone, the primary key would have it too.
    some = materialized(oldest.order_by(WORKFLOW.c.wake_at, WORKFLOW.c.id).limit(integer(MOST)), "some")
    awaited: Any = (
        pg.jsonb_to_recordset(some.c.awaits)
        .table_valued(sa.column("children", ARRAY(sa.UUID())), sa.column("open", sa.Integer()))
        .render_derived(name="awaited", with_types=True)
    )
    child = WORKFLOW.alias("child")
    is_open = sa.or_(child.c.finished_at.is_(None), child.c.finished_at >= _LONG_AGO)
    unfinished = (
        sa.select(count_rows())
        .where(child.c.id == sa.func.any(awaited.c.children), is_open)
        .correlate(awaited)
        .scalar_subquery()
    )
    is_over = sa.select(ONE).select_from(awaited).where(awaited.c.children.is_not(None), unfinished <= awaited.c.open)
    notice = sa.select(SIGNAL.c.id).where(SIGNAL.c.workflow_id == some.c.id, SIGNAL.c.delivered_at.is_(None))
    return sa.select(some.c.id, some.c.name).where(is_over.exists(), ~notice.exists()).order_by(some.c.id)


def _pending(*conditions: Condition) -> Any:
    """Select what is pending, for each row of another table, in the order of an index; count its rows outside."""
    found = sa.select(OTHER.c.id).where(OTHER.c.status == _PENDING, *conditions)
    return found.order_by(OTHER.c.priority).limit(integer(MOST)).lateral("waiting")


def _paused_queues_statement() -> Any:
    waiting = _pending(OTHER.c.queue == QUEUE.c.name)
    return (
        sa.select(QUEUE.c.name, QUEUE.c.paused_at, count_rows().label("workflows"))
        .select_from(QUEUE.join(waiting, sa.true()))
        .where(QUEUE.c.paused_at < _LONG_AGO)
        .group_by(QUEUE.c.name)
        .order_by(QUEUE.c.name)
        .limit(integer(MOST))
    )


def _paused_keys_statement() -> Any:
    of_key = OTHER.c.queue == QUEUE_KEY.c.queue, OTHER.c.by == QUEUE_KEY.c.by, OTHER.c.by.is_not(None)
    keys = QUEUE_KEY.join(QUEUE, QUEUE.c.name == QUEUE_KEY.c.queue)
    return (
        sa.select(QUEUE_KEY.c.queue, QUEUE_KEY.c.by, QUEUE_KEY.c.paused_at, count_rows().label("workflows"))
        .select_from(keys.join(_pending(*of_key), sa.true()))
        .where(QUEUE_KEY.c.paused_at < _LONG_AGO)
        .group_by(QUEUE_KEY.c.queue, QUEUE_KEY.c.by)
        .order_by(QUEUE_KEY.c.queue, QUEUE_KEY.c.by)
        .limit(integer(MOST))
    )


def _blocked_keys_statement() -> Any:
    failed = WORKFLOW.c.status == _FAILED, WORKFLOW.c.place == KEY_UNLESS_FAILED
    of_key = OTHER.c.queue == WORKFLOW.c.queue, OTHER.c.by == WORKFLOW.c.by, OTHER.c.by.is_not(None)
    queues = WORKFLOW.join(QUEUE, QUEUE.c.name == WORKFLOW.c.queue)
    columns = WORKFLOW.c.id, WORKFLOW.c.name, WORKFLOW.c.queue, WORKFLOW.c.by, WORKFLOW.c.finished_at
    return (
        sa.select(*columns, count_rows().label("workflows"))
        .select_from(queues.join(_pending(*of_key), sa.true()))
        .where(*failed, QUEUE.c.fifo == text_literal("block"), WORKFLOW.c.finished_at < _LONG_AGO)
        .group_by(WORKFLOW.c.id)
        .order_by(WORKFLOW.c.queue, WORKFLOW.c.by)
        .limit(integer(MOST))
    )


def _schedules_statement() -> Any:
    is_open = sa.and_(SCHEDULE.c.paused_at.is_(None), SCHEDULE.c.ended_at.is_(None))
    since = sa.func.coalesce(SCHEDULE.c.due_at, SCHEDULE.c.created_at)
    is_undeclared = sa.func.coalesce(SCHEDULE.c.pause_reason == text_literal(UNDECLARED), sa.false())
    columns = SCHEDULE.c.name, SCHEDULE.c.workflow, SCHEDULE.c.paused_at, since.label("since")
    return (
        sa.select(*columns)
        .where(sa.or_(sa.and_(is_open, since < _LONG_AGO), is_undeclared))
        .order_by(SCHEDULE.c.name)
        .limit(integer(MOST))
    )


_WORKERS = Statement(_workers_statement)
_HOLDERS = Statement(_holders_statement)
_HEADS = Statement(_heads_statement)
_DUE_TIMERS = Statement(lambda: _workflows(WORKFLOW.c.wake_at, WORKFLOW.c.status == _SUSPENDED))
_OVERDUE = Statement(_overdue_statement)
_UNDELIVERED = Statement(_undelivered_statement)
_WAITS_OVER = Statement(_waits_over_statement)
_PAUSED_QUEUES = Statement(_paused_queues_statement)
_PAUSED_KEYS = Statement(_paused_keys_statement)
_BLOCKED_KEYS = Statement(_blocked_keys_statement)
_SCHEDULES = Statement(_schedules_statement)
