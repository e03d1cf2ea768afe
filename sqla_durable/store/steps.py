"""The statements on checkpoints: record one, report progress, begin to wait, read a workflow's history.

A checkpoint is inserted only while its attempt owns the workflow, with the workflow's row locked in the same
statement; the primary key `(workflow_id, key)` lets one of two executions of a step commit. Only the record of a step
without an outcome is replaced by the next one. `attempts` records those of many workflows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session
from sqlalchemy.sql.base import ReadOnlyColumnCollection

from sqla_durable.models.base import StepStatus, Text, WorkflowStatus
from sqla_durable.store.driver import DriverStatement
from sqla_durable.store.records import Checkpoint, Fence, Recorded, Verdict
from sqla_durable.store.statements import (
    STEP,
    WORKFLOW,
    Condition,
    Connectable,
    Expression,
    Shape,
    Statement,
    batch_parameter,
    batch_table,
    execute,
    fence_row,
    has_status,
    insert_select,
    interval,
    is_among,
    is_open_step,
    is_same_attempt,
    json_parameter,
    limit_idle_time,
    materialized,
    must_compensate,
    parameter,
    pg,
    scalar,
    status_literal,
)
from sqla_durable.unwinding import AttemptLost

CHECKPOINT = Shape(Checkpoint, without=["value"])


def record(session: Connectable, checkpoint: Checkpoint) -> Verdict:
    """Record one checkpoint in the session's transaction; wait for the lock of the workflow's row.

    LOST and DUPLICATE wrote nothing: roll the transaction back, so that the step's own writes go with it.
    """
    return _verdict(session, _RECORD, checkpoint)


def record_last(session: Session, checkpoint: Checkpoint) -> Verdict:
    """Record it as the last statement before the COMMIT, with a limit on how long the transaction may then be idle."""
    return _verdict(session, _RECORD_LAST, checkpoint)


def record_unlocked(connectable: Connectable, checkpoint: Checkpoint) -> bool:
    """Record one checkpoint, and return true; false if the attempt has lost the workflow or the step has an outcome.

    Also false if another transaction locks the workflow's row. The same as `write_batch` of this checkpoint alone, in
    half of the server's time.
    """
    return bool(_RECORD_UNLOCKED.rows(connectable, given_parameters(checkpoint)))


def why_unwritten(connectable: Connectable, parameters: Mapping[str, Any]) -> Verdict:
    """Return why a statement of these parameters, which has just been executed, wrote nothing: LOST or DUPLICATE."""
    # The row is locked if this attempt owns it, so it cannot have changed in between.
    return Verdict.LOST if scalar(connectable, _OWNED, parameters) is None else Verdict.DUPLICATE


def settle(connectable: Connectable, checkpoint: Checkpoint) -> Recorded:
    """Record an outcome, unless the step has one; return the recorded one. Waits for the lock of the row.

    Raises:
        AttemptLost: the attempt no longer owns the workflow.
    """
    verdict = record(connectable, checkpoint)
    found = find(connectable, checkpoint.fence.workflow_id, checkpoint.key)
    if verdict is Verdict.LOST or found is None:
        raise AttemptLost(checkpoint.fence.workflow_id)
    return found


def recorded_among(connectable: Connectable, checkpoints: Sequence[Checkpoint]) -> set[tuple[Fence, str]]:
    """Return attempt and key of those that are recorded already, if the attempt owns the workflow or ended it.

    Not what another attempt recorded under the key: this one has lost the workflow. Nor what an earlier try recorded.
    """
    rows = execute(
        connectable, _RECORDED_AMONG, batch_parameter("batch", [CHECKPOINT.row(each) for each in checkpoints])
    )
    return {(Fence(row.workflow_id, row.token), row.key) for row in rows}


def find(session: Connectable, workflow_id: UUID, key: str) -> Recorded | None:
    """Read the outcome of one step, to find out whether a commit whose acknowledgement was lost took place."""
    wanted = sa.select(*RECORDED).where(STEP.c.workflow_id == workflow_id, STEP.c.key == key, ~is_open_step())
    row = execute(session, wanted).one_or_none()
    return None if row is None else recorded_in(row)


def histories(connectable: Connectable, workflow_ids: Sequence[UUID]) -> dict[UUID, dict[str, Recorded]]:
    """Read the checkpoints of workflows, by workflow and key."""
    found: dict[UUID, dict[str, Recorded]] = {}
    if workflow_ids:
        for row in execute(connectable, _HISTORIES, {"ids": list(workflow_ids)}):
            recorded = recorded_in(row[1:])
            found.setdefault(row[0], {})[recorded.key] = recorded
    return found


def lock_given() -> sa.CTE:
    """Lock the workflow of the attempt of `GIVEN`, if it owns it; return its id and the deadline that still counts."""
    deadline_at = sa.case((~must_compensate(), WORKFLOW.c.deadline_at)).label("deadline_at")
    locked = sa.select(WORKFLOW.c.id, deadline_at).where(*is_owned())
    return materialized(locked.with_for_update(key_share=True, of=WORKFLOW), "owned")


def outcome_columns(owned: sa.CTE, recorded: sa.CTE) -> tuple[Expression, ...]:
    """Return what `outcome_in` reads: whether the attempt owns the workflow, and the outcome of its step as JSON text.

    The outcome is what the CTE `recorded` returns as `output`, or what was recorded before, whose acknowledgement was
    lost.
    """
    succeeded = STEP.c.status == status_literal(StepStatus.SUCCEEDED)
    own = sa.and_(STEP.c.workflow_id == GIVEN["id"], STEP.c.key == GIVEN["key"], succeeded)
    return (
        sa.select(owned.c.id).exists().label("owned"),
        sa.select(sa.cast(recorded.c.output, Text)).scalar_subquery().label("recorded"),
        sa.select(sa.cast(STEP.c.output, Text)).where(own).scalar_subquery().label("known"),
    )


def outcome_in(row: sa.Row[Any], fence: Fence) -> str | None:
    """Return the outcome in a row of `outcome_columns`, None if there is none.

    Raises:
        AttemptLost: there is none, and the attempt no longer owns the workflow.
    """
    found: str | None = row.recorded if row.known is None else row.known
    if found is None and not row.owned:
        raise AttemptLost(fence.workflow_id)
    return found


def has_outcome() -> Condition:
    """Return whether the step of `GIVEN` has an outcome: then its call must take and start nothing more.

    A statement may reach the server long after its call was cancelled, and that was recorded.
    """
    wanted = sa.and_(STEP.c.workflow_id == GIVEN["id"], STEP.c.key == GIVEN["key"], ~is_open_step())
    return sa.select(STEP.c.key).where(wanted).exists()


def given_parameters(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the parameters of `GIVEN`."""
    return dict(zip(_GIVEN_NAMES, CHECKPOINT.row(checkpoint).values(), strict=True))


