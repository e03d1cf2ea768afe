"""The end of a workflow whose row the database refuses to work with, and what is wrong with the row."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from sqla_durable.models.column_types import Text
from sqla_durable.models.status import WorkflowStatus
from sqla_durable.store._rows import (
    IS_WANTED,
    WORKFLOW,
    Condition,
    Connectable,
    error_object,
    execute,
    materialized,
    parameter,
    pg,
    scalar,
)
from sqla_durable.store.held import leaving
from sqla_durable.store.signals import END_COLUMNS, end_notices

REFUSED_TYPE = "sqla_durable.errors:RowRefusedError"


def fail(connectable: Connectable, workflow_id: UUID, *, reason: str) -> bool:
    """Fail an unfinished workflow whose row nobody else holds, and tell its parent; return whether it has failed."""
    return _failed(connectable, _FAIL, workflow_id, reason)


def fail_alone(connectable: Connectable, workflow_id: UUID, *, reason: str) -> bool:
    """Do the same without telling anybody: the rows that would tell its parent or its children may be what is wrong."""
    return _failed(connectable, _FAIL_ALONE, workflow_id, reason)


def faults(connectable: Connectable, workflow_id: UUID) -> list[str]:
    """Return which columns do not pass the checks of the table: a row may be older than they are."""
    row = execute(connectable, _FAULTS, {"wanted_id": workflow_id}).one_or_none()
    return [] if row is None else [about for about, broken in zip(_CHECKS, row, strict=True) if broken]


def _failed(connectable: Connectable, statement: Any, workflow_id: UUID, reason: str) -> bool:
    return scalar(connectable, statement, {"wanted_id": workflow_id, "reason": reason}) is not None


def _fail_statement() -> tuple[Any, Any]:
    unfinished = materialized(
        sa.select(
            WORKFLOW.c.id,
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
        .returning(*END_COLUMNS)
    )
    ended = failed.cte("ended")
    notices = *end_notices(ended), leaving(ended).cte("left")
    return sa.select(ended.c.id).add_cte(*notices), failed


def _checks() -> Iterator[tuple[str, str]]:
    """Yield for each check the columns that it is about, and its condition; those of times for each column."""
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
    kind = column.type.compile(dialect=_DIALECT).lower()
    return f"{column.name} of type {kind}"


def _names(column: str, condition: str) -> bool:
    return re.search(rf"(?<![.@'\w]){column}\b(?! FROM)", condition) is not None


_DIALECT = postgresql.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy does not annotate it
_CHECKS = dict(_checks())
_FAIL, _FAIL_ALONE = _fail_statement()
_COLUMNS: list[Condition] = [
    sa.literal_column(f"({each}) IS FALSE", type_=sa.Boolean()).label(f"check_{number}")
    for number, each in enumerate(_CHECKS.values())
]
_FAULTS = sa.select(*_COLUMNS).where(IS_WANTED)
