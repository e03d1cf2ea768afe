"""The statements on streams: append items, read on from a number.

Numbers count from 0 in each stream of a workflow, without gaps. The attempt that appends owns the workflow, whose row
is locked. The last number was read before that lock was obtained, so it may be old; then the first item conflicts with
an existing one and nothing is written: the statement is executed again, and sees that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from enum import Enum, auto
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import Session

from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.models.base import Text
from sqla_durable.store import keys, steps
from sqla_durable.store.records import Checkpoint, Origin, Verdict
from sqla_durable.store.statements import (
    LIMIT,
    ONE,
    STEP,
    STREAM_ITEM,
    WANTED_ID,
    WORKFLOW,
    ZERO,
    Columns,
    Condition,
    Connectable,
    Expression,
    Statement,
    batch_parameter,
    batch_table,
    execute,
    fence_row,
    insert_select,
    is_open_step,
    is_same_attempt,
    lock_owned,
    materialized,
    parameter,
    pg,
)
from sqla_durable.store.steps import (
    GIVEN,
    checkpoint_columns,
    given_fence_parameters,
    given_parameters,
    insert_checkpoints,
    lock_given,
)
from sqla_durable.store.workflows import not_found
from sqla_durable.unwinding import AttemptLost

_ROUNDS = 1_000  # each fails because another step has appended
_ITEM = STREAM_ITEM.c
_NAME = parameter("stream_name", Text())


class Appended(Enum):
    """The result of an append."""

    WRITTEN = auto()
    CLOSED = auto()


@dataclass(frozen=True, slots=True)
class Append:
    """Items that one try of a step appends to a stream."""

    origin: Origin
    name: str
    values: Sequence[str | None]


@dataclass(frozen=True, slots=True)
class Item:
    """One item as it is stored; `value` is JSON text, and None in the one that closes the stream."""

    number: int
    value: str | None
    step_key: str | None
    attempt: int
    try_number: int | None
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a stream, as it was read.

    Attributes:
        items: the items from the wanted number on, as many as were wanted at most.
        ended: nothing will be appended after these items.
    """

    items: Sequence[Item]
    ended: bool


@dataclass(frozen=True, slots=True)
class _Writer:
    """The columns that identify a stream, and the step and try that write to it."""

    name: Expression
    step_key: Expression
    attempt: Expression
    try_number: Expression


def append(connectable: Connectable, origin: Origin, *, name: str, values: Sequence[str | None]) -> Appended:
    """Append items to a stream, all or none; each time it is executed. None as the only value closes the stream.

    Closing what is closed does nothing. What an earlier try of the same step has closed is open again for the next
    one. Waits for the lock of the workflow's row.

    Raises:
        AttemptLost: the attempt no longer owns the workflow; nothing was written.
    """
    parameters = given_fence_parameters(origin.fence, origin.step_key)
    parameters |= {"given_attempt": origin.attempt, "try_number": origin.try_number}
    appended = _append(connectable, _APPEND, origin.fence.workflow_id, parameters, name=name, values=values)
    return Appended.WRITTEN if _closes(values) else appended


def record(connectable: Connectable, checkpoint: Checkpoint, *, name: str, values: Sequence[str | None]) -> Appended:
    """Append items and record that as a step, in one statement; once, however often it is executed.

    Raises:
        AttemptLost: the attempt no longer owns the workflow; nothing was written.
    """
    parameters = given_parameters(checkpoint) | {"try_number": None}
    workflow_id = checkpoint.fence.workflow_id
    appended = _append(connectable, _RECORD, workflow_id, parameters, name=name, values=values)
    if appended is Appended.WRITTEN or not _closes(values):
        return appended
    if steps.record(connectable, checkpoint) is Verdict.LOST:
        raise AttemptLost(workflow_id)
    return Appended.WRITTEN


def append_many(connectable: Connectable, appends: Sequence[Append]) -> list[Appended | None]:
    """Append to streams of different workflows by one statement that waits for no lock; return the result of each.

    None: nothing was written, and `append` finds out why. The workflow's row is locked, or the attempt has lost it, or
    another step has appended since the statement began.
    """
    found = {row.place: row for row in execute(connectable, _APPEND_MANY, batch_parameter("batch", _rows_of(appends)))}
    return [_appended(found.get(place), each) for place, each in enumerate(appends)]


def read(session: Session, workflow_id: UUID, name: str, *, start: int, limit: int) -> Page:
    """Read items from a number on, and whether there will be more, in one snapshot. Takes no lock.

    Raises:
        NotFoundError: there is no such workflow.
    """
    parameters = {"wanted_id": workflow_id, "stream_name": name, "start": start, "limit": limit}
    rows = execute(session, _READ, parameters).all()
    if not rows:
        raise not_found(session, workflow_id)
    items = [
        Item(row.number, row.value, row.step_key, row.attempt, row.try_number, row.created_at)
        for row in rows
        if row.number is not None
    ]
    return Page(items, rows[0].ended)


