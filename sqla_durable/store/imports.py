"""The statements that insert workflows as `histories` has read them, in this database or another one.

PostgreSQL reads the JSON, so numbers and times are as exact as they were. What was unfinished becomes cancelled, and is
not executed before somebody resumes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSON, JSONB, REGCLASS, Insert
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session

from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.models.base import StepStatus, Text, WorkflowStatus
from sqla_durable.store.histories import LISTS
from sqla_durable.store.schema import schema_of
from sqla_durable.store.statements import (
    EVENT,
    SIGNAL,
    WORKFLOW,
    ZERO,
    Expression,
    Statement,
    batch_parameter,
    batch_table,
    execute,
    is_among,
    parameter,
    pg,
    scalars,
    status_literal,
    text_literal,
)

_OF_EXECUTION = {"token", "worker_id", "place", "wake_at", "awaits"}
"""Columns of a workflow that say how it is executed, where it is."""
_OF_OUTCOME = {"status", "output", "error", "finished_at", "cancellation"}
_UNFINISHED = ("pending", "running", "suspended")
_LINES = pg.json_array_elements(sa.cast(parameter("lines", Text()), JSON)).table_valued("value").alias("line")


@dataclass(frozen=True, slots=True)
class Imported:
    """What was inserted.

    Attributes:
        ids: the workflows.
        cancelled: how many of them were unfinished.
        signal_id, event_id: the greatest ids that their signals and events have.
    """

    ids: Sequence[UUID]
    cancelled: int
    signal_id: int
    event_id: int


def existing(session: Session, ids: Sequence[UUID]) -> set[UUID]:
    """Return those of the workflows that there are."""
    return set(scalars(session, _EXISTING, {"ids": list(ids)}))


def add(session: Session, lines: Sequence[str], *, moment: datetime) -> Imported:
    """Insert workflows, each the text of an object of `histories`, without their parents; see `link`.

    Args:
        lines: the texts.
        moment: when those are cancelled that were unfinished: one for a whole tree, so that it is resumed as a whole.

    Raises:
        IntegrityError: one of the ids, or a name with its key, is there already.
        DBAPIError: what a line has is no value of its column.
    """
    parameters = {"lines": f"[{','.join(lines)}]"}
    ids = list(scalars(session, _INSERT, parameters))
    for each in _ROWS:
        execute(session, each, parameters)
    cancelled = list(scalars(session, _END, parameters | {"moment": moment}))
    most = execute(session, _GREATEST, {"ids": ids}).one()
    return Imported(ids, cancelled.count(True), most.signal_id, most.event_id)


def link(session: Session, parents: Mapping[UUID, UUID]) -> Sequence[UUID]:
    """Make workflows that have no parent the children of theirs, where these are there.

    Returns:
        Those that are now among their own parents.
    """
    rows = [{"id": child.hex, "parent_id": parent.hex} for child, parent in parents.items()]
    return list(scalars(session, _IN_CYCLES, {"ids": list(scalars(session, _LINK, batch_parameter("linked", rows)))}))


def now(session: Session) -> datetime:
    """Return the time of the database's clock."""
    found: datetime = execute(session, _NOW).scalar_one()
    return found


def reserve_ids(session: Session, imported: Imported) -> None:
    """Let new signals and events have ids that come after those that were inserted. Needs the owner's rights."""
    schema = schema_of(session).replace('"', '""')
    for table, most in ((SIGNAL, imported.signal_id), (EVENT, imported.event_id)):
        if most:
            execute(session, _RESERVE, {"table_name": f'"{schema}".{table.name}', "most": most})


class _WithIds(Insert):
    """An INSERT that writes the ids of a column GENERATED ALWAYS."""

    inherit_cache = True


@compiles(_WithIds)
def _overriding(element: _WithIds, compiler: Any, **options: Any) -> str:
    made: str = compiler.visit_insert(element, **options)
    return made.replace(") SELECT ", ") OVERRIDING SYSTEM VALUE SELECT ", 1)


def _row(member: str, columns: Sequence[sa.Column[Any]], *, of: str = "json_to_recordset") -> Any:
    """Return the rows, or the one row, that each line has as this member."""
    shape = [sa.column(each.name, each.type) for each in columns]
    rows = getattr(pg, of)(_LINES.c.value.op("->")(text_literal(member)))
    return rows.table_valued(*shape).render_derived(name=f"{member}_row", with_types=True).lateral()


def _insert_statement() -> Any:
    columns = [each for each in WORKFLOW.c if each.name not in _OF_EXECUTION | _OF_OUTCOME | {"parent_id"}]
    rows = _row("workflow", columns, of="json_to_record")
    source = sa.select(*(rows.c[each.name] for each in columns), status_literal(WorkflowStatus.SUSPENDED))
    names = [*(each.name for each in columns), "status"]
    return (
        Insert(WORKFLOW)
        .from_select(names, source.select_from(_LINES.join(rows, sa.true())), include_defaults=False)
        .returning(WORKFLOW.c.id)
    )


