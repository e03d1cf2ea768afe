"""The claim: one statement that takes pending workflows, marks them as running, and hands them out.

First in, first out within a priority; paused queues are passed over. The rows are locked with SKIP LOCKED, so that a
claim never waits for another one, nor for anybody's open transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID

from sqlalchemy import Integer, Row, Text, bindparam, cast, column, func, select, true, update
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.dialects.postgresql import UUID as PG_UUID
from sqlalchemy.orm import Session

from sqla_durable.status import WorkflowStatus
from sqla_durable.store import steps
from sqla_durable.store._rows import QUEUE, WORKFLOW, Claimed, Fence, execute, materialized, soon_over, status

_LIMIT = bindparam("limit", type_=Integer())
_TOKEN = bindparam("new_token", type_=PG_UUID())
_WORKER = bindparam("claimant", type_=PG_UUID())


def claim(
    session: Session,
    *,
    worker_id: UUID,
    token: UUID,
    queues: Sequence[str],
    names: Sequence[str],
    limit: int,
) -> list[Claimed]:
    """Claim at most `limit` pending workflows of these queues and names, in their order.

    Commit, and give them their histories, before executing them. The token fences every later write; it must be new for
    each claim.
    """
    parameters = {"queues": queues, "names": names, "limit": limit, "new_token": token, "claimant": worker_id}
    returned = execute(session, _CLAIM, parameters)
    # RETURNING has no order of its own.
    rows = sorted(returned, key=lambda row: (row.priority, row.enqueued_at, row.id))
    return [_claimed(row, token) for row in rows]


def claim_one(session: Session, workflow_id: UUID, *, worker_id: UUID, token: UUID) -> Claimed | None:
    """Claim one pending workflow whatever its queue, waiting for whoever holds its row; None if it is not pending."""
    parameters = {"wanted_id": workflow_id, "new_token": token, "claimant": worker_id}
    row = execute(session, _CLAIM_ONE, parameters).one_or_none()
    return None if row is None else _claimed(row, token)


def with_histories(session: Session, claimed: Sequence[Claimed]) -> list[Claimed]:
    """Give claimed workflows their histories; only those that were executed before have one.

    Apart from the claim, whose transaction holds rows: histories may be long, and take their time.
    """
    histories = steps.histories(session, [each.fence.workflow_id for each in claimed if each.started])
    return [replace(each, history=histories.get(each.fence.workflow_id, {})) for each in claimed]


def _claimed(row: Row[Any], token: UUID) -> Claimed:
    return Claimed(Fence(row.id, token), row.name, row.attempt, row.input, row.started)


def _heads() -> Any:
    """Give the first workflows of each queue that is not paused."""
    name = column("name", Text)
    wanted = func.unnest(bindparam("queues", type_=ARRAY(Text()))).table_valued(name).render_derived(name="wanted")
    paused = select(QUEUE.c.name).where(QUEUE.c.name == wanted.c.name, QUEUE.c.paused_at.is_not(None)).exists()
    listened = select(wanted.c.name).where(~paused).subquery("listened")
    head = (
        select(WORKFLOW.c.id, WORKFLOW.c.priority, WORKFLOW.c.enqueued_at, WORKFLOW.c.started_at)
        .where(
            WORKFLOW.c.status == status(WorkflowStatus.PENDING),
            WORKFLOW.c.queue == listened.c.name,
            WORKFLOW.c.name == func.any(bindparam("names", type_=ARRAY(Text()))),
        )
        .order_by(WORKFLOW.c.priority, WORKFLOW.c.enqueued_at, WORKFLOW.c.id)
        .limit(_LIMIT)
        .with_for_update(key_share=True, skip_locked=True)
        .lateral("head")
    )
    return (
        select(head.c.id, head.c.started_at, soon_over())
        .select_from(listened.join(head, true()))
        .order_by(head.c.priority, head.c.enqueued_at, head.c.id)
        .limit(_LIMIT)
    )


def _one() -> Any:
    return (
        select(WORKFLOW.c.id, WORKFLOW.c.started_at)
        .where(
            WORKFLOW.c.id == bindparam("wanted_id", type_=PG_UUID()),
            WORKFLOW.c.status == status(WorkflowStatus.PENDING),
        )
        .with_for_update(key_share=True)
    )


def _claim_statement(candidates: Any) -> Any:
    # MATERIALIZED: as a subquery in WHERE the planner may execute it again and claim more than the limit.
    claimable = materialized(candidates, "claimable")
    return (
        update(WORKFLOW)
        .where(WORKFLOW.c.id == claimable.c.id)
        .values(
            status=WorkflowStatus.RUNNING,
            token=_TOKEN,
            worker_id=_WORKER,
            started_at=func.coalesce(WORKFLOW.c.started_at, func.statement_timestamp()),
        )
        .returning(
            WORKFLOW.c.id,
            WORKFLOW.c.name,
            WORKFLOW.c.attempt,
            WORKFLOW.c.priority,
            WORKFLOW.c.enqueued_at,
            cast(WORKFLOW.c.input, Text).label("input"),
            claimable.c.started_at.is_not(None).label("started"),
        )
    )


_CLAIM = _claim_statement(_heads())
_CLAIM_ONE = _claim_statement(_one())
