"""The statements that fail workflows whose deadline has come, whatever they are doing.

An attempt that is executing one of them owns it no longer: its next write is refused, as after a cancel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Integer, Text, and_, bindparam, func, literal, null, or_, select, update
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.dialects.postgresql import UUID as PG_UUID
from sqlalchemy.orm import Session

from sqla_durable.status import WorkflowStatus
from sqla_durable.store._rows import WORKFLOW, Connectable, execute, materialized, refresh_known
from sqla_durable.store.signals import asking

TIMEOUT_TYPE = "sqla_durable.errors:WorkflowTimeoutError"


@dataclass(frozen=True, slots=True)
class Overdue:
    """A workflow that was failed because its deadline had come."""

    workflow_id: UUID
    name: str


def fail_overdue(connectable: Connectable, *, limit: int) -> list[Overdue]:
    """Fail at most `limit` workflows whose deadline has come, those that nobody else holds; locks their rows."""
    return [Overdue(row.id, row.name) for row in execute(connectable, _FAIL_OVERDUE, {"limit": limit})]


def fail_one(session: Session, workflow_id: UUID) -> bool:
    """Fail one workflow if its deadline has come, waiting for whoever holds its row; tell whether it had."""
    failed = execute(session, _FAIL_ONE, {"wanted_id": workflow_id}).one_or_none() is not None
    if failed:
        refresh_known(session, [workflow_id])
    return failed


def is_overdue() -> ColumnElement[bool]:
    """Tell that the deadline of an unfinished workflow has come: with the conditions of the index of deadlines."""
    return and_(WORKFLOW.c.finished_at.is_(None), WORKFLOW.c.deadline_at <= func.statement_timestamp())


def in_time() -> ColumnElement[bool]:
    """Tell that there is still time to begin."""
    return or_(WORKFLOW.c.deadline_at.is_(None), WORKFLOW.c.deadline_at > func.statement_timestamp())


def _fail_statement(*conditions: ColumnElement[bool], limit: Any, skip_locked: bool) -> Any:
    overdue = materialized(
        select(WORKFLOW.c.id)
        .where(is_overdue(), *conditions)
        .order_by(WORKFLOW.c.deadline_at)
        .limit(limit)
        .with_for_update(key_share=True, skip_locked=skip_locked, of=WORKFLOW),
        "overdue",
    )
    failed = (
        update(WORKFLOW)
        .where(WORKFLOW.c.id == overdue.c.id)
        .values(
            status=WorkflowStatus.FAILED,
            error=_error(),
            finished_at=func.statement_timestamp(),
            token=null(),
            wake_at=null(),
            awaits=null(),
        )
        .returning(WORKFLOW.c.id, WORKFLOW.c.name, WORKFLOW.c.parent_id, WORKFLOW.c.finished_at, WORKFLOW.c.awaits)
        .cte("failed")
    )
    return select(failed.c.id, failed.c.name).add_cte(asking(failed).cte("asked"))


def _error() -> Any:
    return func.jsonb_build_object(
        literal("type", Text()),
        literal(TIMEOUT_TYPE, Text()),
        literal("message", Text()),
        func.concat(literal("it was not finished at its deadline, ", Text()), WORKFLOW.c.deadline_at),
        type_=JSONB,
    )


_FAIL_OVERDUE = _fail_statement(limit=bindparam("limit", type_=Integer()), skip_locked=True)
_FAIL_ONE = _fail_statement(WORKFLOW.c.id == bindparam("wanted_id", type_=PG_UUID()), limit=1, skip_locked=False)
