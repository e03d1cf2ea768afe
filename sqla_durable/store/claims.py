"""The claim: one statement that takes workflows, marks them as running, and returns them with their histories.

Pending workflows are taken first in, first out within a priority; paused queues are skipped. The rows are locked with
SKIP LOCKED, so that a claim never waits for another one, nor for anybody's open transaction.

A history that is long is read by a statement of its own, because the claim's transaction locks rows. So is one that
this statement may not see in full: an attempt may have recorded, and left the workflow, after the statement began.
Whoever does so changes the row; its `xmin` is then not that of the version that the statement sees.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any, NamedTuple, TypeAlias
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY

from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.models.base import StepStatus, Text, WorkflowStatus
from sqla_durable.store import failures, limits, steps
from sqla_durable.store.driver import DriverStatement
from sqla_durable.store.records import Claimed, Fence, Recorded
from sqla_durable.store.signals import WOKEN, is_satisfied
from sqla_durable.store.statements import (
    ALL,
    IS_WANTED,
    LIMIT,
    ORDER_IN_QUEUE,
    OVERDUE,
    QUEUE,
    STEP,
    WORKFLOW,
    ZERO,
    Columns,
    Condition,
    Connectable,
    Expression,
    Restriction,
    Subset,
    as_uuid,
    batch_parameter,
    batch_table,
    count_rows,
    has_status,
    integer,
    is_among,
    materialized,
    must_compensate,
    parameter,
    pg,
    row_version,
    status_literal,
    subset_forms,
    text_literal,
)

_TOKEN = parameter("new_token", sa.UUID())
_WORKER = parameter("claimant", sa.UUID())
NAMES = parameter("names", ARRAY(Text()))
VERSIONS = parameter("versions", ARRAY(Text()))
QUEUES = parameter("queues", ARRAY(Text()))
_POSITION: Columns = {"priority": sa.SmallInteger(), "enqueued_at": sa.DateTime(timezone=True), "id": sa.UUID()}
_NO_PRIORITY = 32_768  # more than a smallint holds
_MOST_STEPS, _MOST_BYTES = 50, 4_096  # of a history that comes with the claim, and of each of its values, compressed


@dataclass(frozen=True, slots=True)
class ScanPosition:
    """The position of a workflow in its queue; a claim takes what comes after."""

    priority: int
    enqueued_at: datetime | str
    id: UUID


FRONT = ScanPosition(-32_768, "-infinity", UUID(int=0))
"""The position before all others."""


@dataclass(frozen=True, slots=True)
class Range:
    """A part of a queue: what comes after a position, and has a `priority` below `until`."""

    after: ScanPosition
    until: int = _NO_PRIORITY


Ranges: TypeAlias = Mapping[str, Sequence[Range]]
"""The queues, and the ranges of each that a scan reads."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one claim took and when, and the last position that it took in each queue and priority.

    Attributes:
        again: whether the same claim, made at once, may find more, although this one has not taken as many as it could.
        retry_in: the seconds until a rate of the queue has room again.
    """

    claimed: list[Claimed]
    last_positions: dict[str, dict[int, ScanPosition]]
    claimed_at: datetime | None = None
    again: bool = False
    retry_in: float | None = None


def claim(
    connectable: Connectable,
    *,
    worker_id: UUID,
    token: UUID,
    ranges: Ranges,
    names: Sequence[str],
    versions: Sequence[str] = (),
    limit: int,
    subset: Subset = ALL,
) -> Batch:
    """Claim at most `limit` pending workflows of these names, in the order of their queues.

    Commit, and add the histories that are unread, before executing them. The token fences every later write; it must
    be new for each claim.

    Args:
        ranges: the queues, and the ranges of each to read. One that begins after what was read before does not read
            what is dead in the index, which vacuum cannot remove while a snapshot is open elsewhere. But what was
            committed late, or released, may stand there: now and then, read all of a queue from the `FRONT`.
        versions: those that were started by these versions of the code only, and those without one; empty means all.
        subset: which of those that it finds.
    """
    given = {"limit": limit, "new_token": token, "claimant": worker_id} | range_parameters(ranges)
    parameters = given | name_parameters(names, versions) | subset.parameters
    # RETURNING has no order of its own.
    rows = sorted(_taken(subset.form_of(_CLAIM, _CLAIM_PART).rows(connectable, parameters)), key=_position_of)
    last_positions: dict[str, dict[int, ScanPosition]] = defaultdict(dict)
    for row in rows:
        last_positions[row.queue][row.priority] = ScanPosition(row.priority, row.enqueued_at, row.id)
    return Batch([_claimed(row, token) for row in rows], last_positions, rows[0].claimed_at if rows else None)


def claim_limited(
    connectable: Connectable,
    *,
    worker_id: UUID,
    token: UUID,
    queue: str,
    executing: int,
    names: Sequence[str],
    versions: Sequence[str] = (),
    limit: int,
    subset: Subset = ALL,
) -> Batch:
    """Claim at most `limit` pending workflows of a queue with limits, as many as it has places for; see `limits`.

    Commit, as after `claim`. Takes nothing while another claim has locked the queue's row, for which it does not wait.

    Args:
        queue: its name.
        executing: how many workflows of the queue this worker executes.
    """
    given = {"limit": limit, "new_token": token, "claimant": worker_id, "queue": queue, "here": executing}
    parameters = given | name_parameters(names, versions) | subset.parameters
    rows = subset.form_of(_CLAIM_LIMITED, _CLAIM_LIMITED_PART).rows(connectable, parameters)
    again, retry_in = rows[0][:2]
    taken = sorted(_taken(row[2:] for row in rows if row[2] is not None), key=_position_of)
    claimed_at = taken[0].claimed_at if taken else None
    return Batch([_claimed(row, token) for row in taken], {}, claimed_at, again, retry_in)


def limited_claimable(
    connectable: Connectable,
    *,
    queue: str,
    executing: int,
    names: Sequence[str],
    versions: Sequence[str] = (),
    limit: int,
    subset: Subset = ALL,
) -> list[UUID]:
    """Return the ids of those that `claim_limited` would claim."""
    parameters = {"limit": limit, "queue": queue, "here": executing} | name_parameters(names, versions)
    return subset.find_ids(connectable, _LIMITED_CLAIMABLE, parameters)


def claimable(
    connectable: Connectable,
    *,
    ranges: Ranges,
    names: Sequence[str],
    versions: Sequence[str] = (),
    limit: int,
    subset: Subset = ALL,
) -> list[UUID]:
    """Return the ids of those that this would claim, in the order of their queues."""
    return subset.find_ids(
        connectable, _CLAIMABLE, {"limit": limit} | name_parameters(names, versions) | range_parameters(ranges)
    )


def claim_one(connectable: Connectable, workflow_id: UUID, *, worker_id: UUID, token: UUID) -> Claimed | None:
    """Claim one pending workflow whatever its queue, waiting for the lock of its row.

    None if it is not pending, or its deadline has come.
    """
    parameters = {"wanted_id": workflow_id, "new_token": token, "claimant": worker_id}
    rows = _taken(_CLAIM_ONE.rows(connectable, parameters))
    return _claimed(rows[0], token) if rows else None


def claim_receivers(
    connectable: Connectable,
    ids: Sequence[UUID],
    *,
    worker_id: UUID,
    token: UUID,
    queues: Collection[str],
    names: Sequence[str],
    versions: Sequence[str] = (),
    limit: int,
) -> list[Claimed]:
    """Claim at most `limit` of these workflows that are suspended, and for which something that they await is there.

    Past the queue: for a worker that has found nothing in it. Signals stay undelivered until they are taken.
    """
    parameters = {"ids": list(ids), "queues": list(queues), "limit": limit, "new_token": token, "claimant": worker_id}
    rows = _CLAIM_RECEIVERS.rows(connectable, parameters | name_parameters(names, versions))
    return [_claimed(row, token) for row in _taken(rows)]


def with_histories(connectable: Connectable, claimed: Sequence[Claimed]) -> list[Claimed]:
    """Return claimed workflows with the histories that did not come with the claim."""
    unread = [each.fence.workflow_id for each in claimed if each.is_unread]
    if not unread:
        return [*claimed]
    found = steps.histories(connectable, unread)
    return [
        each._replace(history=found.get(each.fence.workflow_id, {}), is_unread=False) if each.is_unread else each
        for each in claimed
    ]


def range_parameters(ranges: Ranges) -> dict[str, str]:
    """Return the parameter of `active_ranges`."""
    rows = [(name, each) for name, parts in ranges.items() for each in parts]
    return batch_parameter("wanted", [{"name": name, **asdict(each.after), "until": each.until} for name, each in rows])


def wanted_queues() -> Any:
    """Return the names of the queues of `range_parameters`."""
    return _wanted_ranges().c.name


def active_ranges() -> Any:
    """Return the `wanted` ranges of those queues that are not paused, and have no limits."""
    wanted = _wanted_ranges()
    return sa.select(*wanted.c).where(~_is_kept(wanted.c.name)).subquery("listened")


def name_parameters(names: Sequence[str], versions: Sequence[str]) -> dict[str, list[str]]:
    """Return the parameters of `is_claimable`; no versions mean all of them."""
    return {"names": list(names), "versions": list(versions)}


def is_claimable(listened: Any) -> Any:
    """Return the condition for what can be claimed from a range: it is pending, and its name and version are wanted."""
    return sa.and_(
        waits_in(listened.c.name),
        sa.tuple_(*ORDER_IN_QUEUE) > sa.tuple_(*(listened.c[each] for each in _POSITION)),
        WORKFLOW.c.priority < listened.c.until,
    )


def waits_in(queue: Expression) -> Condition:
    """Return the condition for what waits in a queue, and has a name and a version that are wanted."""
    is_pending = WORKFLOW.c.status == status_literal(WorkflowStatus.PENDING)
    return sa.and_(is_pending, WORKFLOW.c.queue == queue, _is_known_and_in_time())


class _Taken(NamedTuple):
    """What the claim returns of a workflow; `input`, `headers` and `history` are JSON text."""

    id: UUID
    name: str
    attempt: int
    queue: str
    priority: int
    enqueued_at: datetime
    input: str
    headers: str | None
    started: bool
    history: str | None
    claimed_at: datetime
    is_child: bool
    is_cancelling: bool
    overdue: str | None
    origin: str | None


def _position_of(row: _Taken) -> tuple[int, datetime, UUID]:
    return row.priority, row.enqueued_at, row.id


def _taken(rows: Iterable[Any]) -> list[_Taken]:
    return [_Taken(as_uuid(row[0]), *row[1:]) for row in rows]


def _claimed(row: _Taken, token: UUID) -> Claimed:
    fence = Fence(row.id, token)
    headers: dict[str, str] = json.loads(row.headers) if row.headers else {}
    ends = row.is_child, row.is_cancelling, row.overdue
    is_unread = row.started and row.history is None
    history = _history_in(row.history)
    return Claimed(fence, row.name, row.attempt, row.input, *ends, headers, history, is_unread, row.origin)


def _origin() -> Expression:
    """Return from where a workflow's input may be: any, its schedule, or a start with its key; see `Place`."""
    key = sa.func.coalesce(WORKFLOW.c.key, WORKFLOW.c.former_key)
    return sa.case(
        (WORKFLOW.c.forked_from.is_not(None), text_literal("")),
        (WORKFLOW.c.schedule.is_not(None), pg.concat(text_literal("schedule "), WORKFLOW.c.schedule)),
        (key.is_not(None), pg.concat(text_literal("key "), WORKFLOW.c.name, text_literal("/"), key)),
    )


