"""The statement that reads workflows as they were recorded, to be taken elsewhere; their steps are read by `steps`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Row, bindparam, cast, func, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.dialects.postgresql import UUID as PG_UUID

from sqla_durable.models.column_types import Text
from sqla_durable.models.status import WorkflowStatus
from sqla_durable.store._rows import WORKFLOW, Connectable, execute


@dataclass(frozen=True, slots=True)
class Exported:
    """A workflow's record without its steps; `input`, `output` and `error` are JSON text."""

    id: UUID
    name: str
    version: str | None
    status: WorkflowStatus
    attempt: int
    input: str
    output: str | None
    error: str | None


def read(connectable: Connectable, workflow_ids: Sequence[UUID]) -> list[Exported]:
    """Read workflows, in the order of their ids. Takes no lock; those that are not there are left out."""
    return [_exported(row) for row in execute(connectable, _READ, {"ids": list(workflow_ids)})]


def _exported(row: Row[Any]) -> Exported:
    return Exported(row.id, row.name, row.version, row.status, row.attempt, row.input, row.output, row.error)


_READ = (
    select(
        WORKFLOW.c.id,
        WORKFLOW.c.name,
        WORKFLOW.c.version,
        WORKFLOW.c.status,
        WORKFLOW.c.attempt,
        cast(WORKFLOW.c.input, Text).label("input"),
        cast(WORKFLOW.c.output, Text).label("output"),
        cast(WORKFLOW.c.error, Text).label("error"),
    )
    .where(WORKFLOW.c.id == func.any(bindparam("ids", type_=ARRAY(PG_UUID()))))
    .order_by(WORKFLOW.c.id)
)
