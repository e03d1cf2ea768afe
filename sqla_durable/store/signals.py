"""The statements on signals: send, take, deliver.

Who sends inserts a row and locks nothing of the receiver that its worker would wait for. Who waits has said so in its
row when it was parked, and has asked to be looked at by a row of the engine's own, `#parked`; a child that ends leaves
`#child` to its parent. Each new row is delivered once: the receiver's row is locked, and if it waits for what is there
now, it is woken. So a signal and a parking may cross in any way: whichever is committed later finds the other.

A parent waits until no more than some of its children are unfinished. Only an end lowers that number, and each one
leaves a notice in its own transaction; a child that was deleted had ended before. So a parent whose children are as it
waits for is woken, or has a notice that is not delivered. An application's own SQL on a child leaves none: that is
found by `renotify`, now and then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Session

from sqla_durable.models.column_types import Text
from sqla_durable.models.status import WorkflowStatus
from sqla_durable.store._rows import (
    BEGINNING,
    IS_WANTED,
    LIMIT,
    ONE,
    SIGNAL,
    STEP,
    WORKFLOW,
    ZERO,
    Checkpoint,
    Condition,
    Connectable,
    Expression,
    among,
    beginning,
    count_rows,
    execute,
    has_status,
    insert_select,
    json_parameter,
    materialized,
    parameter,
    pg,
    scalar,
    scalars,
    status,
    words,
)
from sqla_durable.store.keys import require_the_latest, sees_the_latest
from sqla_durable.store.parts import WHOLE, Part, Within, divided
from sqla_durable.store.steps import (
    GIVEN,
    checkpoint_columns,
    given_row,
    has_outcome,
    insert_from,
    outcome_columns,
    outcome_in,
    own_row,
)

PARKED, CHILD, LEFT = "#parked", "#child", "#left"
"""Names of rows that the engine sends to itself; the last one is for `held`."""

CALLBACK = "#callback:"
"""What the names of signals that are outcomes of callbacks begin with."""

UPDATE, ANSWER = "#update:", "#reply:"
"""What the names of signals that are updates begin with, and the keys of events that are answers."""

REFUSED, EARLIER = "#refused", "#earlier"
"""Stands for the step that has consumed it, where none ever will."""

END_COLUMNS = (WORKFLOW.c.id, WORKFLOW.c.parent_id, WORKFLOW.c.finished_at, WORKFLOW.c.awaits)
"""What a statement that ends or suspends workflows returns, for `end_notices`."""

_WOKEN: dict[str, Any] = {
    "status": WorkflowStatus.PENDING,
    "enqueued_at": pg.statement_timestamp(),
    "wake_at": sa.null(),
    "awaits": sa.null(),
}
"""What becomes of a suspended workflow that goes on."""


@dataclass(frozen=True, slots=True)
class WaitedFor:
    """What a suspended workflow waits for, and the names of the senders' signals that nobody has taken."""

    signals: Sequence[str]
    waits_for_children: bool
    wake_at: datetime | None
    untaken: Sequence[str]


def waited_for(session: Session, workflow_id: UUID) -> WaitedFor | None:
    """Return what a workflow waits for; None if it is not suspended. Takes no lock."""
    row = execute(session, _WAITING_FOR, {"wanted_id": workflow_id}).one_or_none()
    if row is None:
        return None
    awaits: list[dict[str, Any]] = row.awaits or []
    names = [each["signal"] for each in awaits if "signal" in each]
    return WaitedFor(names, any("children" in each for each in awaits), row.wake_at, row.untaken or [])


def standings(session: Session, workflow_ids: Sequence[UUID]) -> Mapping[UUID, WorkflowStatus]:
    """Give the statuses of those of the workflows that there are."""
    rows = execute(session, _STANDINGS, {"ids": list(workflow_ids)})
    return {row.id: row.status for row in rows}


def known(session: Session, workflow_ids: Sequence[UUID], *, name: str, key: str) -> set[UUID]:
    """Return those of the workflows to which a signal of this name and key was sent, taken or not. Takes no lock."""
    return set(scalars(session, _KNOWN, {"ids": list(workflow_ids), "signal_name": name, "signal_key": key}))


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
    """Do the same to one workflow where the transaction keeps a snapshot, in a savepoint.

    Raises:
        DBAPIError: one of the key is newer than the snapshot: roll back to the savepoint.
    """
    parameters = {"ids": [workflow_id], "signal_name": name, "payload": payload, "signal_key": key}
    execute(session, _SEND_IN_SNAPSHOT, parameters)


