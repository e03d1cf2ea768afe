"""The statements of operations that wait: they begin, and the clock is asked."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa

from sqla_durable.models.status import StepStatus
from sqla_durable.store._rows import (
    STEP,
    Checkpoint,
    Connectable,
    execute,
    insert_select,
    json_parameter,
    parameter,
    pg,
    scalar,
    status,
)
from sqla_durable.store.steps import GIVEN, checkpoint_columns, given_row, select_owned
from sqla_durable.unwinding import AttemptLost


def begin(connectable: Connectable, checkpoint: Checkpoint, *, until: datetime | None = None) -> float:
    """Record that an operation waits, once; give the seconds until its time comes, infinite without one.

    Args:
        checkpoint: of the status `waiting`; its `delay` says how long.
        until: the time itself, instead of a delay.

    Raises:
        AttemptLost: the attempt no longer owns the workflow, or the operation has an outcome.
    """
    row = execute(connectable, _BEGIN, given_row(checkpoint) | {"until": until}).one_or_none()
    if row is None:
        raise AttemptLost(checkpoint.fence.workflow_id)
    return float("inf") if row.due_in is None else float(row.due_in)


def remember(connectable: Connectable, checkpoint: Checkpoint, *, details: str) -> None:
    """Keep details, as JSON text, in the row of an operation that waits; make the row if there is none.

    Raises:
        AttemptLost: the attempt no longer owns the workflow, or the operation has an outcome.
    """
    if execute(connectable, _REMEMBER, given_row(checkpoint) | {"details": details}).first() is None:
        raise AttemptLost(checkpoint.fence.workflow_id)


def now(connectable: Connectable) -> datetime:
    """Ask for the time on the database's clock."""
    found: datetime = scalar(connectable, _NOW)
    return found


def _begin_statement() -> Any:
    until = parameter("until", sa.DateTime(timezone=True))
    columns = checkpoint_columns(GIVEN)
    columns["wake_at"] = sa.func.coalesce(until, columns["wake_at"])
    inserted = insert_select(STEP, columns, select_owned(columns))
    # What waits already goes on waiting for the same time.
    return inserted.on_conflict_do_update(
        index_elements=["workflow_id", "key"],
        set_={"position": inserted.excluded.position},
        where=STEP.c.status == status(StepStatus.WAITING),
    ).returning(sa.func.extract("epoch", STEP.c.wake_at - pg.statement_timestamp()).label("due_in"))


def _remember_statement() -> Any:
    columns = checkpoint_columns(GIVEN)
    columns["details"] = json_parameter("details")
    inserted = insert_select(STEP, columns, select_owned(columns))
    return inserted.on_conflict_do_update(
        index_elements=["workflow_id", "key"],
        set_={"details": inserted.excluded.details},
        where=STEP.c.status == status(StepStatus.WAITING),
    ).returning(STEP.c.key)


_BEGIN = _begin_statement()
_REMEMBER = _remember_statement()
_NOW = sa.select(pg.statement_timestamp())