def _history_in(records: str | None) -> dict[str, Recorded]:
    if records is None:
        return {}
    rows = ((*each[:3], StepStatus(each[3]), *each[4:]) for each in json.loads(records))
    return {each.key: each for each in map(steps.recorded_in, rows)}


def _is_kept(queue: Expression) -> Condition:
    """Return whether nothing of a queue is claimed here: it is paused, or has limits and a claim of its own."""
    kept = sa.or_(QUEUE.c.paused_at.is_not(None), limits.is_limited())
    return sa.select(QUEUE.c.name).where(QUEUE.c.name == queue, kept).exists()


def _is_known_and_in_time(names: Expression = NAMES, versions: Expression = VERSIONS) -> Condition:
    all_versions = pg.cardinality(versions) == ZERO
    return sa.and_(
        WORKFLOW.c.name == sa.func.any(names),
        failures.in_time(),
        sa.or_(all_versions, WORKFLOW.c.version.is_(None), WORKFLOW.c.version == sa.func.any(versions)),
    )


def _heads(within: Restriction) -> Any:
    """Select and lock the first workflows of each queue that is not paused."""
    listened = active_ranges()
    head = (
        sa.select(*ORDER_IN_QUEUE, WORKFLOW.c.started_at, row_version(WORKFLOW))
        .where(is_claimable(listened), within(WORKFLOW.c.id))
        .order_by(*ORDER_IN_QUEUE)
        .limit(LIMIT)
        .with_for_update(key_share=True, skip_locked=True)
        .lateral("head")
    )
    return (
        sa.select(head.c.id, head.c.started_at, head.c.row_version)
        .select_from(listened.join(head, sa.true()))
        .order_by(head.c.priority, head.c.enqueued_at, head.c.id)
        .limit(LIMIT)
    )


