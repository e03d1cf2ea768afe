"""The statements on leases: one row a worker, its heartbeat, and what becomes of workflows whose worker is dead.

All times are the database's. Whoever reclaims takes rows with SKIP LOCKED, so any number of workers may do it at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Integer,
    Interval,
    Row,
    Text,
    and_,
    bindparam,
    case,
    delete,
    func,
    literal,
    null,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, insert
from sqlalchemy.dialects.postgresql import UUID as PG_UUID
from sqlalchemy.orm import Session

from sqla_durable.status import WorkflowStatus
from sqla_durable.store._rows import WORKER, WORKFLOW, Fence, execute, materialized, scalar, status

MAX_ATTEMPTS_TYPE = "sqla_durable.errors:MaxAttemptsError"
_DEATH = "its worker died"
_DEAD_FOR = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Reclaimed:
    """A workflow taken back from a dead worker: pending again, or failed because that happened too often."""

    workflow_id: UUID
    name: str
    status: WorkflowStatus


def beat(session: Session, *, worker_id: UUID, name: str, queues: Sequence[str], lease: timedelta) -> None:
    """Begin a lease or extend it to `lease` from now; one row, locked until the commit."""
    execute(
        session, _BEAT, {"beating_id": worker_id, "beating_name": name, "listened_queues": list(queues), "lease": lease}
    )


def leave(session: Session, worker_id: UUID) -> None:
    """End a lease. Release the running workflows first, or they are reclaimed as from a dead worker."""
    execute(session, _LEAVE, {"beating_id": worker_id})


def exists(session: Session, worker_id: UUID) -> bool:
    """Tell whether the worker's row is visible here."""
    return scalar(session, select(WORKER.c.id).where(WORKER.c.id == worker_id)) is not None


def alive(session: Session, worker_id: UUID) -> bool:
    """Tell whether the worker's lease is live."""
    live = select(WORKER.c.id).where(WORKER.c.id == worker_id, WORKER.c.lease_expires_at > func.statement_timestamp())
    return scalar(session, live) is not None


def reclaim(session: Session, *, max_attempts: int, limit: int) -> list[Reclaimed]:
    """Take back running workflows whose worker's lease ran out, as their next attempt.

    One that has used up `max_attempts` fails instead, so that it cannot kill workers for ever.
    """
    rows = execute(session, _RECLAIM, {"max_attempts": max_attempts, "limit": limit, "reason": _DEATH})
    return [_reclaimed(row) for row in rows]


def reclaim_one(session: Session, workflow_id: UUID, *, max_attempts: int) -> Reclaimed | None:
    """Take back one workflow if its lease ran out, waiting for whoever holds its row."""
    parameters = {"max_attempts": max_attempts, "limit": 1, "wanted_id": workflow_id, "reason": _DEATH}
    row = execute(session, _RECLAIM_ONE, parameters).one_or_none()
    return None if row is None else _reclaimed(row)


def abandon(session: Session, fence: Fence, *, reason: str, max_attempts: int) -> Reclaimed | None:
    """Take back a workflow from an attempt of one's own that broke, as if its worker had died."""
    parameters = {
        "max_attempts": max_attempts,
        "limit": 1,
        "wanted_id": fence.workflow_id,
        "wanted_token": fence.token,
        "reason": reason,
    }
    row = execute(session, _ABANDON, parameters).one_or_none()
    return None if row is None else _reclaimed(row)


def running_of(session: Session, worker_id: UUID) -> list[Fence]:
    """Give the attempts that the tables say this worker is executing."""
    rows = execute(session, _RUNNING_OF, {"beating_id": worker_id})
    return [Fence(row.id, row.token) for row in rows]


def forget_dead(session: Session) -> None:
    """Delete the rows of workers that have been dead for a day; what they had running was reclaimed long before."""
    execute(session, _FORGET_DEAD)


def _reclaimed(row: Row[Any]) -> Reclaimed:
    return Reclaimed(row.id, row.name, row.status)


def _expires() -> Any:
    return func.statement_timestamp() + bindparam("lease", type_=Interval())


