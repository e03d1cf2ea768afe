"""The statements on checkpoints: record one, read a workflow's history. Many are recorded by `batches`.

A checkpoint is inserted only while its attempt owns the workflow, with the workflow's row locked in the same
statement; the primary key `(workflow_id, key)` lets one of two executions of a step commit. Only the record of a step
that is being tried again gives way to the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID

from sqlalchemy import (
    CTE,
    ColumnElement,
    Float,
    FromClause,
    Integer,
    Row,
    Text,
    and_,
    bindparam,
    case,
    cast,
    func,
    or_,
    select,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, insert
from sqlalchemy.dialects.postgresql import UUID as PG_UUID
from sqlalchemy.orm import Session

from sqla_durable.store._rows import (
    STEP,
    WORKFLOW,
    Checkpoint,
    Columns,
    Connectable,
    Fence,
    Recorded,
    Verdict,
    execute,
    fence_row,
    filled,
    interval,
    of_owner,
    owned,
    retrying,
    soon_over,
    table,
)

CHECKPOINT: Columns = {
    "id": PG_UUID(),
    "token": PG_UUID(),
    "key": Text(),
    "name": Text(),
    "position": Integer(),
    "status": Text(),
    "output": Text(),
    "error": Text(),
    "attempt": Integer(),
    "attempts": Integer(),
    "elapsed": Float(),
    "delay": Float(),
}


def record(session: Session, checkpoint: Checkpoint) -> Verdict:
    """Record one checkpoint in the session's transaction; wait for whoever holds the row.

    LOST and DUPLICATE wrote nothing: roll the transaction back, so that the step's own writes go with it.
    """
    return _verdict(session, _RECORD, checkpoint)


def record_last(session: Session, checkpoint: Checkpoint) -> Verdict:
    """Do the same as the last statement before the COMMIT, which the server does not wait for without an end."""
    return _verdict(session, _RECORD_LAST, checkpoint)


def _verdict(session: Session, statement: Any, checkpoint: Checkpoint) -> Verdict:
    row = execute(session, statement, filled("batch", [checkpoint_row(checkpoint)])).one()
    if not row.owns:
        return Verdict.LOST
    return Verdict.RECORDED if row.recorded else Verdict.DUPLICATE


def recorded_among(connectable: Connectable, checkpoints: Sequence[Checkpoint]) -> set[tuple[Fence, str]]:
    """Give attempt and key of what is recorded already, if the attempt owns the workflow or ended it.

    What another attempt recorded under the key is not this one's: it has lost the workflow. And what an earlier try
    recorded is not this one's.
    """
    rows = execute(connectable, _RECORDED_AMONG, filled("batch", [checkpoint_row(each) for each in checkpoints]))
    return {(Fence(row.workflow_id, row.token), row.key) for row in rows}


def find(session: Session, workflow_id: UUID, key: str) -> Recorded | None:
    """Read the outcome of one step, to settle what became of a commit whose acknowledgement was lost."""
    wanted = _RECORDED.where(STEP.c.workflow_id == workflow_id, STEP.c.key == key, ~retrying())
    row = execute(session, wanted).one_or_none()
    return None if row is None else _recorded(row)


def histories(connectable: Connectable, workflow_ids: Sequence[UUID]) -> dict[UUID, dict[str, Recorded]]:
    """Read the checkpoints of workflows, by workflow and key."""
    found: dict[UUID, dict[str, Recorded]] = {}
    if workflow_ids:
        for row in execute(connectable, _HISTORIES, {"ids": list(workflow_ids)}):
            found.setdefault(row.workflow_id, {})[row.key] = _recorded(row)
    return found


def _recorded(row: Row[Any]) -> Recorded:
    found = Recorded(row.key, row.name, row.position, row.status, row.output, row.error, row.attempts)
    return found if row.age is None else replace(found, age=float(row.age), due_in=float(row.due_in))


def checkpoint_row(checkpoint: Checkpoint) -> dict[str, Any]:
    """Give a checkpoint as a row of `CHECKPOINT`."""
    return {
        **fence_row(checkpoint.fence),
        "key": checkpoint.key,
        "name": checkpoint.name,
        "position": checkpoint.position,
        "status": checkpoint.status.value,
        "output": checkpoint.output,
        "error": checkpoint.error,
        "attempt": checkpoint.attempt,
        "attempts": checkpoint.attempts,
        "elapsed": checkpoint.elapsed,
        "delay": checkpoint.delay,
    }


def insert_of(batch: FromClause, mine: CTE) -> Any:
    """Insert the checkpoints of a batch whose workflows are `mine`; give the keys of those that are written."""
    # A step's duration is measured by its process; the two times stand on the database's clock.
    started_at = func.statement_timestamp() - interval(batch.c.elapsed)
    columns = {
        "workflow_id": batch.c.id,
        "key": batch.c.key,
        "name": batch.c.name,
        "position": batch.c.position,
        "status": batch.c.status,
        "output": cast(batch.c.output, JSONB),
        "error": cast(batch.c.error, JSONB),
        "attempt": batch.c.attempt,
        "attempts": batch.c.attempts,
        "started_at": started_at,
        "finished_at": func.statement_timestamp(),
        "wake_at": func.statement_timestamp() + interval(batch.c.delay),
    }
    source = select(*columns.values()).join_from(batch, mine, of_owner(batch, mine))
    inserted = insert(STEP).from_select(list(columns), source, include_defaults=False)
    kept = {"workflow_id", "key", "started_at"}
    return inserted.on_conflict_do_update(
        index_elements=["workflow_id", "key"],
        # The first try may have been on another server, whose clock was ahead.
        set_={name: inserted.excluded[name] for name in columns if name not in kept}
        | {"finished_at": func.greatest(inserted.excluded.finished_at, STEP.c.started_at)},
        where=retrying(),
    ).returning(STEP.c.workflow_id, STEP.c.key)


def _record_statement(*more: ColumnElement[Any]) -> Any:
    batch = table("batch", CHECKPOINT)
    mine = owned(batch, skip_locked=False)
    inserted = insert_of(batch, mine).cte("inserted")
    owns = select(func.count()).select_from(mine).scalar_subquery()
    recorded = select(func.count()).select_from(inserted).scalar_subquery()
    return select(owns.label("owns"), recorded.label("recorded"), *more)


def _recorded_among_statement() -> Any:
    batch = table("batch", CHECKPOINT)
    return (
        select(STEP.c.workflow_id, WORKFLOW.c.token, STEP.c.key)
        .join_from(batch, WORKFLOW, and_(WORKFLOW.c.id == batch.c.id, WORKFLOW.c.token == batch.c.token))
        .join(STEP, and_(STEP.c.workflow_id == batch.c.id, STEP.c.key == batch.c.key))
        .where(or_(~retrying(), and_(batch.c.delay.is_not(None), STEP.c.attempts == batch.c.attempts)))
    )


def _age_of(moment: ColumnElement[Any]) -> ColumnElement[Any]:
    """Give how many seconds ago that was, for a step that is being tried again."""
    return case((retrying(), func.extract("epoch", func.statement_timestamp() - moment)))


_RECORD = _record_statement()
_RECORD_LAST = _record_statement(soon_over())
_RECORDED_AMONG = _recorded_among_statement()
_RECORDED = select(
    STEP.c.workflow_id,
    STEP.c.key,
    STEP.c.name,
    STEP.c.position,
    STEP.c.status,
    cast(STEP.c.output, Text).label("output"),
    cast(STEP.c.error, Text).label("error"),
    STEP.c.attempts,
    _age_of(STEP.c.started_at).label("age"),
    (-_age_of(STEP.c.wake_at)).label("due_in"),
)
_HISTORIES = _RECORDED.where(STEP.c.workflow_id == func.any(bindparam("ids", type_=ARRAY(PG_UUID()))))