def take(connectable: Connectable, checkpoint: Checkpoint, *, name: str) -> str | None:
    """Take the oldest signal of a name and record it as the outcome of the step, or give None; JSON text.

    Raises:
        AttemptLost: the attempt no longer owns the workflow.
    """
    return take_by(connectable, _TAKE, checkpoint, {"signal_name": name})


def take_by(connectable: Connectable, statement: Any, checkpoint: Checkpoint, wanted: Mapping[str, Any]) -> str | None:
    """Execute a statement of `taking`; give what is recorded, or None if there is nothing to take; JSON text.

    Raises:
        AttemptLost: the attempt no longer owns the workflow.
    """
    return outcome_in(execute(connectable, statement, {**given_row(checkpoint), **wanted}).one(), checkpoint.fence)


def deliver(connectable: Connectable, *, limit: int, since: str = BEGINNING, part: Part = WHOLE) -> tuple[int, int]:
    """Look at the receivers of new signals, and wake those that wait for what is there; give how many of both.

    Receivers whose rows somebody holds are passed over, and so is what was sent before `since`.
    """
    parameters = {"limit": limit, "since": since, **part.parameters}
    row = execute(connectable, part.choose(_DELIVER, _DELIVER_PART), parameters).one()
    return int(row.delivered), int(row.woken)


def wake_one(session: Session, workflow_id: UUID) -> None:
    """Put a suspended workflow into its queue if its time has come, or if what it waits for is there.

    Waits for whoever holds its row.
    """
    execute(session, _WAKE_ONE, {"wanted_id": workflow_id})


def receivers(connectable: Connectable, *, limit: int, since: str = BEGINNING, part: Part = WHOLE) -> list[UUID]:
    """Return the ids of the receivers that this would look at."""
    return part.found(connectable, _RECEIVERS, {"limit": limit, "since": since})


def renotify(connectable: Connectable, *, after: UUID, limit: int, part: Part = WHOLE) -> UUID | None:
    """Leave notices to those that wait for what is there already, among the next `limit` in the order of their ids.

    For children that an application's own SQL has deleted or ended, which leaves no notice. Takes no lock. The notices
    are delivered as any others are.

    Returns:
        The last id that was looked at, or None if there are no more.
    """
    parameters = {"after": after, "limit": limit, **part.parameters}
    found: UUID | None = scalar(connectable, part.choose(_RENOTIFY, _RENOTIFY_PART), parameters)
    return found


def waiting(connectable: Connectable, *, after: UUID, limit: int, part: Part = WHOLE) -> list[UUID]:
    """Return the ids of those that this would look at."""
    return part.found(connectable, _WAITING, {"after": after, "limit": limit})


def asking(ended: sa.CTE) -> Any:
    """Insert what those that were suspended ask for, and what children that have ended leave to their parents.

    To a parent that is finished too: it may be retried in a transaction that this statement does not see. Of several
    children of one parent, one notice. And where there is a column `holds`, what those that have ended leave of the
    children that they hold.
    """
    finished = ended.c.finished_at.is_not(None)
    source: Any = (
        sa.select(
            sa.case((finished, ended.c.parent_id), else_=ended.c.id),
            sa.case((finished, CHILD), else_=PARKED),
            sa.true(),
        )
        .where(sa.or_(ended.c.awaits.is_not(None), sa.and_(finished, ended.c.parent_id.is_not(None))))
        .distinct()
    )
    if "holds" in ended.c:
        source = sa.union_all(source, sa.select(ended.c.id, words(LEFT), sa.true()).where(finished, ended.c.holds))
    return noting(source)


def end_notices(ended: sa.CTE, *conditions: Condition) -> tuple[sa.CTE, sa.CTE]:
    """Return what belongs to each end: the notices that it leaves, and that it needs none any more.

    Args:
        ended: returns the `END_COLUMNS` of workflows that have ended or were suspended.
        conditions: on the workflows whose own notices are deleted.
    """
    return asking(ended).cte("asked"), deleting_notices(ended, *conditions).cte("cleared")


def noting(source: Any) -> Any:
    """Insert notices of the engine's own: of each the workflow, the name, and true."""
    columns = ["workflow_id", "name", "is_notice"]
    return insert_select(SIGNAL, columns, source).returning(SIGNAL.c.id)


def deleting_notices(ended: sa.FromClause, *conditions: Condition) -> Any:
    """Make the statement that deletes the notices to workflows that have ended, which nothing wakes any more."""
    # None of them is ever taken: the index of what is not taken leads past all that the workflow has taken.
    theirs = sa.and_(SIGNAL.c.workflow_id == ended.c.id, SIGNAL.c.consumed_by.is_(None), _engine_s_own())
    return sa.delete(SIGNAL).where(theirs, ended.c.finished_at.is_not(None), *conditions).returning(SIGNAL.c.id)