def given_fence_parameters(fence: Fence, key: str | None = None) -> dict[str, Any]:
    """Return those of the parameters of `GIVEN` that identify an attempt and its step."""
    return {_given_name(name): value for name, value in fence_row(fence).items()} | {_given_name("key"): key}


def insert_batch(batch: sa.FromClause, mine: sa.CTE) -> Any:
    """Insert the checkpoints of a batch whose workflows are `is_owned`; give the keys of those that are written."""
    columns = checkpoint_columns(batch.c)
    source = sa.select(*columns.values()).join_from(batch, mine, is_same_attempt(batch, mine))
    return insert_checkpoints(columns, source).returning(STEP.c.workflow_id, STEP.c.key)


def checkpoint_columns(
    given: Mapping[str, Expression] | ReadOnlyColumnCollection[str, Any],
) -> dict[str, Any]:
    """Return the columns of a checkpoint's record, made of those of `CHECKPOINT`."""
    now = pg.statement_timestamp()
    return {
        "workflow_id": given["id"],
        "key": given["key"],
        "name": given["name"],
        "position": given["position"],
        "status": given["status"],
        "output": sa.cast(given["output"], JSONB),
        "error": sa.cast(given["error"], JSONB),
        "attempt": given["attempt"],
        "tries": given["tries"],
        # A step's duration is measured by its process; the two times are on the database's clock.
        "started_at": now - interval(given["elapsed"]),
        "finished_at": now,
        "wake_at": now + interval(given["delay"]),
    }


def insert_checkpoints(columns: Mapping[str, Any], source: sa.SelectBase) -> Any:
    """Insert checkpoints, unless there is an outcome; the record of a step without one is replaced."""
    inserted = insert_select(STEP, columns, source)
    kept = {"workflow_id", "key", "started_at"}
    return inserted.on_conflict_do_update(
        index_elements=["workflow_id", "key"],
        # The first try may have been on another server, whose clock was ahead.
        set_={name: inserted.excluded[name] for name in columns if name not in kept}
        | {"finished_at": sa.func.greatest(inserted.excluded.finished_at, STEP.c.started_at)},
        where=is_open_step(),
    )


