"""The statements on leases: the heartbeat of a worker, and reclaiming what dead workers were executing.

Any number of workers may reclaim at once: rows are locked with SKIP LOCKED, in the order of their ids. All times are
the database's.

A workflow whose attempt recorded a step before its worker died goes on at once, and so does one that lost its worker
for the first time. One that lost several in a row without recording anything may be what kills them: it waits longer
each time, apart from those that happened to run beside it, and fails when `max_attempts` are reached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, insert
from sqlalchemy.orm import Session

from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.definitions.queues import like
from sqla_durable.models.base import Text, WorkflowStatus
from sqla_durable.store.inbox import END_COLUMNS, end_notices, insert_orphan_notices
from sqla_durable.store.records import Fence
from sqla_durable.store.statements import (
    ALL,
    IS_WANTED,
    LIMIT,
    MOST_ATTEMPTS,
    ONE,
    STEP,
    SUSPECT_CRASHES,
    WORKER,
    WORKFLOW,
    Condition,
    Connectable,
    Expression,
    Restriction,
    Statement,
    Subset,
    error_object,
    execute,
    has_status,
    integer,
    interval,
    is_open_step,
    json_parameter,
    materialized,
    next_attempt,
    parameter,
    pg,
    scalar,
    scalars,
    status_literal,
    subset_forms,
)

_DEAD_FOR = timedelta(days=1)


DEFAULT_MAX_ATTEMPTS = 10
MOST_CRASHES = 32_767
"""The largest number in the column of crashes."""

MAX_ATTEMPTS_TYPE = "sqla_durable.errors:MaxAttemptsError"
_DEATH = "its worker died"
_LONGEST_BACKOFF = 300  # seconds; the first is one
_SPREADS = 65_536
_DOUBLINGS = 9  # more than it takes to the longest, and no overflow


@dataclass(frozen=True, slots=True)
class Holder:
    """The worker or executor that executes a workflow: its name, and the end of its lease."""

    name: str
    lease_expires_at: datetime


@dataclass(frozen=True, slots=True)
class RunningSteps:
    """What a worker reported with its last heartbeat: by step, its try and the seconds since that began."""

    name: str
    heartbeat_at: datetime
    lease_expires_at: datetime
    steps: Mapping[str, tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Reclaimed:
    """A reclaimed workflow: pending, suspended for a while, or failed because that happened too often."""

    workflow_id: UUID
    name: str
    status: WorkflowStatus


def beat(
    connectable: Connectable,
    *,
    worker_id: UUID,
    name: str,
    queues: Sequence[str],
    lease: timedelta,
    names: Sequence[str] | None = None,
    versions: Sequence[str] | None = None,
    slots: int | None = None,
    doing: str | None = None,
) -> None:
    """Start a lease or extend it to `lease` from now; one row, locked until the commit.

    Args:
        names, versions, slots: what the worker claims, and how many it executes at once; None for an executor.
        doing: JSON text of the steps that it has been executing for long, `{workflow: {step: [try, seconds]}}`.
    """
    given = {"beating_id": worker_id, "beating_name": name, "listened_queues": list(queues), "lease": lease}
    claims = {"known_names": names and list(names), "claimed_versions": versions and list(versions)}
    execute(connectable, _BEAT, given | claims | {"slots": slots, "doing": doing})


def end_lease(connectable: Connectable, worker_id: UUID) -> None:
    """End a lease. Release the running workflows first; others reclaim them as from a dead worker."""
    execute(connectable, _END_LEASE, {"beating_id": worker_id})


def exists(session: Session, worker_id: UUID) -> bool:
    """Return whether the worker's row is visible here."""
    return scalar(session, sa.select(WORKER.c.id).where(WORKER.c.id == worker_id)) is not None


def holder(session: Session, workflow_id: UUID) -> Holder | None:
    """Return the worker that executes a workflow, with the end of its lease; None if there is none. Takes no lock."""
    row = execute(session, _HOLDER, {"wanted_id": workflow_id}).one_or_none()
    return None if row is None else Holder(row.name, row.lease_expires_at)


def running_steps(session: Session, workflow_id: UUID) -> RunningSteps | None:
    """Return what a worker reported of its steps of a workflow with its last heartbeat; None if none executes that."""
    row = execute(session, _RUNNING_STEPS, {"wanted_id": workflow_id, "wanted_text": str(workflow_id)}).one_or_none()
    return None if row is None else RunningSteps(row.name, row.heartbeat_at, row.lease_expires_at, row.steps or {})


