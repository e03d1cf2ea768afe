"""The claim: one statement that takes pending workflows, marks them as running, and returns them.

First in, first out within a priority; paused queues are skipped. The rows are locked with SKIP LOCKED, so that a claim
never waits for another one, nor for anybody's open transaction.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any, TypeAlias
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY

from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.models.base import Text, WorkflowStatus
from sqla_durable.store import failures, steps
from sqla_durable.store.records import Claimed, Fence
from sqla_durable.store.statements import (
    ALL,
    IS_WANTED,
    LIMIT,
    OVERDUE,
    QUEUE,
    WORKFLOW,
    ZERO,
    Columns,
    Connectable,
    Expression,
    Restriction,
    Statement,
    Subset,
    batch_parameter,
    batch_table,
    execute,
    materialized,
    must_compensate,
    parameter,
    pg,
    scalars,
    status_literal,
    subset_forms,
)

_TOKEN = parameter("new_token", sa.UUID())
_WORKER = parameter("claimant", sa.UUID())
_NAMES = parameter("names", ARRAY(Text()))
_VERSIONS = parameter("versions", ARRAY(Text()))
_POSITION: Columns = {"priority": sa.SmallInteger(), "enqueued_at": sa.DateTime(timezone=True), "id": sa.UUID()}
_NO_PRIORITY = 32_768  # more than a smallint holds


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
    """What one claim took and when, and the last position that it took in each queue and priority."""

    claimed: list[Claimed]
    last_positions: dict[str, dict[int, ScanPosition]]
    claimed_at: datetime | None = None


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

    Commit, and add their histories, before executing them. The token fences every later write; it must be new for
    each claim.

    Args:
        ranges: the queues, and the ranges of each to read. One that begins after what was read before does not read
            what is dead in the index, which vacuum cannot remove while a snapshot is open elsewhere. But what was
            committed late, or released, may stand there: now and then, read all of a queue from the `FRONT`.
        versions: those that were started by these versions of the code only, and those without one; empty means all.
        subset: which of those that it finds.
    """
    parameters = (
        {"limit": limit, "new_token": token, "claimant": worker_id}
        | name_parameters(names, versions)
        | subset.parameters
    )
    returned = execute(connectable, subset.form_of(_CLAIM, _CLAIM_PART), parameters | range_parameters(ranges))
    # RETURNING has no order of its own.
    rows = sorted(returned, key=lambda row: (row.priority, row.enqueued_at, row.id))
    last_positions: dict[str, dict[int, ScanPosition]] = defaultdict(dict)
    for row in rows:
        last_positions[row.queue][row.priority] = ScanPosition(row.priority, row.enqueued_at, row.id)
    return Batch([_claimed(row, token) for row in rows], last_positions, rows[0].claimed_at if rows else None)


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
    row = execute(connectable, _CLAIM_ONE, parameters).one_or_none()
    return None if row is None else _claimed(row, token)


def with_histories(connectable: Connectable, claimed: Sequence[Claimed]) -> list[Claimed]:
    """Return claimed workflows with their histories; only those that were executed before have one.

    In a statement of its own, because the claim's transaction locks rows and long histories take time to read.
    """
    histories = steps.histories(connectable, [each.fence.workflow_id for each in claimed if each.started])
    return [each._replace(history=histories.get(each.fence.workflow_id, {})) for each in claimed]


def from_front(queues: Iterable[str]) -> Ranges:
    """Return the ranges that read all of these queues."""
    return {each: [Range(FRONT)] for each in queues}


def range_parameters(ranges: Ranges) -> dict[str, str]:
    """Return the parameter of `active_ranges`."""
    rows = [(name, each) for name, parts in ranges.items() for each in parts]
    return batch_parameter("wanted", [{"name": name, **asdict(each.after), "until": each.until} for name, each in rows])


def active_ranges() -> Any:
    """Return the `wanted` ranges of those queues that are not paused."""
    wanted = batch_table("wanted", {"name": Text(), **_POSITION, "until": sa.Integer()})
    paused = sa.select(QUEUE.c.name).where(QUEUE.c.name == wanted.c.name, QUEUE.c.paused_at.is_not(None)).exists()
    return sa.select(*wanted.c).where(~paused).subquery("listened")


def name_parameters(names: Sequence[str], versions: Sequence[str]) -> dict[str, list[str]]:
    """Return the parameters of `is_claimable`; no versions mean all of them."""
    return {"names": list(names), "versions": list(versions)}


def is_claimable(listened: Any) -> Any:
    """Return the condition for what can be claimed from a range: it is pending, and its name and version are wanted."""
    all_versions = pg.cardinality(_VERSIONS) == ZERO
    return sa.and_(
        WORKFLOW.c.status == status_literal(WorkflowStatus.PENDING),
        WORKFLOW.c.queue == listened.c.name,
        sa.tuple_(*_position()) > sa.tuple_(*(listened.c[each] for each in _POSITION)),
        WORKFLOW.c.priority < listened.c.until,
        WORKFLOW.c.name == sa.func.any(_NAMES),
        failures.in_time(),
        sa.or_(all_versions, WORKFLOW.c.version.is_(None), WORKFLOW.c.version == sa.func.any(_VERSIONS)),
    )


