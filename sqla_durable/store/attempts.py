"""What an attempt writes about its workflow: how it ends, that it is suspended or released, that it has a saga.

Whatever an attempt writes is fenced: the row is locked while its token is compared, in the same statement. The group
commit of a worker is one statement for many attempts: it locks rows in the order of their ids, and skips those that
another transaction holds, so that nobody's open transaction delays a batch. It returns what it did not write.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import field
from typing import Any, TypeAlias
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.models.base import WorkflowStatus
from sqla_durable.store.driver import DriverStatement
from sqla_durable.store.inbox import END_COLUMNS, end_notices
from sqla_durable.store.records import Checkpoint, Completion, Fence, Suspend
from sqla_durable.store.statements import (
    COMPENSATES,
    FENCE,
    ONE,
    WORKFLOW,
    ZERO,
    Columns,
    Condition,
    Connectable,
    Shape,
    Statement,
    as_uuid,
    batch_parameter,
    batch_table,
    count_rows,
    execute,
    fence_row,
    interval,
    is_same_attempt,
    lock_owned,
    materialized,
    pg,
    scalar,
    scalars,
    status_literal,
)
from sqla_durable.store.steps import CHECKPOINT, given_parameters, insert_batch, is_owned
from sqla_durable.unwinding import AttemptLost

COMPLETION = Shape(Completion, without=["is_child"])
End: TypeAlias = Completion | Suspend
_END: Columns = {**COMPLETION.columns, "delay": sa.Float(), "awaits": JSONB(), "checkpoints": sa.Integer()}


@dataclass(frozen=True, slots=True)
class Unwritten:
    """What a batch asked for and the statement did not write: checkpoints by attempt and key, ends by attempt."""

    checkpoints: set[tuple[Fence, str]] = field(default_factory=set[tuple[Fence, str]])
    ends: set[Fence] = field(default_factory=set[Fence])

    def __bool__(self) -> bool:
        return bool(self.checkpoints or self.ends)


def finish(session: Session, completion: Completion) -> bool:
    """Record an outcome; wait for the row's lock. False: the attempt no longer owns the workflow."""
    return scalar(session, _FINISH, batch_parameter("batch", [COMPLETION.row(completion)])) is not None


def lock(session: Session, fence: Fence) -> bool:
    """Lock the row of a running workflow; wait for its lock. False: the attempt no longer owns it."""
    return scalar(session, _LOCK, batch_parameter("batch", [fence_row(fence)])) is not None


def finished_by(connectable: Connectable, fences: Iterable[Fence]) -> dict[Fence, WorkflowStatus]:
    """Return those of the attempts that have finished their workflows: an acknowledgement may have been lost."""
    rows = execute(connectable, _FINISHED_BY, batch_parameter("batch", [fence_row(each) for each in fences]))
    return {Fence(row.id, row.token): row.status for row in rows}


def release(connectable: Connectable, fences: Iterable[Fence]) -> set[UUID]:
    """Release running workflows to their queues, in their old places; return the ids of those still owned."""
    return set(scalars(connectable, _RELEASE, batch_parameter("batch", [fence_row(each) for each in fences])))


def release_unlocked(connectable: Connectable, fences: Sequence[Fence]) -> list[Fence]:
    """Release those whose rows are not locked by others; return the attempts that still own theirs."""
    scalars(connectable, _RELEASE_UNLOCKED, batch_parameter("batch", [fence_row(each) for each in fences])).all()
    owned = still_owned(connectable, fences)
    return [each for each in fences if each in owned]


def still_owned(connectable: Connectable, fences: Iterable[Fence]) -> set[Fence]:
    """Return the attempts that still own their workflows. Takes no lock."""
    rows = execute(connectable, _STILL_OWNED, batch_parameter("batch", [fence_row(each) for each in fences]))
    return {Fence(row.id, row.token) for row in rows}


def write_batch(
    connectable: Connectable, checkpoints: Sequence[Checkpoint] = (), ends: Sequence[End] = ()
) -> Unwritten:
    """Record checkpoints, and what ends the attempts whose checkpoints in this batch are all written.

    One statement, for workflows whose rows are not locked by others and whose attempts own them. Locks their rows in
    the order of their ids, for as long as the statement's transaction.
    """
    counts = Counter([each.fence for each in checkpoints]) if ends else Counter[Fence]()
    parameters = batch_parameter("batch", [CHECKPOINT.row(each) for each in checkpoints])
    parameters |= batch_parameter("ending", [_end_row(each, counts[each.fence]) for each in ends])
    unwritten = Unwritten()
    for workflow_id, token, key in _WRITE_BATCH.rows(connectable, parameters):
        fence = Fence(as_uuid(workflow_id), as_uuid(token))
        if key is None:
            unwritten.ends.add(fence)
        else:
            unwritten.checkpoints.add((fence, key))
    return unwritten


def begin_saga(connectable: Connectable, checkpoint: Checkpoint) -> None:
    """Record that the workflow has a saga: a cancel enqueues it, for a worker to compensate.

    Raises:
        AttemptLost: the attempt no longer owns the workflow.
    """
    if scalar(connectable, _BEGIN_SAGA, given_parameters(checkpoint)) is None:
        raise AttemptLost(checkpoint.fence.workflow_id)


def _finish_statement() -> Any:
    batch = batch_table("batch", COMPLETION.columns)
    mine = lock_owned(batch, skip_locked=False)
    ended = (
        sa.update(WORKFLOW)
        .where(WORKFLOW.c.id == mine.c.id, is_same_attempt(batch, mine))
        .values(
            status=batch.c.status,
            output=sa.cast(batch.c.output, JSONB),
            error=sa.cast(batch.c.error, JSONB),
            finished_at=pg.statement_timestamp(),
        )
        .returning(*END_COLUMNS, batch.c.has_deferred)
        .cte("ended")
    )
    return sa.select(ended.c.id).add_cte(*end_notices(ended))