def is_owned(table: sa.FromClause = WORKFLOW) -> tuple[Condition, ...]:
    """Return the conditions that the workflow is owned by the attempt of `GIVEN`."""
    return (
        table.c.id == GIVEN["id"],
        table.c.token == GIVEN["token"],
        has_status(table, WorkflowStatus.RUNNING),
    )


def select_from_owned(columns: Mapping[str, Any], *, skip_locked: bool = False) -> Any:
    """Select columns from the workflow's row, locked in the same statement, if the attempt of `GIVEN` owns it.

    Without the lock a cancel or a reclaim could commit between this check and the commit.
    """
    owned = sa.select(*columns.values()).where(*is_owned())
    return owned.with_for_update(key_share=True, skip_locked=skip_locked, of=WORKFLOW)


def report_progress(connectable: Connectable, checkpoint: Checkpoint, *, details: str | None) -> None:
    """Record in a running step's row that it is alive, and its details if there are any; insert the row if needed.

    A no-op for a step that has an outcome, or whose try has been recorded as failed. Waits for the lock of the
    workflow's row.

    Args:
        checkpoint: of the status `running`.
        details: JSON text; None leaves those that are there.

    Raises:
        AttemptLost: the attempt no longer owns the workflow; nothing was written.
    """
    if not execute(connectable, _REPORT, given_parameters(checkpoint) | {"details": details}).scalar_one():
        raise AttemptLost(checkpoint.fence.workflow_id)


def begin_wait(connectable: Connectable, checkpoint: Checkpoint, *, until: datetime | None = None) -> float:
    """Record once that an operation waits; return the seconds until it is due, infinite without a time.

    Args:
        checkpoint: of the status `waiting`; its `delay` says how long.
        until: the time itself, instead of a delay.

    Raises:
        AttemptLost: the attempt no longer owns the workflow, or the operation has an outcome.
    """
    row = execute(connectable, _BEGIN_WAIT, given_parameters(checkpoint) | {"until": until}).one_or_none()
    if row is None:
        raise AttemptLost(checkpoint.fence.workflow_id)
    return float("inf") if row.due_in is None else float(row.due_in)


def keep_details(connectable: Connectable, checkpoint: Checkpoint, *, details: str) -> None:
    """Record details, as JSON text, in the row of an operation that waits; insert the row if needed.

    Raises:
        AttemptLost: the attempt no longer owns the workflow, or the operation has an outcome.
    """
    if execute(connectable, _KEEP_DETAILS, given_parameters(checkpoint) | {"details": details}).first() is None:
        raise AttemptLost(checkpoint.fence.workflow_id)


def _verdict(session: Connectable, statement: DriverStatement, checkpoint: Checkpoint) -> Verdict:
    parameters = given_parameters(checkpoint)
    return Verdict.RECORDED if statement.rows(session, parameters) else why_unwritten(session, parameters)


def recorded_in(values: Iterable[Any]) -> Recorded:
    """Return the record that the values of `RECORDED` in one row make."""
    key, name, position, status, output, error, tries, age, due_in, details = values
    if age is None:
        return Recorded(key, name, position, status, output, error, tries, details=details)
    endless = 0.0 if status is StepStatus.RUNNING else float("inf")
    due_in = endless if due_in is None else float(due_in)
    return Recorded(key, name, position, status, output, error, tries, float(age), due_in, details)


def _given_name(name: str) -> str:
    return f"given_{name}"  # the bare name of a column is reserved in INSERT


def _record_statement(*more: Expression, skip_locked: bool = False) -> Any:
    columns = checkpoint_columns(GIVEN)
    source = select_from_owned(columns, skip_locked=skip_locked)
    return insert_checkpoints(columns, source).returning(STEP.c.key, *more)


