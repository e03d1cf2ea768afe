"""The statements that start workflows: one, by its key, many; and what a new one consists of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import lru_cache
from typing import Any
from typing import cast as as_type
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

from sqla_durable.errors import KeyNotVisibleError
from sqla_durable.models import Workflow
from sqla_durable.models.base import WorkflowStatus
from sqla_durable.store.keys import (
    MOST_REPEATS,
    insert_new_keys,
    not_visible,
    require_the_latest,
    sees_the_latest,
)
from sqla_durable.store.records import NewWorkflow
from sqla_durable.store.statements import (
    WORKFLOW,
    Condition,
    Connectable,
    Expression,
    Shape,
    batch_parameter,
    batch_table,
    execute,
    insert_select,
    interval,
    is_among,
    merge_record,
    pg,
    scalars,
)

NEW = Shape(NewWorkflow, priority=sa.SmallInteger())
MOST_AT_ONCE = 5_000
"""How many workflows one statement starts."""

_DEFAULT_QUEUE = "default"  # of the column
_DEFAULTED = [each for each in WORKFLOW.c if each.server_default is not None and each.name != "input"]

_SHOWN = [WORKFLOW.c.name, WORKFLOW.c.key, *_DEFAULTED]
"""What is read of a workflow that has a key: no payload, because a role that starts workflows may not read it."""

_NOW = pg.statement_timestamp()
_GIVEN = "id", "name", "input"
_OPTIONS: Mapping[str, Any] = {"queue": _DEFAULT_QUEUE, **NewWorkflow._field_defaults}

_COLUMNS_OF: Mapping[str, Sequence[str]] = {
    "delay": ["wake_at", "status"],
    "wake_at": ["wake_at", "status"],
    "deadline": ["deadline_at"],
}
"""The columns in which an option is written, where they do not have its name."""


def add(session: Session, new: NewWorkflow) -> Workflow:
    """Add a workflow without a key to the session; it is inserted with the session's next flush."""
    workflow = Workflow(**_values(new))
    session.add(workflow)
    return workflow


def insert_unless_known(session: Session, new: NewWorkflow) -> Workflow:
    """Insert a workflow with a key, or return the one that has it; the caller's transaction survives either way.

    Waits for another transaction that is inserting the same name and key, and returns its record if it commits. One
    that is there already is not inserted: ON CONFLICT would wait for a transaction that is changing it, such as an open
    cancel. Source: PostgreSQL manual, INSERT, ON CONFLICT clause.

    Raises:
        KeyNotVisibleError: the record that has the key cannot be seen.
        SnapshotKept: nothing was inserted: do it with `insert_in_snapshot`, in a savepoint.
    """
    if session.autoflush:
        session.flush()
    name, key = new.name, new.key or ""
    for _ in range(MOST_REPEATS):
        inserted = execute(session, _inserting(new, sees_the_latest())).mappings().one_or_none()
        if inserted is not None:
            return _inserted_record(session, new, inserted)
        known = execute(session, _with_key(new)).mappings().one_or_none()
        if known is not None:
            return merge_record(session, known)
        require_the_latest(session)
    raise not_visible("workflow", name=name, key=key)


def insert_in_snapshot(session: Session, new: NewWorkflow) -> Workflow:
    """Insert a workflow whose key is not known in the transaction's snapshot.

    Raises:
        KeyNotVisibleError: the record that has the key is hidden.
        DBAPIError: it is newer than the snapshot: roll back to a savepoint.
    """
    row = execute(session, _inserting(new)).mappings().one_or_none()
    if row is None:
        raise not_visible("workflow", name=new.name, key=new.key or "")
    return _inserted_record(session, new, row)


def insert_many(session: Session, workflows: Sequence[NewWorkflow]) -> list[UUID]:
    """Insert workflows by one statement; return their ids in order, for known keys those of the known workflows.

    Where none has a key, they are only counted: to return and read the ids costs a fifth of such a start.

    Raises:
        KeyNotVisibleError: the record that has one of the keys cannot be seen. Others may be inserted: `undo` that.
        SnapshotKept: as `insert_unless_known`, with `insert_many_in_snapshot`, for all of them.
    """
    if all(each.key is None for each in workflows):
        if _insert(session, workflows).rowcount < len(workflows):
            raise hidden_among(session, workflows)
        return [each.id for each in workflows]
    ids: dict[UUID, UUID] = {}
    for _ in range(MOST_REPEATS):
        missing = [each for each in workflows if each.id not in ids]
        if missing:
            ids |= _inserted(session, missing)
            ids |= _known(session, [each for each in missing if each.id not in ids])
            # Still missing: one that was in the way was deleted between the two statements, or cannot be seen.
            if len(ids) < len(workflows):
                require_the_latest(session)
    if len(ids) < len(workflows):
        raise hidden_among(session, workflows)
    return [ids[each.id] for each in workflows]


