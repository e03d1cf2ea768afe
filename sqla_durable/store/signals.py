"""The statements on signals: send, take, deliver.

A sender inserts a row and locks nothing that the receiver's worker would wait for. A workflow that is suspended records
in its row what it awaits, and leaves a notice to itself, `#suspended`; a child that ends leaves `#child` to its parent.
Each new row is delivered once: the receiver's row is locked, and if what it awaits is available now, it is woken. So a
signal and a suspension at the same time lose nothing: the one that commits later finds the other.

A parent waits until at most a given number of its children is unfinished. Only an end lowers that number, and each end
leaves a notice in its own transaction; a child that was deleted had ended before. So a parent whose wait is over is
woken, or has an undelivered notice. An application's own SQL on a child leaves none: `renotify` repairs that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Session

from sqla_durable.models.base import Text, WorkflowStatus
from sqla_durable.store.inbox import (
    CHILD,
    ORPHANS,
    first_keyed,
    first_untaken,
    insert_notices,
    is_notice,
    is_undelivered,
    send_statement,
    take_by,
    take_statement,
)
from sqla_durable.store.keys import require_the_latest
from sqla_durable.store.records import Checkpoint
from sqla_durable.store.statements import (
    ALL,
    BEGINNING,
    IS_WANTED,
    LIMIT,
    ONE,
    SIGNAL,
    WORKFLOW,
    Condition,
    Connectable,
    Expression,
    Restriction,
    Statement,
    Subset,
    count_rows,
    execute,
    has_status,
    is_among,
    materialized,
    parameter,
    pg,
    scalar,
    scalars,
    status_literal,
    subset_forms,
    text_literal,
)
from sqla_durable.store.steps import GIVEN

WOKEN: dict[str, Any] = {
    "status": WorkflowStatus.PENDING,
    "enqueued_at": pg.statement_timestamp(),
    "wake_at": sa.null(),
    "awaits": sa.null(),
}
"""What becomes of a suspended workflow that goes on."""


def sent_with_key(session: Session, workflow_ids: Sequence[UUID], *, name: str, key: str) -> set[UUID]:
    """Return those of the workflows to which a signal of this name and key was sent, taken or not. Takes no lock."""
    return set(scalars(session, _SENT_WITH_KEY, {"ids": list(workflow_ids), "signal_name": name, "signal_key": key}))


def send(session: Session, workflow_ids: Sequence[UUID], *, name: str, payload: str, key: str | None) -> None:
    """Send a signal to workflows, in the caller's transaction, by one statement; one of a known key is not sent again.

    Waits for another transaction that is sending the same name and key to the same workflow.

    Raises:
        SnapshotKept: nothing was sent: do it with `send_in_snapshot`, in savepoints.
    """
    parameters = {"ids": list(workflow_ids), "signal_name": name, "payload": payload, "signal_key": key}
    sent = scalars(session, _SEND, parameters).all()
    if key is not None and len(sent) < len(workflow_ids):
        require_the_latest(session)


def send_in_snapshot(session: Session, workflow_id: UUID, *, name: str, payload: str, key: str | None) -> None:
    """Send a signal to one workflow where the transaction keeps a snapshot, in a savepoint.

    Raises:
        DBAPIError: one of the key is newer than the snapshot: roll back to the savepoint.
    """
    parameters = {"ids": [workflow_id], "signal_name": name, "payload": payload, "signal_key": key}
    execute(session, _SEND_IN_SNAPSHOT, parameters)


def take(connectable: Connectable, checkpoint: Checkpoint, *, name: str) -> str | None:
    """Take the oldest signal of a name, record it as the outcome of the step, and return it as JSON text, or None.

    Raises:
        AttemptLost: the attempt no longer owns the workflow.
    """
    return take_by(connectable, _TAKE, checkpoint, {"signal_name": name})


def deliver(connectable: Connectable, *, limit: int, since: str = BEGINNING, subset: Subset = ALL) -> tuple[int, int]:
    """Deliver new signals, and wake the receivers that await them; return how many of both.

    Receivers whose rows others have locked are skipped, and so is what was sent before `since`.
    """
    parameters = {"limit": limit, "since": since, **subset.parameters}
    row = execute(connectable, subset.form_of(_DELIVER, _DELIVER_PART), parameters).one()
    return int(row.delivered), int(row.woken)


def wake_one(session: Session, workflow_id: UUID) -> None:
    """Enqueue a suspended workflow if it is due, or if what it awaits is available.

    Waits for the lock of its row.
    """
    execute(session, _WAKE_ONE, {"wanted_id": workflow_id})


def receivers(connectable: Connectable, *, limit: int, since: str = BEGINNING, subset: Subset = ALL) -> list[UUID]:
    """Return the ids of the receivers to which this would deliver."""
    return subset.find_ids(connectable, _RECEIVERS, {"limit": limit, "since": since})


def renotify(connectable: Connectable, *, after: UUID, limit: int, subset: Subset = ALL) -> UUID | None:
    """Leave notices to workflows whose wait is over already, among the next `limit` in the order of their ids.

    For children that an application's own SQL has deleted or ended, which leaves no notice; and for deferred children
    whose parent has ended so, or was refused. Takes no lock. The notices are delivered as any others are.

    Returns:
        The last id that was checked, or None if there are no more.
    """
    parameters = {"after": after, "limit": limit, **subset.parameters}
    found: UUID | None = scalar(connectable, subset.form_of(_RENOTIFY, _RENOTIFY_PART), parameters)
    return found


def waiting(connectable: Connectable, *, after: UUID, limit: int, subset: Subset = ALL) -> list[UUID]:
    """Return the ids of the workflows that this would check."""
    return subset.find_ids(connectable, _WAITING, {"after": after, "limit": limit})


def is_satisfied(new: sa.CTE) -> Condition:
    """Return the condition that something is there which a row awaits, by its `workflow_id` and `awaits`."""
    awaited: Any = (
        pg.jsonb_to_recordset(new.c.awaits)
        .table_valued(
            sa.column("signal", Text()), sa.column("children", ARRAY(sa.UUID())), sa.column("open", sa.Integer())
        )
        .render_derived(name="awaited", with_types=True)
    )
    first = first_untaken(new.c.workflow_id, awaited.c.signal).with_only_columns(SIGNAL.c.name)
    sent: Condition = first.correlate(new, awaited).scalar_subquery() == awaited.c.signal
    child = WORKFLOW.alias("child")
    unfinished: Expression = (
        sa.select(count_rows())
        .where(child.c.id == sa.func.any(awaited.c.children), child.c.finished_at.is_(None))
        .correlate(awaited)
        .scalar_subquery()
    )
    enough = sa.and_(awaited.c.children.is_not(None), unfinished <= awaited.c.open)
    anything = ONE
    return sa.select(anything).select_from(awaited).where(sa.or_(sent, enough)).exists()


def _deliver_statement(within: Restriction) -> tuple[Any, Any]:
    receiver = (
        sa.select(WORKFLOW.c.status, WORKFLOW.c.awaits)
        .where(WORKFLOW.c.id == SIGNAL.c.workflow_id)
        .limit(ONE)
        .with_for_update(key_share=True, skip_locked=True, of=WORKFLOW)
        .lateral("receiver")
    )
    new = materialized(
        sa.select(SIGNAL.c.workflow_id, SIGNAL.c.id, receiver.c.status, receiver.c.awaits)
        .join(receiver, sa.true())
        .where(is_undelivered(), SIGNAL.c.name != text_literal(ORPHANS), within(SIGNAL.c.workflow_id))
        .order_by(SIGNAL.c.created_at)
        .limit(LIMIT),
        "new",
    )
    same = sa.and_(SIGNAL.c.workflow_id == new.c.workflow_id, SIGNAL.c.id == new.c.id)
    gone = sa.delete(SIGNAL).where(same, is_notice()).returning(SIGNAL.c.id).cte("gone")
    seen = (
        sa.update(SIGNAL)
        .where(same, ~is_notice())
        .values(delivered_at=pg.statement_timestamp())
        .returning(SIGNAL.c.id)
        .cte("seen")
    )
    waiting = sa.and_(new.c.status == status_literal(WorkflowStatus.SUSPENDED), new.c.awaits.is_not(None))
    # By id: to compare what they await would cost more than to look for it.
    first = sa.select(pg.min(new.c.id)).where(waiting).group_by(new.c.workflow_id)
    receivers = materialized(sa.select(new.c.workflow_id, new.c.awaits).where(new.c.id.in_(first)), "receivers")
    due = materialized(sa.select(receivers.c.workflow_id).where(is_satisfied(receivers)), "due")
    woken = (
        sa.update(WORKFLOW)
        # Checked again in the row that is locked, whatever the statement's snapshot has of it.
        .where(WORKFLOW.c.id == due.c.workflow_id, has_status(WORKFLOW, WorkflowStatus.SUSPENDED))
        .values(WOKEN)
        .returning(WORKFLOW.c.id)
        .cte("woken")
    )
    delivered = (_count(gone) + _count(seen)).label("delivered")
    return sa.select(delivered, _count(woken).label("woken")), sa.select(new.c.workflow_id)


def _wake_one_statement() -> Any:
    waiting = materialized(
        sa.select(WORKFLOW.c.id.label("workflow_id"), WORKFLOW.c.wake_at, WORKFLOW.c.awaits)
        .where(IS_WANTED, has_status(WORKFLOW, WorkflowStatus.SUSPENDED))
        .with_for_update(key_share=True, of=WORKFLOW),
        "waiting",
    )
    is_there = sa.and_(waiting.c.awaits.is_not(None), is_satisfied(waiting))
    due = materialized(
        sa.select(waiting.c.workflow_id).where(sa.or_(waiting.c.wake_at <= pg.statement_timestamp(), is_there)), "due"
    )
    return sa.update(WORKFLOW).where(WORKFLOW.c.id == due.c.workflow_id).values(WOKEN).returning(WORKFLOW.c.id)


def _renotify_statement(within: Restriction) -> tuple[Any, Any]:
    # A workflow with a time is woken at that time.
    endless = WORKFLOW.c.status == status_literal(WorkflowStatus.SUSPENDED), WORKFLOW.c.wake_at.is_(None)
    some = materialized(
        sa.select(WORKFLOW.c.id.label("workflow_id"), WORKFLOW.c.awaits, WORKFLOW.c.parent_id, WORKFLOW.c.started_at)
        .where(*endless, within(WORKFLOW.c.id), WORKFLOW.c.id > parameter("after", sa.UUID()))
        .order_by(WORKFLOW.c.wake_at, WORKFLOW.c.id)
        .limit(LIMIT),
        "some",
    )
    due = sa.select(some.c.workflow_id, text_literal(CHILD), sa.true()).where(
        some.c.awaits.is_not(None), is_satisfied(some)
    )
    last = sa.select(some.c.workflow_id).order_by(some.c.workflow_id.desc()).limit(ONE)
    noted = insert_notices(sa.union_all(due, _ended_parents(some))).cte("noted")
    return last.add_cte(noted), sa.select(some.c.workflow_id)


def _ended_parents(some: sa.CTE) -> Any:
    """Select the notices to parents that have ended, of those of the suspended workflows that are deferred."""
    deferred = some.c.awaits.is_(None), some.c.started_at.is_(None), some.c.parent_id.is_not(None)
    parents = materialized(sa.select(some.c.parent_id).where(*deferred).distinct(), "parents")
    # LIMIT: found by the primary key, whatever the planner believes of their number.
    ended = (
        sa.select(WORKFLOW.c.id)
        .where(WORKFLOW.c.id == parents.c.parent_id, WORKFLOW.c.finished_at.is_not(None))
        .limit(ONE)
        .lateral("ended")
    )
    return sa.select(ended.c.id, text_literal(ORPHANS), sa.true()).select_from(parents.join(ended, sa.true()))


def _sent_with_key_statement() -> Any:
    key = parameter("signal_key", Text())
    first = first_keyed(WORKFLOW.c.id, _NAME, key).lateral("first")
    return (
        sa.select(WORKFLOW.c.id)
        .join(first, sa.and_(first.c.name == _NAME, first.c.key == key))
        .where(is_among(WORKFLOW.c.id))
    )


def _take_oldest_statement() -> Any:
    oldest = materialized(first_untaken(GIVEN["id"], _NAME), "oldest")
    return take_statement(oldest, lambda taken: taken.c.payload, oldest.c.name == _NAME)


def _count(rows: sa.CTE) -> Any:
    return sa.select(count_rows()).select_from(rows).scalar_subquery()


_SEND = Statement(send_statement)
_SEND_IN_SNAPSHOT = Statement(lambda: send_statement(in_snapshot=True))
_NAME = parameter("signal_name", Text())
_SENT_WITH_KEY = Statement(_sent_with_key_statement)
_TAKE = Statement(_take_oldest_statement)
_DELIVER, _DELIVER_PART, _RECEIVERS = subset_forms(Statement, _deliver_statement)
_WAKE_ONE = Statement(_wake_one_statement)
_RENOTIFY, _RENOTIFY_PART, _WAITING = subset_forms(Statement, _renotify_statement)