def _wanted_ranges() -> sa.TableValuedAlias:
    return batch_table("wanted", {"name": Text(), **_POSITION, "until": sa.Integer()})


def _one() -> Any:
    return (
        sa.select(WORKFLOW.c.id, WORKFLOW.c.started_at, row_version(WORKFLOW))
        .where(
            IS_WANTED,
            WORKFLOW.c.status == status_literal(WorkflowStatus.PENDING),
            failures.in_time(),
        )
        .with_for_update(key_share=True)
    )


def _receivers() -> Any:
    """Select and lock those of some suspended workflows for which something that they await is there."""
    waiting = materialized(
        sa.select(WORKFLOW.c.id.label("workflow_id"), WORKFLOW.c.awaits, WORKFLOW.c.started_at, row_version(WORKFLOW))
        .where(
            is_among(WORKFLOW.c.id),
            has_status(WORKFLOW, WorkflowStatus.SUSPENDED),
            WORKFLOW.c.awaits.is_not(None),
            WORKFLOW.c.queue == sa.func.any(QUEUES),
            ~_is_kept(WORKFLOW.c.queue),
            _is_known_and_in_time(),
        )
        .order_by(WORKFLOW.c.id)
        .with_for_update(key_share=True, skip_locked=True, of=WORKFLOW),
        "waiting",
    )
    return (
        sa.select(waiting.c.workflow_id.label("id"), waiting.c.started_at, waiting.c.row_version)
        .where(is_satisfied(waiting))
        .limit(LIMIT)
    )


