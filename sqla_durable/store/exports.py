"""The statement that reads workflows as they were recorded, to be taken elsewhere; their steps are read by `steps`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from sqla_durable.models.column_types import Text
from sqla_durable.models.status import WorkflowStatus
from sqla_durable.store._rows import WORKFLOW, Connectable, among, execute


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


def _exported(row: sa.Row[Any]) -> Exported:
    return Exported(row.id, row.name, row.version, row.status, row.attempt, row.input, row.output, row.error)


_READ = (
    sa.select(
        WORKFLOW.c.id,
        WORKFLOW.c.name,
        WORKFLOW.c.version,
        WORKFLOW.c.status,
        WORKFLOW.c.attempt,
        sa.cast(WORKFLOW.c.input, Text).label("input"),
        sa.cast(WORKFLOW.c.output, Text).label("output"),
        sa.cast(WORKFLOW.c.error, Text).label("error"),
    )
    .where(among(WORKFLOW.c.id))
    .order_by(WORKFLOW.c.id)
)