def is_new(begin: str = "since") -> Condition:
    """Return the condition for a signal that is not delivered, among those sent since the parameter named `begin`."""
    return sa.and_(SIGNAL.c.delivered_at.is_(None), SIGNAL.c.created_at >= beginning(begin))


def _engine_s_own() -> Condition:
    return SIGNAL.c.name.in_([words(PARKED), words(CHILD)])


def sending(*, in_snapshot: bool = False, is_update: bool = False) -> Any:
    """Make a statement that inserts a signal for each of some workflows, unless its key is known; returns their ids.

    Where the transaction keeps a snapshot, one with a key is inserted by the statement made for that only.
    """
    key = parameter("signal_key", Text())
    source = sa.select(
        pg.unnest(parameter("ids", ARRAY(sa.UUID()))),
        parameter("signal_name", Text()),
        key,
        json_parameter("payload"),
    )
    source = source if in_snapshot else source.where(sa.or_(key.is_(None), sees_the_latest()))
    columns = ["workflow_id", "name", "key", "payload"]
    if is_update:
        source, columns = source.add_columns(sa.true()), [*columns, "is_update"]
    return (
        insert_select(SIGNAL, columns, source)
        .on_conflict_do_nothing(index_elements=["workflow_id", "name", "key"], index_where=SIGNAL.c.key.is_not(None))
        .returning(SIGNAL.c.id)
    )


def first_untaken(workflow_id: Expression, name: Expression, *columns: Expression) -> Any:
    """Select the first signal, from a name on, that nobody has taken: whoever reads it compares its name.

    In the order of the index of what is untaken, which is the only one that gives it. Were the name compared here, the
    primary key would have the same order, and all that was ever taken would be read; so does a plan without an order,
    while the table is small or has no statistics.
    """
    return (
        sa.select(SIGNAL.c.workflow_id, SIGNAL.c.name, SIGNAL.c.id, *columns)
        .where(SIGNAL.c.workflow_id == workflow_id, SIGNAL.c.name >= name, SIGNAL.c.consumed_by.is_(None))
        .order_by(SIGNAL.c.name, SIGNAL.c.id)
        .limit(ONE)
    )


def first_keyed(
    workflow_id: Expression,
    name: Expression,
    key: Expression,
    *columns: Expression,
) -> Any:
    """Select the first signal that has a key, from a name and key on: whoever reads it compares both.

    In the order of the index of keys, for the same reason.
    """
    return (
        sa.select(SIGNAL.c.id, SIGNAL.c.name, SIGNAL.c.key, *columns)
        .where(SIGNAL.c.workflow_id == workflow_id, SIGNAL.c.key.is_not(None))
        .where(sa.tuple_(SIGNAL.c.name, SIGNAL.c.key) >= sa.tuple_(name, key))
        .order_by(SIGNAL.c.name, SIGNAL.c.key)
        .limit(ONE)
    )


def is_untaken() -> Condition:
    """Return whether nobody has taken a signal that is found by its id.

    In words that match no index's condition: the primary key leads to one row, the index of what is untaken to many.
    """
    return pg.num_nonnulls(SIGNAL.c.consumed_by) == ZERO


def taking(wanted: sa.FromClause, output: Callable[[sa.CTE], Expression], *conditions: Condition) -> Any:
    """Make a statement that takes the signal that is wanted, and records it as the outcome of a step.

    Args:
        wanted: its `id`, of the workflow of `GIVEN`.
        output: gives the outcome, of the `id` and the `payload` of what is taken.
        conditions: on what is wanted.
    """
    owned = own_row()
    found = materialized(
        sa.select(owned.c.id.label("workflow_id"), wanted.c.id)
        .select_from(owned.join(wanted, sa.true()))
        .where(*conditions),
        "found",
    )
    taken = (
        sa.update(SIGNAL)
        .where(SIGNAL.c.workflow_id == found.c.workflow_id, SIGNAL.c.id == found.c.id)
        # Looked at in the row as it is now: another branch may have taken it since this statement began.
        .where(is_untaken(), ~has_outcome())
        .values(
            consumed_by=GIVEN["key"],
            delivered_at=sa.func.coalesce(SIGNAL.c.delivered_at, pg.statement_timestamp()),
        )
        .returning(SIGNAL.c.id, SIGNAL.c.payload)
        .cte("taken")
    )
    columns = checkpoint_columns(GIVEN) | {"output": output(taken)}
    recorded = insert_from(columns, sa.select(*columns.values())).returning(STEP.c.output).cte("recorded")
    return sa.select(*outcome_columns(owned, recorded))


def _satisfied(new: sa.CTE) -> Condition:
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