def _history(claimable: sa.CTE) -> Expression:
    """Return the history as a JSON array of records, each an array; NULL if it is to be read by itself, or none."""
    seen = WORKFLOW.alias("seen")
    seen_version = sa.select(row_version(seen)).where(seen.c.id == claimable.c.id).scalar_subquery()
    sizes = [sa.func.coalesce(pg.pg_column_size(each), ZERO) for each in (STEP.c.output, STEP.c.error, STEP.c.details)]
    is_short = sum(sizes, ZERO) <= integer(_MOST_BYTES)
    some = (
        sa.select(sa.case((is_short, pg.json_build_array(*steps.RECORDED))).label("record"))
        .where(STEP.c.workflow_id == claimable.c.id)
        .limit(integer(_MOST_STEPS + 1))
        .correlate(claimable)
        .subquery("some")
    )
    is_whole = sa.and_(count_rows() <= integer(_MOST_STEPS), count_rows() == pg.count(some.c.record))
    listed = sa.func.coalesce(sa.cast(pg.json_agg(some.c.record), Text), text_literal("[]"))
    whole = sa.select(sa.case((is_whole, listed))).select_from(some).scalar_subquery()
    return sa.case((sa.and_(claimable.c.started_at.is_not(None), seen_version == claimable.c.row_version), whole))


