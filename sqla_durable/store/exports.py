"""The statement that reads workflows as they were recorded, to be taken elsewhere; their steps are read by `steps`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from uuid import UUID

import sqlalchemy as sa

from sqla_durable.models.status import WorkflowStatus
from sqla_durable.store._rows import WORKFLOW, Connectable, among, execute, text_columns


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
    return [Exported(**row) for row in execute(connectable, _READ, {"ids": list(workflow_ids)}).mappings()]


_READ = (
    sa.select(*text_columns(WORKFLOW, [each.name for each in fields(Exported)]))
    .where(among(WORKFLOW.c.id))
    .order_by(WORKFLOW.c.id)
)