def _end_statement() -> Any:
    """Write their outcomes; those without one are cancelled."""
    columns = [each for each in WORKFLOW.c if each.name in _OF_OUTCOME | {"id"}]
    rows = _row("workflow", columns, of="json_to_record")
    given = sa.select(rows).select_from(_LINES.join(rows, sa.true())).subquery("given")
    is_open = given.c.status.in_([text_literal(each) for each in _UNFINISHED])
    status = sa.case((is_open, text_literal("cancelled")), else_=given.c.status)
    values = {
        "status": sa.cast(status, WORKFLOW.c.status.type),
        "output": _json_value(given.c.output, given.c.status == text_literal("succeeded")),
        "error": sa.case((is_open, sa.null()), else_=given.c.error),
        "finished_at": sa.case((is_open, parameter("moment", sa.DateTime(timezone=True))), else_=given.c.finished_at),
        "cancellation": given.c.cancellation,
    }
    return sa.update(WORKFLOW).values(values).where(WORKFLOW.c.id == given.c.id).returning(is_open)


def _json_value(column: Expression, is_there: Expression) -> Expression:
    """Return a JSON value; where there must be one, what JSON has as null is that value and not none."""
    return sa.case((is_there, sa.func.coalesce(column, sa.cast(text_literal("null"), JSONB))), else_=sa.null())


def _given(table: sa.Table, row: Any, name: str) -> Expression:
    match table.name, name:
        case ("step", "output"):
            return _json_value(row.output, row.status == status_literal(StepStatus.SUCCEEDED))
        case ("signal", "payload") | ("event", "value"):
            return _json_value(row[name], sa.true())
        case ("stream_item", "value"):
            return _json_value(row.value, sa.not_(row.closed))
        case _:
            return row[name]  # type: ignore[no-any-return]


def _insert_into(table: sa.Table, member: str) -> Any:
    columns = [each for each in table.c if each.name != "workflow_id"]
    rows = _row(member, columns)
    workflow_id = sa.cast(_LINES.c.value.op("#>>")(sa.cast(text_literal("{workflow,id}"), _TEXTS)), sa.UUID)
    given = [_given(table, rows.c, each.name) for each in columns]
    source = sa.select(workflow_id, *given).select_from(_LINES.join(rows, sa.true()))
    kind = _WithIds if table is SIGNAL else Insert
    return kind(table).from_select(["workflow_id", *(each.name for each in columns)], source, include_defaults=False)


_TEXTS = ARRAY(Text())

_NOW = Statement(lambda: sa.select(pg.statement_timestamp()))
_EXISTING = Statement(lambda: sa.select(WORKFLOW.c.id).where(is_among(WORKFLOW.c.id)))
_INSERT = Statement(_insert_statement)
_END = Statement(_end_statement)
_ROWS = [Statement(partial(_insert_into, table, member)) for member, table in LISTS.items()]


def _greatest_statement() -> Any:
    greatest = (
        sa.select(sa.func.coalesce(pg.max(table.c.id), ZERO)).where(is_among(table.c.workflow_id)).scalar_subquery()
        for table in (SIGNAL, EVENT)
    )
    return sa.select(*(each.label(name) for each, name in zip(greatest, ("signal_id", "event_id"), strict=True)))


def _link_statement() -> Any:
    linked = batch_table("linked", {"id": sa.UUID(), "parent_id": sa.UUID()})
    parent = WORKFLOW.alias("parent")
    known = sa.select(linked.c.id, parent.c.id.label("parent_id")).join(parent, parent.c.id == linked.c.parent_id)
    found = known.subquery("known")
    changed = sa.update(WORKFLOW).values(parent_id=found.c.parent_id).where(WORKFLOW.c.id == found.c.id)
    return changed.where(WORKFLOW.c.parent_id.is_(None)).returning(WORKFLOW.c.id)


def _in_cycles_statement() -> Any:
    own = sa.select(WORKFLOW.c.id, WORKFLOW.c.parent_id.label("above_id")).where(is_among(WORKFLOW.c.id))
    above, parent = own.cte("above", recursive=True), WORKFLOW.alias("parent")
    every = above.union(sa.select(above.c.id, parent.c.parent_id).join(parent, parent.c.id == above.c.above_id))
    return sa.select(every.c.id).where(every.c.id == every.c.above_id)


def _reserve_statement() -> Any:
    name = sa.cast(pg.pg_get_serial_sequence(parameter("table_name", Text()), text_literal("id")), REGCLASS)
    last = sa.func.coalesce(pg.pg_sequence_last_value(name), ZERO)
    most = parameter("most", sa.BigInteger())
    return sa.select(pg.setval(name, most)).where(last < most)


_GREATEST = Statement(_greatest_statement)
_LINK = Statement(_link_statement)
_IN_CYCLES = Statement(_in_cycles_statement)
_RESERVE = Statement(_reserve_statement)
