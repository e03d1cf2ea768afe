"""The inbox of a workflow, the table `signal`: how its rows are sent, found and taken, and the notices among them.

Signals, updates and outcomes of callbacks are rows of it. A notice is a row that the engine sends itself: that a
suspended workflow is to be checked, that a child has ended, or that deferred children are orphans.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY

from sqla_durable.models.base import Text, WorkflowStatus
from sqla_durable.store.keys import insert_new_keys, sees_the_latest
from sqla_durable.store.records import Checkpoint
from sqla_durable.store.statements import (
    ONE,
    SIGNAL,
    STEP,
    WORKFLOW,
    ZERO,
    Condition,
    Connectable,
    Expression,
    execute,
    has_status,
    insert_select,
    json_parameter,
    materialized,
    parameter,
    pg,
    scan_start,
    text_literal,
)
from sqla_durable.store.steps import (
    GIVEN,
    checkpoint_columns,
    given_parameters,
    insert_checkpoints,
    lock_given,
    outcome_columns,
    outcome_in,
)

SUSPENDED, CHILD, ORPHANS = "#suspended", "#child", "#orphans"
"""The names of notices: of a suspended workflow to itself, of a child that has ended, and for `deferred`."""

CALLBACK = "#callback:"
"""What the names of signals that are outcomes of callbacks begin with."""

UPDATE, ANSWER = "#update:", "#reply:"
"""What the names of signals that are updates begin with, and the keys of events that are answers."""

REFUSED, EARLIER = "#refused", "#earlier"
"""In the place of the step that consumed a row: the update was refused, or an earlier round took it."""

END_COLUMNS = (WORKFLOW.c.id, WORKFLOW.c.parent_id, WORKFLOW.c.finished_at, WORKFLOW.c.awaits)
"""What a statement that ends or suspends workflows returns, for `end_notices`."""


def take_by(connectable: Connectable, statement: Any, checkpoint: Checkpoint, wanted: Mapping[str, Any]) -> str | None:
    """Execute a statement of `take_statement`; return what is recorded as JSON text, None if there is nothing to take.

    Raises:
        AttemptLost: the attempt no longer owns the workflow.
    """
    return outcome_in(
        execute(connectable, statement, {**given_parameters(checkpoint), **wanted}).one(), checkpoint.fence
    )


def insert_end_notices(ended: sa.CTE) -> Any:
    """Insert notices: of suspended workflows to themselves, and of ended children to their parents.

    A finished parent gets one too: it may be retried in a transaction that this statement does not see. Several
    children of one parent leave one notice. Where there is a column `has_deferred`, parents that have ended leave one
    for their orphans.
    """
    finished = ended.c.finished_at.is_not(None)
    source: Any = (
        sa.select(
            sa.case((finished, ended.c.parent_id), else_=ended.c.id),
            sa.case((finished, CHILD), else_=SUSPENDED),
            sa.true(),
        )
        .where(sa.or_(ended.c.awaits.is_not(None), sa.and_(finished, ended.c.parent_id.is_not(None))))
        .distinct()
    )
    if "has_deferred" in ended.c:
        source = sa.union_all(
            source, sa.select(ended.c.id, text_literal(ORPHANS), sa.true()).where(finished, ended.c.has_deferred)
        )
    return insert_notices(source)


def end_notices(ended: sa.CTE, *conditions: Condition) -> tuple[sa.CTE, sa.CTE]:
    """Return what belongs to each end or suspension: it inserts notices, and deletes those that it no longer needs.

    Args:
        ended: returns the `END_COLUMNS` of workflows that have ended or were suspended.
        conditions: on the workflows whose own notices are deleted.
    """
    return insert_end_notices(ended).cte("asked"), delete_notices(ended, *conditions).cte("cleared")


def insert_notices(source: Any) -> Any:
    """Insert notices of the engine: each is a workflow, a name, and true."""
    columns = ["workflow_id", "name", "is_notice"]
    return insert_select(SIGNAL, columns, source).returning(SIGNAL.c.id)


def delete_notices(ended: sa.FromClause, *conditions: Condition) -> Any:
    """Delete the notices to workflows that have ended: nothing wakes these any more."""
    # None of them is ever taken: the index of what is not taken leads past all that the workflow has taken.
    theirs = sa.and_(SIGNAL.c.workflow_id == ended.c.id, SIGNAL.c.consumed_by.is_(None), is_notice())
    return sa.delete(SIGNAL).where(theirs, ended.c.finished_at.is_not(None), *conditions).returning(SIGNAL.c.id)


def is_undelivered(begin: str = "since") -> Condition:
    """Return the condition for a signal that is not delivered, among those sent since the parameter named `begin`."""
    return sa.and_(SIGNAL.c.delivered_at.is_(None), SIGNAL.c.created_at >= scan_start(begin))


def send_statement(*, in_snapshot: bool = False, is_update: bool = False) -> Any:
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
    return insert_new_keys(SIGNAL, columns, source).returning(SIGNAL.c.id)


def first_untaken(workflow_id: Expression, name: Expression, *columns: Expression) -> Any:
    """Select the first untaken signal from a name on; the caller compares its name.

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
    """Select the first signal with a key, from a name and key on; the caller compares both.

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
    """Return whether a signal that is found by its id is untaken.

    As an expression that fits no partial index: the primary key finds one row, the index of untaken signals many.
    """
    return pg.num_nonnulls(SIGNAL.c.consumed_by) == ZERO


def take_statement(wanted: sa.FromClause, output: Callable[[sa.CTE], Expression], *conditions: Condition) -> Any:
    """Make a statement that takes the signal that is wanted, and records it as the outcome of a step.

    Args:
        wanted: its `id`, of the workflow of `GIVEN`.
        output: gives the outcome, of the `id` and the `payload` of what is to be taken.
        conditions: on what is wanted.
    """
    owned = lock_given()
    # Locked, and so checked in the row as it is now: another branch may have taken it since this statement began.
    found = materialized(
        sa.select(SIGNAL.c.workflow_id, SIGNAL.c.id, SIGNAL.c.payload)
        .select_from(owned.join(wanted, sa.true()))
        .join(SIGNAL, sa.and_(SIGNAL.c.workflow_id == owned.c.id, SIGNAL.c.id == wanted.c.id))
        .where(*conditions, is_untaken())
        .with_for_update(key_share=True, of=SIGNAL),
        "found",
    )
    columns = checkpoint_columns(GIVEN) | {"workflow_id": found.c.workflow_id, "output": output(found)}
    recorded = (
        insert_checkpoints(columns, sa.select(*columns.values()))
        .returning(STEP.c.workflow_id, STEP.c.output)
        .cte("recorded")
    )
    # Only what is recorded: the step may have got another outcome, such as a cancel, while this waited for the lock.
    taken = (
        sa.update(SIGNAL)
        .where(SIGNAL.c.workflow_id == recorded.c.workflow_id, SIGNAL.c.id == found.c.id)
        .values(
            consumed_by=GIVEN["key"],
            delivered_at=sa.func.coalesce(SIGNAL.c.delivered_at, pg.statement_timestamp()),
        )
        .returning(SIGNAL.c.id)
        .cte("taken")
    )
    return sa.select(*outcome_columns(owned, recorded)).add_cte(taken)


def insert_orphan_notices(parents: sa.FromClause) -> Any:
    """Insert notices for those of a statement's workflows that have deferred children.

    Where there is a column `was_running`, whatever has it leaves one: an attempt may have started children that the
    statement does not see, because that was committed before it had the lock of the row, and after it began.
    """
    # LIMIT: probed by the index of children, whatever the planner believes of the number of parents.
    deferred = (
        sa.select(WORKFLOW.c.id)
        .where(WORKFLOW.c.parent_id == parents.c.id, is_deferred())
        .limit(ONE)
        .lateral("has_deferred")
    )
    may_have: Condition = deferred.c.id.is_not(None)
    if "was_running" in parents.c:
        may_have = sa.or_(may_have, parents.c.was_running)
    found = parents.outerjoin(deferred, sa.true())
    return insert_notices(sa.select(parents.c.id, text_literal(ORPHANS), sa.true()).select_from(found).where(may_have))


def was_running() -> sa.Label[bool]:
    """Return, for `insert_orphan_notices`, whether a workflow is running when its row is locked."""
    return has_status(WORKFLOW, WorkflowStatus.RUNNING).label("was_running")


def is_deferred(table: sa.FromClause = WORKFLOW) -> Condition:
    """Return whether a child is deferred: it waits for others to end."""
    return sa.and_(
        has_status(table, WorkflowStatus.SUSPENDED),
        table.c.wake_at.is_(None),
        table.c.awaits.is_(None),
        table.c.started_at.is_(None),
    )


def is_notice() -> Condition:
    """Return whether a row is a notice that is delivered and then deleted."""
    return SIGNAL.c.name.in_([text_literal(SUSPENDED), text_literal(CHILD)])
