"""What a claim takes from a queue with limits: it locks the queue's row, counts what runs, and fills the places left.

One claim at a time has the lock, and each that takes something changes the row: one whose snapshot is older than the
last change finds another row version under its lock, and takes nothing. So what it counts is what there is. Nothing is
kept in a counter that somebody would have to decrease: a place is free as soon as its workflow is not running, whoever
has ended, released, suspended, reclaimed or deleted it.

What has started before and goes on comes first. Where settings are per key, keys take turns: a *walk* visits those that
wait, one look into an index each, beginning behind the one that was served last. It passes those that are full.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from sqla_durable.models.base import Text, WorkflowStatus
from sqla_durable.store.statements import (
    LIMIT,
    ONE,
    QUEUE,
    QUEUE_KEY,
    QUEUE_USE,
    WORKFLOW,
    ZERO,
    Condition,
    Expression,
    Restriction,
    count_rows,
    insert_select,
    integer,
    interval,
    materialized,
    parameter,
    pg,
    row_version,
    status_literal,
    text_literal,
)

_MOST_AT_ONCE = integer(250)  # workflows that one claim takes
_MOST_PASSED = integer(500)  # keys that one claim passes because they are full
_MOST_GOING_ON = integer(1_000)  # workflows that go on, among which one claim chooses
_MOST_KEYLESS = integer(200)  # waiting workflows, among which one claim looks for those without a key
_MOST_EXPIRED = integer(1_000)  # rows of uses that one claim deletes
_LAST_ID = sa.literal_column("uuid 'ffffffff-ffff-ffff-ffff-ffffffffffff'", type_=sa.UUID())
_LATEST = sa.literal_column("timestamptz 'infinity'", type_=sa.DateTime(timezone=True))
_BEFORE_ALL, _NO_KEY = integer(-32_769), text_literal("")
_BEHIND, _AROUND, _STRAIGHT = integer(0), integer(1), integer(2)
"""Where a walk is: behind the last key that was served, come around to the others, or going on where one ended."""

_QUEUE = parameter("queue", Text())
_CLAIM = parameter("new_token", sa.UUID())
_PENDING, _RUNNING = status_literal(WorkflowStatus.PENDING), status_literal(WorkflowStatus.RUNNING)
_SUSPENDED, _FAILED = status_literal(WorkflowStatus.SUSPENDED), status_literal(WorkflowStatus.FAILED)
_WHILE_RUNNING, _UNTIL_FINISHED = text_literal("running"), text_literal("finished")
_KEY, _KEY_UNLESS_FAILED = text_literal("key"), text_literal("key_failed")
_OTHER = WORKFLOW.alias("other")
_ORDER = WORKFLOW.c.priority, WORKFLOW.c.enqueued_at, WORKFLOW.c.id


class Places(NamedTuple):
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
    return sa.or_(pg.num_nonnulls(*given) > ZERO, QUEUE.c.fair)


def places(is_known: Condition, within: Restriction) -> Places:
    """Return what a claim takes from the queue of the parameter `queue`: at most `limit`, with `here` running already.

    Args:
        is_known: the condition that a worker can claim a workflow.
        within: a restriction of the workflows.
    """
    can_go = sa.and_(WORKFLOW.c.status == _PENDING, is_known, within(WORKFLOW.c.id))
    limits = _limits()
    counts = _counts(limits)
    going_on = _going_on(counts, can_go)
    free = _free(counts, going_on)
    ranked = _ranked(free)
    walk = _walk(free, ranked)
    planned = _planned(free, walk, ranked)
    new = sa.union_all(
        _of_priorities(free, ranked, can_go),
        _of_keys(free, planned, can_go),
        _keyless(free, planned, can_go),
    ).cte("new")
    place = sa.select(limits.c.place).scalar_subquery()
    chosen = materialized(
        sa.union_all(
            _all(going_on).add_columns(going_on.c.uses, place.label("place")),
            _all(new).add_columns(sa.true(), place),
        ),
        "chosen",
    )
    took = sa.select(count_rows()).select_from(chosen).scalar_subquery()
    passed = sa.select(pg.max(walk.c.number)).scalar_subquery()
    ready = sa.select(pg.max(walk.c.ready)).scalar_subquery()
    ended = sa.func.coalesce(sa.and_(passed >= _MOST_PASSED, ready < free.c.places), sa.false())
    wanted = sa.select(pg.sum(planned.c.number)).scalar_subquery()
    outcome = materialized(
        sa.select(
            free.c.name,
            took.label("took"),
            ended.label("ended"),
            sa.or_(ended, sa.and_(took > ZERO, took < wanted)).label("again"),
            free.c.retry_in,
        ),
        "outcome",
    )
    info = sa.select(
        sa.func.coalesce(sa.select(outcome.c.again).scalar_subquery(), sa.false()).label("again"),
        sa.select(outcome.c.retry_in).scalar_subquery().label("retry_in"),
    ).cte("info")
    writes = [_note(limits, outcome, walk, planned), _use(free, chosen), _forget(free)]
    return Places(chosen, writes, info)


def _limits() -> sa.CTE:
    """Lock the row of the queue, if nobody has, and if it is what the snapshot sees."""
    seen = materialized(sa.select(QUEUE.c.name, row_version(QUEUE)).where(QUEUE.c.name == _QUEUE), "seen")
    version: Any = sa.column("xmin", _selectable=QUEUE)
    is_keyed = pg.num_nonnulls(QUEUE.c.per_key, QUEUE.c.key_rate, QUEUE.c.fifo) > ZERO
    place = sa.case(
        (QUEUE.c.fifo == text_literal("block"), _KEY_UNLESS_FAILED),
        (QUEUE.c.fifo.is_not(None), _KEY),
        (QUEUE.c.while_suspended == text_literal("hold"), _UNTIL_FINISHED),
        (pg.num_nonnulls(QUEUE.c.rate, QUEUE.c.key_rate) > ZERO, _WHILE_RUNNING),
    )
    names = "concurrency", "rate", "rate_period", "key_rate", "key_rate_period", "aging", "turn_priority"
    columns = [
        QUEUE.c.name,
        *(QUEUE.c[each] for each in names),
        sa.case((QUEUE.c.fifo.is_not(None), ONE), else_=QUEUE.c.per_key).label("per_key"),
        sa.func.least(LIMIT, QUEUE.c.per_worker - parameter("here", sa.Integer())).label("most"),
        QUEUE.c.fifo.is_not(None).label("is_fifo"),
        sa.or_(is_keyed, QUEUE.c.fair).label("is_keyed"),
        place.label("place"),
        sa.func.coalesce(QUEUE.c.turn, _NO_KEY).label("turn"),
    ]
    locked = sa.select(*columns).join_from(QUEUE, seen, QUEUE.c.name == seen.c.name)
    is_as_seen = sa.and_(version == seen.c.row_version, QUEUE.c.paused_at.is_(None))
    return materialized(locked.where(is_as_seen).with_for_update(key_share=True, skip_locked=True, of=QUEUE), "limits")


def _counts(limits: sa.CTE) -> sa.CTE:
    """Count what runs and what keeps a place, for the queue and by key; and what was used of a rate."""
    counted = sa.or_(limits.c.concurrency.is_not(None), limits.c.per_key.is_not(None))
    running = materialized(
        sa.select(WORKFLOW.c.by, count_rows().label("number"))
        .select_from(limits.join(WORKFLOW, sa.and_(WORKFLOW.c.status == _RUNNING, WORKFLOW.c.queue == limits.c.name)))
        .where(counted)
        .group_by(WORKFLOW.c.by),
        "running",
    )
    by_key = pg.jsonb_object_agg(running.c.by, running.c.number, type_=JSONB)
    keeps = sa.and_(WORKFLOW.c.queue == limits.c.name, WORKFLOW.c.place == _UNTIL_FINISHED)
    suspended = sa.and_(WORKFLOW.c.status == _SUSPENDED, WORKFLOW.c.place != _WHILE_RUNNING, keeps)
    pending = sa.and_(WORKFLOW.c.status == _PENDING, WORKFLOW.c.place.is_not(None), keeps)
    used = sa.select(sa.func.coalesce(pg.sum(QUEUE_USE.c.number), ZERO)).where(
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
            sa.select(sa.func.coalesce(pg.sum(running.c.number), ZERO)).scalar_subquery().label("running"),
            sa.select(by_key).where(running.c.by.is_not(None)).scalar_subquery().label("running_by"),
            sa.or_(*(_has_kept(limits, each) for each in _KEPT)).label("has_kept"),
            _how_many(suspended, limits).label("suspended"),
            _how_many(pending, limits).label("pending"),
            sa.case((limits.c.rate.is_not(None), used.scalar_subquery())).label("used"),
            sa.cast(sa.func.extract("epoch", next_room - pg.statement_timestamp()), sa.Float).label("retry_in"),
        ),
        "counts",
    )


def _how_many(condition: Condition, outer: sa.CTE) -> Expression:
    return sa.select(count_rows()).select_from(WORKFLOW).where(condition).correlate(outer).scalar_subquery()


def _in_period(used_at: Expression, period: Expression) -> tuple[Condition, ...]:
    """Return whether a use counts now; what is a period ahead of it was noted before a clock was set back."""
    return used_at > pg.statement_timestamp() - period, used_at <= pg.statement_timestamp() + period


def _going_on(counts: sa.CTE, can_go: Condition) -> sa.CTE:
    """Choose and lock what has started before in the queue: it needs no room of a rate, but after a crash."""
    has_crashed = WORKFLOW.c.crashes > ZERO
    first = (
        sa.select(*_ORDER, WORKFLOW.c.by, has_crashed.label("has_crashed"))
        .where(can_go, WORKFLOW.c.place.is_not(None), WORKFLOW.c.queue == counts.c.name)
        .order_by(*_ORDER)
        .limit(_MOST_GOING_ON)
        .correlate(counts)
        .lateral("first")
    )
    order = [first.c[each.name] for each in _ORDER]
    crashed = sa.cast(first.c.has_crashed, sa.Integer)
    waiting = (
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
    left = counts.c.per_key - _running(counts, waiting.c.by) - _kept(counts, waiting.c.by, *_KEPT[:2])
    rate_left = counts.c.rate - counts.c.used
    key_rate_left = counts.c.key_rate - _used(counts, waiting.c.by)
    allowed = (
        sa.select(waiting.c.id)
        .select_from(counts.join(waiting, sa.true()))
        .where(
            ~_is_paused_key(counts, waiting.c.by),
            sa.or_(waiting.c.by.is_(None), counts.c.per_key.is_(None), waiting.c.of_key <= left),
            sa.or_(~waiting.c.has_crashed, counts.c.rate.is_(None), waiting.c.crashed <= rate_left),
            sa.or_(~waiting.c.has_crashed, counts.c.key_rate.is_(None), waiting.c.crashed_of_key <= key_rate_left),
        )
        .order_by(*(waiting.c[each.name] for each in _ORDER))
        .limit(_scalar(counts, sa.func.least(counts.c.most, _room(counts))))
    )
    locked = (
        sa.select(
            WORKFLOW.c.id,
            WORKFLOW.c.by,
            WORKFLOW.c.started_at,
            row_version(WORKFLOW),
            has_crashed.label("uses"),
            (WORKFLOW.c.place == _UNTIL_FINISHED).label("keeps"),
        )
        .where(WORKFLOW.c.id == sa.func.any(sa.func.array(allowed.scalar_subquery())), can_go)
        .with_for_update(key_share=True, skip_locked=True)
    )
    return materialized(locked, "going_on")


def _is_paused_key(counts: sa.FromClause, by: Expression) -> Condition:
    mine = sa.select(QUEUE_KEY.c.by).where(QUEUE_KEY.c.queue == counts.c.name, QUEUE_KEY.c.by == by)
    return mine.where(QUEUE_KEY.c.paused_at.is_not(None)).correlate_except(QUEUE_KEY).exists()


def _room(counts: sa.FromClause) -> Expression:
    """Return how many places are not taken by what runs, or keeps its place while it is suspended."""
    return counts.c.concurrency - counts.c.running - counts.c.suspended


def _running(counts: sa.FromClause, by: Expression) -> Expression:
    """Return how many of a key run."""
    found = pg.jsonb_object_field_text(counts.c.running_by, by)
    return sa.func.coalesce(sa.cast(found, sa.Integer), ZERO)


_KEPT: tuple[Condition, ...] = (
    sa.and_(_OTHER.c.status == _SUSPENDED, _OTHER.c.place != _WHILE_RUNNING),
    sa.and_(_OTHER.c.status == _FAILED, _OTHER.c.place == _KEY_UNLESS_FAILED),
    sa.and_(_OTHER.c.status == _PENDING, _OTHER.c.place.is_not(None), _OTHER.c.place != _WHILE_RUNNING),
)
"""What keeps a place, or that of its key, without running; the last of these goes on as soon as it is claimed."""


def _has_kept(limits: sa.FromClause, kept: Condition) -> Condition:
    return sa.select(_OTHER.c.id).where(_OTHER.c.queue == limits.c.name, kept).correlate_except(_OTHER).exists()


def _kept(counts: sa.FromClause, by: Expression, *kept: Condition) -> Expression:
    """Return how many places of a key are kept by what does not run."""
    of_key = sa.and_(_OTHER.c.queue == counts.c.name, _OTHER.c.by == by)
    found = [sa.select(count_rows()).where(of_key, each).correlate_except(_OTHER).scalar_subquery() for each in kept]
    return sa.case((counts.c.has_kept, sum(found, ZERO)), else_=ZERO)


def _used(counts: sa.FromClause, by: Expression) -> Expression:
    """Return how many starts of a key count against its rate."""
    found = sa.select(sa.func.coalesce(pg.sum(QUEUE_USE.c.number), ZERO)).where(
        QUEUE_USE.c.queue == counts.c.name,
        QUEUE_USE.c.by == sa.func.coalesce(by, _NO_KEY),
        *_in_period(QUEUE_USE.c.used_at, counts.c.key_rate_period),
    )
    return found.correlate_except(QUEUE_USE).scalar_subquery()


def _scalar(table: sa.FromClause, value: Expression) -> Expression:
    """Return a number of the one row of a table, for LIMIT; none is below zero."""
    return sa.select(sa.func.greatest(ZERO, value)).select_from(table).scalar_subquery()


def _free(counts: sa.CTE, going_on: sa.CTE) -> sa.CTE:
    """Count the places for what has not started, and find out which keys have something that goes on now."""
    took, took_more, used = (
        sa.select(count_rows()).where(*conditions).select_from(going_on).scalar_subquery()
        for conditions in ([], [~going_on.c.keeps], [going_on.c.uses])
    )
    room = _room(counts) - counts.c.pending - took_more
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


def _waiting(free: sa.FromClause) -> Condition:
    """Return the condition for what has not started and waits in the queue."""
    return sa.and_(_OTHER.c.queue == free.c.name, _OTHER.c.status == _PENDING)


def _ranked(free: sa.CTE) -> sa.CTE:
    """Rank the priorities that wait, by the first workflow of each; what has waited counts as a higher priority."""
    order = _OTHER.c.priority, _OTHER.c.enqueued_at, _OTHER.c.id
    first = sa.select(_OTHER.c.priority, _OTHER.c.enqueued_at).order_by(*order).limit(ONE)
    begin = first.where(_waiting(free)).correlate(free).lateral("begin")
    priorities = (
        sa.select(begin.c.priority, begin.c.enqueued_at)
        .select_from(free.join(begin, sa.true()))
        .where(free.c.places > ZERO)
        .cte("priorities", recursive=True)
    )
    next_one = first.where(_waiting(free), _OTHER.c.priority > priorities.c.priority)
    following = next_one.correlate(free, priorities).lateral("following")
    priorities = priorities.union_all(
        sa.select(following.c.priority, following.c.enqueued_at).select_from(
            priorities.join(free, sa.true()).join(following, sa.true())
        )
    )
    waited = sa.func.extract("epoch", pg.statement_timestamp() - priorities.c.enqueued_at)
    age = sa.func.extract("epoch", free.c.aging)
    aged = priorities.c.priority - waited / age
    counts_as = sa.func.coalesce(aged, sa.cast(priorities.c.priority, sa.Numeric))
    order_by = counts_as, priorities.c.priority
    next_aged = pg.lead(aged).over(order_by=order_by)
    ahead = sa.cast(age * (priorities.c.priority - next_aged), sa.Float)
    until = pg.statement_timestamp() - interval(ahead)
    return materialized(
        sa.select(
            priorities.c.priority,
            pg.row_number().over(order_by=order_by).label("rank"),
            sa.func.coalesce(until, _LATEST).label("until"),
        ).select_from(free.join(priorities, sa.true())),
        "ranked",
    )


def _new(can_go: Condition, *conditions: Condition) -> Any:
    """Select and lock what has not started."""
    return (
        sa.select(WORKFLOW.c.id, WORKFLOW.c.by, WORKFLOW.c.started_at, row_version(WORKFLOW))
        .where(can_go, WORKFLOW.c.place.is_(None), *conditions)
        .with_for_update(key_share=True, skip_locked=True, of=WORKFLOW)
    )


def _of_priorities(free: sa.CTE, ranked: sa.CTE, can_go: Condition) -> Any:
    """Take the first workflows, one priority after another, where settings are for the whole queue."""
    each = (
        sa.select(free.c.name, ranked.c.priority, ranked.c.until)
        .select_from(free.join(ranked, sa.true()))
        .where(~free.c.is_keyed)
        .order_by(ranked.c.rank)
        .subquery("each")
    )
    mine = sa.and_(WORKFLOW.c.queue == each.c.name, WORKFLOW.c.priority == each.c.priority)
    head = _new(can_go, mine, WORKFLOW.c.enqueued_at <= each.c.until).order_by(WORKFLOW.c.enqueued_at, WORKFLOW.c.id)
    # The outer limit ends it. This one is for the planner, which takes another one than a number for a tenth of all.
    head = head.limit(_MOST_AT_ONCE).correlate(each).lateral("head_of_priority")
    return _all(head).select_from(each.join(head, sa.true())).limit(_scalar(free, free.c.places))


def _all(head: sa.FromClause) -> Any:
    return sa.select(head.c.id, head.c.by, head.c.started_at, head.c.row_version)


def _walk(free: sa.CTE, ranked: sa.CTE) -> sa.CTE:
    """Visit the keys that wait, priority by priority, and find out how many places each has.

    A walk ends when as many keys as there are places have one, or when it has passed too many that have none; then the
    next one goes straight on there.
    """
    start = sa.func.coalesce(
        sa.select(pg.min(ranked.c.rank)).where(ranked.c.priority == free.c.turn_priority).scalar_subquery(), ONE
    )
    goes_straight = sa.func.coalesce(
        sa.select(ranked.c.rank).where(ranked.c.priority == free.c.turn_priority).exists(), sa.false()
    )
    walk = (
        sa.select(
            ZERO.label("number"),
            ZERO.label("ready"),
            sa.cast(start, sa.BigInteger).label("rank"),
            sa.cast(sa.null(), sa.SmallInteger).label("priority"),
            free.c.turn.label("by"),
            sa.cast(sa.null(), sa.DateTime(timezone=True)).label("enqueued_at"),
            sa.cast(sa.null(), sa.UUID).label("id"),
            sa.case((goes_straight, _STRAIGHT), else_=_BEHIND).label("phase"),
            ONE.label("weight"),
            sa.cast(ZERO, sa.BigInteger).label("places"),
        )
        .where(free.c.is_keyed, free.c.places > ZERO)
        .cte("walk", recursive=True)
    )
    at = sa.select(ranked.c.priority).where(ranked.c.rank == walk.c.rank).correlate(walk).scalar_subquery()
    waits = sa.and_(_waiting(free), _OTHER.c.by.is_not(None))
    some = sa.select(ONE).where(waits, _OTHER.c.priority == ranked.c.priority).correlate(free, ranked).exists()
    next_rank = (
        sa.select(ranked.c.priority)
        .where(ranked.c.rank > walk.c.rank, some)
        .order_by(ranked.c.rank)
        .limit(ONE)
        .correlate(walk, free)
        .scalar_subquery()
    )

    def first(value: Expression, *conditions: Condition) -> Expression:
        found = sa.select(value).where(waits, *conditions).order_by(_OTHER.c.by, _OTHER.c.enqueued_at, _OTHER.c.id)
        return found.limit(ONE).correlate(walk, free).scalar_subquery()

    before_turn = _OTHER.c.by <= free.c.turn
    behind = first(
        sa.case((sa.or_(walk.c.phase != _AROUND, before_turn), _OTHER.c.id)),
        _OTHER.c.priority == at,
        _OTHER.c.by > walk.c.by,
    )
    around = sa.case((walk.c.phase == _BEHIND, first(sa.case((before_turn, _OTHER.c.id)), _OTHER.c.priority == at)))
    later = first(_OTHER.c.id, _OTHER.c.priority == next_rank, _OTHER.c.by > free.c.turn)
    later_around = first(_OTHER.c.id, _OTHER.c.priority == next_rank)
    found = sa.select(sa.func.coalesce(behind, around, later, later_around).label("id")).correlate(walk, free)
    next_one = found.lateral("next_one")
    step, rank = WORKFLOW.alias("step"), ranked.alias("its_rank")
    stays = sa.and_(rank.c.rank == walk.c.rank, walk.c.phase == _STRAIGHT)
    phase = sa.case((stays, _STRAIGHT), (step.c.by > free.c.turn, _BEHIND), else_=_AROUND)
    key = QUEUE_KEY.alias("key")
    room = sa.func.least(
        free.c.places,
        free.c.per_key - _running(free, step.c.by) - _kept(free, step.c.by, *_KEPT),
        free.c.key_rate - _used(free, step.c.by),
    )
    waits_longer = sa.or_(
        key.c.paused_at.is_not(None), pg.jsonb_object_field(free.c.keys_going_on, step.c.by).is_not(None)
    )
    places = sa.select(sa.case((waits_longer, ZERO), else_=sa.func.greatest(ZERO, room)).label("places"))
    room_of_key = places.correlate(free, step, key).lateral("room_of_key")
    going = sa.and_(walk.c.number < _MOST_PASSED, walk.c.ready < free.c.places)
    return walk.union_all(
        sa.select(
            walk.c.number + ONE,
            walk.c.ready + sa.case((room_of_key.c.places > ZERO, ONE), else_=ZERO),
            rank.c.rank,
            step.c.priority,
            step.c.by,
            step.c.enqueued_at,
            step.c.id,
            phase,
            sa.func.coalesce(key.c.weight, ONE),
            sa.cast(room_of_key.c.places, sa.BigInteger),
        ).select_from(
            walk.join(free, going)
            .join(next_one, sa.true())
            .join(step, step.c.id == next_one.c.id)
            .join(rank, rank.c.priority == step.c.priority)
            .outerjoin(key, sa.and_(key.c.queue == free.c.name, key.c.by == step.c.by))
            .join(room_of_key, sa.true())
        )
    )


def _planned(free: sa.CTE, walk: sa.CTE, ranked: sa.CTE) -> sa.CTE:
    """Distribute the places over the keys: within a priority by turns, in each of which a key gets its weight."""
    # As if its key came before all others: it is looked for where a walk comes around.
    comes_around = sa.or_(
        sa.select(walk.c.number).where(walk.c.phase == _AROUND).exists(),
        sa.select(pg.max(walk.c.ready)).scalar_subquery() < free.c.places,
    )
    first_keyless = (
        sa.select(_OTHER.c.priority, _OTHER.c.by, _OTHER.c.place)
        .where(_waiting(free))
        .order_by(_OTHER.c.priority, _OTHER.c.enqueued_at, _OTHER.c.id)
        .limit(_MOST_KEYLESS)
        .correlate(free)
        .lateral("first_keyless")
    )
    keyless = (
        sa.select(first_keyless.c.priority, count_rows().label("number"))
        .select_from(free.join(first_keyless, sa.and_(free.c.places > ZERO, comes_around)))
        .where(first_keyless.c.by.is_(None), first_keyless.c.place.is_(None))
        .group_by(first_keyless.c.priority)
        .subquery("keyless")
    )
    lanes = sa.union_all(
        sa.select(
            walk.c.rank,
            walk.c.priority,
            walk.c.by,
            walk.c.number,
            walk.c.weight,
            walk.c.places,
            walk.c.enqueued_at,
            walk.c.id,
        ).where(walk.c.places > ZERO),
        sa.select(
            ranked.c.rank,
            keyless.c.priority,
            sa.cast(sa.null(), Text),
            ZERO,
            ONE,
            keyless.c.number,
            sa.null(),
            sa.null(),
        ).join_from(keyless, ranked, ranked.c.priority == keyless.c.priority),
    ).subquery("lanes")
    weights = pg.sum(lanes.c.weight).over(partition_by=lanes.c.rank)
    turns = pg.ceil(sa.cast(free.c.places, sa.Float) / weights)
    most = sa.func.least(lanes.c.places, lanes.c.weight * sa.cast(turns, sa.BigInteger))
    shares = sa.select(*lanes.c, most.label("most")).select_from(free.join(lanes, sa.true())).subquery("shares")
    series = pg.generate_series(ONE, sa.cast(shares.c.most, sa.Integer)).table_valued("one").render_derived("series")
    turn = (series.c.one - ONE) // shares.c.weight
    ordered = (
        sa.select(
            *shares.c,
            turn.label("turn"),
            pg.row_number().over(partition_by=shares.c.by, order_by=(shares.c.rank, series.c.one)).label("of_key"),
        )
        .select_from(shares.join(series, sa.true()))
        .subquery("ordered")
    )
    order = ordered.c.rank, ordered.c.turn, ordered.c.number
    chosen = (
        sa.select(*ordered.c, pg.row_number().over(order_by=order).label("at"))
        .where(sa.or_(ordered.c.by.is_(None), ordered.c.of_key <= ordered.c.places))
        .order_by(*order)
        .limit(_scalar(free, free.c.places))
        .subquery("chosen_turns")
    )
    return materialized(
        sa.select(
            chosen.c.priority,
            chosen.c.by,
            chosen.c.enqueued_at,
            chosen.c.id,
            count_rows().label("number"),
            pg.max(chosen.c.at).label("last"),
        ).group_by(chosen.c.priority, chosen.c.by, chosen.c.enqueued_at, chosen.c.id),
        "planned",
    )


def _of_keys(free: sa.CTE, planned: sa.CTE, can_go: Condition) -> Any:
    """Take the first workflows of keys; with `fifo` the very first of each, whoever could take it."""
    each = planned
    mine = sa.and_(WORKFLOW.c.queue == free.c.name, WORKFLOW.c.priority == each.c.priority, WORKFLOW.c.by == each.c.by)
    until = (
        sa.case((free.c.is_fifo, each.c.enqueued_at), else_=_LATEST),
        sa.case((free.c.is_fifo, each.c.id), else_=_LAST_ID),
    )
    in_turn = sa.tuple_(WORKFLOW.c.enqueued_at, WORKFLOW.c.id) <= sa.tuple_(*until)
    head = _new(can_go, mine, in_turn, WORKFLOW.c.by.is_not(None)).order_by(WORKFLOW.c.enqueued_at, WORKFLOW.c.id)
    head = head.limit(each.c.number).correlate(free, each).lateral("head_of_key")
    return _all(head).select_from(free.join(each, sa.true()).join(head, sa.true()))


def _keyless(free: sa.CTE, planned: sa.CTE, can_go: Condition) -> Any:
    """Take workflows without a key from among the first of a queue whose settings are per key."""
    first = (
        sa.select(_OTHER.c.id, _OTHER.c.by)
        .where(_waiting(free))
        .order_by(_OTHER.c.priority, _OTHER.c.enqueued_at, _OTHER.c.id)
        .limit(_MOST_KEYLESS)
        .correlate(free)
        .lateral("first_without")
    )
    number = sa.select(pg.sum(planned.c.number)).where(planned.c.by.is_(None)).scalar_subquery()
    ids = sa.select(first.c.id).select_from(free.join(first, sa.true())).where(first.c.by.is_(None))
    wanted = sa.func.coalesce(number, ZERO)
    is_one = WORKFLOW.c.id == sa.func.any(sa.func.array(ids.where(wanted > ZERO).scalar_subquery()))
    head = _new(can_go, is_one, WORKFLOW.c.by.is_(None)).order_by(*_ORDER).limit(wanted).subquery("keyless_head")
    return _all(head)


def _note(limits: sa.CTE, outcome: sa.CTE, walk: sa.CTE, planned: sa.CTE) -> sa.CTE:
    """Change the queue's row, so that an older snapshot counts nothing; note where keys go on."""
    served = sa.select(planned.c.by).where(planned.c.by.is_not(None)).order_by(planned.c.last.desc()).limit(ONE)
    last = sa.select(walk.c.by, walk.c.priority).order_by(walk.c.number.desc()).limit(ONE).subquery("last")
    passed = sa.select(last.c.by).scalar_subquery()
    stopped_at = sa.select(last.c.priority).scalar_subquery()
    turn = sa.case((outcome.c.ended, passed), else_=sa.func.coalesce(served.scalar_subquery(), limits.c.turn))
    note = sa.select(
        limits.c.name,
        turn.label("turn"),
        sa.case((outcome.c.ended, stopped_at)).label("turn_priority"),
    ).join_from(limits, outcome, sa.or_(outcome.c.took > ZERO, outcome.c.ended, limits.c.turn_priority.is_not(None)))
    found = materialized(note, "note")
    return (
        sa.update(QUEUE)
        .where(QUEUE.c.name == found.c.name)
        .values(claim=_CLAIM, turn=found.c.turn, turn_priority=found.c.turn_priority)
        .returning(QUEUE.c.name)
        .cte("noted")
    )


def _use(free: sa.CTE, chosen: sa.CTE) -> sa.CTE:
    """Note how many were started, where a rate counts that."""
    by = sa.func.coalesce(chosen.c.by, _NO_KEY)
    uses = (
        sa.select(free.c.name, by, pg.statement_timestamp(), _CLAIM, count_rows())
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
        .where(old.c.used_at <= pg.statement_timestamp() - longest)
        .limit(_MOST_EXPIRED)
        .subquery("expired")
    )
    mine = sa.and_(*(QUEUE_USE.c[each.name] == expired.c[each.name] for each in key))
    return sa.delete(QUEUE_USE).where(mine).returning(QUEUE_USE.c.queue).cte("forgotten")
