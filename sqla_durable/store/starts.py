"""The statements that start workflows: one, by its key, many; and what a new one consists of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from typing import cast as as_type
from uuid import UUID

from sqlalchemy import (
    Boolean,
    ClauseElement,
    ColumnElement,
    DateTime,
    Float,
    SmallInteger,
    Text,
    case,
    cast,
    func,
    literal,
    select,
    tuple_,
)
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.dialects.postgresql import UUID as PG_UUID
from sqlalchemy.orm import Session

from sqla_durable.models import Workflow
from sqla_durable.status import WorkflowStatus
from sqla_durable.store._rows import (
    WORKFLOW,
    Columns,
    NewWorkflow,
    execute,
    filled,
    interval,
    scalars,
    table,
)

NEW: Columns = {
    "id": PG_UUID(),
    "name": Text(),
    "key": Text(),
    "queue": Text(),
    "priority": SmallInteger(),
    "input": Text(),
    "delay": Float(),
    "wake_at": DateTime(timezone=True),
    "parent_id": PG_UUID(),
    "parent_key": Text(),
    "detached": Boolean(),
    "headers": Text(),
    "timeout": Float(),
    "deadline": Float(),
    "deadline_at": DateTime(timezone=True),
    "version": Text(),
}

_FRESH = {"populate_existing": True}


def add(session: Session, new: NewWorkflow) -> Workflow:
    """Add a workflow without a key to the session; it is inserted with the session's next flush."""
    workflow = Workflow(**_values(new))
    session.add(workflow)
    return workflow


def insert_unless_known(session: Session, new: NewWorkflow) -> Workflow:
    """Insert a workflow with a key, or give the one that has it; the caller's transaction survives either way.

    Waits for another transaction that is inserting the same name and key, and gives its record if it commits. One that
    is there already is not inserted: ON CONFLICT would wait for whoever is changing it, a caller's open cancel too.
    Source: PostgreSQL manual, INSERT, ON CONFLICT clause.
    """
    known = select(Workflow).where(Workflow.name == new.name, Workflow.key == new.key)
    values = {name: _literal(name, value) for name, value in _values(new).items()}
    statement = (
        insert(Workflow)
        .from_select(list(values), select(*values.values()).where(~known.exists()), include_defaults=False)
        .on_conflict_do_nothing(index_elements=["name", "key"], index_where=Workflow.key.is_not(None))
        .returning(Workflow)
    )
    while True:
        for attempt in (statement, known):
            found = session.scalars(attempt, execution_options=_FRESH).one_or_none()
            if found is not None:
                return found


def insert_many(session: Session, workflows: Sequence[NewWorkflow]) -> list[UUID]:
    """Insert workflows by one statement; give their ids in order, for known keys those of the known workflows."""
    ids: dict[UUID, UUID] = {}
    while missing := [each for each in workflows if each.id not in ids]:
        statement = _INSERT_MANY if all(each.key is None for each in missing) else _INSERT_MANY_UNLESS_KNOWN
        inserted = scalars(session, statement, filled("batch", [new_row(each) for each in missing]))
        ids |= {each: each for each in inserted}
        known = _ids_by_key(session, [each for each in missing if each.id not in ids])
        ids |= {each.id: known[each.name, each.key] for each in missing if (each.name, each.key) in known}
        # Still missing: one that was in the way was deleted between the two statements.
    return [ids[each.id] for each in workflows]