def attempts_of(connectable: Connectable, worker_id: UUID) -> list[Fence]:
    """Return the attempts that this worker is executing, according to the tables."""
    rows = execute(connectable, _ATTEMPTS_OF, {"beating_id": worker_id})
    return [Fence(row.id, row.token) for row in rows]


def delete_dead(connectable: Connectable) -> None:
    """Delete the rows of workers that have been dead for a day; what they had running was reclaimed long before."""
    execute(connectable, _DELETE_DEAD)


def reclaim(
    connectable: Connectable,
    *,
    max_attempts: int,
    limit: int,
    names: Sequence[str] | None = None,
    queues: Sequence[str] | None = None,
    asking: UUID | None = None,
    subset: Subset = ALL,
) -> list[Reclaimed]:
    """Reclaim running workflows whose worker's lease has expired, as their next attempt.

    Args:
        max_attempts: after so many crashes in a row one of these names and queues fails; others only wait longer,
            because their own workers may allow them more.
        limit: how many at most.
        names, queues: None means all; `*` stands for any text in the name of a queue.
        asking: the worker that reclaims: its own lease may expire between its last poll and this.
        subset: which of those that it finds.
    """
    patterns = None if queues is None else [like(each) for each in queues]
    mine = {"mine_names": names, "mine_queues": patterns, "asking_id": asking, **subset.parameters}
    parameters = {"max_attempts": max_attempts, "limit": limit, "reason": _DEATH, **mine}
    rows = execute(connectable, subset.form_of(_RECLAIM, _RECLAIM_PART), parameters)
    return [_reclaimed(row) for row in rows]


def expired(connectable: Connectable, *, limit: int, asking: UUID | None = None, subset: Subset = ALL) -> list[UUID]:
    """Return the ids of the workflows that this would reclaim."""
    return subset.find_ids(connectable, _EXPIRED, {"limit": limit, "asking_id": asking})


def reclaim_one(session: Session, workflow_id: UUID, *, max_attempts: int) -> Reclaimed | None:
    """Reclaim one workflow if its lease has expired, waiting for the lock of its row; never suspend it.

    The caller executes it now.
    """
    parameters = {"max_attempts": max_attempts, "limit": 1, "wanted_id": workflow_id, "reason": _DEATH}
    # The lock comes first, in a statement of its own: the next one sees what the transaction before has recorded.
    scalars(session, _LOCK_ONE, parameters).all()
    row = execute(session, _RECLAIM_ONE, parameters).one_or_none()
    return None if row is None else _reclaimed(row)


def abandon_attempt(connectable: Connectable, fence: Fence, *, reason: str, max_attempts: int) -> bool:
    """Reclaim a workflow from an attempt of this worker that broke, as if the worker had died.

    Returns:
        False if the row is locked: try again.
    """
    parameters = {
        "max_attempts": max_attempts,
        "limit": 1,
        "wanted_id": fence.workflow_id,
        "wanted_token": fence.token,
        "reason": reason,
    }
    if execute(connectable, _ABANDON_ATTEMPT, parameters).one_or_none() is not None:
        return True
    return scalars(connectable, _STILL_RUNNING, parameters).one_or_none() is None


def _lease_end() -> Any:
    return pg.statement_timestamp() + parameter("lease", sa.Interval())


def _beat_statement() -> Any:
    statement = (
        insert(WORKER)
        .inline()
        .values(
            id=parameter("beating_id", sa.UUID()),
            name=parameter("beating_name", Text()),
            queues=parameter("listened_queues", ARRAY(Text())),
            names=parameter("known_names", ARRAY(Text())),
            versions=parameter("claimed_versions", ARRAY(Text())),
            slots=parameter("slots", sa.Integer()),
            lease_expires_at=_lease_end(),
            doing=json_parameter("doing"),
        )
    )
    return statement.on_conflict_do_update(
        index_elements=["id"],
        set_={
            "heartbeat_at": pg.statement_timestamp(),
            "lease_expires_at": statement.excluded.lease_expires_at,
            "doing": statement.excluded.doing,
            "queues": statement.excluded.queues,
        },
    )


def _delete_dead_statement() -> Any:
    dead = materialized(
        sa.select(WORKER.c.id)
        .where(WORKER.c.lease_expires_at < pg.statement_timestamp() - _DEAD_FOR)
        .order_by(WORKER.c.id)
        .with_for_update(skip_locked=True),
        "dead",
    )
    return sa.delete(WORKER).where(WORKER.c.id.in_(sa.select(dead.c.id)))


