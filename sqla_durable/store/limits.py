"""What a claim takes from a queue with limits: it locks the queue's row, counts what runs, and fills the places left.

One claim at a time has the lock, and each that takes something changes the row: one whose snapshot is older than the
last change finds another row version under its lock, and takes nothing. So what it counts is what there is. What has
started before and goes on comes first; see `places` for what is counted, and `turns` for who gets a place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa

from sqla_durable.store import turns
from sqla_durable.store.places import (
    NO_KEY,
    PENDING,
    UNTIL_FINISHED,
    at_least_zero,
    count,
    count_free,
    has_paused_key,
    how_many,
    is_keyed,
    is_paused_key,
    kept_of,
    kinds_kept,
    noted_place,
    room_in,
    running_of,
    total,
    used_of,
)
from sqla_durable.store.statements import (
    LIMIT,
    ONE,
    ORDER_IN_QUEUE,
    QUEUE,
    QUEUE_USE,
    WORKFLOW,
    ZERO,
    Condition,
    Restriction,
    insert_select,
    integer,
    materialized,
    parameter,
    pg,
    row_version,
)

_MOST_GOING_ON = integer(1_000)  # workflows that go on, among which one claim chooses
_MOST_LOCKED = integer(100)  # of those, chosen more than there are places, because others may have locked some
_MOST_EXPIRED = integer(1_000)  # rows of uses that one claim deletes
_LATE = sa.text("interval '10 seconds'")  # the time between the beginnings of two claims that end in another order
_CLAIM = parameter("new_token", sa.UUID())
_HAS_CRASHED = WORKFLOW.c.crashes > ZERO


class Choice(NamedTuple):
    """What a claim of a queue with limits is to take.

    Attributes:
        chosen: `id`, `started_at`, `row_version` and `place` of the workflows, which are locked.
        writes: statements that note the claim, to be executed in the same one.
        info: one row: whether to try `again` at once, and the seconds until a rate has room again, `retry_in`.
    """

    chosen: sa.CTE
    writes: list[sa.CTE]
    info: sa.CTE


def is_limited() -> Condition:
    """Return whether a queue's row makes its claims count: such a queue has claims of its own."""
    given = [QUEUE.c[each] for each in ("concurrency", "per_worker", "per_key", "rate", "key_rate", "fifo", "aging")]
    return sa.or_(pg.num_nonnulls(*given) > ZERO, QUEUE.c.fair, has_paused_key())


def choose(is_known: Condition, within: Restriction) -> Choice:
    """Return what a claim takes from the queue of the parameter `queue`: at most `limit`, with `here` running already.

    Args:
        is_known: the condition that a worker can claim a workflow.
        within: a restriction of the workflows.
    """
    can_go = sa.and_(WORKFLOW.c.status == PENDING, is_known, within(WORKFLOW.c.id))
    limits = _limits()
    counts = count(limits)
    going_on = _going_on(counts, can_go)
    free = count_free(counts, going_on)
    ranked = turns.rank_priorities(free)
    walk = turns.walk_keys(free, ranked, can_go)
    planned = turns.distribute(free, walk, ranked)
    new = sa.union_all(
        turns.of_priorities(free, ranked, can_go),
        turns.of_keys(free, planned, can_go),
        turns.firsts_of_keys(free, planned, can_go),
        turns.keyless(free, planned, can_go),
    ).cte("new")
    place = sa.select(limits.c.place).scalar_subquery()
    chosen = materialized(
        sa.union_all(
            turns.head_columns(going_on).add_columns(going_on.c.uses, place.label("place")),
            turns.head_columns(new).add_columns(sa.true(), place),
        ),
        "chosen",
    )
    outcome = _outcome(free, walk, planned, chosen)
    info = sa.select(
        sa.func.coalesce(sa.select(outcome.c.again).scalar_subquery(), sa.false()).label("again"),
        sa.select(outcome.c.retry_in).scalar_subquery().label("retry_in"),
    ).cte("info")
    writes = [_note(limits, outcome, walk, planned), _use(free, chosen), _forget(free)]
    return Choice(chosen, writes, info)