def _beat_statement() -> Any:
    statement = insert(WORKER).values(
        id=bindparam("beating_id", type_=PG_UUID()),
        name=bindparam("beating_name", type_=Text()),
        queues=bindparam("listened_queues", type_=ARRAY(Text())),
        lease_expires_at=_expires(),
    )
    return statement.on_conflict_do_update(
        index_elements=["id"],
        set_={
            "heartbeat_at": func.statement_timestamp(),
            "lease_expires_at": statement.excluded.lease_expires_at,
        },
    )


def _expired() -> ColumnElement[bool]:
    alive = select(WORKER.c.id).where(
        WORKER.c.id == WORKFLOW.c.worker_id, WORKER.c.lease_expires_at > func.statement_timestamp()
    )
    return ~alive.exists()


def _reclaim_statement(*conditions: ColumnElement[bool], skip_locked: bool) -> Any:
    # Two CTEs: where a row has changed in between, PostgreSQL checks the row itself once more when it locks it, but
    # not what a sub-select says about another table. Reclaimed and claimed anew by somebody else, the workflow would
    # still look abandoned; by its token it does not.
    seen = materialized(
        select(WORKFLOW.c.id, WORKFLOW.c.token).where(WORKFLOW.c.status == status(WorkflowStatus.RUNNING), *conditions),
        "seen",
    )
    abandoned = materialized(
        select(WORKFLOW.c.id)
        .join(seen, and_(seen.c.id == WORKFLOW.c.id, seen.c.token == WORKFLOW.c.token))
        .where(WORKFLOW.c.status == status(WorkflowStatus.RUNNING))
        .order_by(WORKFLOW.c.id)
        .limit(bindparam("limit", type_=Integer()))
        .with_for_update(key_share=True, of=WORKFLOW, skip_locked=skip_locked),
        "abandoned",
    )
    spent = WORKFLOW.c.attempt >= bindparam("max_attempts", type_=Integer())
    return (
        update(WORKFLOW)
        .where(WORKFLOW.c.id == abandoned.c.id)
        .values(
            status=case((spent, WorkflowStatus.FAILED.value), else_=WorkflowStatus.PENDING.value),
            attempt=case((spent, WORKFLOW.c.attempt), else_=WORKFLOW.c.attempt + 1),
            error=case((spent, _max_attempts_error()), else_=null()),
            finished_at=case((spent, func.statement_timestamp()), else_=null()),
            token=null(),
        )
        .returning(WORKFLOW.c.id, WORKFLOW.c.name, WORKFLOW.c.status)
    )


def _max_attempts_error() -> Any:
    message = func.concat(
        bindparam("reason", type_=Text()), " in attempt ", WORKFLOW.c.attempt, ", the last one allowed"
    )
    return func.jsonb_build_object(
        literal("type", Text()),
        literal(MAX_ATTEMPTS_TYPE, Text()),
        literal("message", Text()),
        message,
        type_=JSONB,
    )


def _forget_dead_statement() -> Any:
    dead = materialized(
        select(WORKER.c.id)
        .where(WORKER.c.lease_expires_at < func.statement_timestamp() - _DEAD_FOR)
        .order_by(WORKER.c.id)
        .with_for_update(skip_locked=True),
        "dead",
    )
    return delete(WORKER).where(WORKER.c.id.in_(select(dead.c.id)))


_BEAT = _beat_statement()
_LEAVE = delete(WORKER).where(WORKER.c.id == bindparam("beating_id", type_=PG_UUID()))
_WANTED = WORKFLOW.c.id == bindparam("wanted_id", type_=PG_UUID())
_RECLAIM = _reclaim_statement(_expired(), skip_locked=True)
_RECLAIM_ONE = _reclaim_statement(_expired(), _WANTED, skip_locked=False)
_ABANDON = _reclaim_statement(
    _WANTED, WORKFLOW.c.token == bindparam("wanted_token", type_=PG_UUID()), skip_locked=False
)
_RUNNING_OF = select(WORKFLOW.c.id, WORKFLOW.c.token).where(
    WORKFLOW.c.status == status(WorkflowStatus.RUNNING),
    WORKFLOW.c.worker_id == bindparam("beating_id", type_=PG_UUID()),
)
_FORGET_DEAD = _forget_dead_statement()