def _deliver_statement(within: Within) -> tuple[Any, Any]:
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
        .where(is_new(), SIGNAL.c.name != words(LEFT), within(SIGNAL.c.workflow_id))
        .order_by(SIGNAL.c.created_at)
        .limit(LIMIT),
        "new",
    )
    same = sa.and_(SIGNAL.c.workflow_id == new.c.workflow_id, SIGNAL.c.id == new.c.id)
    gone = sa.delete(SIGNAL).where(same, _engine_s_own()).returning(SIGNAL.c.id).cte("gone")
    seen = (
        sa.update(SIGNAL)
        .where(same, ~_engine_s_own())
        .values(delivered_at=pg.statement_timestamp())
        .returning(SIGNAL.c.id)
        .cte("seen")
    )
    waiting = sa.and_(new.c.status == status(WorkflowStatus.SUSPENDED), new.c.awaits.is_not(None))
    # By id: to compare what they await would cost more than to look for it.
    first = sa.select(pg.min(new.c.id)).where(waiting).group_by(new.c.workflow_id)
    receivers = materialized(sa.select(new.c.workflow_id, new.c.awaits).where(new.c.id.in_(first)), "receivers")
    due = materialized(sa.select(receivers.c.workflow_id).where(_satisfied(receivers)), "due")
    woken = (
        sa.update(WORKFLOW)
        # Looked at again in the row that is locked, whatever the statement has seen of it before.
        .where(WORKFLOW.c.id == due.c.workflow_id, has_status(WORKFLOW, WorkflowStatus.SUSPENDED))
        .values(_WOKEN)
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
    is_there = sa.and_(waiting.c.awaits.is_not(None), _satisfied(waiting))
    due = materialized(
        sa.select(waiting.c.workflow_id).where(sa.or_(waiting.c.wake_at <= pg.statement_timestamp(), is_there)), "due"
    )
    return sa.update(WORKFLOW).where(WORKFLOW.c.id == due.c.workflow_id).values(_WOKEN).returning(WORKFLOW.c.id)


def _renotify_statement(within: Within) -> tuple[Any, Any]:
    # What has a time looks for itself when that has come.
    endless = WORKFLOW.c.status == status(WorkflowStatus.SUSPENDED), WORKFLOW.c.wake_at.is_(None)
    some = materialized(
        sa.select(WORKFLOW.c.id.label("workflow_id"), WORKFLOW.c.awaits)
        .where(*endless, within(WORKFLOW.c.id), WORKFLOW.c.id > parameter("after", sa.UUID()))
        .order_by(WORKFLOW.c.wake_at, WORKFLOW.c.id)
        .limit(LIMIT),
        "some",
    )
    due = sa.select(some.c.workflow_id, words(CHILD), sa.true()).where(some.c.awaits.is_not(None), _satisfied(some))
    last = sa.select(some.c.workflow_id).order_by(some.c.workflow_id.desc()).limit(ONE)
    return last.add_cte(noting(due).cte("noted")), sa.select(some.c.workflow_id)


def _known_statement() -> Any:
    key = parameter("signal_key", Text())
    first = first_keyed(WORKFLOW.c.id, _NAME, key).lateral("first")
    return (
        sa.select(WORKFLOW.c.id)
        .join(first, sa.and_(first.c.name == _NAME, first.c.key == key))
        .where(among(WORKFLOW.c.id))
    )


def _count(rows: sa.CTE) -> Any:
    return sa.select(count_rows()).select_from(rows).scalar_subquery()


_WAITING_FOR = sa.select(
    WORKFLOW.c.wake_at,
    WORKFLOW.c.awaits,
    sa.select(pg.array_agg(SIGNAL.c.name.distinct()))
    .where(SIGNAL.c.workflow_id == WORKFLOW.c.id, SIGNAL.c.consumed_by.is_(None), ~SIGNAL.c.name.startswith(words("#")))
    .scalar_subquery()
    .label("untaken"),
).where(IS_WANTED, WORKFLOW.c.status == status(WorkflowStatus.SUSPENDED))
_STANDINGS = sa.select(WORKFLOW.c.id, WORKFLOW.c.status).where(among(WORKFLOW.c.id))
_SEND = sending()
_SEND_IN_SNAPSHOT = sending(in_snapshot=True)
_NAME = parameter("signal_name", Text())
_KNOWN = _known_statement()
_OLDEST = materialized(first_untaken(GIVEN["id"], _NAME), "oldest")
_TAKE = taking(_OLDEST, lambda taken: taken.c.payload, _OLDEST.c.name == _NAME)
_DELIVER, _DELIVER_PART, _RECEIVERS = divided(_deliver_statement)
_WAKE_ONE = _wake_one_statement()
_RENOTIFY, _RENOTIFY_PART, _WAITING = divided(_renotify_statement)
