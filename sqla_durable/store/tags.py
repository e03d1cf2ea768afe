"""The statements on tags: merge some into those of a workflow that is running.

The attempt that sets them owns the workflow, whose row is locked in the same statement.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

from sqla_durable.store.records import Checkpoint, Fence, Origin
from sqla_durable.store.statements import (
    STEP,
    WORKFLOW,
    Connectable,
    Expression,
    Statement,
    json_parameter,
    pg,
    refresh_loaded,
    scalar,
)
from sqla_durable.store.steps import (
    GIVEN,
    checkpoint_columns,
    given_fence_parameters,
    given_parameters,
    insert_checkpoints,
    is_owned,
    lock_given,
)
from sqla_durable.unwinding import AttemptLost

_EMPTY = sa.literal_column("jsonb '{}'", type_=JSONB())


def record(connectable: Connectable, checkpoint: Checkpoint, *, tags: str) -> None:
    """Merge tags (JSON text, null removes one) and record that as a step, in one statement; once.

    Waits for the lock of the workflow's row.

    Raises:
        AttemptLost: the attempt no longer owns the workflow; nothing was written.
    """
    _write(connectable, _RECORD, checkpoint.fence, given_parameters(checkpoint) | {"tags": tags})


def merge(connectable: Connectable, origin: Origin, *, tags: str) -> None:
    """Merge tags (JSON text, null removes one). Waits for the lock of the workflow's row.

    Raises:
        AttemptLost: the attempt no longer owns the workflow; nothing was written.
    """
    parameters = given_fence_parameters(origin.fence, origin.step_key)
    _write(connectable, _MERGE, origin.fence, parameters | {"tags": tags})


def _write(connectable: Connectable, statement: Statement, fence: Fence, parameters: dict[str, Any]) -> None:
    if not scalar(connectable, statement, parameters):
        raise AttemptLost(fence.workflow_id)
    if isinstance(connectable, Session):
        refresh_loaded(connectable, [fence.workflow_id])


def _merged() -> Expression:
    """Return the tags of a workflow with the given ones; NULL if none are left."""
    before = sa.func.coalesce(WORKFLOW.c.tags, _EMPTY)
    return sa.func.nullif(pg.jsonb_strip_nulls(before.op("||")(json_parameter("tags"))), _EMPTY)


def _record_statement() -> Any:
    owned = lock_given()
    columns = checkpoint_columns(GIVEN) | {"workflow_id": owned.c.id}
    recorded = insert_checkpoints(columns, sa.select(*columns.values())).returning(STEP.c.workflow_id).cte("recorded")
    merged = sa.update(WORKFLOW).where(WORKFLOW.c.id == recorded.c.workflow_id).values(tags=_merged())
    return sa.select(sa.select(owned.c.id).exists()).add_cte(merged.returning(WORKFLOW.c.id).cte("merged"))


def _merge_statement() -> Any:
    return sa.update(WORKFLOW).where(*is_owned()).values(tags=_merged()).returning(sa.true())


_RECORD = Statement(_record_statement)
_MERGE = Statement(_merge_statement)
