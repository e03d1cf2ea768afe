"""Which workflows a statement of an operator is about: by ids or by a `select()`, locked in the order of their ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias
from uuid import UUID

from sqlalchemy import ColumnElement, Select, Uuid, and_, func, literal, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.dialects.postgresql import UUID as PG_UUID
from sqlalchemy.orm import Session

from sqla_durable.errors import ArgumentError
from sqla_durable.models import Workflow
from sqla_durable.status import WorkflowStatus
from sqla_durable.store._rows import WORKFLOW, scalars, status

Wanted: TypeAlias = "Sequence[UUID] | Select[Any]"


def hold(session: Session, meant: ColumnElement[bool]) -> list[UUID]:
    """Lock the workflows that are meant, in the order of their ids, then look again; give those that are still meant.

    Waits for whoever holds a row. What was claimed, finished or moved meanwhile may no longer be meant: in one
    statement, a lock wait would be followed by a second look at the locked row only, and not at the sub-selects.
    """
    held = lock(session, meant)
    return look_again(session, held, meant) if held else []


def lock(session: Session, meant: ColumnElement[bool]) -> list[UUID]:
    """Lock the workflows that are meant, in the order of their ids; give the ids."""
    locked = select(WORKFLOW.c.id).where(meant).order_by(WORKFLOW.c.id).with_for_update(key_share=True, of=WORKFLOW)
    return list(scalars(session, locked))


def look_again(session: Session, held: Sequence[UUID], meant: ColumnElement[bool]) -> list[UUID]:
    """Give those of the locked workflows that are meant as they are now, in the order of their ids."""
    return list(scalars(session, select(WORKFLOW.c.id).where(among(held), meant).order_by(WORKFLOW.c.id)))


def workers_of(session: Session, held: Sequence[UUID]) -> set[UUID]:
    """Give the workers that are executing these workflows, whose rows are locked."""
    running = and_(among(held), WORKFLOW.c.status == status(WorkflowStatus.RUNNING))
    return set(scalars(session, select(WORKFLOW.c.worker_id).where(running).distinct())) if held else set()


def among(wanted: Wanted) -> ColumnElement[bool]:
    """Compare with one array, however many they are: a statement has 65,535 parameters at most."""
    if isinstance(wanted, Select):
        return WORKFLOW.c.id.in_(_ids_in(wanted))
    return WORKFLOW.c.id == func.any(literal(list(wanted), ARRAY(PG_UUID())))


def known(wanted: Wanted, changed: Iterable[UUID]) -> set[UUID]:
    """Give the ids of the records that the caller will look at: those given by id, and those that were changed."""
    return {*changed, *(() if isinstance(wanted, Select) else wanted)}


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
