"""One look at what there is to do for a worker, so that an idle one costs a statement a poll.

Nothing here is locked or changed, and nothing is promised: what has been seen is claimed, woken and taken back by the
statements that do it, each of which looks for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Float, and_, bindparam, cast, func, literal_column, select, text, true
from sqlalchemy.dialects.postgresql import UUID as PG_UUID

from sqla_durable.status import WorkflowStatus
from sqla_durable.store._rows import SIGNAL, WORKER, WORKFLOW, Connectable, execute, status
from sqla_durable.store.deadlines import is_overdue
from sqla_durable.store.queues import FRONT, known, listened_queues, listening, pending_in
from sqla_durable.store.signals import LEFT, is_new

_NEVER = text("timestamptz 'infinity'")


@dataclass(frozen=True, slots=True)
class Seen:
    """What there is to do.

    Attributes:
        claimable: something waits in the queues.
        due: the time of something suspended has come.
        next_due_in: seconds until the next time or deadline comes after that; None if there is none.
        undelivered: signals are new, of senders or of the engine itself.
        abandoned: a worker is dead and has left something running.
        alive: the lease of the worker that looks is live.
        overdue: the deadline of something unfinished has come.
        left: a parent has left held children behind; its row is one of the undelivered, too.
    """

    claimable: bool
    due: bool
    next_due_in: float | None
    undelivered: bool
    abandoned: bool
    alive: bool
    overdue: bool = False
    left: bool = False


def look(
    connectable: Connectable,
    *,
    worker_id: UUID,
    queues: Sequence[str],
    names: Sequence[str],
    versions: Sequence[str] = (),
) -> Seen:
    """Look, in one statement that takes no lock. Without queues nothing is claimable; no versions mean all of them."""
    parameters = {"looking_id": worker_id} | known(names, versions) | listening(dict.fromkeys(queues, FRONT))
    row = execute(connectable, _LOOK, parameters).one()
    next_due_in = None if row.next_due_in is None else float(row.next_due_in)
    return Seen(row.claimable, row.due, next_due_in, row.undelivered, row.abandoned, row.alive, row.overdue, row.left)


def _claimable() -> ColumnElement[bool]:
    listened = listened_queues()
    # Limited and in the order of the claim's index: else a plan reads the table until something of the queue comes,
    # and an empty queue costs all of it.
    place = WORKFLOW.c.priority, WORKFLOW.c.enqueued_at, WORKFLOW.c.id
    first = select(WORKFLOW.c.id).where(pending_in(listened)).order_by(*place).limit(1).lateral("first")
    return select(first.c.id).select_from(listened.join(first, true())).exists()


def _due() -> ColumnElement[bool]:
    return select(WORKFLOW.c.id).where(_suspended(), WORKFLOW.c.wake_at <= func.statement_timestamp()).exists()


def _next_due_in() -> Any:
    # How long it is until "infinity", PostgreSQL 16 and older refuse to say.
    ahead = and_(WORKFLOW.c.wake_at > func.statement_timestamp(), WORKFLOW.c.wake_at < _NEVER)
    later = select(func.min(WORKFLOW.c.wake_at)).where(_suspended(), ahead)
    limited = and_(WORKFLOW.c.finished_at.is_(None), WORKFLOW.c.deadline_at < _NEVER)
    deadline = select(func.min(WORKFLOW.c.deadline_at)).where(
        limited, WORKFLOW.c.deadline_at > func.statement_timestamp()
    )
    next_at = func.least(later.scalar_subquery(), deadline.scalar_subquery())
    return cast(func.extract("epoch", next_at - func.statement_timestamp()), Float)


def _suspended() -> ColumnElement[bool]:
    return WORKFLOW.c.status == status(WorkflowStatus.SUSPENDED)


def _abandoned() -> ColumnElement[bool]:
    # Limited, so that each dead worker is looked up: else a plan may read whatever is running to find its worker.
    left = (
        select(WORKFLOW.c.id)
        .where(WORKFLOW.c.status == status(WorkflowStatus.RUNNING), WORKFLOW.c.worker_id == WORKER.c.id)
        .limit(1)
        .lateral("left_behind")
    )
    dead = WORKER.c.lease_expires_at <= func.statement_timestamp()
    return select(left.c.id).select_from(WORKER.join(left, true())).where(dead).exists()


def _alive() -> ColumnElement[bool]:
    mine = WORKER.c.id == bindparam("looking_id", type_=PG_UUID())
    return select(WORKER.c.id).where(mine, WORKER.c.lease_expires_at > func.statement_timestamp()).exists()


_LOOK = select(
    _claimable().label("claimable"),
    _due().label("due"),
    _next_due_in().label("next_due_in"),
    select(SIGNAL.c.id).where(is_new()).exists().label("undelivered"),
    _abandoned().label("abandoned"),
    _alive().label("alive"),
    select(WORKFLOW.c.id).where(is_overdue()).exists().label("overdue"),
    select(SIGNAL.c.id).where(is_new(), SIGNAL.c.name == literal_column(f"'{LEFT}'")).exists().label("left"),
)
