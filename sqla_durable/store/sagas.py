"""The statement of sagas: a workflow says that it may have something to undo, before it does the first of it."""

from __future__ import annotations

import sqlalchemy as sa

from sqla_durable.store._rows import COMPENSATES, WORKFLOW, Checkpoint, Connectable, scalar
from sqla_durable.store.steps import given_row, mine
from sqla_durable.unwinding import AttemptLost


def begin(connectable: Connectable, checkpoint: Checkpoint) -> None:
    """Let a cancel leave the workflow to a worker that undoes what it did.

    Raises:
        AttemptLost: the attempt no longer owns the workflow.
    """
    if scalar(connectable, _BEGIN, given_row(checkpoint)) is None:
        raise AttemptLost(checkpoint.fence.workflow_id)


_BEGIN = (
    sa.update(WORKFLOW)
    .where(*mine())
    .values(cancellation=sa.func.coalesce(WORKFLOW.c.cancellation, COMPENSATES))
    .returning(WORKFLOW.c.id)
)