def _closes(values: Sequence[str | None]) -> bool:
    return None in values


def _rows_of(appends: Sequence[Append]) -> list[dict[str, Any]]:
    return [
        {
            **fence_row(each.origin.fence),
            "place": place,
            "name": each.name,
            "step_key": each.origin.step_key,
            "attempt": each.origin.attempt,
            "try_number": each.origin.try_number,
            "item": item,
            "value": value,
        }
        for place, each in enumerate(appends)
        for item, value in enumerate(each.values, 1)
    ]


def _appended(row: sa.Row[Any] | None, append: Append) -> Appended | None:
    if row is None:
        return None
    if row.written or (row.closed and _closes(append.values)):
        return Appended.WRITTEN
    return Appended.CLOSED if row.closed else None


def _append(
    connectable: Connectable,
    statement: Any,
    workflow_id: UUID,
    parameters: dict[str, Any],
    *,
    name: str,
    values: Sequence[str | None],
) -> Appended:
    for _ in range(_ROUNDS):
        row = execute(connectable, statement, parameters | {"stream_name": name, "items": list(values)}).one()
        if not row.owned:
            raise AttemptLost(workflow_id)
        if row.first is not None or row.known:
            return Appended.WRITTEN
        if row.closed:
            return Appended.CLOSED
        # Another step of this workflow has appended since the statement began.
    raise keys.not_visible("stream", name=name, key="the next item")


def _append_statement(*, recorded: bool) -> Any:
    own = lock_given()
    last = materialized(_last(GIVEN["id"], _NAME), "last")
    given = materialized(_given_items(), "given")
    known: Condition = _known() if recorded else sa.false()
    first = _first(own, last, given, known)
    rest = _rest(given, first)
    statement = sa.select(
        sa.select(own.c.id).exists().label("owned"),
        sa.select(first.c.number).scalar_subquery().label("first"),
        sa.func.coalesce(sa.select(_is_closed(last, _GIVEN_WRITER)).scalar_subquery(), sa.false()).label("closed"),
        known.label("known"),
    ).add_cte(rest)
    return statement.add_cte(_checkpoint(first)) if recorded else statement


def _last(workflow_id: Expression, name: Expression) -> Any:
    """Select the last item of the stream, by the primary key."""
    return (
        sa.select(_ITEM.number, _ITEM.value, _ITEM.step_key, _ITEM.attempt, _ITEM.try_number, _ITEM.closed)
        .where(_ITEM.workflow_id == workflow_id, _ITEM.name == name)
        .order_by(_ITEM.number.desc())
        .limit(ONE)
    )


def _is_closed(last: Any, writer: _Writer) -> Condition:
    """Return whether an item closes the stream for this try: not if an earlier try of the same step has written it."""
    same_step = last.c.step_key.is_not_distinct_from(writer.step_key)
    same_try = sa.and_(last.c.attempt == writer.attempt, last.c.try_number.is_not_distinct_from(writer.try_number))
    return sa.and_(last.c.closed, sa.or_(~same_step, same_try))


def _given_items() -> Any:
    items = parameter("items", ARRAY(Text()))
    each = (
        pg.unnest(items)
        .table_valued(sa.column("value", Text()), with_ordinality="place", name="each")
        .render_derived(name="each")
    )
    return sa.select(sa.cast(each.c.value, JSONB).label("value"), sa.cast(each.c.place, sa.Integer).label("place"))


def _first(own: sa.CTE, last: sa.CTE, given: sa.CTE, known: Condition) -> sa.CTE:
    """Append the first item if nothing was appended meanwhile: then its number and those after it are free."""
    number = sa.func.coalesce(last.c.number + ONE, ZERO)
    columns = _columns(_GIVEN_WRITER, own.c.id, number, given.c.value)
    source = (
        sa.select(*columns.values())
        .select_from(own.join(given, given.c.place == ONE).outerjoin(last, sa.true()))
        .where(~sa.func.coalesce(_is_closed(last, _GIVEN_WRITER), sa.false()), ~known)
    )
    inserted = insert_select(STREAM_ITEM, columns, source)
    return inserted.on_conflict_do_nothing().returning(_ITEM.workflow_id, _ITEM.number).cte("first")


def _rest(given: sa.CTE, first: sa.CTE) -> sa.CTE:
    columns = _columns(_GIVEN_WRITER, first.c.workflow_id, first.c.number + given.c.place - ONE, given.c.value)
    source = sa.select(*columns.values()).select_from(first.join(given, given.c.place > ONE))
    inserted = insert_select(STREAM_ITEM, columns, source)
    return inserted.returning(_ITEM.number).cte("rest")