def _outcome(free: sa.CTE, walk: sa.CTE, planned: sa.CTE, chosen: sa.CTE) -> sa.CTE:
    """Return how many a claim `took`, whether its walk has `ended` early, and whether to try `again` at once."""
    took = sa.select(how_many()).select_from(chosen).scalar_subquery()
    passed = sa.select(pg.max(walk.c.number)).scalar_subquery()
    ready = sa.select(pg.max(walk.c.ready)).scalar_subquery()
    ended = sa.func.coalesce(sa.and_(passed >= turns.MOST_PASSED, ready < free.c.places), sa.false())
    wanted = sa.select(total(planned.c.number)).scalar_subquery()
    return materialized(
        sa.select(
            free.c.name,
            took.label("took"),
            ended.label("ended"),
            sa.or_(ended, sa.and_(took > ZERO, took < wanted)).label("again"),
            free.c.retry_in,
        ),
        "outcome",
    )


def _limits() -> sa.CTE:
    """Lock the row of the queue, if nobody has, and if it is what the snapshot sees."""
    seen = materialized(sa.select(QUEUE.c.name, row_version(QUEUE)).where(QUEUE.c.name == turns.QUEUE_NAME), "seen")
    version: sa.ColumnClause[Any] = sa.column("xmin", _selectable=QUEUE)
    names = "concurrency", "rate", "rate_period", "key_rate", "key_rate_period", "aging", "passed", "turn_priority"
    columns = [
        QUEUE.c.name,
        *(QUEUE.c[each] for each in names),
        sa.case((QUEUE.c.fifo.is_not(None), ONE), else_=QUEUE.c.per_key).label("per_key"),
        sa.func.least(LIMIT, QUEUE.c.per_worker - parameter("here", sa.Integer())).label("most"),
        QUEUE.c.fifo.is_not(None).label("is_fifo"),
        is_keyed().label("is_keyed"),
        noted_place().label("place"),
        sa.func.coalesce(QUEUE.c.turn, NO_KEY).label("turn"),
    ]
    locked = sa.select(*columns).join_from(QUEUE, seen, QUEUE.c.name == seen.c.name)
    is_as_seen = sa.and_(version == seen.c.row_version, QUEUE.c.paused_at.is_(None))
    return materialized(locked.where(is_as_seen).with_for_update(key_share=True, skip_locked=True, of=QUEUE), "limits")


def _going_on(counts: sa.CTE, can_go: Condition) -> sa.CTE:
    """Choose and lock what has started before in the queue: it needs no room of a rate, but after a crash."""
    goes_on = can_go, WORKFLOW.c.place.is_not(None)
    places = sa.func.least(counts.c.most, room_in(counts))
    allowed = _allowed_to_go_on(counts, goes_on).limit(at_least_zero(counts, places + _MOST_LOCKED))
    place = sa.select(counts.c.place).scalar_subquery()
    holds = sa.and_(place == UNTIL_FINISHED, WORKFLOW.c.place == UNTIL_FINISHED)
    locked = (
        sa.select(
            WORKFLOW.c.id,
            WORKFLOW.c.by,
            WORKFLOW.c.started_at,
            row_version(WORKFLOW),
            _HAS_CRASHED.label("uses"),
            sa.func.coalesce(holds, sa.false()).label("keeps"),
        )
        .where(WORKFLOW.c.id == sa.func.any(sa.func.array(allowed.scalar_subquery())), *goes_on, turns.IS_HERE)
        .order_by(*ORDER_IN_QUEUE)
        .limit(at_least_zero(counts, places))
        .with_for_update(key_share=True, skip_locked=True)
    )
    return materialized(locked, "going_on")


def _allowed_to_go_on(counts: sa.CTE, goes_on: Sequence[Condition]) -> sa.Select[Any]:
    """Select the ids of those for which the limits of their keys, and after a crash the rates, have room, in order."""
    waiting = _waiting_to_go_on(counts, goes_on)
    kept = kinds_kept(counts.c.place)  # what is pending of these is among `waiting`
    left = (
        counts.c.per_key - running_of(counts, waiting.c.by) - kept_of(counts, waiting.c.by, kept.suspended, kept.failed)
    )
    rate_left = counts.c.rate - counts.c.used
    key_rate_left = counts.c.key_rate - used_of(counts, waiting.c.by)
    return (
        sa.select(waiting.c.id)
        .select_from(counts.join(waiting, sa.true()))
        .where(
            sa.or_(waiting.c.by.is_(None), counts.c.per_key.is_(None), waiting.c.of_key <= left),
            sa.or_(~waiting.c.has_crashed, counts.c.rate.is_(None), waiting.c.crashed <= rate_left),
            sa.or_(
                ~waiting.c.has_crashed,
                waiting.c.by.is_(None),
                counts.c.key_rate.is_(None),
                waiting.c.crashed_of_key <= key_rate_left,
            ),
        )
        .order_by(*(waiting.c[each.name] for each in ORDER_IN_QUEUE))
    )