def insert_many_in_snapshot(session: Session, workflows: Sequence[NewWorkflow]) -> list[UUID]:
    """Insert those that are not inserted yet where the transaction keeps a snapshot, in a savepoint.

    Raises:
        KeyNotVisibleError, DBAPIError: as `insert_in_snapshot`.
    """
    own = [each.id for each in workflows]
    there = scalars(session, sa.select(WORKFLOW.c.id).where(is_among(WORKFLOW.c.id, own)))
    ids = {each: each for each in there}
    ids |= _inserted(session, [each for each in workflows if each.id not in ids], in_snapshot=True)
    ids |= _known(session, [each for each in workflows if each.id not in ids])
    if len(ids) < len(workflows):
        raise hidden_among(session, workflows)
    return [ids[each.id] for each in workflows]


def insert_absent(connectable: Connectable, workflows: Sequence[NewWorkflow]) -> dict[UUID, UUID]:
    """Insert those whose keys no row has, in any isolation level; return their ids, mapped to themselves.

    Raises:
        DBAPIError: a row with one of the keys is newer than the transaction's snapshot: roll back to a savepoint.
    """
    ids: dict[UUID, UUID] = {}
    for first in range(0, len(workflows), MOST_AT_ONCE):
        ids |= _inserted(connectable, workflows[first : first + MOST_AT_ONCE], in_snapshot=True)
    return ids


def shown_record(session: Session, workflow_id: UUID) -> Workflow:
    """Read a workflow into the session, with the columns that a start with a key reads, and return its record."""
    return merge_record(
        session, execute(session, sa.select(*_SHOWN).where(WORKFLOW.c.id == workflow_id)).mappings().one()
    )


def undo(session: Session, workflows: Sequence[NewWorkflow]) -> None:
    """Delete those of the workflows that this transaction has inserted, by their new ids."""
    execute(session, sa.delete(WORKFLOW).where(is_among(WORKFLOW.c.id, [each.id for each in workflows])))


def hidden_among(connectable: Connectable, workflows: Sequence[NewWorkflow]) -> KeyNotVisibleError:
    """Return the error for the first of the workflows whose key is taken by a record that cannot be seen."""
    found = _ids_by_key(connectable, workflows)
    hidden = [each for each in workflows if each.key is not None and (each.name, each.key) not in found]
    first = (hidden or workflows)[0]
    return not_visible("workflow", name=first.name, key=first.key or "")


def new_columns(given: Any) -> dict[str, Any]:
    """Return the columns of workflows to be started, made of those of `NEW`."""
    delayed = pg.statement_timestamp() + interval(given.delay)
    wake_at = sa.func.coalesce(given.wake_at, delayed)
    return {
        **{each.name: given[each.name] for each in WORKFLOW.c if each.name in NEW.columns},
        "input": sa.cast(given.input, JSONB),
        "status": sa.case((wake_at.is_(None), WorkflowStatus.PENDING.value), else_=WorkflowStatus.SUSPENDED.value),
        "wake_at": wake_at,
        "headers": sa.cast(given.headers, JSONB),
        "tags": sa.cast(given.tags, JSONB),
        "timeout": interval(given.timeout),
        "deadline_at": sa.func.coalesce(given.deadline_at, pg.statement_timestamp() + interval(given.deadline)),
    }


def _inserted_record(session: Session, new: NewWorkflow, row: sa.RowMapping) -> Workflow:
    """Return the record of a row that is new: what is not returned of it is what was given, or NULL."""
    given = {name: value for name, value in _values(new).items() if not isinstance(value, sa.ClauseElement)}
    return merge_record(session, row, dict.fromkeys(WORKFLOW.c.keys()) | given)


def _with_key(new: NewWorkflow) -> Any:
    return sa.select(*_SHOWN).where(WORKFLOW.c.name == new.name, WORKFLOW.c.key == new.key)


