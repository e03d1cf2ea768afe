"""The rows of queues and of their keys: made, changed, paused and resumed in the caller's transaction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from sqla_durable.definitions.queues import QueueOptions
from sqla_durable.store.statements import ONE, QUEUE, QUEUE_KEY, Condition, Connectable, execute, pg


def put(connectable: Connectable, name: str, options: QueueOptions) -> bool:
    """Make the row of a queue, or change it; return whether anything has changed.

    Locks the row, and those of the keys whose weights change; a row that is already as it is to be is not locked.
    Weights that are given replace all others. Pauses stay.
    """
    values = options.columns
    changed = _put_row(connectable, name, values)
    weights = options.weights
    return (weights is not None and _put_weights(connectable, name, weights)) or changed


def pause(connectable: Connectable, name: str) -> None:
    """Pause a queue, with a row or without. Locks its row."""
    given = insert(QUEUE).values(name=name, paused_at=pg.statement_timestamp())
    paused_at = sa.func.coalesce(QUEUE.c.paused_at, given.excluded.paused_at)
    execute(connectable, given.on_conflict_do_update(index_elements=["name"], set_={"paused_at": paused_at}))


def resume(connectable: Connectable, name: str) -> None:
    """Let a queue go on. Locks its row, if it is paused."""
    paused = QUEUE.c.name == name, QUEUE.c.paused_at.is_not(None)
    execute(connectable, sa.update(QUEUE).where(*paused).values(paused_at=None))


def pause_key(connectable: Connectable, name: str, by: str) -> None:
    """Pause one key of a queue, with a row or without. Locks the key's row."""
    # Only where there is none: ON CONFLICT would wait for a claim that is changing the row.
    there = sa.select(QUEUE.c.name).where(QUEUE.c.name == name).exists()
    missing = insert(QUEUE).from_select(["name"], sa.select(sa.literal(name)).where(~there), include_defaults=False)
    execute(connectable, missing.on_conflict_do_nothing(index_elements=["name"]))
    given = insert(QUEUE_KEY).values(queue=name, by=by, paused_at=pg.statement_timestamp())
    paused_at = sa.func.coalesce(QUEUE_KEY.c.paused_at, given.excluded.paused_at)
    execute(connectable, given.on_conflict_do_update(index_elements=["queue", "by"], set_={"paused_at": paused_at}))


def resume_key(connectable: Connectable, name: str, by: str) -> None:
    """Let one key of a queue go on. Locks the key's row, if it is paused."""
    paused = QUEUE_KEY.c.queue == name, QUEUE_KEY.c.by == by, QUEUE_KEY.c.paused_at.is_not(None)
    execute(connectable, sa.update(QUEUE_KEY).where(*paused).values(paused_at=None))


def _put_row(connectable: Connectable, name: str, values: Mapping[str, Any]) -> bool:
    same = [QUEUE.c[each].is_not_distinct_from(value) for each, value in values.items()]
    if execute(connectable, sa.select(QUEUE.c.name).where(QUEUE.c.name == name, *same)).first() is not None:
        return False
    given = insert(QUEUE).values(name=name, **values)
    changed = given.on_conflict_do_update(
        index_elements=["name"],
        set_={each: given.excluded[each] for each in values},
        where=_differ(QUEUE, given.excluded, values),
    )
    return execute(connectable, changed.returning(QUEUE.c.name)).first() is not None


def _put_weights(connectable: Connectable, name: str, weights: Mapping[str, int]) -> bool:
    others = (
        QUEUE_KEY.c.queue == name,
        QUEUE_KEY.c.by.not_in(list(weights)),
        QUEUE_KEY.c.weight != ONE,
    )
    reset = execute(connectable, sa.update(QUEUE_KEY).where(*others).values(weight=1).returning(QUEUE_KEY.c.by)).all()
    if not weights:
        return bool(reset)
    given = insert(QUEUE_KEY).values([{"queue": name, "by": by, "weight": weights[by]} for by in sorted(weights)])
    changed = given.on_conflict_do_update(
        index_elements=["queue", "by"],
        set_={"weight": given.excluded.weight},
        where=_differ(QUEUE_KEY, given.excluded, ["weight"]),
    )
    return bool(execute(connectable, changed.returning(QUEUE_KEY.c.by)).all() or reset)


def _differ(table: sa.Table, other: Any, columns: Iterable[str]) -> Condition:
    return sa.or_(*(table.c[each].is_distinct_from(other[each]) for each in columns))