def _columns(writer: _Writer, workflow_id: Any, number: Any, value: Any) -> dict[str, Any]:
    return {
        "workflow_id": workflow_id,
        "name": writer.name,
        "number": number,
        "value": value,
        "closed": value.is_(None),
        "step_key": writer.step_key,
        "attempt": writer.attempt,
        "try_number": writer.try_number,
        "created_at": pg.statement_timestamp(),
    }


def _known() -> Any:
    """Return whether an earlier execution of this statement is committed, whose acknowledgement was lost."""
    same = sa.and_(STEP.c.workflow_id == GIVEN["id"], STEP.c.key == GIVEN["key"])
    return sa.select(STEP.c.key).where(same, ~is_open_step()).exists()


def _checkpoint(first: sa.CTE) -> Any:
    columns = checkpoint_columns(GIVEN) | {"workflow_id": first.c.workflow_id}
    return insert_checkpoints(columns, sa.select(*columns.values())).returning(STEP.c.key).cte("recorded")


def _append_many_statement() -> Any:
    """Do for each workflow of a batch what `_append_statement` does for one; locked rows are skipped."""
    batch = sa.select(*batch_table("batch", _BATCH).c).cte("batch")
    fences = sa.select(batch.c.id, batch.c.token).where(batch.c.item == ONE).subquery("fences")
    mine = lock_owned(fences, skip_locked=True)
    last = _last(batch.c.id, batch.c.name).lateral("last")
    of_batch = _Writer(batch.c.name, batch.c.step_key, batch.c.attempt, batch.c.try_number)
    head = materialized(
        sa.select(
            *batch.c,
            sa.func.coalesce(last.c.number + ONE, ZERO).label("number"),
            sa.func.coalesce(_is_closed(last, of_batch), sa.false()).label("closed"),
        )
        .select_from(batch.join(mine, is_same_attempt(batch, mine)).outerjoin(last, sa.true()))
        .where(batch.c.item == ONE),
        "head",
    )
    of_head = _Writer(head.c.name, head.c.step_key, head.c.attempt, head.c.try_number)
    columns = _columns(of_head, head.c.id, head.c.number, sa.cast(head.c.value, JSONB))
    open_ones = insert_select(STREAM_ITEM, columns, sa.select(*columns.values()).where(~head.c.closed))
    first = open_ones.on_conflict_do_nothing().returning(_ITEM.workflow_id, _ITEM.number).cte("first")
    columns = _columns(of_batch, batch.c.id, first.c.number + batch.c.item - ONE, sa.cast(batch.c.value, JSONB))
    others = sa.select(*columns.values()).select_from(batch.join(first, first.c.workflow_id == batch.c.id))
    rest = insert_select(STREAM_ITEM, columns, others.where(batch.c.item > ONE))
    return (
        sa.select(head.c.place, head.c.closed, first.c.number.is_not(None).label("written"))
        .select_from(head.outerjoin(first, first.c.workflow_id == head.c.id))
        .add_cte(rest.returning(_ITEM.number).cte("rest"))
    )


def _read_statement() -> Any:
    wanted = WANTED_ID
    item = (
        sa.select(_ITEM.number, _ITEM.value, _ITEM.step_key, _ITEM.attempt, _ITEM.try_number, _ITEM.created_at)
        .where(_ITEM.workflow_id == wanted, _ITEM.name == _NAME, _ITEM.number >= parameter("start", sa.Integer()))
        .order_by(_ITEM.number)
        .limit(LIMIT)
        .subquery("item")
    )
    closed = sa.select(_last(wanted, _NAME).subquery("last").c.closed).scalar_subquery()
    ended = sa.or_(WORKFLOW.c.finished_at.is_not(None), sa.func.coalesce(closed, sa.false()))
    return (
        sa.select(
            ended.label("ended"),
            item.c.number,
            sa.cast(item.c.value, Text).label("value"),
            item.c.step_key,
            item.c.attempt,
            item.c.try_number,
            item.c.created_at,
        )
        .select_from(WORKFLOW)
        .outerjoin(item, sa.true())
        .where(WORKFLOW.c.id == wanted)
        .order_by(item.c.number)
    )


_GIVEN_WRITER = _Writer(_NAME, GIVEN["key"], GIVEN["attempt"], parameter("try_number", sa.Integer()))
_BATCH: Columns = {
    "id": sa.UUID(),
    "token": sa.UUID(),
    "place": sa.Integer(),
    "name": Text(),
    "step_key": Text(),
    "attempt": sa.Integer(),
    "try_number": sa.Integer(),
    "item": sa.Integer(),
    "value": Text(),
}
_APPEND = Statement(lambda: _append_statement(recorded=False))
_RECORD = Statement(lambda: _append_statement(recorded=True))
_APPEND_MANY = Statement(_append_many_statement)
_READ = Statement(_read_statement)
