"""The statements that fail workflows for reasons outside of their code: a deadline, a row that the database refuses.

An attempt that is executing one of them no longer owns it: its next write is refused, as after a cancel. One with a
saga is enqueued at its deadline, to compensate before it fails; for that it has all the time that it needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import Session

from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.models.base import Text, WorkflowStatus
from sqla_durable.store.inbox import END_COLUMNS, end_notices, insert_orphan_notices, was_running
from sqla_durable.store.statements import (
    ALL,
    BEGINNING,
    COMPENSATES,
    IS_WANTED,
    LIMIT,
    OVERDUE,
    WORKFLOW,
    Condition,
    Connectable,
    Restriction,
    Statement,
    Subset,
    end_or_compensate,
    error_object,
    execute,
    materialized,
    must_compensate,
    parameter,
    pg,
    refresh_loaded,
    scalar,
    scan_start,
    subset_forms,
    text_literal,
)

TIMEOUT_TYPE = "sqla_durable.errors:WorkflowTimeoutError"


@dataclass(frozen=True, slots=True)
class Overdue:
    """A workflow whose deadline has passed: it has failed, or it `compensates` first.

    `worker_id` is the worker that was executing it, if one was.
    """

    workflow_id: UUID
    name: str
    compensates: bool
    worker_id: UUID | None


REFUSED_TYPE = "sqla_durable.errors:RowRefusedError"


def fail_overdue(
    connectable: Connectable, *, limit: int, since: str = BEGINNING, subset: Subset = ALL
) -> list[Overdue]:
    """Fail at most `limit` workflows whose deadline has passed and whose rows are not locked; lock their rows.

    Deadlines before `since` are skipped.
    """
    parameters = {"limit": limit, "since": since, **subset.parameters}
    rows = execute(connectable, subset.form_of(_FAIL_OVERDUE, _FAIL_PART), parameters)
    return [Overdue(row.id, row.name, row.finished_at is None, row.executing_id) for row in rows]


def overdue_ids(connectable: Connectable, *, limit: int, since: str = BEGINNING, subset: Subset = ALL) -> list[UUID]:
    """Return the ids of the workflows that this would fail."""
    return subset.find_ids(connectable, _OVERDUE_IDS, {"limit": limit, "since": since})


def fail_if_overdue(session: Session, workflow_id: UUID) -> bool:
    """Fail one workflow if its deadline has passed, waiting for the lock of its row; return whether it had."""
    failed = execute(session, _FAIL_IF_OVERDUE, {"wanted_id": workflow_id}).one_or_none() is not None
    if failed:
        refresh_loaded(session, [workflow_id])
    return failed


def is_overdue() -> Condition:
    """Return whether the deadline of an unfinished workflow has passed; uses the index of deadlines."""
    is_past = WORKFLOW.c.deadline_at <= pg.statement_timestamp()
    return sa.and_(WORKFLOW.c.finished_at.is_(None), is_past, ~must_compensate())


def in_time() -> Condition:
    """Return whether a workflow may still begin: its deadline has not passed, or it compensates."""
    is_ahead = WORKFLOW.c.deadline_at > pg.statement_timestamp()
    return sa.or_(WORKFLOW.c.deadline_at.is_(None), is_ahead, must_compensate())


def deadline_reason() -> Any:
    """Return the message of the error at a deadline."""
    return pg.concat(text_literal("it was not finished at its deadline, "), WORKFLOW.c.deadline_at)


def fail_refused(connectable: Connectable, workflow_id: UUID, *, reason: str) -> bool:
    """Fail an unfinished workflow whose row is not locked, and notify its parent; return whether it has failed."""
    return _has_failed(connectable, _FAIL_REFUSED, workflow_id, reason)


def fail_refused_alone(connectable: Connectable, workflow_id: UUID, *, reason: str) -> bool:
    """Fail it without any notice: the rows that notify its parent or its children may be what the database refuses."""
    return _has_failed(connectable, _FAIL_REFUSED_ALONE, workflow_id, reason)


def faults(connectable: Connectable, workflow_id: UUID) -> list[str]:
    """Return the columns that break a CHECK of the table: a row may be older than the constraint."""
    row = execute(connectable, _FAULTS, {"wanted_id": workflow_id}).one_or_none()
    return [] if row is None else [about for about, broken in zip(_checks(), row, strict=True) if broken]


def _fail_at_deadline_statement(*conditions: Condition, limit: Any, skip_locked: bool) -> tuple[Any, Any]:
    overdue = materialized(
        sa.select(
            WORKFLOW.c.id,
            WORKFLOW.c.worker_id,
            pg.statement_timestamp().label("locked_at"),
            error_object(TIMEOUT_TYPE, deadline_reason()).label("error"),
        )
        .where(is_overdue(), *conditions)
        .order_by(WORKFLOW.c.deadline_at)
        .limit(limit)
        .with_for_update(key_share=True, skip_locked=skip_locked, of=WORKFLOW),
        "overdue",
    )
    compensates = WORKFLOW.c.cancellation == COMPENSATES
    failed = (
        sa.update(WORKFLOW)
        .where(WORKFLOW.c.id == overdue.c.id)
        .values(
            end_or_compensate(compensates, WorkflowStatus.FAILED, reason=OVERDUE, now=overdue.c.locked_at)
            | {
                "token": sa.null(),
                "error": sa.case((compensates, sa.null()), else_=overdue.c.error),
            }
        )
        .returning(
            *END_COLUMNS,
            WORKFLOW.c.name,
            overdue.c.worker_id.label("executing_id"),
        )
        .cte("failed")
    )
    columns = failed.c.id, failed.c.name, failed.c.finished_at, failed.c.executing_id
    # Most deferred children have the deadline too; not those whose own was changed, or that a compensation started.
    ended = sa.select(failed.c.id).where(failed.c.finished_at.is_not(None)).cte("ended")
    notices = *end_notices(failed), insert_orphan_notices(ended).cte("left")
    return sa.select(*columns).add_cte(*notices), sa.select(overdue.c.id)


def _fail_overdue_statement(within: Restriction) -> tuple[Any, Any]:
    conditions = WORKFLOW.c.deadline_at >= scan_start(), within(WORKFLOW.c.id)
    return _fail_at_deadline_statement(*conditions, limit=LIMIT, skip_locked=True)


def _has_failed(connectable: Connectable, statement: Statement, workflow_id: UUID, reason: str) -> bool:
    return scalar(connectable, statement, {"wanted_id": workflow_id, "reason": reason}) is not None


def _fail_refused_statement() -> tuple[Any, Any]:
    unfinished = materialized(
        sa.select(
            WORKFLOW.c.id,
            was_running(),
            pg.statement_timestamp().label("locked_at"),
            error_object(REFUSED_TYPE, parameter("reason", Text())).label("error"),
        )
        .where(IS_WANTED, WORKFLOW.c.finished_at.is_(None))
        .with_for_update(key_share=True, skip_locked=True, of=WORKFLOW),
        "unfinished",
    )
    failed = (
        sa.update(WORKFLOW)
        .where(WORKFLOW.c.id == unfinished.c.id)
        .values(
            status=WorkflowStatus.FAILED,
            error=unfinished.c.error,
            finished_at=unfinished.c.locked_at,
            token=sa.null(),
            wake_at=sa.null(),
            awaits=sa.null(),
        )
        .returning(*END_COLUMNS, unfinished.c.was_running)
    )
    ended = failed.cte("ended")
    notices = *end_notices(ended), insert_orphan_notices(ended).cte("left")
    return sa.select(ended.c.id).add_cte(*notices), failed


def _faults_statement() -> Any:
    columns = [
        sa.literal_column(f"({each}) IS FALSE", type_=sa.Boolean()).label(f"check_{number}")
        for number, each in enumerate(_checks().values())
    ]
    return sa.select(*columns).where(IS_WANTED)


@cache
def _checks() -> dict[str, str]:
    """Return the condition of each check by the columns that it is about; those of times for each column."""
    return dict(_read_checks())


def _read_checks() -> Iterator[tuple[str, str]]:
    for each in sorted(WORKFLOW.constraints, key=lambda constraint: str(constraint.name)):
        if isinstance(each, sa.CheckConstraint):
            condition = str(each.sqltext)
            columns = [column for column in WORKFLOW.c if _names(column.name, condition)]
            if condition.startswith("least("):
                for column in columns:
                    single = re.sub(r"(least|greatest)\([^)]*\)", rf"\1({column.name})", condition)
                    yield f"{_shown(column)}, {each.name}", single
            else:
                yield f"{' and '.join(map(_shown, columns))}, {each.name}", condition


def _shown(column: sa.Column[Any]) -> str:
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy does not annotate it
    kind = column.type.compile(dialect=dialect).lower()
    return f"{column.name} of type {kind}"


def _names(column: str, condition: str) -> bool:
    return re.search(rf"(?<![.@'\w]){column}\b(?! FROM)", condition) is not None


_FAIL_OVERDUE, _FAIL_PART, _OVERDUE_IDS = subset_forms(Statement, _fail_overdue_statement)
_FAIL_IF_OVERDUE = Statement(lambda: _fail_at_deadline_statement(IS_WANTED, limit=1, skip_locked=False)[0])
_FAIL_REFUSED = Statement(lambda: _fail_refused_statement()[0])
_FAIL_REFUSED_ALONE = Statement(lambda: _fail_refused_statement()[1])
_FAULTS = Statement(_faults_statement)
