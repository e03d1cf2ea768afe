"""Which workflows an operator's statement is about, and their locks.

They are given by ids or by a `select()`, which is evaluated once: without an order, or beside other transactions, a
second evaluation may give other rows. They are locked in the order of their ids until the caller commits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.orm import Session
from sqlalchemy.sql.selectable import SelectStatementGrouping

from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.errors import ArgumentError
from sqla_durable.models import Workflow
from sqla_durable.store.statements import WORKFLOW, Condition, Connectable, execute, is_among, scalars

Query: TypeAlias = "sa.Select[Any] | sa.CompoundSelect[Any]"

# Another one after each UPDATE, and the same under a lock. Source: PostgreSQL manual, System Columns.
_VERSION: sa.ColumnElement[int] = sa.literal_column("CAST(CAST(xmin AS text) AS bigint)", type_=sa.Integer()).label(
    "version"
)


@dataclass(frozen=True, slots=True)
class Selection:
    """The workflows that a verb changes.

    Attributes:
        ids: their ids.
        query: the select that gave them, if one did.
        versions: of each row that the select gave, the version that it has seen.
    """

    ids: Sequence[UUID]
    query: Query | None = None
    versions: Mapping[UUID, int] | None = None


def evaluate(session: Session, query: Query) -> Selection:
    """Evaluate a select, in one statement that takes no lock of its own.

    Raises:
        ArgumentError: it does not say which workflows are meant.
    """
    # MATERIALIZED: executed once; as a subquery, the planner may execute it again for each row.
    meant = _ids_in(query).cte().prefix_with("MATERIALIZED")
    seen = sa.select(WORKFLOW.c.id, _VERSION).where(WORKFLOW.c.id.in_(sa.select(*meant.c)))
    versions = {row.id: row.version for row in execute(session, seen)}
    return Selection(list(versions), query, versions)


def lock_selected(session: Session, wanted: Selection, meant: Callable[[Condition], Condition]) -> list[UUID]:
    """Lock the workflows that are meant, in the order of their ids, then check again; return those still meant.

    Waits for the locks of their rows. What was claimed, finished or moved meanwhile may no longer be meant: in one
    statement, only the locked row would be checked again after a lock wait, and not the sub-selects.

    Args:
        meant: makes the condition of the verb from one on the wanted workflows.
    """
    locked = lock(session, meant(is_among(WORKFLOW.c.id, wanted.ids)))
    return still_meant(session, locked, meant(is_among(WORKFLOW.c.id, still_wanted(session, wanted)))) if locked else []


def lock(connectable: Connectable, meant: Condition) -> list[UUID]:
    """Lock the workflows that are meant, in the order of their ids; return the ids."""
    locked = sa.select(WORKFLOW.c.id).where(meant).order_by(WORKFLOW.c.id).with_for_update(key_share=True, of=WORKFLOW)
    return list(scalars(connectable, locked))


def still_meant(connectable: Connectable, locked: Sequence[UUID], meant: Condition) -> list[UUID]:
    """Return those of the locked workflows that are still meant, in the order of their ids."""
    found = sa.select(WORKFLOW.c.id).where(is_among(WORKFLOW.c.id, locked), meant).order_by(WORKFLOW.c.id)
    return list(scalars(connectable, found))


def still_wanted(connectable: Connectable, wanted: Selection) -> Sequence[UUID]:
    """Return the ids without those of rows that were changed since the select gave them, and no longer fit it.

    Only a row that was changed is compared with the select again, without its LIMIT and OFFSET: of others it could
    give another choice.
    """
    if wanted.query is None or not wanted.versions:
        return wanted.ids
    versions = wanted.versions
    today = execute(connectable, sa.select(WORKFLOW.c.id, _VERSION).where(is_among(WORKFLOW.c.id, wanted.ids)))
    changed = {row.id for row in today if row.version != versions[row.id]}
    if not changed:
        return wanted.ids
    again = _ids_in(wanted.query.limit(None).offset(None))
    found = sa.select(WORKFLOW.c.id).where(is_among(WORKFLOW.c.id, [*changed]), WORKFLOW.c.id.in_(again))
    fitting = set(scalars(connectable, found))
    return [each for each in wanted.ids if each not in changed or each in fitting]


def ids_to_refresh(wanted: Selection, changed: Iterable[UUID]) -> set[UUID]:
    """Return the ids of the records to refresh: those given by id, and those that were changed."""
    return {*changed, *(wanted.ids if wanted.query is None else ())}


def _ids_in(query: Query) -> sa.Select[tuple[UUID]]:
    """Select the ids of a caller's select: as a subquery, it may join, order, limit and alias anything."""
    match _described(query):
        case [{"type": kind}] if kind is Workflow:
            return sa.select(query.subquery().c.id)
        case [{"type": sa.Uuid()}]:
            return sa.select(*query.subquery().c)
        case described:
            given = ", ".join(str(each["name"]) for each in described)
            raise ArgumentError(
                f"a select of {given} does not say which workflows are meant: select Workflow, or one column of their "
                "ids, such as Workflow.id."
            )


def _described(query: sa.SelectBase) -> list[Any]:
    """Describe the columns; those of a union are named and typed by its first select."""
    match query:
        case sa.CompoundSelect():
            return _described(query.selects[0])
        case SelectStatementGrouping():
            return _described(query.element)
        case sa.Select():
            return list(query.column_descriptions)
        case _:
            return []