def unknown_names(connectable: Connectable, *, queues: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the names of workflows near the head of the queues that are not among `names`."""
    head = (
        sa.select(WORKFLOW.c.name)
        .where(WORKFLOW.c.status == status_literal(WorkflowStatus.PENDING), WORKFLOW.c.queue.in_(queues))
        .where(WORKFLOW.c.name.not_in(names))
        .limit(100)
        .subquery()
    )
    return list(scalars(connectable, sa.select(head.c.name).distinct().order_by(head.c.name)))


def other_versions(connectable: Connectable, *, queues: Sequence[str], versions: Sequence[str]) -> list[str]:
    """Return the versions of workflows near the head of each queue that are not among `versions`."""
    heads = [
        sa.select(WORKFLOW.c.version)
        .where(WORKFLOW.c.status == status_literal(WorkflowStatus.PENDING), WORKFLOW.c.queue == queue)
        .order_by(WORKFLOW.c.priority, WORKFLOW.c.enqueued_at, WORKFLOW.c.id)
        .limit(1_000)
        .subquery()
        for queue in queues
    ]
    found = sa.union(*(sa.select(each.c.version).where(each.c.version.not_in(versions)) for each in heads))
    return sorted(scalars(connectable, found))


def _claimed(row: sa.Row[Any], token: UUID) -> Claimed:
    fence = Fence(row.id, token)
    headers: dict[str, str] = row.headers or {}
    ends = row.is_child, row.is_cancelling, row.overdue
    return Claimed(fence, row.name, row.attempt, row.input, row.started, *ends, headers)


def _heads(within: Restriction) -> Any:
    """Select and lock the first workflows of each queue that is not paused."""
    listened = active_ranges()
    place = _position()
    head = (
        sa.select(*place, WORKFLOW.c.started_at)
        .where(is_claimable(listened), within(WORKFLOW.c.id))
        .order_by(*place)
        .limit(LIMIT)
        .with_for_update(key_share=True, skip_locked=True)
        .lateral("head")
    )
    return (
        sa.select(head.c.id, head.c.started_at)
        .select_from(listened.join(head, sa.true()))
        .order_by(head.c.priority, head.c.enqueued_at, head.c.id)
        .limit(LIMIT)
    )


def _position() -> tuple[Expression, ...]:
    return tuple(WORKFLOW.c[each] for each in _POSITION)


def _one() -> Any:
    return (
        sa.select(WORKFLOW.c.id, WORKFLOW.c.started_at)
        .where(
            IS_WANTED,
            WORKFLOW.c.status == status_literal(WorkflowStatus.PENDING),
            failures.in_time(),
        )
        .with_for_update(key_share=True)
    )


def _deadline() -> Expression:
    """Return the deadline from the first claim on; LEAST ignores NULL."""
    return sa.func.least(WORKFLOW.c.deadline_at, pg.statement_timestamp() + WORKFLOW.c.timeout)


def _claim_many_statement(within: Restriction) -> tuple[Any, Any]:
    heads = materialized(_heads(within), "heads")
    return _claim_statement(_heads(within)), sa.select(heads.c.id)


def _claim_statement(candidates: Any) -> Any:
    # MATERIALIZED: as a subquery in WHERE the planner may execute it again and claim more than the limit.
    claimable = materialized(candidates, "claimable")
    return (
        sa.update(WORKFLOW)
        .where(WORKFLOW.c.id == claimable.c.id)
        .values(
            status=WorkflowStatus.RUNNING,
            token=_TOKEN,
            worker_id=_WORKER,
            started_at=sa.func.coalesce(WORKFLOW.c.started_at, pg.statement_timestamp()),
            deadline_at=sa.case((WORKFLOW.c.started_at.is_(None), _deadline()), else_=WORKFLOW.c.deadline_at),
        )
        .returning(
            WORKFLOW.c.id,
            WORKFLOW.c.name,
            WORKFLOW.c.attempt,
            WORKFLOW.c.queue,
            WORKFLOW.c.priority,
            WORKFLOW.c.enqueued_at,
            sa.cast(WORKFLOW.c.input, Text).label("input"),
            WORKFLOW.c.headers,
            claimable.c.started_at.is_not(None).label("started"),
            pg.statement_timestamp().label("claimed_at"),
            WORKFLOW.c.parent_id.is_not(None).label("is_child"),
            must_compensate().label("is_cancelling"),
            sa.case((WORKFLOW.c.cancellation == OVERDUE, failures.deadline_reason())).label("overdue"),
        )
    )


_CLAIM, _CLAIM_PART, _CLAIMABLE = subset_forms(_claim_many_statement)
_CLAIM_ONE = Statement(lambda: _claim_statement(_one()))
