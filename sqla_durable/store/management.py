"""The statements of operators: cancel, resume. They lock rows in the order of ids until the caller commits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias
from uuid import UUID

from sqlalchemy import ColumnElement, Select, Uuid, and_, case, func, literal, literal_column, null, or_, select, update
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.dialects.postgresql import UUID as PG_UUID
from sqlalchemy.orm import Session

from sqla_durable.errors import ArgumentError
from sqla_durable.models import Workflow
from sqla_durable.status import FINISHED, WorkflowStatus
from sqla_durable.store._rows import WORKFLOW, refresh_known, scalars, status
from sqla_durable.store.crashes import MAX_ATTEMPTS_TYPE
from sqla_durable.store.deadlines import TIMEOUT_TYPE, in_time

Wanted: TypeAlias = "Iterable[UUID] | Select[Any]"

_UNFINISHED = sorted(set(WorkflowStatus) - FINISHED)


def cancel(session: Session, wanted: Wanted) -> list[UUID]:
    """Cancel those of the workflows that are not finished; give their ids. Waits for whoever holds a row."""
    condition = or_(*(WORKFLOW.c.status == status(each) for each in _UNFINISHED))
    outcome = {
        "status": WorkflowStatus.CANCELLED,
        "finished_at": func.statement_timestamp(),
        "wake_at": null(),
        "awaits": null(),
    }
    return _change(session, wanted, condition, outcome)


def resume(session: Session, wanted: Wanted) -> list[UUID]:
    """Enqueue those of the workflows that were cancelled or stopped for their crashes or deadlines; give their ids.

    Their histories stand, their crashes are forgiven, and a deadline that has come is lifted. Waits for whoever
    holds a row.
    """
    stopped = and_(
        WORKFLOW.c.status == status(WorkflowStatus.FAILED),
        WORKFLOW.c.token.is_(None),  # one that failed by itself keeps its token, whatever its error is
        WORKFLOW.c.error["type"].astext.in_(literal_column(f"'{each}'") for each in (MAX_ATTEMPTS_TYPE, TIMEOUT_TYPE)),
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
        "deadline_at": case((in_time(), WORKFLOW.c.deadline_at)),
    }
    return _change(session, wanted, condition, again)


def _change(session: Session, wanted: Wanted, condition: ColumnElement[bool], values: dict[str, Any]) -> list[UUID]:
    """Lock, then look again and change: what was claimed, finished or moved meanwhile may no longer be meant.

    In one statement, a lock wait would be followed by a second look at the locked row only, and not at the sub-select.
    """
    ids = wanted if isinstance(wanted, Select) else list(wanted)
    meant = and_(_among(ids), condition)
    locked = select(WORKFLOW.c.id).where(meant).order_by(WORKFLOW.c.id).with_for_update(key_share=True, of=WORKFLOW)
    held = list(scalars(session, locked))
    statement = update(WORKFLOW).where(_among(held), meant).values(values).returning(WORKFLOW.c.id)
    changed = sorted(scalars(session, statement)) if held else []
    refresh_known(session, changed if isinstance(ids, Select) else ids)
    return changed


def _among(ids: Select[Any] | Sequence[UUID]) -> ColumnElement[bool]:
    """Compare with one array, however many they are: a statement has 65,535 parameters at most."""
    if isinstance(ids, Select):
        return WORKFLOW.c.id.in_(_ids_in(ids))
    return WORKFLOW.c.id == func.any(literal(list(ids), ARRAY(PG_UUID())))


def _ids_in(workflows: Select[Any]) -> Select[tuple[UUID]]:
    """Give the ids that a select stands for: as a subquery, it may join, order, limit and alias what it likes."""
    match workflows.column_descriptions:
        case [{"type": kind}] if kind is Workflow:
            return select(workflows.subquery().c.id)
        case [{"type": Uuid()}]:
            return select(*workflows.subquery().c)
        case described:
            given = ", ".join(str(each["name"]) for each in described)
            raise ArgumentError(
                f"a select of {given} does not say which workflows are meant: select Workflow, or one column of their "
                "ids, such as Workflow.id."
            )
