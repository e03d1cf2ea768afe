"""The statements that fail workflows whose deadline has come, whatever they are doing.

An attempt that is executing one of them owns it no longer: its next write is refused, as after a cancel. One with a
saga is enqueued, to undo what it did before it fails; for that it has all the time that it needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sqla_durable.models.status import WorkflowStatus
from sqla_durable.store._rows import (
    BEGINNING,
    COMPENSATES,
    IS_WANTED,
    LIMIT,
    OVERDUE,
    WORKFLOW,
    Condition,
    Connectable,
    beginning,
    end_or_compensate,
    error_object,
    execute,
    materialized,
    pg,
    refresh_known,
    undoes,
    words,
)
from sqla_durable.store.parts import WHOLE, Part, Within, divided
from sqla_durable.store.signals import END_COLUMNS, end_notices

TIMEOUT_TYPE = "sqla_durable.errors:WorkflowTimeoutError"


@dataclass(frozen=True, slots=True)
class Overdue:
    """A workflow that was failed because its deadline had come, or `undoes` what it did before.

    `worker_id` is the worker that was executing it, if one was.
    """

    workflow_id: UUID
    name: str
    undoes: bool
    worker_id: UUID | None


def fail_overdue(connectable: Connectable, *, limit: int, since: str = BEGINNING, part: Part = WHOLE) -> list[Overdue]:
    """Fail at most `limit` workflows whose deadline has come, those that nobody else holds; locks their rows.

    What was to be finished before `since` is passed over.
    """
    parameters = {"limit": limit, "since": since, **part.parameters}
    rows = execute(connectable, part.choose(_FAIL_OVERDUE, _FAIL_PART), parameters)
    return [Overdue(row.id, row.name, row.finished_at is None, row.executing_id) for row in rows]


def overdue(connectable: Connectable, *, limit: int, since: str = BEGINNING, part: Part = WHOLE) -> list[UUID]:
    """Return the ids of those that this would fail."""
    return part.found(connectable, _OVERDUE, {"limit": limit, "since": since})


def fail_one(session: Session, workflow_id: UUID) -> bool:
    """Do it to one workflow if its deadline has come, waiting for whoever holds its row; tell whether it had."""
    failed = execute(session, _FAIL_ONE, {"wanted_id": workflow_id}).one_or_none() is not None
    if failed:
        refresh_known(session, [workflow_id])
    return failed


def is_overdue() -> Condition:
    """Tell that the deadline of an unfinished workflow has come: with the conditions of the index of deadlines."""
    is_past = WORKFLOW.c.deadline_at <= pg.statement_timestamp()
    return sa.and_(WORKFLOW.c.finished_at.is_(None), is_past, ~undoes())


def in_time() -> Condition:
    """Tell that there is still time to begin; to undo something there always is."""
    is_ahead = WORKFLOW.c.deadline_at > pg.statement_timestamp()
    return sa.or_(WORKFLOW.c.deadline_at.is_(None), is_ahead, undoes())


def reason() -> Any:
    """Give the words for what has happened to a workflow at its deadline."""
    return pg.concat(words("it was not finished at its deadline, "), WORKFLOW.c.deadline_at)


def _fail_statement(*conditions: Condition, limit: Any, skip_locked: bool) -> tuple[Any, Any]:
    overdue = materialized(
        sa.select(
            WORKFLOW.c.id,
            WORKFLOW.c.worker_id,
            pg.statement_timestamp().label("locked_at"),
            error_object(TIMEOUT_TYPE, reason()).label("error"),
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
    told = failed.c.id, failed.c.name, failed.c.finished_at, failed.c.executing_id
    return sa.select(*told).add_cte(*end_notices(failed)), sa.select(overdue.c.id)


def _fail_overdue_statement(within: Within) -> tuple[Any, Any]:
    conditions = WORKFLOW.c.deadline_at >= beginning(), within(WORKFLOW.c.id)
    return _fail_statement(*conditions, limit=LIMIT, skip_locked=True)


_FAIL_OVERDUE, _FAIL_PART, _OVERDUE = divided(_fail_overdue_statement)
_FAIL_ONE, _ = _fail_statement(IS_WANTED, limit=1, skip_locked=False)
