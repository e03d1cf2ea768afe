"""The group commit: what many attempts record, in one statement that is a transaction of its own.

Rows that another transaction holds are passed over, so that nobody's open transaction holds up a batch. Who asked for
too much is told: what was not written is given back, and the statements below tell why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from sqlalchemy import (
    CTE,
    Boolean,
    Float,
    Integer,
    and_,
    case,
    cast,
    func,
    literal_column,
    null,
    select,
    union,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.dialects.postgresql import UUID as PG_UUID

from sqla_durable.models.column_types import Text
from sqla_durable.models.status import WorkflowStatus
from sqla_durable.store._rows import (
    WORKFLOW,
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
    table,
)
from sqla_durable.store.signals import asking, deleting_notices
from sqla_durable.store.steps import CHECKPOINT, checkpoint_row, insert_of

End: TypeAlias = Completion | Park

_END: Columns = {
    "id": PG_UUID(),
    "token": PG_UUID(),
    "status": Text(),
    "output": Text(),
    "error": Text(),
    "delay": Float(),
    "awaits": JSONB(),
    "checkpoints": Integer(),
    "holds": Boolean(),
    "has_notices": Boolean(),
}


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
    parameters = filled("batch", [checkpoint_row(each) for each in checkpoints])
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
    fence = {**fence_row(end.fence), "checkpoints": checkpoints}
    match end:
        case Completion():
            outcome = {"status": end.status.value, "output": end.output, "error": end.error}
            return fence | outcome | {"holds": end.holds, "has_notices": end.has_notices}
        case Park():
            awaits = [each.to_json() for each in end.awaits] or None
            return fence | {"status": WorkflowStatus.SUSPENDED.value, "delay": end.delay, "awaits": awaits}


def _write_statement() -> Any:
    batch = select(*table("batch", CHECKPOINT).c).cte("batch")
    ending = select(*table("ending", _END).c).cte("ending")
    mine = owned(union(_fences(batch), _fences(ending)).subquery("fences"), skip_locked=True)
    recorded = insert_of(batch, mine).cte("recorded")
    ended = _end_statement(ending, mine, recorded).cte("ended")
    of_ended = asking(ended).cte("asked"), deleting_notices(ended, ended.c.has_notices).cte("cleared")
    left = select(batch.c.id, batch.c.token, batch.c.key).where(
        ~select(mine.c.id).where(of_owner(batch, mine), _in(recorded, batch)).exists()
    )
    open_ends = select(ending.c.id, ending.c.token, null()).where(
        ~select(ended.c.id).where(ended.c.id == ending.c.id, ended.c.token == ending.c.token).exists()
    )
    return union_all(left, open_ends).add_cte(*of_ended)


def _fences(rows: CTE) -> Any:
    return select(rows.c.id, rows.c.token)


def _in(recorded: CTE, batch: CTE) -> Any:
    return and_(recorded.c.workflow_id == batch.c.id, recorded.c.key == batch.c.key)


def _end_statement(ending: CTE, mine: CTE, recorded: CTE) -> Any:
    written = (
        select(recorded.c.workflow_id, count_rows().label("checkpoints"))
        .group_by(recorded.c.workflow_id)
        .cte("written")
    )
    ready = materialized(
        select(*ending.c)
        .join(mine, of_owner(ending, mine))
        .outerjoin(written, written.c.workflow_id == ending.c.id)
        .where(func.coalesce(written.c.checkpoints, literal_column("0")) == ending.c.checkpoints),
        "ready",
    )
    parked = ready.c.status == literal_column(f"'{WorkflowStatus.SUSPENDED}'")
    return (
        update(WORKFLOW)
        .where(WORKFLOW.c.id == ready.c.id)
        .values(
            status=ready.c.status,
            output=cast(ready.c.output, JSONB),
            error=cast(ready.c.error, JSONB),
            finished_at=case((~parked, pg.statement_timestamp())),
            token=case((~parked, WORKFLOW.c.token)),
            worker_id=case((~parked, WORKFLOW.c.worker_id)),
            wake_at=pg.statement_timestamp() + interval(ready.c.delay),
            awaits=case((parked, ready.c.awaits)),
        )
        .returning(
            WORKFLOW.c.id,
            ready.c.token.label("token"),
            ready.c.holds,
            ready.c.has_notices,
            WORKFLOW.c.awaits,
            WORKFLOW.c.parent_id,
            WORKFLOW.c.finished_at,
        )
    )


_WRITE = _write_statement()
