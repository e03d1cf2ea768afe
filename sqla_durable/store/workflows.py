"""The statements on workflow records: start, find, finish, release, wake; `batches` finishes and parks many.

Whatever an attempt writes is fenced: its row is locked while its token is compared, in the same statement. Statements
for many rows lock in the order of ids, and skip rows that another transaction holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
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
    Integer,
    SmallInteger,
    Text,
    and_,
    bindparam,
    case,
    cast,
    func,
    literal,
    null,
    or_,
    select,
    tuple_,
    union,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.dialects.postgresql import UUID as PG_UUID
from sqlalchemy.orm import Session

from sqla_durable.errors import WorkflowNotFoundError
from sqla_durable.models import Workflow
from sqla_durable.status import WorkflowStatus
from sqla_durable.store._rows import (
    SUSPECT,
    WORKFLOW,
    Columns,
    Completion,
    Connectable,
    Fence,
    NewWorkflow,
    Standing,
    execute,
    fence_row,
    filled,
    interval,
    materialized,
    of_owner,
    owned,
    scalar,
    scalars,
    status,
    table,
)
from sqla_durable.store.signals import asking

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
_FENCE: Columns = {"id": PG_UUID(), "token": PG_UUID()}
_COMPLETION: Columns = {**_FENCE, "status": Text(), "output": Text(), "error": Text()}
_FRESH = {"populate_existing": True}
_LIMIT = bindparam("limit", type_=Integer())


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
        # The one that was in the way was deleted between the two statements.


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


def standing(session: Session, workflow_id: UUID) -> Standing:
    """Read where a workflow stands, and its outcome if it has one.

    Raises:
        WorkflowNotFoundError: there is no such workflow.
    """
    row = execute(session, _OUTCOME, {"wanted_id": workflow_id}).one_or_none()
    if row is None:
        raise not_found(session, workflow_id)
    return Standing(row.id, row.name, row.status, row.output, row.error)


def not_found(session: Session, workflow_id: UUID) -> WorkflowNotFoundError:
    """Give the error for a workflow that is not there."""
    return WorkflowNotFoundError(
        f"no workflow {workflow_id} is visible in {session.get_bind(Workflow).engine.url.render_as_string()}: is the "
        "transaction that started it committed?",
        workflow_id=workflow_id,
    )


def finish(session: Session, completion: Completion) -> bool:
    """Record an outcome; wait for whoever holds the row. False: the attempt no longer owns the workflow."""
    return scalar(session, _FINISH, filled("batch", [_completion_row(completion)])) is not None


def finished_by(connectable: Connectable, fences: Iterable[Fence]) -> dict[Fence, WorkflowStatus]:
    """Give those of the attempts that have finished their workflows: an acknowledgement may have been lost."""
    rows = execute(connectable, _FINISHED_BY, filled("batch", [fence_row(each) for each in fences]))
    return {Fence(row.id, row.token): row.status for row in rows}


def release(connectable: Connectable, fences: Iterable[Fence]) -> set[UUID]:
    """Hand running workflows back to their queues, in their old places; give the ids of those still owned."""
    return set(scalars(connectable, _RELEASE, filled("batch", [fence_row(each) for each in fences])))


def release_unlocked(connectable: Connectable, fences: Sequence[Fence]) -> list[Fence]:
    """Do the same with those whose rows nobody else holds; give the attempts that still own theirs."""
    scalars(connectable, _RELEASE_UNLOCKED, filled("batch", [fence_row(each) for each in fences])).all()
    owned = still_owned(connectable, fences)
    return [each for each in fences if each in owned]


def still_owned(connectable: Connectable, fences: Iterable[Fence]) -> set[Fence]:
    """Give the attempts that still own their workflows. Takes no lock."""
    rows = execute(connectable, _STILL_OWNED, filled("batch", [fence_row(each) for each in fences]))
    return {Fence(row.id, row.token) for row in rows}


def wake_due(connectable: Connectable, *, limit: int) -> int:
    """Put suspended workflows whose time has come into their queues, placed by that time; give how many.

    Of those that crashed several times in a row only one: together they would be executed side by side again, by the
    same worker, and the one that kills it would take the others along once more.

    A time before they were enqueued counts as that: a workflow for the year 1990 does not stand before all others.
    """
    return len(scalars(connectable, _WAKE_DUE, {"limit": limit}).all())


def unknown_names(connectable: Connectable, *, queues: Sequence[str], names: Sequence[str]) -> list[str]:
    """Give the names of workflows near the head of the queues that are not among `names`."""
    head = (
        select(WORKFLOW.c.name)
        .where(WORKFLOW.c.status == status(WorkflowStatus.PENDING), WORKFLOW.c.queue.in_(queues))
        .where(WORKFLOW.c.name.not_in(names))
        .limit(100)
        .subquery()
    )
    return list(scalars(connectable, select(head.c.name).distinct().order_by(head.c.name)))


def other_versions(connectable: Connectable, *, queues: Sequence[str], versions: Sequence[str]) -> list[str]:
    """Give the versions of workflows near the head of each queue that are not among `versions`."""
    heads = [
        select(WORKFLOW.c.version)
        .where(WORKFLOW.c.status == status(WorkflowStatus.PENDING), WORKFLOW.c.queue == queue)
        .order_by(WORKFLOW.c.priority, WORKFLOW.c.enqueued_at, WORKFLOW.c.id)
        .limit(1_000)
        .subquery()
        for queue in queues
    ]
    found = union(*(select(each.c.version).where(each.c.version.not_in(versions)) for each in heads))
    return sorted(scalars(connectable, found))


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


def _completion_row(completion: Completion) -> dict[str, Any]:
    return {
        **fence_row(completion.fence),
        "status": completion.status.value,
        "output": completion.output,
        "error": completion.error,
    }


def _finish_statement() -> Any:
    batch = table("batch", _COMPLETION)
    mine = owned(batch, skip_locked=False)
    ended = (
        update(WORKFLOW)
        .where(WORKFLOW.c.id == mine.c.id, of_owner(batch, mine))
        .values(
            status=batch.c.status,
            output=cast(batch.c.output, JSONB),
            error=cast(batch.c.error, JSONB),
            finished_at=func.statement_timestamp(),
        )
        .returning(WORKFLOW.c.id, WORKFLOW.c.parent_id, WORKFLOW.c.finished_at, WORKFLOW.c.awaits)
        .cte("ended")
    )
    return select(ended.c.id).add_cte(asking(ended).cte("asked"))


def _release_statement(*, skip_locked: bool) -> Any:
    mine = owned(table("batch", _FENCE), skip_locked=skip_locked)
    return (
        update(WORKFLOW)
        .where(WORKFLOW.c.id == mine.c.id)
        .values(status=WorkflowStatus.PENDING, token=null(), worker_id=null())
        .returning(WORKFLOW.c.id)
    )


def _still_owned_statement() -> Any:
    return select(WORKFLOW.c.id, WORKFLOW.c.token).where(
        _of_attempts(), WORKFLOW.c.status == status(WorkflowStatus.RUNNING)
    )


def _finished_by_statement() -> Any:
    return select(WORKFLOW.c.id, WORKFLOW.c.token, WORKFLOW.c.status).where(
        _of_attempts(), WORKFLOW.c.finished_at.is_not(None)
    )


def _of_attempts() -> ColumnElement[bool]:
    batch = table("batch", _FENCE)
    return tuple_(WORKFLOW.c.id, WORKFLOW.c.token).in_(select(batch.c.id, batch.c.token))


def _wake_due_statement() -> Any:
    is_due = and_(
        WORKFLOW.c.status == status(WorkflowStatus.SUSPENDED), WORKFLOW.c.wake_at <= func.statement_timestamp()
    )
    suspect = WORKFLOW.c.crashes >= SUSPECT
    # Of those that nobody holds: one that is held must not keep the others.
    first = materialized(
        select(WORKFLOW.c.id)
        .where(is_due, suspect)
        .order_by(WORKFLOW.c.wake_at, WORKFLOW.c.id)
        .limit(1)
        .with_for_update(key_share=True, skip_locked=True),
        "first",
    )
    due = materialized(
        select(WORKFLOW.c.id)
        .where(is_due, or_(~suspect, WORKFLOW.c.id == select(first.c.id).scalar_subquery()))
        .order_by(WORKFLOW.c.wake_at)
        .limit(_LIMIT)
        .with_for_update(key_share=True, skip_locked=True, of=WORKFLOW),
        "due",
    )
    return (
        update(WORKFLOW)
        .where(WORKFLOW.c.id == due.c.id)
        .values(
            status=WorkflowStatus.PENDING,
            enqueued_at=func.greatest(WORKFLOW.c.wake_at, WORKFLOW.c.enqueued_at),
            wake_at=null(),
            awaits=null(),
        )
        .returning(WORKFLOW.c.id)
    )


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
_FINISH = _finish_statement()
_RELEASE = _release_statement(skip_locked=False)
_RELEASE_UNLOCKED = _release_statement(skip_locked=True)
_FINISHED_BY = _finished_by_statement()
_STILL_OWNED = _still_owned_statement()
_OUTCOME = select(
    WORKFLOW.c.id, WORKFLOW.c.name, WORKFLOW.c.status, cast(WORKFLOW.c.output, Text), WORKFLOW.c.error
).where(WORKFLOW.c.id == bindparam("wanted_id", type_=PG_UUID()))
_WAKE_DUE = _wake_due_statement()
