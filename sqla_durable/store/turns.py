"""How the places of a queue are distributed: over priorities by rank, and over keys by turns.

A *walk* visits the keys that wait, one look into an index each, beginning behind the one that was served last. It
passes keys that are full, and ends when as many have room as there are places.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from sqla_durable.models.base import Text
from sqla_durable.store.places import (
    OTHER,
    at_least_zero,
    how_many,
    kept_of,
    kinds_kept,
    running_of,
    total,
    used_of,
    waits_in,
)
from sqla_durable.store.statements import (
    ONE,
    ORDER_IN_QUEUE,
    QUEUE_KEY,
    WORKFLOW,
    ZERO,
    Condition,
    Expression,
    integer,
    interval,
    materialized,
    parameter,
    pg,
    row_version,
)

MOST_PASSED = integer(500)
"""Keys that one walk passes because they are full."""

_MOST_AT_ONCE = integer(250)  # workflows that one claim takes
_MOST_KEYLESS = integer(200)  # waiting workflows, among which one claim looks for those without a key
_LATEST = sa.literal_column("timestamptz 'infinity'", type_=sa.DateTime(timezone=True))
_BEHIND, _AROUND = integer(0), integer(1)
"""Where a walk is: behind the last key that was served, or come around to the others."""

QUEUE_NAME = parameter("queue", Text())
"""The queue of a claim."""

IS_HERE: Condition = pg.concat(WORKFLOW.c.queue) == QUEUE_NAME
"""Whether a workflow is in the queue, as an expression that fits no index: it is found by its id."""

_VISITED = OTHER.c.priority, OTHER.c.by, OTHER.c.id
_ORDER_OF_OTHERS = OTHER.c.priority, OTHER.c.enqueued_at, OTHER.c.id


def rank_priorities(free: sa.CTE) -> sa.CTE:
    """Rank the priorities that wait, by the first workflow of each; what has waited counts as a higher priority."""
    first = sa.select(OTHER.c.priority, OTHER.c.enqueued_at).order_by(*_ORDER_OF_OTHERS).limit(ONE)
    begin = first.where(waits_in(free)).correlate(free).lateral("begin")
    priorities = (
        sa.select(begin.c.priority, begin.c.enqueued_at)
        .select_from(free.join(begin, sa.true()))
        .where(free.c.places > ZERO)
        .cte("priorities", recursive=True)
    )
    next_one = first.where(waits_in(free), OTHER.c.priority > priorities.c.priority)
    following = next_one.correlate(free, priorities).lateral("following")
    priorities = priorities.union_all(
        sa.select(following.c.priority, following.c.enqueued_at).select_from(
            priorities.join(free, sa.true()).join(following, sa.true())
        )
    )
    waited: Expression = sa.cast(
        sa.func.extract("epoch", pg.statement_timestamp() - priorities.c.enqueued_at), sa.Double
    )
    age: Expression = sa.cast(sa.func.extract("epoch", free.c.aging), sa.Double)
    priority: Expression = sa.cast(priorities.c.priority, sa.Double)
    aged = priority - waited / age
    counts_as = sa.func.coalesce(aged, priority)
    order_by = counts_as, priorities.c.priority
    next_aged = pg.lead(aged).over(order_by=order_by)
    until = pg.statement_timestamp() - interval(age * (priority - next_aged))
    return materialized(
        sa.select(
            priorities.c.priority,
            pg.row_number().over(order_by=order_by).label("rank"),
            sa.func.coalesce(until, _LATEST).label("until"),
        ).select_from(free.join(priorities, sa.true())),
        "ranked",
    )


def of_priorities(free: sa.CTE, ranked: sa.CTE, can_go: Condition) -> Any:
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
    return head_columns(head).select_from(each.join(head, sa.true())).limit(at_least_zero(free, free.c.places))


def walk_keys(free: sa.CTE, ranked: sa.CTE, can_go: Condition) -> sa.CTE:
    """Visit the keys that wait, priority by priority, and find out how many places each has.

    A walk ends when as many keys as there are places have one, or when it has passed too many that have none; then the
    next one goes on there. A key of which nothing can go has none.
    """
    walk = _beginning_of_walk(free, ranked)
    found = _next_keys(free, ranked, walk)
    priority, by, workflow_id = (sa.func.coalesce(*(each.c[column.name] for each in found)) for column in _VISITED)
    rank, key = ranked.alias("its_rank"), QUEUE_KEY.alias("key")
    phase = sa.case((by > free.c.turn, _BEHIND), else_=_AROUND)
    room_of_key = _room_of_key(free, key, by, outer=found)
    mine = sa.and_(WORKFLOW.c.queue == free.c.name, WORKFLOW.c.priority == priority, WORKFLOW.c.by == by)
    is_first = sa.and_(WORKFLOW.c.id == workflow_id, ~_waits_ahead(free, ranked, rank, by, outer=found))
    known = sa.select(WORKFLOW.c.id).where(mine, can_go, WORKFLOW.c.place.is_(None), sa.or_(~free.c.is_fifo, is_first))
    can_start = sa.and_(room_of_key.c.most > ZERO, known.limit(ONE).correlate(free, rank, *found).exists())
    places = sa.select(sa.case((can_start, room_of_key.c.most), else_=ZERO).label("places"))
    places_of_key = places.correlate(free, rank, room_of_key, *found).lateral("places_of_key")
    visited: Any = walk.join(free, sa.and_(walk.c.number < MOST_PASSED, walk.c.ready < free.c.places))
    for each in found:
        visited = visited.outerjoin(each, sa.true())
    return walk.union_all(
        sa.select(
            walk.c.number + ONE,
            walk.c.ready + sa.case((places_of_key.c.places > ZERO, ONE), else_=ZERO),
            rank.c.rank,
            priority,
            by,
            workflow_id,
            phase,
            sa.func.coalesce(key.c.weight, ONE),
            sa.cast(places_of_key.c.places, sa.BigInteger),
        ).select_from(
            visited.join(rank, rank.c.priority == priority)
            .outerjoin(key, sa.and_(key.c.queue == free.c.name, key.c.by == by))
            .join(room_of_key, sa.true())
            .join(places_of_key, sa.true())
        )
    )


def _beginning_of_walk(free: sa.CTE, ranked: sa.CTE) -> sa.CTE:
    """Return a walk before its first key: behind the one that was served last, or where the last walk ended."""
    stopped = sa.select(pg.min(ranked.c.rank)).where(ranked.c.priority == free.c.turn_priority).scalar_subquery()
    goes_on = sa.and_(free.c.passed.is_not(None), stopped.is_not(None))
    return (
        sa.select(
            ZERO.label("number"),
            ZERO.label("ready"),
            sa.cast(sa.case((goes_on, stopped), else_=ONE), sa.BigInteger).label("rank"),
            sa.cast(sa.null(), sa.SmallInteger).label("priority"),
            sa.case((goes_on, free.c.passed), else_=free.c.turn).label("by"),
            sa.cast(sa.null(), sa.UUID).label("id"),
            sa.case((sa.and_(goes_on, free.c.passed <= free.c.turn), _AROUND), else_=_BEHIND).label("phase"),
            ONE.label("weight"),
            sa.cast(ZERO, sa.BigInteger).label("places"),
        )
        .where(free.c.is_keyed, free.c.places > ZERO)
        .cte("walk", recursive=True)
    )


def _next_keys(free: sa.CTE, ranked: sa.CTE, walk: sa.CTE) -> list[sa.FromClause]:
    """Return the first workflow of the key that a walk visits next: of these, one has a row, or none at the end."""
    at = sa.select(ranked.c.priority).where(ranked.c.rank == walk.c.rank).correlate(walk).scalar_subquery()
    some = sa.select(ONE).where(_has_key(free), OTHER.c.priority == ranked.c.priority).correlate(free, ranked).exists()
    next_rank = (
        sa.select(ranked.c.priority)
        .where(ranked.c.rank > walk.c.rank, some)
        .order_by(ranked.c.rank)
        .limit(ONE)
        .correlate(walk, free)
        .scalar_subquery()
    )
    is_behind, always = walk.c.phase == _BEHIND, sa.true()
    tried: list[sa.FromClause] = []

    def find(name: str, *conditions: Condition, only: Condition, unless: Condition | None = None) -> None:
        # Conditions on what is outside belong into the innermost select, where they keep it from being executed.
        gate = only, *(each.c.id.is_(None) for each in tried)
        waiting = sa.select(*_VISITED).where(_has_key(free), *gate, *conditions)
        in_order = waiting.order_by(OTHER.c.by, OTHER.c.enqueued_at, OTHER.c.id)
        one = in_order.limit(ONE).correlate(walk, free, *tried).subquery(f"{name}_one")
        # A walk that has come around ends at the key that was served last.
        comes_around = sa.true() if unless is None else sa.or_(unless, one.c.by <= free.c.turn)
        tried.append(sa.select(*one.c).where(comes_around).correlate(walk, free, *tried).lateral(name))

    find("behind", OTHER.c.priority == at, OTHER.c.by > walk.c.by, only=always, unless=is_behind)
    find("around", OTHER.c.priority == at, only=is_behind, unless=sa.false())
    find("later", OTHER.c.priority == next_rank, OTHER.c.by > free.c.turn, only=always)
    find("later_around", OTHER.c.priority == next_rank, only=always)
    return tried


def _has_key(free: sa.CTE) -> Condition:
    return sa.and_(waits_in(free), OTHER.c.by.is_not(None))


def _room_of_key(free: sa.CTE, key: sa.FromClause, by: Expression, *, outer: list[sa.FromClause]) -> sa.FromClause:
    """Return the `most` places that a key can have: none while it is paused, or something of it goes on."""
    room = sa.func.least(
        free.c.places,
        free.c.per_key - running_of(free, by) - kept_of(free, by, *kinds_kept(free.c.place)),
        free.c.key_rate - used_of(free, by),
    )
    waits_longer = sa.or_(key.c.paused_at.is_not(None), pg.jsonb_object_field(free.c.keys_going_on, by).is_not(None))
    most = sa.case((waits_longer, ZERO), else_=sa.func.greatest(ZERO, room))
    # The limit keeps the planner from writing the counts into each place that asks for them, to be counted there.
    return sa.select(most.label("most")).limit(ONE).correlate(free, key, *outer).lateral("room_of_key")


def _waits_ahead(
    free: sa.CTE, ranked: sa.CTE, rank: sa.FromClause, by: Expression, *, outer: list[sa.FromClause]
) -> Condition:
    """Return whether something of a key waits in a priority that is ranked before."""
    better = ranked.alias("better")
    waits = sa.and_(_has_key(free), OTHER.c.priority == better.c.priority)
    ahead = sa.select(OTHER.c.id).join_from(better, OTHER, waits).where(better.c.rank < rank.c.rank, OTHER.c.by == by)
    return ahead.correlate(free, rank, *outer).exists()


def distribute(free: sa.CTE, walk: sa.CTE, ranked: sa.CTE) -> sa.CTE:
    """Distribute the places over the keys: within a priority by turns, in each of which a key gets its weight."""
    keys = _keys_with_places(free, walk, ranked)
    weights: Expression = sa.cast(pg.sum(keys.c.weight).over(partition_by=keys.c.rank), sa.Double)
    turns = pg.ceil(sa.cast(free.c.places, sa.Double) / weights)
    most = sa.func.least(keys.c.places, keys.c.weight * sa.cast(turns, sa.BigInteger))
    shares = sa.select(*keys.c, most.label("most")).select_from(free.join(keys, sa.true())).subquery("shares")
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
        .limit(at_least_zero(free, free.c.places))
        .subquery("chosen_turns")
    )
    return materialized(
        sa.select(
            chosen.c.priority,
            chosen.c.by,
            chosen.c.id,
            how_many().label("number"),
            pg.max(chosen.c.at).label("last"),
        ).group_by(chosen.c.priority, chosen.c.by, chosen.c.id),
        "planned",
    )


def _keys_with_places(free: sa.CTE, walk: sa.CTE, ranked: sa.CTE) -> sa.Subquery:
    """Return the keys that can have places, and what waits without one as if it were a key in each priority."""
    column = walk.c
    columns = column.rank, column.priority, column.by, column.number, column.weight, column.places, column.id
    keyless = _waiting_keyless(free, walk)
    as_keys = ranked.c.rank, keyless.c.priority, sa.cast(sa.null(), Text), ZERO, ONE, keyless.c.number, sa.null()
    return sa.union_all(
        sa.select(*columns).where(walk.c.places > ZERO),
        sa.select(*as_keys).join_from(keyless, ranked, ranked.c.priority == keyless.c.priority),
    ).subquery("keys")


def _waiting_keyless(free: sa.CTE, walk: sa.CTE) -> sa.Subquery:
    """Count what waits without a key near the head of the queue, by priority."""
    # As if its key came before all others: it is looked for where a walk comes around.
    comes_around = sa.or_(
        sa.select(walk.c.number).where(walk.c.phase == _AROUND).exists(),
        sa.select(pg.max(walk.c.ready)).scalar_subquery() < free.c.places,
    )
    first_keyless = (
        sa.select(OTHER.c.priority, OTHER.c.by, OTHER.c.place)
        .where(waits_in(free))
        .order_by(*_ORDER_OF_OTHERS)
        .limit(_MOST_KEYLESS)
        .correlate(free)
        .lateral("first_keyless")
    )
    return (
        sa.select(first_keyless.c.priority, how_many().label("number"))
        .select_from(free.join(first_keyless, sa.and_(free.c.places > ZERO, comes_around)))
        .where(first_keyless.c.by.is_(None), first_keyless.c.place.is_(None))
        .group_by(first_keyless.c.priority)
        .subquery("keyless")
    )


def of_keys(free: sa.CTE, planned: sa.CTE, can_go: Condition) -> Any:
    """Take the first workflows of keys that take turns."""
    each = planned
    mine = sa.and_(WORKFLOW.c.queue == free.c.name, WORKFLOW.c.priority == each.c.priority, WORKFLOW.c.by.is_not(None))
    # Not `=`: so the order is that of one index alone, whatever the planner thinks of the number of keys.
    of_key = WORKFLOW.c.by.between(each.c.by, each.c.by)
    order = WORKFLOW.c.by, WORKFLOW.c.enqueued_at, WORKFLOW.c.id
    head = _new(can_go, mine, of_key).order_by(*order).limit(each.c.number).correlate(free, each).lateral("head_of_key")
    return head_columns(head).select_from(free.join(each, ~free.c.is_fifo).join(head, sa.true()))


def firsts_of_keys(free: sa.CTE, planned: sa.CTE, can_go: Condition) -> Any:
    """Take, with `fifo`, the very first workflow of each key; while that is locked, none."""
    mine = WORKFLOW.c.id == planned.c.id, WORKFLOW.c.by == planned.c.by, IS_HERE
    head = _new(can_go, *mine).limit(ONE).correlate(planned).lateral("first_of_key")
    return head_columns(head).select_from(free.join(planned, free.c.is_fifo).join(head, sa.true()))


def keyless(free: sa.CTE, planned: sa.CTE, can_go: Condition) -> Any:
    """Take workflows without a key from among the first of a queue whose settings are per key."""
    first = (
        sa.select(OTHER.c.id, OTHER.c.by)
        .where(waits_in(free))
        .order_by(*_ORDER_OF_OTHERS)
        .limit(_MOST_KEYLESS)
        .correlate(free)
        .lateral("first_without")
    )
    number = sa.select(total(planned.c.number)).where(planned.c.by.is_(None)).scalar_subquery()
    ids = sa.select(first.c.id).select_from(free.join(first, sa.true())).where(first.c.by.is_(None))
    wanted = sa.func.coalesce(number, ZERO)
    is_one = WORKFLOW.c.id == sa.func.any(sa.func.array(ids.where(wanted > ZERO).scalar_subquery()))
    head = (
        _new(can_go, is_one, WORKFLOW.c.by.is_(None), IS_HERE)
        .order_by(*ORDER_IN_QUEUE)
        .limit(wanted)
        .subquery("keyless_head")
    )
    return head_columns(head)


def head_columns(head: sa.FromClause) -> Any:
    """Select what a claim needs of the workflows that it takes."""
    return sa.select(head.c.id, head.c.by, head.c.started_at, head.c.row_version)


def _new(can_go: Condition, *conditions: Condition) -> Any:
    """Select and lock what has not started."""
    return (
        sa.select(WORKFLOW.c.id, WORKFLOW.c.by, WORKFLOW.c.started_at, row_version(WORKFLOW))
        .where(can_go, WORKFLOW.c.place.is_(None), *conditions)
        .with_for_update(key_share=True, skip_locked=True, of=WORKFLOW)
    )