def _values(new: NewWorkflow) -> dict[str, Any]:
    values: dict[str, Any] = {
        "id": new.id,
        "name": new.name,
        "key": new.key,
        "queue": new.queue,
        "priority": new.priority,
        "input": new.input,
        "version": new.version,
    }
    if new.headers is not None:
        values["headers"] = new.headers
    if new.timeout is not None:
        values["timeout"] = timedelta(seconds=new.timeout)
    if new.deadline_at is not None:
        values["deadline_at"] = new.deadline_at
    elif new.deadline is not None:
        values["deadline_at"] = func.statement_timestamp() + timedelta(seconds=new.deadline)
    if new.wake_at is not None:
        values |= {"status": WorkflowStatus.SUSPENDED, "wake_at": new.wake_at}
    if new.parent_id is not None:
        values |= {"parent_id": new.parent_id, "parent_key": new.parent_key}
    if new.detached:
        values["detached"] = True
    if new.wake_at is None and new.delay is not None:
        wake_at = func.statement_timestamp() + timedelta(seconds=new.delay)
        values |= {"status": WorkflowStatus.SUSPENDED, "wake_at": wake_at}
    return values


def _literal(name: str, value: Any) -> ColumnElement[Any]:
    if isinstance(value, ClauseElement):
        return as_type("ColumnElement[Any]", value)
    return literal(value, WORKFLOW.c[name].type)


def new_row(new: NewWorkflow) -> dict[str, Any]:
    """Give a workflow to be started as a row of `NEW`."""
    return {
        "id": new.id,
        "name": new.name,
        "key": new.key,
        "queue": new.queue,
        "priority": new.priority,
        "input": json.dumps(new.input, ensure_ascii=False),
        "delay": new.delay,
        "wake_at": new.wake_at,
        "parent_id": new.parent_id,
        "parent_key": new.parent_key,
        "detached": new.detached,
        "headers": None if new.headers is None else json.dumps(new.headers, ensure_ascii=False),
        "timeout": new.timeout,
        "deadline": new.deadline,
        "deadline_at": new.deadline_at,
        "version": new.version,
    }


def _ids_by_key(session: Session, workflows: Sequence[NewWorkflow]) -> dict[tuple[str, str | None], UUID]:
    if not workflows:
        return {}
    keys = [(each.name, each.key) for each in workflows]
    columns = WORKFLOW.c.name, WORKFLOW.c.key, WORKFLOW.c.id
    rows = execute(session, select(*columns).where(tuple_(WORKFLOW.c.name, WORKFLOW.c.key).in_(keys)))
    return {(row.name, row.key): row.id for row in rows}


def new_columns(given: Any) -> dict[str, Any]:
    """Give the columns of workflows to be started, made of those of `NEW`."""
    delayed = func.statement_timestamp() + interval(given.delay)
    wake_at = func.coalesce(given.wake_at, delayed)
    return {
        "id": given.id,
        "name": given.name,
        "key": given.key,
        "queue": given.queue,
        "priority": given.priority,
        "input": cast(given.input, JSONB),
        "status": case((wake_at.is_(None), WorkflowStatus.PENDING.value), else_=WorkflowStatus.SUSPENDED.value),
        "wake_at": wake_at,
        "parent_id": given.parent_id,
        "parent_key": given.parent_key,
        "detached": given.detached,
        "headers": cast(given.headers, JSONB),
        "timeout": interval(given.timeout),
        "deadline_at": func.coalesce(given.deadline_at, func.statement_timestamp() + interval(given.deadline)),
        "version": given.version,
    }


def _insert_many_statement(*, keyed: bool) -> Any:
    batch = table("batch", NEW)
    columns = new_columns(batch.c)
    known = select(WORKFLOW.c.id).where(WORKFLOW.c.name == batch.c.name, WORKFLOW.c.key == batch.c.key)
    source = select(*columns.values())
    if keyed:
        source = source.where(~known.exists())
    return (
        insert(WORKFLOW)
        # In the order of keys: two callers that start the same keys wait for each other in one direction only.
        .from_select(list(columns), source.order_by(batch.c.name, batch.c.key, batch.c.id), include_defaults=False)
        .on_conflict_do_nothing(index_elements=["name", "key"], index_where=WORKFLOW.c.key.is_not(None))
        .returning(WORKFLOW.c.id)
    )


_INSERT_MANY = _insert_many_statement(keyed=False)

_INSERT_MANY_UNLESS_KNOWN = _insert_many_statement(keyed=True)
