"""The statements that read workflows: their state, what they wait for, and whole records for an export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.errors import NotFoundError
from sqla_durable.models.base import Text, WorkflowStatus
from sqla_durable.store.records import WorkflowState
from sqla_durable.store.statements import (
    IS_WANTED,
    SIGNAL,
    WORKFLOW,
    Connectable,
    Statement,
    connection_of,
    execute,
    is_among,
    pg,
    status_literal,
    text_columns,
    text_literal,
)


@dataclass(frozen=True, slots=True)
class WaitedFor:
    """What a suspended workflow waits for, and the names of its untaken signals."""

    signals: Sequence[str]
    waits_for_children: bool
    wake_at: datetime | None
    untaken: Sequence[str]


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


def state(session: Session, workflow_id: UUID) -> WorkflowState:
    """Read the state of a workflow, with its outcome if it has one.

    Raises:
        NotFoundError: there is no such workflow.
    """
    row = execute(session, _STATE, {"wanted_id": workflow_id}).one_or_none()
    if row is None:
        raise not_found(session, workflow_id)
    return WorkflowState(row.id, row.name, row.status, row.output, row.error)


def not_found(session: Session, workflow_id: UUID) -> NotFoundError:
    """Return the error for a workflow that is not visible."""
    return NotFoundError(
        f"no workflow {workflow_id} is visible here, in {connection_of(session).engine.url.render_as_string()}: is "
        "the transaction that started it committed?",
        workflow_id=workflow_id,
    )


def waited_for(session: Session, workflow_id: UUID) -> WaitedFor | None:
    """Return what a workflow waits for; None if it is not suspended. Takes no lock."""
    row = execute(session, _WAITING_FOR, {"wanted_id": workflow_id}).one_or_none()
    if row is None:
        return None
    awaits: list[dict[str, Any]] = row.awaits or []
    names = [each["signal"] for each in awaits if "signal" in each]
    return WaitedFor(names, any("children" in each for each in awaits), row.wake_at, row.untaken or [])


class Receiver(NamedTuple):
    """The name and the status of a workflow to which something is to be sent."""

    name: str
    status: WorkflowStatus


def receivers(session: Session, workflow_ids: Sequence[UUID]) -> Mapping[UUID, Receiver]:
    """Return those of the workflows that exist."""
    rows = execute(session, _RECEIVERS, {"ids": list(workflow_ids)})
    return {row.id: Receiver(row.name, row.status) for row in rows}


def export(connectable: Connectable, workflow_ids: Sequence[UUID]) -> list[Exported]:
    """Read workflows, in the order of their ids. Takes no lock; those that do not exist are left out."""
    return [Exported(**row) for row in execute(connectable, _EXPORT, {"ids": list(workflow_ids)}).mappings()]


def _waiting_for_statement() -> Any:
    untaken = sa.select(pg.array_agg(SIGNAL.c.name.distinct())).where(
        SIGNAL.c.workflow_id == WORKFLOW.c.id,
        SIGNAL.c.consumed_by.is_(None),
        ~SIGNAL.c.name.startswith(text_literal("#")),
    )
    columns = WORKFLOW.c.wake_at, WORKFLOW.c.awaits, untaken.scalar_subquery().label("untaken")
    return sa.select(*columns).where(IS_WANTED, WORKFLOW.c.status == status_literal(WorkflowStatus.SUSPENDED))


_STATE = Statement(
    lambda: sa.select(
        WORKFLOW.c.id, WORKFLOW.c.name, WORKFLOW.c.status, sa.cast(WORKFLOW.c.output, Text), WORKFLOW.c.error
    ).where(IS_WANTED)
)
_WAITING_FOR = Statement(_waiting_for_statement)
_RECEIVERS = Statement(
    lambda: sa.select(WORKFLOW.c.id, WORKFLOW.c.name, WORKFLOW.c.status).where(is_among(WORKFLOW.c.id))
)
_EXPORT = Statement(
    lambda: (
        sa.select(*text_columns(WORKFLOW, [each.name for each in fields(Exported)]))
        .where(is_among(WORKFLOW.c.id))
        .order_by(WORKFLOW.c.id)
    )
)