def _reclaimed(row: sa.Row[Any]) -> Reclaimed:
    return Reclaimed(row.id, row.name, row.status)


def _lease_has_expired() -> Condition:
    alive = sa.select(WORKER.c.id).where(
        WORKER.c.id == WORKFLOW.c.worker_id, WORKER.c.lease_expires_at > pg.statement_timestamp()
    )
    return ~alive.exists()


def _lock_abandoned(*conditions: Condition, skip_locked: bool, mine: Condition) -> sa.CTE:
    # Two CTEs: where a row has changed in between, PostgreSQL checks the row itself once more when it locks it, but
    # not what a sub-select says about another table. Reclaimed and claimed again by another worker, the workflow would
    # still look abandoned; by its token it does not.
    seen = materialized(
        sa.select(WORKFLOW.c.id, WORKFLOW.c.token).where(
            WORKFLOW.c.status == status_literal(WorkflowStatus.RUNNING), *conditions
        ),
        "seen",
    )
    # At most what the columns can have: other SQL may have written the row.
    more = sa.func.least(WORKFLOW.c.crashes + ONE, WORKFLOW.c.attempt, integer(MOST_CRASHES))
    columns = [WORKFLOW.c.id, sa.case((_has_progressed(), 0), else_=more).label("crashes")]
    columns.append(mine.label("mine"))
    return materialized(
        sa.select(*columns)
        .join(seen, sa.and_(seen.c.id == WORKFLOW.c.id, seen.c.token == WORKFLOW.c.token))
        .where(WORKFLOW.c.status == status_literal(WorkflowStatus.RUNNING))
        .order_by(WORKFLOW.c.id)
        .limit(LIMIT)
        .with_for_update(key_share=True, of=WORKFLOW, skip_locked=skip_locked),
        "abandoned",
    )


def _is_mine() -> Condition:
    names, queues = parameter("mine_names", ARRAY(Text())), parameter("mine_queues", ARRAY(Text()))
    return sa.and_(
        sa.or_(names.is_(None), WORKFLOW.c.name == sa.func.any(names)),
        sa.or_(queues.is_(None), WORKFLOW.c.queue.bool_op("LIKE")(sa.func.any(queues))),
    )


def _has_progressed() -> Condition:
    """Return whether the attempt that ends here has recorded the outcome of a step."""
    recorded = sa.select(STEP.c.key).where(STEP.c.workflow_id == WORKFLOW.c.id, STEP.c.attempt == WORKFLOW.c.attempt)
    # The last number is that of more than one attempt.
    return recorded.where(~is_open_step(), WORKFLOW.c.attempt < MOST_ATTEMPTS).exists()


def _reclaim_statement(abandoned: sa.CTE) -> Any:
    return _reclaiming_statement(abandoned, suspect=abandoned.c.crashes >= SUSPECT_CRASHES)


def _reclaim_all_statement(within: Restriction) -> tuple[Any, Any]:
    asking = parameter("asking_id", sa.UUID())
    is_of_others = sa.or_(asking.is_(None), WORKFLOW.c.worker_id != asking)
    conditions = _lease_has_expired(), is_of_others, within(WORKFLOW.c.id)
    ids = _lock_abandoned(*conditions, skip_locked=True, mine=sa.true())
    return _reclaim_statement(_lock_abandoned(*conditions, skip_locked=True, mine=_is_mine())), sa.select(ids.c.id)


def _wanted_attempt() -> Condition:
    return sa.and_(IS_WANTED, WORKFLOW.c.token == parameter("wanted_token", sa.UUID()))


def _reclaiming_statement(abandoned: sa.CTE, *, suspect: Condition) -> Any:
    spent = sa.and_(abandoned.c.mine, abandoned.c.crashes >= parameter("max_attempts", sa.Integer()))
    back = (
        sa.update(WORKFLOW)
        .where(WORKFLOW.c.id == abandoned.c.id)
        .values(
            status=sa.case(
                (spent, WorkflowStatus.FAILED.value),
                (suspect, WorkflowStatus.SUSPENDED.value),
                else_=WorkflowStatus.PENDING.value,
            ),
            attempt=sa.case((spent, WORKFLOW.c.attempt), else_=next_attempt()),
            crashes=abandoned.c.crashes,
            error=sa.case((spent, _max_attempts_error(abandoned.c.crashes)), else_=sa.null()),
            wake_at=sa.case((sa.and_(suspect, ~spent), _later(abandoned.c.crashes)), else_=sa.null()),
            finished_at=sa.case((spent, pg.statement_timestamp()), else_=sa.null()),
            token=sa.null(),
        )
        .returning(*END_COLUMNS, WORKFLOW.c.name, WORKFLOW.c.status)
        .cte("back")
    )
    was_running = sa.true().label("was_running")
    spent_ones = sa.select(back.c.id, was_running).where(back.c.finished_at.is_not(None)).cte("spent")
    return sa.select(back.c.id, back.c.name, back.c.status).add_cte(
        *end_notices(back), insert_orphan_notices(spent_ones).cte("left")
    )