def _waiting_to_go_on(counts: sa.CTE, goes_on: Sequence[Condition]) -> sa.Subquery:
    """Number the first of those that go on: of their key, and of those that have crashed."""
    first = (
        sa.select(*ORDER_IN_QUEUE, WORKFLOW.c.by, _HAS_CRASHED.label("has_crashed"))
        .where(*goes_on, WORKFLOW.c.queue == counts.c.name, ~is_paused_key(counts, WORKFLOW.c.by))
        .order_by(*ORDER_IN_QUEUE)
        .limit(_MOST_GOING_ON)
        .correlate(counts)
        .lateral("first")
    )
    order = [first.c[each.name] for each in ORDER_IN_QUEUE]
    crashed = sa.cast(first.c.has_crashed, sa.Integer)
    return (
        sa.select(
            *order,
            first.c.by,
            first.c.has_crashed,
            pg.row_number().over(partition_by=first.c.by, order_by=order).label("of_key"),
            pg.sum(crashed).over(order_by=order).label("crashed"),
            pg.sum(crashed).over(partition_by=first.c.by, order_by=order).label("crashed_of_key"),
        )
        .select_from(counts.join(first, sa.true()))
        .subquery("waiting_on")
    )


def _note(limits: sa.CTE, outcome: sa.CTE, walk: sa.CTE, planned: sa.CTE) -> sa.CTE:
    """Change the queue's row, so that an older snapshot counts nothing; note where keys go on.

    Also where nothing could be locked of the keys whose turn it was: the next claim tries others.
    """
    served = sa.select(sa.func.coalesce(planned.c.by, NO_KEY)).order_by(planned.c.last.desc()).limit(ONE)
    last = sa.select(walk.c.by, walk.c.priority).order_by(walk.c.number.desc()).limit(ONE).subquery("last")
    turn = sa.func.coalesce(served.scalar_subquery(), limits.c.turn)
    passed = sa.select(last.c.by).where(last.c.by != turn).correlate(limits).scalar_subquery()
    stopped_at = sa.select(last.c.priority).scalar_subquery()
    is_noted = sa.or_(
        outcome.c.took > ZERO,
        outcome.c.ended,
        limits.c.turn_priority.is_not(None),
        sa.select(planned.c.number).exists(),
    )
    note = sa.select(
        limits.c.name,
        turn.label("turn"),
        sa.case((outcome.c.ended, passed)).label("passed"),
        sa.case((outcome.c.ended, stopped_at)).label("turn_priority"),
    ).join_from(limits, outcome, is_noted)
    found = materialized(note, "note")
    return (
        sa.update(QUEUE)
        .where(QUEUE.c.name == found.c.name)
        .values(claim=_CLAIM, turn=found.c.turn, passed=found.c.passed, turn_priority=found.c.turn_priority)
        .returning(QUEUE.c.name)
        .cte("noted")
    )


def _use(free: sa.CTE, chosen: sa.CTE) -> sa.CTE:
    """Note how many were started, where a rate counts that."""
    by = sa.case((free.c.key_rate.is_not(None), sa.func.coalesce(chosen.c.by, NO_KEY)), else_=NO_KEY)
    uses = (
        sa.select(free.c.name, by, pg.statement_timestamp(), _CLAIM, how_many())
        .select_from(free.join(chosen, sa.true()))
        .where(chosen.c.uses, pg.num_nonnulls(free.c.rate, free.c.key_rate) > ZERO)
        .group_by(free.c.name, by)
    )
    inserting = insert_select(QUEUE_USE, ["queue", "by", "used_at", "claim", "number"], uses)
    return inserting.returning(QUEUE_USE.c.queue).cte("used")


def _forget(free: sa.CTE) -> sa.CTE:
    """Delete what no longer counts."""
    longest = sa.func.greatest(free.c.rate_period, free.c.key_rate_period)
    old = QUEUE_USE.alias("old")
    key = [old.c[each.name] for each in QUEUE_USE.primary_key]
    expired = (
        sa.select(*key)
        .select_from(free.join(old, old.c.queue == free.c.name))
        .where(old.c.used_at <= pg.statement_timestamp() - longest - _LATE)
        .limit(_MOST_EXPIRED)
        .subquery("expired")
    )
    mine = sa.and_(*(QUEUE_USE.c[each.name] == expired.c[each.name] for each in key))
    return sa.delete(QUEUE_USE).where(mine).returning(QUEUE_USE.c.queue).cte("forgotten")
