"""The statements on leases: one row a worker, its heartbeat, and what it has running.

All times are the database's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, insert
from sqlalchemy.orm import Session

from sqla_durable.models.column_types import Text
from sqla_durable.models.status import WorkflowStatus
from sqla_durable.store._rows import (
    IS_WANTED,
    WORKER,
    WORKFLOW,
    Connectable,
    Fence,
    execute,
    has_status,
    json_parameter,
    materialized,
    parameter,
    pg,
    scalar,
    status,
)

_DEAD_FOR = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Holder:
    """Who executes a workflow: the name of the worker or the executor, and the end of its lease."""

    name: str
    lease_expires_at: datetime


@dataclass(frozen=True, slots=True)
class Doing:
    """What a worker has said at its last beat: by step, its try and the seconds for which that was executed."""

    name: str
    heartbeat_at: datetime
    lease_expires_at: datetime
    steps: Mapping[str, tuple[int, float]]


def beat(
    connectable: Connectable,
    *,
    worker_id: UUID,
    name: str,
    queues: Sequence[str],
    lease: timedelta,
    doing: str | None = None,
) -> None:
    """Begin a lease or extend it to `lease` from now; one row, locked until the commit.

    Args:
        doing: JSON text of what it executes for long, `{workflow: {step: [try, seconds]}}`.
    """
    given = {"beating_id": worker_id, "beating_name": name, "listened_queues": list(queues), "lease": lease}
    execute(connectable, _BEAT, given | {"doing": doing})


def leave(connectable: Connectable, worker_id: UUID) -> None:
    """End a lease. Release the running workflows first, or they are reclaimed as from a dead worker."""
    execute(connectable, _LEAVE, {"beating_id": worker_id})


def exists(session: Session, worker_id: UUID) -> bool:
    """Tell whether the worker's row is visible here."""
    return scalar(session, sa.select(WORKER.c.id).where(WORKER.c.id == worker_id)) is not None


def holder(session: Session, workflow_id: UUID) -> Holder | None:
    """Return who executes a workflow, and until when it may; None if nobody does. Takes no lock."""
    row = execute(session, _HOLDER, {"wanted_id": workflow_id}).one_or_none()
    return None if row is None else Holder(row.name, row.lease_expires_at)


def doing(session: Session, workflow_id: UUID) -> Doing | None:
    """Return what a worker has said at its last beat of its steps of a workflow; None if nobody executes that."""
    row = execute(session, _DOING, {"wanted_id": workflow_id, "wanted_text": str(workflow_id)}).one_or_none()
    return None if row is None else Doing(row.name, row.heartbeat_at, row.lease_expires_at, row.steps or {})


def running_of(connectable: Connectable, worker_id: UUID) -> list[Fence]:
    """Give the attempts that the tables say this worker is executing."""
    rows = execute(connectable, _RUNNING_OF, {"beating_id": worker_id})
    return [Fence(row.id, row.token) for row in rows]


def forget_dead(connectable: Connectable) -> None:
    """Delete the rows of workers that have been dead for a day; what they had running was reclaimed long before."""
    execute(connectable, _FORGET_DEAD)


def _expires() -> Any:
    return pg.statement_timestamp() + parameter("lease", sa.Interval())


def _beat_statement() -> Any:
    statement = (
        insert(WORKER)
        .inline()
        .values(
            id=parameter("beating_id", sa.UUID()),
            name=parameter("beating_name", Text()),
            queues=parameter("listened_queues", ARRAY(Text())),
            lease_expires_at=_expires(),
            doing=json_parameter("doing"),
        )
    )
    return statement.on_conflict_do_update(
        index_elements=["id"],
        set_={
            "heartbeat_at": pg.statement_timestamp(),
            "lease_expires_at": statement.excluded.lease_expires_at,
            "doing": statement.excluded.doing,
        },
    )


def _forget_dead_statement() -> Any:
    dead = materialized(
        sa.select(WORKER.c.id)
        .where(WORKER.c.lease_expires_at < pg.statement_timestamp() - _DEAD_FOR)
        .order_by(WORKER.c.id)
        .with_for_update(skip_locked=True),
        "dead",
    )
    return sa.delete(WORKER).where(WORKER.c.id.in_(sa.select(dead.c.id)))


_BEAT = _beat_statement()
_LEAVE = sa.delete(WORKER).where(WORKER.c.id == parameter("beating_id", sa.UUID()))
_RUNNING_OF = sa.select(WORKFLOW.c.id, WORKFLOW.c.token).where(
    WORKFLOW.c.status == status(WorkflowStatus.RUNNING),
    WORKFLOW.c.worker_id == parameter("beating_id", sa.UUID()),
)
_HOLDER = (
    sa.select(WORKER.c.name, WORKER.c.lease_expires_at)
    .join(WORKFLOW, WORKFLOW.c.worker_id == WORKER.c.id)
    .where(IS_WANTED, has_status(WORKFLOW, WorkflowStatus.RUNNING))
)
_DOING = (
    sa.select(
        WORKER.c.name,
        WORKER.c.heartbeat_at,
        WORKER.c.lease_expires_at,
        WORKER.c.doing.op("->")(parameter("wanted_text", Text())).label("steps"),
    )
    .join(WORKFLOW, WORKFLOW.c.worker_id == WORKER.c.id)
    .where(IS_WANTED, has_status(WORKFLOW, WorkflowStatus.RUNNING))
)
_FORGET_DEAD = _forget_dead_statement()
