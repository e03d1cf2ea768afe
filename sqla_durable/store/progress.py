"""The statement with which a step that is being executed reports that it lives, and how far it is."""

from __future__ import annotations

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
    status,
    unfinished,
)
from sqla_durable.store.steps import GIVEN, checkpoint_columns, given_row, own_row
from sqla_durable.unwinding import AttemptLost


def report(connectable: Connectable, checkpoint: Checkpoint, *, details: str | None) -> None:
    """Note in a running step's row that it lives, and its details if there are some; make the row if there is none.

    Does nothing to a step that has an outcome, nor to one whose try has been recorded as failed. Waits for whoever
    holds the workflow's row.

    Args:
        checkpoint: of the status `running`.
        details: JSON text; None leaves those that are there.

    Raises:
        AttemptLost: the attempt no longer owns the workflow; nothing was written.
    """
    if not execute(connectable, _REPORT, given_row(checkpoint) | {"details": details}).scalar_one():
        raise AttemptLost(checkpoint.fence.workflow_id)


def _report_statement() -> Any:
    owned = own_row()
    details = json_parameter("details")
    columns = checkpoint_columns(GIVEN) | {"workflow_id": owned.c.id, "details": details}
    inserted = insert_select(STEP, columns, sa.select(*columns.values()))
    given = inserted.excluded
    same_or_later = sa.or_(STEP.c.status == status(StepStatus.RUNNING), STEP.c.attempts < given.attempts)
    reported = inserted.on_conflict_do_update(
        index_elements=["workflow_id", "key"],
        set_={
            "status": given.status,
            "attempt": given.attempt,
            "attempts": given.attempts,
            "wake_at": sa.null(),
            # The first try may have been on another server, whose clock was ahead.
            "finished_at": sa.func.greatest(given.finished_at, STEP.c.started_at),
            "details": sa.func.coalesce(given.details, STEP.c.details),
        },
        where=sa.and_(unfinished(), same_or_later),
    ).returning(STEP.c.key)
    return sa.select(sa.select(owned.c.id).exists()).add_cte(reported.cte("reported"))


_REPORT = _report_statement()
