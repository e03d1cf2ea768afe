"""The statements of operators: cancel, resume. They lock rows in the order of ids until the caller commits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias
from uuid import UUID

from sqlalchemy import ColumnElement, Select, and_, func, literal_column, null, or_, select, update
from sqlalchemy.orm import Session

from sqla_durable.models import Workflow
from sqla_durable.status import FINISHED, WorkflowStatus
from sqla_durable.store._rows import WORKFLOW, execute, materialized, scalars, status
from sqla_durable.store.crashes import MAX_ATTEMPTS_TYPE

Wanted: TypeAlias = "Iterable[UUID] | Select[Any]"

_UNFINISHED = sorted(set(WorkflowStatus) - FINISHED)


def cancel(session: Session, wanted: Wanted) -> list[UUID]:
    """Cancel those of the workflows that are not finished; give their ids. Waits for whoever holds a row."""
    condition = or_(*(WORKFLOW.c.status == status(each) for each in _UNFINISHED))
    outcome = {"status": WorkflowStatus.CANCELLED, "finished_at": func.statement_timestamp(), "wake_at": null()}
    return _change(session, wanted, condition, outcome)


def resume(session: Session, wanted: Wanted) -> list[UUID]:
    """Enqueue those of the workflows that were cancelled or stopped for their crashes; give their ids.

    Their histories stand, and their crashes are forgiven. Waits for whoever holds a row.
    """
    stopped = and_(
        WORKFLOW.c.status == status(WorkflowStatus.FAILED),
        WORKFLOW.c.error["type"].astext == literal_column(f"'{MAX_ATTEMPTS_TYPE}'"),
    )
    condition = or_(WORKFLOW.c.status == status(WorkflowStatus.CANCELLED), stopped)
    again = {
        "status": WorkflowStatus.PENDING,
        "attempt": WORKFLOW.c.attempt + 1,
        "crashes": 0,
        "token": null(),
        "worker_id": null(),
        "error": null(),
        "enqueued_at": func.statement_timestamp(),
        "finished_at": null(),
    }
    return _change(session, wanted, condition, again)


def _change(session: Session, wanted: Wanted, condition: ColumnElement[bool], values: dict[str, Any]) -> list[UUID]:
    chosen = wanted if isinstance(wanted, Select) else list(wanted)
    locked = materialized(
        select(WORKFLOW.c.id)
        .where(WORKFLOW.c.id.in_(chosen), condition)
        .order_by(WORKFLOW.c.id)
        .with_for_update(key_share=True, of=WORKFLOW),
        "locked",
    )
    statement = update(WORKFLOW).where(WORKFLOW.c.id == locked.c.id).values(values).returning(WORKFLOW.c.id)
    changed = sorted(scalars(session, statement))
    _refresh_known(session, changed)
    return changed


def _refresh_known(session: Session, changed: list[UUID]) -> None:
    """Read anew the records that the session holds, which statements on the table have passed by."""
    known = [each for each in changed if session.identity_key(Workflow, each) in session.identity_map]
    if known:
        fresh = select(Workflow).where(Workflow.id.in_(known)).execution_options(populate_existing=True)
        execute(session, fresh).all()