def _recorded_among_statement() -> Any:
    batch = batch_table("batch", CHECKPOINT.columns)
    # The same try of a step that is running has a row too, without a time.
    is_timed, has_time = batch.c.delay.is_not(None), STEP.c.wake_at.is_not(None)
    is_open = sa.or_(batch.c.delay.is_not(None), sa.and_(batch.c.output.is_(None), batch.c.error.is_(None)))
    return (
        sa.select(STEP.c.workflow_id, WORKFLOW.c.token, STEP.c.key)
        .join_from(batch, WORKFLOW, sa.and_(WORKFLOW.c.id == batch.c.id, WORKFLOW.c.token == batch.c.token))
        .join(STEP, sa.and_(STEP.c.workflow_id == batch.c.id, STEP.c.key == batch.c.key))
        .where(sa.or_(~is_open_step(), sa.and_(is_open, STEP.c.tries == batch.c.tries, is_timed == has_time)))
    )


def _age_of(moment: Expression) -> Expression:
    """Return how many seconds ago that was, for a step without an outcome."""
    return sa.case((is_open_step(), sa.func.extract("epoch", pg.statement_timestamp() - moment)))


def _report_statement() -> Any:
    owned = lock_given()
    details = json_parameter("details")
    columns = checkpoint_columns(GIVEN) | {"workflow_id": owned.c.id, "details": details}
    inserted = insert_select(STEP, columns, sa.select(*columns.values()))
    given = inserted.excluded
    same_or_later = sa.or_(STEP.c.status == status_literal(StepStatus.RUNNING), STEP.c.tries < given.tries)
    reported = inserted.on_conflict_do_update(
        index_elements=["workflow_id", "key"],
        set_={
            "status": given.status,
            "attempt": given.attempt,
            "tries": given.tries,
            "wake_at": sa.null(),
            # The first try may have been on another server, whose clock was ahead.
            "finished_at": sa.func.greatest(given.finished_at, STEP.c.started_at),
            "details": sa.func.coalesce(given.details, STEP.c.details),
        },
        where=sa.and_(is_open_step(), same_or_later),
    ).returning(STEP.c.key)
    return sa.select(sa.select(owned.c.id).exists()).add_cte(reported.cte("reported"))


def _begin_wait_statement() -> Any:
    until = parameter("until", sa.DateTime(timezone=True))
    columns = checkpoint_columns(GIVEN)
    columns["wake_at"] = sa.func.coalesce(until, columns["wake_at"])
    inserted = insert_select(STEP, columns, select_from_owned(columns))
    # A wait that has begun keeps its time.
    return inserted.on_conflict_do_update(
        index_elements=["workflow_id", "key"],
        set_={"position": inserted.excluded.position},
        where=STEP.c.status == status_literal(StepStatus.WAITING),
    ).returning(sa.func.extract("epoch", STEP.c.wake_at - pg.statement_timestamp()).label("due_in"))


def _keep_details_statement() -> Any:
    columns = checkpoint_columns(GIVEN)
    columns["details"] = json_parameter("details")
    inserted = insert_select(STEP, columns, select_from_owned(columns))
    return inserted.on_conflict_do_update(
        index_elements=["workflow_id", "key"],
        set_={"details": inserted.excluded.details},
        where=STEP.c.status == status_literal(StepStatus.WAITING),
    ).returning(STEP.c.key)


_GIVEN_NAMES = [_given_name(each) for each in CHECKPOINT.columns]
GIVEN: dict[str, Expression] = {name: parameter(_given_name(name), kind) for name, kind in CHECKPOINT.columns.items()}
"""One checkpoint as parameters."""

_OWNED = Statement(lambda: sa.select(WORKFLOW.c.id).where(*is_owned()))
_RECORD = DriverStatement(_record_statement)
_RECORD_UNLOCKED = DriverStatement(lambda: _record_statement(skip_locked=True))
_RECORD_LAST = DriverStatement(lambda: _record_statement(limit_idle_time()))
_RECORDED_AMONG = Statement(_recorded_among_statement)
RECORDED = (
    STEP.c.key,
    STEP.c.name,
    STEP.c.position,
    STEP.c.status,
    sa.cast(STEP.c.output, Text).label("output"),
    sa.cast(STEP.c.error, Text).label("error"),
    STEP.c.tries,
    _age_of(STEP.c.started_at).label("age"),
    (-_age_of(STEP.c.wake_at)).label("due_in"),
    sa.cast(STEP.c.details, Text).label("details"),
)
"""The columns of which `recorded_in` makes a record."""

_HISTORIES = Statement(lambda: sa.select(STEP.c.workflow_id, *RECORDED).where(is_among(STEP.c.workflow_id)))
_REPORT = Statement(_report_statement)
_BEGIN_WAIT = Statement(_begin_wait_statement)
_KEEP_DETAILS = Statement(_keep_details_statement)