def _inserting(new: NewWorkflow, *conditions: Condition) -> Any:
    values = {name: _literal(name, value) for name, value in _values(new).items()}
    computed = [WORKFLOW.c[name] for name, value in _values(new).items() if isinstance(value, sa.ClauseElement)]
    source = sa.select(*values.values()).where(~_with_key(new).exists(), *conditions)
    return insert_new_keys(WORKFLOW, values, source).returning(*_SHOWN, *computed)


def _inserted(
    connectable: Connectable, workflows: Sequence[NewWorkflow], *, in_snapshot: bool = False
) -> dict[UUID, UUID]:
    if not workflows:
        return {}
    return {each: each for each in _insert(connectable, workflows, in_snapshot=in_snapshot).scalars()}


def _insert(
    connectable: Connectable, workflows: Sequence[NewWorkflow], *, in_snapshot: bool = False
) -> sa.CursorResult[Any]:
    """Insert workflows with the columns that one of them needs: where all have the default, none is sent."""
    values = dict(zip(NewWorkflow._fields, zip(*workflows, strict=True), strict=True))
    options = [name for name, default in _OPTIONS.items() if values[name].count(default) < len(workflows)]
    values["id"] = tuple(each.hex for each in values["id"])
    names = *_GIVEN, *options
    rows = [dict(zip(names, row)) for row in zip(*(values[name] for name in names))]  # noqa: B905 (it takes time)
    statement = _insert_many(tuple(options), in_snapshot=in_snapshot)
    return as_type("sa.CursorResult[Any]", execute(connectable, statement, batch_parameter("batch", rows)))


def _known(session: Session, workflows: Sequence[NewWorkflow]) -> dict[UUID, UUID]:
    known = _ids_by_key(session, workflows)
    return {each.id: known[each.name, each.key] for each in workflows if (each.name, each.key) in known}


def _values(new: NewWorkflow) -> dict[str, Any]:
    given = {name: value for name, default in _OPTIONS.items() if (value := getattr(new, name)) != default}
    values: dict[str, Any] = {"id": new.id, "name": new.name, "input": json.loads(new.input)}
    values |= {name: value for name, value in given.items() if name in WORKFLOW.c}
    if new.timeout is not None:
        values["timeout"] = timedelta(seconds=new.timeout)
    if new.deadline is not None and new.deadline_at is None:
        values["deadline_at"] = _NOW + timedelta(seconds=new.deadline)
    if new.delay is not None and new.wake_at is None:
        values["wake_at"] = _NOW + timedelta(seconds=new.delay)
    return values | ({"status": WorkflowStatus.SUSPENDED} if "wake_at" in values else {})


def _literal(name: str, value: Any) -> Expression:
    if isinstance(value, sa.ClauseElement):
        return as_type("Expression", value)
    return sa.literal(value, WORKFLOW.c[name].type)


def _ids_by_key(connectable: Connectable, workflows: Sequence[NewWorkflow]) -> dict[tuple[str, str | None], UUID]:
    if not workflows:
        return {}
    keys = [(each.name, each.key) for each in workflows]
    columns = WORKFLOW.c.name, WORKFLOW.c.key, WORKFLOW.c.id
    rows = execute(connectable, sa.select(*columns).where(sa.tuple_(WORKFLOW.c.name, WORKFLOW.c.key).in_(keys)))
    return {(row.name, row.key): row.id for row in rows}


@lru_cache(maxsize=128)
def _insert_many(options: tuple[str, ...], *, in_snapshot: bool) -> Any:
    batch = _BATCH
    given = {*_GIVEN, *(column for name in options for column in _COLUMNS_OF.get(name, [name]))}
    columns = {name: value for name, value in new_columns(batch.c).items() if name in given}
    source = sa.select(*columns.values())
    if "key" not in given:
        inserting = insert_select(WORKFLOW, columns, source.order_by(batch.c.id))
        return inserting.execution_options(preserve_rowcount=True)
    source = source.where(_IS_UNKNOWN)
    source = source if in_snapshot else source.where(sa.or_(batch.c.key.is_(None), sees_the_latest()))
    # In the order of keys: two callers that start the same keys wait for each other in one direction only.
    ordered = source.order_by(batch.c.name, batch.c.key, batch.c.id)
    return insert_new_keys(WORKFLOW, columns, ordered).returning(WORKFLOW.c.id)


_BATCH = batch_table("batch", NEW.columns)
_IS_UNKNOWN = ~sa.select(WORKFLOW.c.id).where(WORKFLOW.c.name == _BATCH.c.name, WORKFLOW.c.key == _BATCH.c.key).exists()