def _later(crashes: sa.ColumnElement[int]) -> Expression:
    """Return a time that doubles with each crash, spread by a hash: `random()` is not allowed in a sharded UPDATE.

    Of the id and the number of crashes, so that two that died together once are apart the next time.
    """
    doubled = pg.power(2, sa.func.least(crashes - SUSPECT_CRASHES, _DOUBLINGS))
    hashed = pg.hashtextextended(sa.cast(WORKFLOW.c.id, Text), sa.cast(crashes, sa.BigInteger))
    bits = hashed.op("&")(sa.cast(integer(_SPREADS - 1), sa.BigInteger))
    chosen: Expression = sa.cast(bits, sa.Double)
    spreads: Expression = sa.cast(integer(_SPREADS), sa.Double)
    spread = 0.5 + chosen / spreads
    return pg.statement_timestamp() + interval(sa.func.least(doubled * spread, _LONGEST_BACKOFF))


def _max_attempts_error(crashes: sa.ColumnElement[int]) -> Any:
    message = pg.concat(
        parameter("reason", Text()),
        " in attempt ",
        WORKFLOW.c.attempt,
        ", the last one allowed: ",
        crashes,
        " in a row recorded no step",
    )
    return error_object(MAX_ATTEMPTS_TYPE, message)


_BEAT = Statement(_beat_statement)
_END_LEASE = Statement(lambda: sa.delete(WORKER).where(WORKER.c.id == parameter("beating_id", sa.UUID())))
_ATTEMPTS_OF = Statement(
    lambda: sa.select(WORKFLOW.c.id, WORKFLOW.c.token).where(
        WORKFLOW.c.status == status_literal(WorkflowStatus.RUNNING),
        WORKFLOW.c.worker_id == parameter("beating_id", sa.UUID()),
    )
)
_HOLDER = Statement(
    lambda: (
        sa.select(WORKER.c.name, WORKER.c.lease_expires_at)
        .join(WORKFLOW, WORKFLOW.c.worker_id == WORKER.c.id)
        .where(IS_WANTED, has_status(WORKFLOW, WorkflowStatus.RUNNING))
    )
)
_RUNNING_STEPS = Statement(
    lambda: (
        sa.select(
            WORKER.c.name,
            WORKER.c.heartbeat_at,
            WORKER.c.lease_expires_at,
            WORKER.c.doing.op("->")(parameter("wanted_text", Text())).label("steps"),
        )
        .join(WORKFLOW, WORKFLOW.c.worker_id == WORKER.c.id)
        .where(IS_WANTED, has_status(WORKFLOW, WorkflowStatus.RUNNING))
    )
)
_DELETE_DEAD = Statement(_delete_dead_statement)
_RECLAIM, _RECLAIM_PART, _EXPIRED = subset_forms(Statement, _reclaim_all_statement)
_LOCK_ONE = Statement(
    lambda: (
        sa.select(WORKFLOW.c.id)
        .where(WORKFLOW.c.status == status_literal(WorkflowStatus.RUNNING), _lease_has_expired(), IS_WANTED)
        .with_for_update(key_share=True, of=WORKFLOW)
    )
)
_RECLAIM_ONE = Statement(
    lambda: _reclaiming_statement(
        _lock_abandoned(_lease_has_expired(), IS_WANTED, skip_locked=False, mine=sa.true()), suspect=sa.false()
    )
)
_ABANDON_ATTEMPT = Statement(
    lambda: _reclaim_statement(_lock_abandoned(_wanted_attempt(), skip_locked=True, mine=sa.true()))
)
_STILL_RUNNING = Statement(
    lambda: sa.select(WORKFLOW.c.id).where(
        _wanted_attempt(), WORKFLOW.c.status == status_literal(WorkflowStatus.RUNNING)
    )
)
