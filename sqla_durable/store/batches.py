"""The group commit: what many attempts record, in one statement that is a transaction of its own.

Rows that another transaction holds are passed over, so that nobody's open transaction holds up a batch. Who asked for
too much is told: what was not written is given back, and the statements below tell why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from sqla_durable.models.status import WorkflowStatus
from sqla_durable.store._rows import (
    WORKFLOW,
    ZERO,
    Checkpoint,
    Columns,
    Completion,
    Connectable,
    Fence,
    Park,
    count_rows,
    execute,
    fence_row,
    filled,
    interval,
    materialized,
    of_owner,
    owned,
    pg,
    status,
    table,
)
from sqla_durable.store.signals import END_COLUMNS, end_notices
from sqla_durable.store.steps import CHECKPOINT, insert_of
from sqla_durable.store.workflows import COMPLETION

End: TypeAlias = Completion | Park

_END: Columns = {**COMPLETION.columns, "delay": sa.Float(), "awaits": JSONB(), "checkpoints": sa.Integer()}


@dataclass(frozen=True, slots=True)
class Unwritten:
    """What a batch asked for and the statement did not write: checkpoints by attempt and key, ends by attempt."""

    checkpoints: set[tuple[Fence, str]] = field(default_factory=set[tuple[Fence, str]])
    ends: set[Fence] = field(default_factory=set[Fence])


def write(connectable: Connectable, checkpoints: Sequence[Checkpoint] = (), ends: Sequence[End] = ()) -> Unwritten:
    """Record checkpoints, and what ends the attempts whose checkpoints in this batch are all written.

    One statement, for workflows whose rows nobody else holds and whose attempts own them. Locks their rows in the order
    of their ids, for as long as the statement's transaction.
    """
    counts = Counter(each.fence for each in checkpoints)
    parameters = filled("batch", [CHECKPOINT.row(each) for each in checkpoints])
    parameters |= filled("ending", [_end_row(each, counts[each.fence]) for each in ends])
    unwritten = Unwritten()
    for row in execute(connectable, _WRITE, parameters):
        fence = Fence(row.id, row.token)
        if row.key is None:
            unwritten.ends.add(fence)
        else:
            unwritten.checkpoints.add((fence, row.key))
    return unwritten


def _end_row(end: End, checkpoints: int) -> dict[str, Any]:
    counted = {"checkpoints": checkpoints}
    match end:
        case Completion():
            return COMPLETION.row(end) | counted
        case Park():
            awaits = [each.to_json() for each in end.awaits] or None
            suspended = {"status": WorkflowStatus.SUSPENDED.value, "delay": end.delay, "awaits": awaits}
            return fence_row(end.fence) | suspended | counted


def _write_statement() -> Any:
    batch = sa.select(*table("batch", CHECKPOINT.columns).c).cte("batch")
    ending = sa.select(*table("ending", _END).c).cte("ending")
    mine = owned(sa.union(_fences(batch), _fences(ending)).subquery("fences"), skip_locked=True)
    recorded = insert_of(batch, mine).cte("recorded")
    ended = _end_statement(ending, mine, recorded).cte("ended")
    left = sa.select(batch.c.id, batch.c.token, batch.c.key).where(
        ~sa.select(mine.c.id).where(of_owner(batch, mine), _in(recorded, batch)).exists()
    )
    open_ends = sa.select(ending.c.id, ending.c.token, sa.null()).where(
        ~sa.select(ended.c.id).where(ended.c.id == ending.c.id, ended.c.token == ending.c.token).exists()
    )
    return sa.union_all(left, open_ends).add_cte(*end_notices(ended, ended.c.has_notices))


def _fences(rows: sa.CTE) -> Any:
    return sa.select(rows.c.id, rows.c.token)


def _in(recorded: sa.CTE, batch: sa.CTE) -> Any:
    return sa.and_(recorded.c.workflow_id == batch.c.id, recorded.c.key == batch.c.key)


def _end_statement(ending: sa.CTE, mine: sa.CTE, recorded: sa.CTE) -> Any:
    written = (
        sa.select(recorded.c.workflow_id, count_rows().label("checkpoints"))
        .group_by(recorded.c.workflow_id)
        .cte("written")
    )
    ready = materialized(
        sa.select(*ending.c)
        .join(mine, of_owner(ending, mine))
        .outerjoin(written, written.c.workflow_id == ending.c.id)
        .where(sa.func.coalesce(written.c.checkpoints, ZERO) == ending.c.checkpoints),
        "ready",
    )
    parked = ready.c.status == status(WorkflowStatus.SUSPENDED)
    return (
        sa.update(WORKFLOW)
        .where(WORKFLOW.c.id == ready.c.id)
        .values(
            status=ready.c.status,
            output=sa.cast(ready.c.output, JSONB),
            error=sa.cast(ready.c.error, JSONB),
            finished_at=sa.case((~parked, pg.statement_timestamp())),
            token=sa.case((~parked, WORKFLOW.c.token)),
            worker_id=sa.case((~parked, WORKFLOW.c.worker_id)),
            wake_at=pg.statement_timestamp() + interval(ready.c.delay),
            awaits=sa.case((parked, ready.c.awaits)),
        )
        .returning(*END_COLUMNS, ready.c.token.label("token"), ready.c.holds, ready.c.has_notices)
    )


_WRITE = _write_statement()
