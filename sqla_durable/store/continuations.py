"""The statements of continue as new: they delete a history, and whatever else the next round does not need."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from sqla_durable.models.base import Text, WorkflowStatus
from sqla_durable.store.inbox import ANSWER, CALLBACK, EARLIER, REFUSED, UPDATE, insert_orphan_notices
from sqla_durable.store.records import Fence
from sqla_durable.store.statements import (
    EVENT,
    FENCE,
    IS_WANTED,
    SIGNAL,
    STEP,
    WORKFLOW,
    Condition,
    Connectable,
    Statement,
    batch_parameter,
    batch_table,
    fence_row,
    integer,
    interval,
    json_parameter,
    lock_owned,
    materialized,
    next_attempt,
    parameter,
    pg,
    scalar,
    status_literal,
    text_literal,
)

_SUSPENDED_FOR = 30  # seconds, after which the workflow is replayed if the second statement has not come
_READ_WITHIN = 5  # seconds in which a waiting sender has read its answer: it polls four times a second
_CALLBACK: sa.ColumnElement[str] = text_literal(CALLBACK)
_UPDATE: sa.ColumnElement[str] = text_literal(UPDATE)
_ANSWER: sa.ColumnElement[str] = text_literal(ANSWER)


def continue_as_new(connectable: Connectable, fence: Fence, *, given: str) -> bool:
    """Continue a workflow as new: enqueue it with another input (JSON text) and no history, as its next attempt.

    What it published and what was sent to it stays, except for signals and updates that were taken, answers older than
    some seconds, outcomes of callbacks, and events that newer ones replace. Of what was sent with a key, the key and
    the answer stay, so that a repetition is recognised: only these rows of an endless workflow grow. Waits for the
    lock of the row.

    Two statements, each of which may be a transaction of its own. The first one ends the attempt, so that
    the second one sees, and deletes, what a branch has recorded meanwhile. If the second one is never executed, the
    workflow is replayed after a while, and calls this again.

    Returns:
        False if the attempt does not own the workflow: it was lost, or this was executed before.
    """
    suspended = scalar(connectable, _SUSPEND, batch_parameter("batch", [fence_row(fence)]))
    if suspended is None:
        return False
    parameters = {"wanted_id": fence.workflow_id, "wanted_attempt": suspended, "input": given}
    return scalar(connectable, _CONTINUE, parameters) is not None


def _suspend_statement() -> Any:
    """Suspend the workflow until the second statement."""
    mine = lock_owned(batch_table("batch", FENCE), skip_locked=False)
    wake_at = pg.statement_timestamp() + interval(integer(_SUSPENDED_FOR))
    return (
        sa.update(WORKFLOW)
        .where(WORKFLOW.c.id == mine.c.id)
        .values(status=WorkflowStatus.SUSPENDED, token=sa.null(), worker_id=sa.null(), wake_at=wake_at)
        .returning(WORKFLOW.c.attempt)
    )


def _continue_statement() -> Any:
    suspended = materialized(
        sa.select(WORKFLOW.c.id)
        .where(
            IS_WANTED,
            WORKFLOW.c.attempt == parameter("wanted_attempt", sa.Integer()),
            WORKFLOW.c.status == status_literal(WorkflowStatus.SUSPENDED),
            WORKFLOW.c.awaits.is_(None),
        )
        .with_for_update(key_share=True, of=WORKFLOW),
        "suspended",
    )
    forgotten = sa.delete(STEP).where(STEP.c.workflow_id == suspended.c.id).returning(STEP.c.key).cte("forgotten")
    return (
        sa.update(WORKFLOW)
        .where(WORKFLOW.c.id == suspended.c.id)
        .values(
            status=WorkflowStatus.PENDING,
            input=json_parameter("input"),
            attempt=next_attempt(),
            crashes=0,
            token=sa.null(),
            worker_id=sa.null(),
            wake_at=sa.null(),
            cancellation=sa.null(),
            enqueued_at=pg.statement_timestamp(),
            continued_at=pg.statement_timestamp(),
        )
        .returning(WORKFLOW.c.id)
        .add_cte(
            forgotten, insert_orphan_notices(suspended).cte("left"), *_forget_sent(suspended), _forget_events(suspended)
        )
    )


def _forget_sent(suspended: sa.FromClause) -> tuple[sa.CTE, sa.CTE, sa.CTE]:
    """Delete what was taken, with the answers; what has a key stays, without its payload.

    Outcomes of callbacks go too: the steps that would read them are gone, those of earlier rounds whose answer crossed
    with their end as well.
    """
    mine: Condition = SIGNAL.c.workflow_id == suspended.c.id
    taken = sa.and_(mine, SIGNAL.c.consumed_by.is_not(None))
    kept = sa.or_(SIGNAL.c.key.is_not(None), sa.and_(SIGNAL.c.name.startswith(_UPDATE), ~_is_known_to_sender()))
    outcomes = sa.and_(mine, SIGNAL.c.name.startswith(_CALLBACK))
    gone = sa.delete(SIGNAL).where(sa.or_(sa.and_(taken, ~kept), outcomes)).returning(SIGNAL.c.workflow_id, SIGNAL.c.id)
    consumed = gone.cte("consumed")
    remembered = (
        sa.update(SIGNAL)
        .where(taken, kept, ~outcomes, SIGNAL.c.consumed_by.not_in([text_literal(REFUSED), text_literal(EARLIER)]))
        .values(consumed_by=EARLIER, payload=sa.text("'null'::jsonb"))
        .returning(SIGNAL.c.id)
        .cte("remembered")
    )
    answers = (
        sa.delete(EVENT)
        .where(EVENT.c.workflow_id == consumed.c.workflow_id, EVENT.c.id == consumed.c.id)
        .where(EVENT.c.key == _ANSWER + sa.cast(consumed.c.id, Text))
        .returning(EVENT.c.id)
        .cte("answers")
    )
    return consumed, remembered, answers


def _is_known_to_sender() -> Condition:
    """Return whether an update was answered, or forgotten, so long ago that its sender has read the answer."""
    before = pg.statement_timestamp() - interval(integer(_READ_WITHIN))
    answered = (
        sa.select(EVENT.c.id)
        .where(EVENT.c.workflow_id == SIGNAL.c.workflow_id, EVENT.c.key == _ANSWER + sa.cast(SIGNAL.c.id, Text))
        .where(EVENT.c.id == SIGNAL.c.id, EVENT.c.created_at < before)
        .correlate(SIGNAL)
        .exists()
    )
    return sa.or_(answered, sa.and_(SIGNAL.c.consumed_by == EARLIER, SIGNAL.c.delivered_at < before))


def _forget_events(suspended: sa.FromClause) -> sa.CTE:
    """Delete the events that newer ones replace."""
    newer = EVENT.alias("newer")
    is_replaced = (
        sa.select(newer.c.id)
        .where(newer.c.workflow_id == EVENT.c.workflow_id, newer.c.key == EVENT.c.key, newer.c.id > EVENT.c.id)
        .correlate(EVENT)
        .exists()
    )
    replaced = sa.delete(EVENT).where(EVENT.c.workflow_id == suspended.c.id, is_replaced)
    return replaced.returning(EVENT.c.id).cte("replaced")


_SUSPEND = Statement(_suspend_statement)
_CONTINUE = Statement(_continue_statement)
