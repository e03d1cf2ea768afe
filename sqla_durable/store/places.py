"""The places of a queue with limits: how many are taken, kept and free, for the queue and by key.

Nothing is kept in a counter that somebody would have to decrease: a place is free as soon as its workflow is not
running, however it has ended, or whoever has released, suspended, reclaimed or deleted it. Only the starts that a
rate counts are written down, in `queue_use`.
"""

from __future__ import annotations

from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from sqla_durable.models.base import WorkflowStatus
from sqla_durable.store.statements import (
    ONE,
    QUEUE,
    QUEUE_KEY,
    QUEUE_USE,
    WORKFLOW,
    ZERO,
    Condition,
    Expression,
    count_rows,
    materialized,
    pg,
    status_literal,
    text_literal,
)

NO_KEY = text_literal("")
"""The key of uses by workflows that have none."""

PENDING = status_literal(WorkflowStatus.PENDING)
WHILE_RUNNING, UNTIL_FINISHED = text_literal("running"), text_literal("finished")
KEY, KEY_UNLESS_FAILED = text_literal("key"), text_literal("key_failed")
"""The values of `place`."""

OTHER = WORKFLOW.alias("other")
"""Workflows that a claim reads, and does not take here."""

_RUNNING, _SUSPENDED = status_literal(WorkflowStatus.RUNNING), status_literal(WorkflowStatus.SUSPENDED)
_FAILED = status_literal(WorkflowStatus.FAILED)


class Kept(NamedTuple):
    """The conditions for what keeps a place, or that of its key, without running."""

    suspended: Condition
    failed: Condition
    pending: Condition


def is_keyed() -> Condition:
    """Return whether the settings of the queue's row are per key, or a key is paused, so that keys take turns."""
    per_key = pg.num_nonnulls(QUEUE.c.per_key, QUEUE.c.key_rate, QUEUE.c.fifo) > ZERO
    return sa.or_(per_key, QUEUE.c.fair, has_paused_key())


def has_paused_key() -> Condition:
    """Return whether a key of the queue is paused: its claims ask for the key of each workflow then."""
    paused = sa.select(QUEUE_KEY.c.by).where(QUEUE_KEY.c.queue == QUEUE.c.name, QUEUE_KEY.c.paused_at.is_not(None))
    return paused.correlate(QUEUE).exists()


def noted_place() -> Expression:
    """Return the place that a claim notes in what it takes, by the settings of the queue's row."""
    return sa.case(
        (QUEUE.c.fifo == text_literal("block"), KEY_UNLESS_FAILED),
        (QUEUE.c.fifo.is_not(None), KEY),
        (QUEUE.c.while_suspended == text_literal("hold"), UNTIL_FINISHED),
        (pg.num_nonnulls(QUEUE.c.rate, QUEUE.c.key_rate) > ZERO, WHILE_RUNNING),
    )


def keeps(noted: Expression) -> Condition:
    """Return whether anything keeps a place without running in a queue whose claims note this place now."""
    return sa.func.coalesce(noted, WHILE_RUNNING) != WHILE_RUNNING


def kinds_kept(noted: Expression) -> Kept:
    """Return what keeps a place, or that of its key, without running, in a queue whose claims note this place now."""
    kept = OTHER.c.place != WHILE_RUNNING
    failed = sa.and_(OTHER.c.status == _FAILED, OTHER.c.place == KEY_UNLESS_FAILED)
    return Kept(
        suspended=sa.and_(OTHER.c.status == _SUSPENDED, kept),
        failed=sa.and_(noted == KEY_UNLESS_FAILED, failed),
        pending=sa.and_(OTHER.c.status == PENDING, OTHER.c.place.is_not(None), kept),
    )


def count(limits: sa.CTE) -> sa.CTE:
    """Count what runs and what keeps a place, for the queue and by key; and what was used of a rate."""
    counted = sa.or_(limits.c.concurrency.is_not(None), limits.c.per_key.is_not(None))
    running = materialized(
        sa.select(WORKFLOW.c.by, how_many().label("number"))
        .select_from(limits.join(WORKFLOW, sa.and_(WORKFLOW.c.status == _RUNNING, WORKFLOW.c.queue == limits.c.name)))
        .where(counted)
        .group_by(WORKFLOW.c.by),
        "running",
    )
    by_key = pg.jsonb_object_agg(running.c.by, running.c.number, type_=JSONB)
    holds = sa.and_(
        limits.c.place == UNTIL_FINISHED, WORKFLOW.c.queue == limits.c.name, WORKFLOW.c.place == UNTIL_FINISHED
    )
    suspended = sa.and_(WORKFLOW.c.status == _SUSPENDED, WORKFLOW.c.place != WHILE_RUNNING, holds)
    pending = sa.and_(WORKFLOW.c.status == PENDING, WORKFLOW.c.place.is_not(None), holds)
    used = sa.select(total(QUEUE_USE.c.number)).where(
        *_in_period(QUEUE_USE.c.used_at, limits.c.rate_period), QUEUE_USE.c.queue == limits.c.name
    )
    oldest = sa.select(pg.min(QUEUE_USE.c.used_at)).where(QUEUE_USE.c.queue == limits.c.name)
    next_room = sa.func.least(
        *(
            oldest.where(*_in_period(QUEUE_USE.c.used_at, each)).scalar_subquery() + each
            for each in (limits.c.rate_period, limits.c.key_rate_period)
        )
    )
    return materialized(
        sa.select(
            *limits.c,
            sa.select(total(running.c.number)).scalar_subquery().label("running"),
            sa.select(by_key).where(running.c.by.is_not(None)).scalar_subquery().label("running_by"),
            sa.and_(
                keeps(limits.c.place), sa.or_(*(_has_kept(limits, each) for each in kinds_kept(limits.c.place)))
            ).label("has_kept"),
            _number_of(suspended, limits).label("suspended"),
            _number_of(pending, limits).label("pending"),
            sa.case((limits.c.rate.is_not(None), used.scalar_subquery())).label("used"),
            sa.cast(sa.func.extract("epoch", next_room - pg.statement_timestamp()), sa.Float).label("retry_in"),
        ),
        "counts",
    )


