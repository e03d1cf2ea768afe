"""One statement that finds out what there is to do for a worker, so that an idle one costs a statement a poll.

It locks and changes nothing, and promises nothing: the statements that claim, wake and reclaim check again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.models.base import WorkflowStatus
from sqla_durable.store import retention, schedules
from sqla_durable.store.claims import (
    Ranges,
    active_ranges,
    is_claimable,
    name_parameters,
    range_parameters,
    waits_in,
    wanted_queues,
)
from sqla_durable.store.failures import is_overdue
from sqla_durable.store.inbox import ORPHANS, is_undelivered
from sqla_durable.store.limits import is_limited
from sqla_durable.store.statements import (
    BEGINNING,
    ORDER_IN_QUEUE,
    QUEUE,
    SCHEDULE,
    SIGNAL,
    WORKER,
    WORKFLOW,
    ZERO,
    Condition,
    Connectable,
    Statement,
    execute,
    materialized,
    parameter,
    pg,
    scan_start,
    status_literal,
    text_literal,
)

LATE_COMMIT = timedelta(seconds=2)
"""How long after its statement a transaction may commit, and still be found by polls that do not read everything."""

_LATE_COMMIT = sa.text("interval '2 seconds'")
_DEAD_LATELY = sa.text("interval '1 minute'")
_EARLIEST = sa.text("timestamptz '0001-01-02 00:00Z'")  # the first that Python's datetime holds in every time zone
_MONTH = 30 * 86_400.0


@dataclass(frozen=True, slots=True)
class ScanStarts:
    """The times before which a poll has found nothing to do; the next one starts there.

    So dead entries of the indexes before them are not read again. They stay for as long as a snapshot is open
    elsewhere, because vacuum cannot remove them.

    Attributes:
        wake_at: of what is suspended.
        deadline_at: of deadlines that have come.
        sent_at: of signals that are not delivered.
        expired_at: of leases of dead workers.
        found_at: when the poll was; None where they are the beginning.
    """

    wake_at: str = BEGINNING
    deadline_at: str = BEGINNING
    sent_at: str = BEGINNING
    expired_at: str = BEGINNING
    found_at: datetime | None = None


FULL_SCAN = ScanStarts()
"""Everything is read."""


@dataclass(frozen=True, slots=True)
class Work:
    """What there is to do.

    Attributes:
        claimable: something waits in the queues.
        due: something suspended is due.
        next_due_in: seconds until the next time or deadline comes after that; None if there is none.
        undelivered: signals are new, of senders or of the engine itself.
        abandoned: a worker is dead and has left something running.
        alive: the lease of the worker that polls is live.
        overdue: the deadline of something unfinished has passed.
        has_orphans: deferred children have lost their parent; its notice is one of the undelivered, too.
        ticks: a schedule is due.
        prunes: a policy of retention is due.
        kept: the names of the queues from which ordinary claims take nothing, in order: paused, or with limits.
        limited: those that have limits and are not paused.
        waiting: something waits in one of those, of the queues that were asked for.
        scan_starts: where the next poll may begin.
    """

    claimable: bool
    due: bool
    next_due_in: float | None
    undelivered: bool
    abandoned: bool
    alive: bool
    overdue: bool = False
    has_orphans: bool = False
    ticks: bool = False
    prunes: bool = False
    kept: tuple[str, ...] = ()
    limited: tuple[str, ...] = ()
    waiting: bool = False
    scan_starts: ScanStarts = field(default=FULL_SCAN, compare=False)


def find_work(
    connectable: Connectable,
    *,
    worker_id: UUID,
    ranges: Ranges,
    names: Sequence[str],
    versions: Sequence[str] = (),
    scan_starts: ScanStarts = FULL_SCAN,
    within: float = _MONTH,
) -> Work:
    """Find out what there is to do, in one statement that takes no lock.

    Args:
        worker_id: the worker that polls.
        ranges: the parts of queues in which something may be claimable; without any, nothing is.
        names: the workflows that it may claim.
        versions: and their versions; none mean all of them.
        scan_starts: where to begin.
        within: how many seconds ahead the next time or deadline is searched.
    """
    parameters = {"polling_id": worker_id} | name_parameters(names, versions) | range_parameters(ranges)
    row = execute(connectable, _FIND_WORK, parameters | _scan_parameters(scan_starts) | {"within": within}).one()
    return Work(
        claimable=row.claimable,
        due=row.due,
        next_due_in=None if row.next_due_in is None else float(row.next_due_in),
        undelivered=row.undelivered,
        abandoned=row.abandoned,
        alive=row.alive,
        overdue=row.overdue,
        has_orphans=row.has_orphans,
        ticks=row.ticks,
        prunes=row.prunes,
        kept=tuple(sorted(row.kept or ())),
        limited=tuple(sorted(row.limited or ())),
        waiting=row.waiting,
        scan_starts=ScanStarts(
            wake_at=row.wake_mark.isoformat(),
            deadline_at=row.deadline_mark.isoformat(),
            sent_at=row.sent_mark.isoformat(),
            expired_at=row.expired_mark.isoformat(),
            found_at=row.found_at,
        ),
    )


def _scan_parameters(starts: ScanStarts) -> dict[str, str]:
    return {
        "since_wake": starts.wake_at,
        "since_deadline": starts.deadline_at,
        "since_sent": starts.sent_at,
        "since_expired": starts.expired_at,
    }


def _claimable() -> Condition:
    listened = active_ranges()
    # Limited and in the order of the claim's index: else a plan reads the table until something of the queue comes,
    # and an empty queue costs all of it.
    first = sa.select(WORKFLOW.c.id).where(is_claimable(listened)).order_by(*ORDER_IN_QUEUE).limit(1).lateral("first")
    return sa.select(first.c.id).select_from(listened.join(first, sa.true())).exists()


def _waiting(kept: sa.CTE) -> Condition:
    """Return whether something waits in one of those queues with limits."""
    here = kept.c.name.in_(sa.select(wanted_queues()))
    in_order = sa.select(WORKFLOW.c.id).where(waits_in(kept.c.name)).order_by(*ORDER_IN_QUEUE)
    first = in_order.limit(1).lateral("first_limited")
    return sa.select(first.c.id).select_from(kept.join(first, sa.true())).where(kept.c.is_limited, here).exists()


def _first(column: sa.ColumnElement[datetime], *conditions: Condition) -> Any:
    return sa.select(pg.min(column)).where(*conditions).scalar_subquery()


def _scan_start(first: Any) -> Any:
    """Return the time before which there is nothing, less what may be committed late.

    A time in the future does not keep the next poll from what comes before it.
    """
    return sa.func.greatest(sa.func.least(first, pg.statement_timestamp()), _EARLIEST) - _LATE_COMMIT


def _next_due_in() -> Any:
    ahead = pg.statement_timestamp() + pg.make_interval(*[ZERO] * 6, _WITHIN)
    later = _first(WORKFLOW.c.wake_at, _SUSPENDED, _between(WORKFLOW.c.wake_at, ahead))
    deadline = _first(WORKFLOW.c.deadline_at, WORKFLOW.c.finished_at.is_(None), _between(WORKFLOW.c.deadline_at, ahead))
    tick = schedules.first_due_at(ahead)
    return sa.cast(sa.func.extract("epoch", sa.func.least(later, deadline, tick) - pg.statement_timestamp()), sa.Float)


def _between(column: sa.ColumnElement[datetime], ahead: Any) -> Condition:
    return sa.and_(column > pg.statement_timestamp(), column <= ahead)


def _abandoned() -> Condition:
    # Limited, so that each dead worker is looked up: else a plan may read whatever is running to find its worker.
    left = (
        sa.select(WORKFLOW.c.id)
        .where(WORKFLOW.c.status == status_literal(WorkflowStatus.RUNNING), WORKFLOW.c.worker_id == WORKER.c.id)
        .limit(1)
        .lateral("left_behind")
    )
    dead = WORKER.c.lease_expires_at.between(scan_start("since_expired"), pg.statement_timestamp())
    return sa.select(left.c.id).select_from(WORKER.join(left, sa.true())).where(dead).exists()


def _alive() -> Condition:
    mine = WORKER.c.id == parameter("polling_id", sa.UUID())
    return sa.select(WORKER.c.id).where(mine, WORKER.c.lease_expires_at > pg.statement_timestamp()).exists()


def _find_work_statement() -> Any:
    due = WORKFLOW.c.wake_at.between(scan_start("since_wake"), pg.statement_timestamp())
    firsts = sa.select(
        _first(WORKFLOW.c.wake_at, _SUSPENDED, due).label("first_wake_at"),
        _first(WORKFLOW.c.deadline_at, is_overdue(), WORKFLOW.c.deadline_at >= scan_start("since_deadline")).label(
            "first_deadline_at"
        ),
        _first(SIGNAL.c.created_at, is_undelivered("since_sent")).label("first_sent_at"),
    ).cte("firsts")
    is_paused = QUEUE.c.paused_at.is_not(None)
    kept = materialized(
        sa.select(QUEUE.c.name, sa.not_(is_paused).label("is_limited")).where(sa.or_(is_paused, is_limited())), "kept"
    )
    is_left = SIGNAL.c.name == text_literal(ORPHANS)
    return sa.select(
        firsts.c.first_wake_at.is_not(None).label("due"),
        _claimable().label("claimable"),
        _next_due_in().label("next_due_in"),
        _abandoned().label("abandoned"),
        _alive().label("alive"),
        sa.select(SIGNAL.c.id).where(is_undelivered("since_sent"), is_left).exists().label("has_orphans"),
        sa.select(SCHEDULE.c.name).where(schedules.is_due()).exists().label("ticks"),
        sa.select(retention.RETENTION.c.name).where(retention.is_due()).exists().label("prunes"),
        sa.select(pg.array_agg(kept.c.name)).scalar_subquery().label("kept"),
        sa.select(pg.array_agg(kept.c.name)).where(kept.c.is_limited).scalar_subquery().label("limited"),
        _waiting(kept).label("waiting"),
        firsts.c.first_deadline_at.is_not(None).label("overdue"),
        firsts.c.first_sent_at.is_not(None).label("undelivered"),
        _scan_start(firsts.c.first_wake_at).label("wake_mark"),
        _scan_start(firsts.c.first_deadline_at).label("deadline_mark"),
        _scan_start(firsts.c.first_sent_at).label("sent_mark"),
        (pg.statement_timestamp() - _DEAD_LATELY).label("expired_mark"),
        pg.statement_timestamp().label("found_at"),
    )


_WITHIN = parameter("within", sa.Float())
_SUSPENDED = WORKFLOW.c.status == status_literal(WorkflowStatus.SUSPENDED)
_FIND_WORK = Statement(_find_work_statement)