def _deadline() -> Expression:
    """Return the deadline from the first claim on; LEAST ignores NULL."""
    return sa.func.least(WORKFLOW.c.deadline_at, pg.statement_timestamp() + WORKFLOW.c.timeout)


def _claim_many_statement(within: Restriction) -> tuple[Any, Any]:
    heads = materialized(_heads(within), "heads")
    return _claim_statement(_heads(within)), sa.select(heads.c.id)


def _limited_statement(within: Restriction) -> tuple[Any, Any]:
    # From subqueries, so that the planner does not know their values: with them it may think that planning again each
    # time is worth its while, and planning takes ten times as long as the claim.
    names, versions = (sa.cast(sa.select(each).scalar_subquery(), ARRAY(Text())) for each in (NAMES, VERSIONS))
    chosen, writes, info = limits.choose(_is_known_and_in_time(names, versions), within)
    # With the array too, whose length the planner knows: it expects more of `chosen` than a limit lets through.
    ids = sa.func.array(sa.select(chosen.c.id).scalar_subquery())
    taken = _claiming(chosen, place=chosen.c.place).where(WORKFLOW.c.id == sa.func.any(ids)).cte("taken")
    found = sa.select(*info.c, *taken.c).select_from(info.outerjoin(taken, sa.true()))
    return found.add_cte(*writes), sa.select(chosen.c.id)


def _claim_statement(candidates: Any, **more: Any) -> Any:
    # MATERIALIZED: as a subquery in WHERE the planner may execute it again and claim more than the limit.
    return _claiming(materialized(candidates, "claimable"), **more)


def _claiming(claimable: sa.CTE, **more: Any) -> Any:
    return (
        sa.update(WORKFLOW)
        .where(WORKFLOW.c.id == claimable.c.id)
        .values(
            {
                **more,
                "status": WorkflowStatus.RUNNING,
                "token": _TOKEN,
                "worker_id": _WORKER,
                "started_at": sa.func.coalesce(WORKFLOW.c.started_at, pg.statement_timestamp()),
                "deadline_at": sa.case((WORKFLOW.c.started_at.is_(None), _deadline()), else_=WORKFLOW.c.deadline_at),
            }
        )
        .returning(
            WORKFLOW.c.id,
            WORKFLOW.c.name,
            WORKFLOW.c.attempt,
            WORKFLOW.c.queue,
            WORKFLOW.c.priority,
            WORKFLOW.c.enqueued_at,
            sa.cast(WORKFLOW.c.input, Text).label("input"),
            sa.cast(WORKFLOW.c.headers, Text).label("headers"),
            claimable.c.started_at.is_not(None).label("started"),
            _history(claimable).label("history"),
            pg.statement_timestamp().label("claimed_at"),
            WORKFLOW.c.parent_id.is_not(None).label("is_child"),
            must_compensate().label("is_cancelling"),
            sa.case((WORKFLOW.c.cancellation == OVERDUE, failures.deadline_reason())).label("overdue"),
            _origin().label("origin"),
        )
    )


_CLAIM, _CLAIM_PART, _CLAIMABLE = subset_forms(DriverStatement, _claim_many_statement)
_CLAIM_LIMITED, _CLAIM_LIMITED_PART, _LIMITED_CLAIMABLE = subset_forms(DriverStatement, _limited_statement)
_CLAIM_ONE = DriverStatement(lambda: _claim_statement(_one()))
_CLAIM_RECEIVERS = DriverStatement(lambda: _claim_statement(_receivers(), **WOKEN))