def total(numbers: Expression) -> Expression:
    """Return the sum of some numbers as an integer: PostgreSQL's is a wider one, and has other operators."""
    return sa.func.coalesce(sa.cast(pg.sum(numbers), sa.Integer), ZERO)


def how_many() -> Expression:
    """Return `count(*)` as an integer."""
    return sa.cast(count_rows(), sa.Integer)


def count_free(counts: sa.CTE, going_on: sa.CTE) -> sa.CTE:
    """Count the places for what has not started, and find out which keys have something that goes on now."""
    took, took_more, used = (
        sa.select(how_many()).where(*conditions).select_from(going_on).scalar_subquery()
        for conditions in ([], [~going_on.c.keeps], [going_on.c.uses])
    )
    room = room_in(counts) - counts.c.pending - took_more
    places = sa.func.least(counts.c.most - took, room, counts.c.rate - counts.c.used - used)
    keys = sa.select(pg.jsonb_object_agg(going_on.c.by, ONE, type_=JSONB)).where(going_on.c.by.is_not(None))
    return materialized(
        sa.select(
            *counts.c,
            sa.func.greatest(ZERO, places).label("places"),
            sa.func.coalesce(keys.scalar_subquery(), sa.cast(text_literal("{}"), JSONB)).label("keys_going_on"),
        ),
        "free",
    )


def room_in(counts: sa.FromClause) -> Expression:
    """Return how many places are not taken by what runs, or keeps its place while it is suspended."""
    return counts.c.concurrency - counts.c.running - counts.c.suspended


def running_of(counts: sa.FromClause, by: Expression) -> Expression:
    """Return how many of a key run."""
    found = pg.jsonb_object_field_text(counts.c.running_by, by)
    return sa.func.coalesce(sa.cast(found, sa.Integer), ZERO)


def kept_of(counts: sa.FromClause, by: Expression, *kept: Condition) -> Expression:
    """Return how many places of a key are kept by what does not run."""
    of_key = sa.and_(OTHER.c.queue == counts.c.name, OTHER.c.by == by)
    found = [sa.select(how_many()).where(of_key, each).correlate_except(OTHER).scalar_subquery() for each in kept]
    return sa.case((counts.c.has_kept, sum(found, ZERO)), else_=ZERO)


def used_of(counts: sa.FromClause, by: Expression) -> Expression:
    """Return how many starts of a key count against its rate."""
    found = sa.select(total(QUEUE_USE.c.number)).where(
        QUEUE_USE.c.queue == counts.c.name,
        QUEUE_USE.c.by == by,
        *_in_period(QUEUE_USE.c.used_at, counts.c.key_rate_period),
    )
    return found.correlate_except(QUEUE_USE).scalar_subquery()


def is_paused_key(counts: sa.FromClause, by: Expression) -> Condition:
    """Return whether this key of the queue is paused."""
    mine = sa.select(QUEUE_KEY.c.by).where(QUEUE_KEY.c.queue == counts.c.name, QUEUE_KEY.c.by == by)
    is_paused = mine.where(QUEUE_KEY.c.paused_at.is_not(None)).correlate_except(QUEUE_KEY).exists()
    return sa.and_(counts.c.is_keyed, is_paused)


def at_least_zero(table: sa.FromClause, value: Expression) -> Expression:
    """Return a number of the one row of a table, for LIMIT; none is below zero."""
    return sa.select(sa.func.greatest(ZERO, value)).select_from(table).scalar_subquery()


def waits_in(free: sa.FromClause) -> Condition:
    """Return the condition for what has not started and waits in the queue."""
    return sa.and_(OTHER.c.queue == free.c.name, OTHER.c.status == PENDING)


def _has_kept(limits: sa.FromClause, kept: Condition) -> Condition:
    # In the order of its index, so that no plan reads the table until something is found.
    found = sa.select(OTHER.c.queue).where(OTHER.c.queue == limits.c.name, kept).order_by(OTHER.c.by).limit(ONE)
    return found.correlate_except(OTHER).scalar_subquery().is_not(None)


def _number_of(condition: Condition, outer: sa.CTE) -> Expression:
    return sa.select(how_many()).select_from(WORKFLOW).where(condition).correlate(outer).scalar_subquery()


def _in_period(used_at: Expression, period: Expression) -> tuple[Condition, ...]:
    """Return whether a use counts now; what is a period ahead of it was noted before a clock was set back."""
    return used_at > pg.statement_timestamp() - period, used_at <= pg.statement_timestamp() + period