def _release_statement(*, skip_locked: bool) -> Any:
    mine = lock_owned(batch_table("batch", FENCE), skip_locked=skip_locked)
    return (
        sa.update(WORKFLOW)
        .where(WORKFLOW.c.id == mine.c.id)
        .values(status=WorkflowStatus.PENDING, token=sa.null(), worker_id=sa.null())
        .returning(WORKFLOW.c.id)
    )


def _still_owned_statement() -> Any:
    # Row by row, by the primary key: the index of what is running keeps dead entries while a snapshot is open.
    batch = batch_table("batch", FENCE)
    found = (
        sa.select(WORKFLOW.c.status)
        .where(WORKFLOW.c.id == batch.c.id, WORKFLOW.c.token == batch.c.token)
        .limit(ONE)
        .lateral("found")
    )
    running = found.c.status == status_literal(WorkflowStatus.RUNNING)
    return sa.select(batch.c.id, batch.c.token).select_from(batch.join(found, running))


def _finished_by_statement() -> Any:
    return sa.select(WORKFLOW.c.id, WORKFLOW.c.token, WORKFLOW.c.status).where(
        _of_attempts(), WORKFLOW.c.finished_at.is_not(None)
    )


def _of_attempts() -> Condition:
    batch = batch_table("batch", FENCE)
    return sa.tuple_(WORKFLOW.c.id, WORKFLOW.c.token).in_(sa.select(batch.c.id, batch.c.token))


def _end_row(end: End, checkpoints: int) -> dict[str, Any]:
    counted = {"checkpoints": checkpoints}
    match end:
        case Completion():
            return COMPLETION.row(end) | counted
        case Suspend():
            awaits = [each.to_json() for each in end.awaits] or None
            suspended = {"status": WorkflowStatus.SUSPENDED.value, "delay": end.delay, "awaits": awaits}
            return fence_row(end.fence) | suspended | counted


def _write_batch_statement() -> Any:
    batch = sa.select(*batch_table("batch", CHECKPOINT.columns).c).cte("batch")
    ending = sa.select(*batch_table("ending", _END).c).cte("ending")
    mine = lock_owned(sa.union(_fences(batch), _fences(ending)).subquery("fences"), skip_locked=True)
    recorded = insert_batch(batch, mine).cte("recorded")
    ended = _end_statement(ending, mine, recorded).cte("ended")
    left = sa.select(batch.c.id, batch.c.token, batch.c.key).where(
        ~sa.select(mine.c.id).where(is_same_attempt(batch, mine), _is_recorded(recorded, batch)).exists()
    )
    open_ends = sa.select(ending.c.id, ending.c.token, sa.null()).where(
        ~sa.select(ended.c.id).where(ended.c.id == ending.c.id, ended.c.token == ending.c.token).exists()
    )
    return sa.union_all(left, open_ends).add_cte(*end_notices(ended, ended.c.has_notices))


def _fences(rows: sa.CTE) -> Any:
    return sa.select(rows.c.id, rows.c.token)


def _is_recorded(recorded: sa.CTE, batch: sa.CTE) -> Any:
    return sa.and_(recorded.c.workflow_id == batch.c.id, recorded.c.key == batch.c.key)


def _end_statement(ending: sa.CTE, mine: sa.CTE, recorded: sa.CTE) -> Any:
    written = (
        sa.select(recorded.c.workflow_id, count_rows().label("checkpoints"))
        .group_by(recorded.c.workflow_id)
        .cte("written")
    )
    ready = materialized(
        sa.select(*ending.c)
        .join(mine, is_same_attempt(ending, mine))
        .outerjoin(written, written.c.workflow_id == ending.c.id)
        .where(sa.func.coalesce(written.c.checkpoints, ZERO) == ending.c.checkpoints),
        "ready",
    )
    suspends = ready.c.status == status_literal(WorkflowStatus.SUSPENDED)
    return (
        sa.update(WORKFLOW)
        .where(WORKFLOW.c.id == ready.c.id)
        .values(
            status=ready.c.status,
            output=sa.cast(ready.c.output, JSONB),
            error=sa.cast(ready.c.error, JSONB),
            finished_at=sa.case((~suspends, pg.statement_timestamp())),
            token=sa.case((~suspends, WORKFLOW.c.token)),
            worker_id=sa.case((~suspends, WORKFLOW.c.worker_id)),
            wake_at=pg.statement_timestamp() + interval(ready.c.delay),
            awaits=sa.case((suspends, ready.c.awaits)),
        )
        .returning(*END_COLUMNS, ready.c.token.label("token"), ready.c.has_deferred, ready.c.has_notices)
    )


_FINISH = Statement(_finish_statement)
_LOCK = Statement(lambda: sa.select(lock_owned(batch_table("batch", FENCE), skip_locked=False).c.id))
_RELEASE = Statement(lambda: _release_statement(skip_locked=False))
_RELEASE_UNLOCKED = Statement(lambda: _release_statement(skip_locked=True))
_FINISHED_BY = Statement(_finished_by_statement)
_STILL_OWNED = Statement(_still_owned_statement)
_WRITE_BATCH = DriverStatement(_write_batch_statement)
_BEGIN_SAGA = Statement(
    lambda: (
        sa.update(WORKFLOW)
        .where(*is_owned())
        .values(cancellation=sa.func.coalesce(WORKFLOW.c.cancellation, COMPENSATES))
        .returning(WORKFLOW.c.id)
    )
)
