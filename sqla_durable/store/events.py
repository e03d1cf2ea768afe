"""The statements on events: set one, read the latest. The history of an event stays; the greatest id is the latest.

The attempt that sets one owns the workflow, whose row is locked in the same statement: so ids follow the order of
commits.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.models.base import Text, WorkflowStatus
from sqla_durable.store.records import Checkpoint, Origin
from sqla_durable.store.statements import (
    EVENT,
    IS_WANTED,
    ONE,
    STEP,
    WANTED_ID,
    WORKFLOW,
    Connectable,
    Statement,
    execute,
    insert_select,
    json_parameter,
    materialized,
    parameter,
    pg,
    scalar,
)
from sqla_durable.store.steps import (
    GIVEN,
    checkpoint_columns,
    given_fence_parameters,
    given_parameters,
    insert_checkpoints,
    lock_given,
    outcome_columns,
    outcome_in,
    select_from_owned,
)
from sqla_durable.store.workflows import not_found
from sqla_durable.unwinding import AttemptLost


@dataclass(frozen=True, slots=True)
class Latest:
    """The latest value of an event as JSON text, None if it has none, and the status of its workflow."""

    value: str | None
    status: WorkflowStatus


def record(connectable: Connectable, checkpoint: Checkpoint, *, key: str, value: str) -> None:
    """Set an event and record that as a step, in one statement; once, however often it is executed.

    Waits for the lock of the workflow's row.

    Raises:
        AttemptLost: the attempt no longer owns the workflow; nothing was written.
    """
    parameters = given_parameters(checkpoint) | {"event_key": key, "event_value": value}
    if not scalar(connectable, _RECORD, parameters):
        raise AttemptLost(checkpoint.fence.workflow_id)


def put(connectable: Connectable, origin: Origin, *, key: str, value: str) -> None:
    """Set an event; each time it is executed. Waits for the lock of the workflow's row.

    Raises:
        AttemptLost: the attempt no longer owns the workflow; nothing was written.
    """
    parameters = given_fence_parameters(origin.fence, origin.step_key)
    if scalar(connectable, _PUT, parameters | {"event_key": key, "event_value": value}) is None:
        raise AttemptLost(origin.fence.workflow_id)


def latest(session: Session, workflow_id: UUID, key: str) -> Latest:
    """Read the latest value of an event and the workflow's status, in one snapshot. Takes no lock.

    Raises:
        NotFoundError: there is no such workflow.
    """
    row = execute(session, _LATEST, {"wanted_id": workflow_id, "event_key": key}).one_or_none()
    if row is None:
        raise not_found(session, workflow_id)
    return Latest(row.value, row.status)


def take(connectable: Connectable, checkpoint: Checkpoint, *, workflow_id: UUID, key: str) -> Latest | None:
    """Record the latest value of another workflow's event as a step's outcome, if there is one; in one statement.

    None: there is no such workflow. Without a value nothing is recorded. Locks the row of the attempt's own workflow,
    and nothing of the other's.

    Raises:
        AttemptLost: the attempt no longer owns its workflow.
    """
    parameters = given_parameters(checkpoint) | {"wanted_id": workflow_id, "event_key": key}
    row = execute(connectable, _TAKE, parameters).one()
    found = outcome_in(row, checkpoint.fence)
    return None if row.status is None else Latest(found, row.status)


def _columns() -> dict[str, Any]:
    return {
        "key": parameter("event_key", Text()),
        "value": json_parameter("event_value"),
        "step_key": GIVEN["key"],
        "created_at": pg.statement_timestamp(),
    }


def _record_statement() -> Any:
    owned = lock_given()
    checkpoint = checkpoint_columns(GIVEN) | {"workflow_id": owned.c.id}
    recorded = (
        insert_checkpoints(checkpoint, sa.select(*checkpoint.values())).returning(STEP.c.workflow_id).cte("recorded")
    )
    columns = {"workflow_id": recorded.c.workflow_id, **_columns()}
    event = insert_select(EVENT, columns, sa.select(*columns.values()))
    return sa.select(sa.select(owned.c.id).exists()).add_cte(event.returning(EVENT.c.id).cte("event"))


def _put_statement() -> Any:
    columns = {"workflow_id": WORKFLOW.c.id, **_columns()}
    return insert_select(EVENT, columns, select_from_owned(columns)).returning(EVENT.c.id)


def _newest() -> Any:
    """Select the latest value of the event, as the primary key orders them."""
    return (
        sa.select(EVENT.c.value)
        .where(
            EVENT.c.workflow_id == WANTED_ID,
            EVENT.c.key == parameter("event_key", Text()),
        )
        .order_by(EVENT.c.id.desc())
        .limit(ONE)
    )


def _take_statement() -> Any:
    owned, newest = lock_given(), materialized(_newest(), "newest")
    columns = checkpoint_columns(GIVEN) | {"workflow_id": owned.c.id, "output": newest.c.value}
    recorded = insert_checkpoints(columns, sa.select(*columns.values()).select_from(owned.join(newest, sa.true())))
    taken = recorded.returning(STEP.c.output).cte("taken")
    standing = sa.select(WORKFLOW.c.status).where(IS_WANTED)
    return sa.select(
        *outcome_columns(owned, taken),
        standing.scalar_subquery().label("status"),
    )


_RECORD = Statement(_record_statement)
_PUT = Statement(_put_statement)
_LATEST = Statement(
    lambda: sa.select(WORKFLOW.c.status, sa.cast(_newest().scalar_subquery(), Text).label("value")).where(IS_WANTED)
)
_TAKE = Statement(_take_statement)
