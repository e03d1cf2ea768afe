"""The statements on workflow records: find, finish, release, wake.

`starts` inserts them, `batches` finishes and suspends many, `rounds` continues one as new.

Whatever an attempt writes is fenced: its row is locked while its token is compared, in the same statement. Statements
for many rows lock in the order of ids, and skip rows that another transaction holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

from sqla_durable.errors import WorkflowNotFoundError
from sqla_durable.models.column_types import Text
from sqla_durable.models.status import WorkflowStatus
from sqla_durable.store._rows import (
    BEGINNING,
    FENCE,
    IS_WANTED,
    LIMIT,
    ONE,
    SUSPECT,
    WORKFLOW,
    Completion,
    Condition,
    Connectable,
    Fence,
    Shape,
    Standing,
    beginning,
    connection_of,
    execute,
    fence_row,
    filled,
    materialized,
    of_owner,
    owned,
    pg,
    scalar,
    scalars,
    status,
    table,
)
from sqla_durable.store.parts import WHOLE, Part, Within, divided
from sqla_durable.store.signals import END_COLUMNS, end_notices

COMPLETION = Shape(Completion, without=["is_child"])


# The one that was in the way was deleted between the two statements.


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
        f"no workflow {workflow_id} is visible in {connection_of(session).engine.url.render_as_string()}: is the "
        "transaction that started it committed?",
        workflow_id=workflow_id,
    )


def finish(session: Session, completion: Completion) -> bool:
    """Record an outcome; wait for whoever holds the row. False: the attempt no longer owns the workflow."""
    return scalar(session, _FINISH, filled("batch", [COMPLETION.row(completion)])) is not None


def lock(session: Session, fence: Fence) -> bool:
    """Lock the row of a running workflow; wait for whoever holds it. False: the attempt no longer owns it."""
    return scalar(session, _LOCK, filled("batch", [fence_row(fence)])) is not None


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


def wake_due(connectable: Connectable, *, limit: int, since: str = BEGINNING, part: Part = WHOLE) -> int:
    """Put suspended workflows whose time has come into their queues, behind what waits there; return how many.

    Of those that crashed several times in a row only one: together they would be executed side by side again, by the
    same worker, and the one that kills it would take the others along once more.

    They are enqueued as of now, however long they have been due: claims do not look again at what was enqueued before.
    What was due before `since` is passed over.
    """
    parameters = {"limit": limit, "since": since, **part.parameters}
    return len(scalars(connectable, part.choose(_WAKE_DUE, _WAKE_PART), parameters).all())


def due(connectable: Connectable, *, limit: int, since: str = BEGINNING, part: Part = WHOLE) -> list[UUID]:
    """Return the ids of those that this would put into their queues."""
    return part.found(connectable, _DUE, {"limit": limit, "since": since})


def unknown_names(connectable: Connectable, *, queues: Sequence[str], names: Sequence[str]) -> list[str]:
    """Give the names of workflows near the head of the queues that are not among `names`."""
    head = (
        sa.select(WORKFLOW.c.name)
        .where(WORKFLOW.c.status == status(WorkflowStatus.PENDING), WORKFLOW.c.queue.in_(queues))
        .where(WORKFLOW.c.name.not_in(names))
        .limit(100)
        .subquery()
    )
    return list(scalars(connectable, sa.select(head.c.name).distinct().order_by(head.c.name)))


def other_versions(connectable: Connectable, *, queues: Sequence[str], versions: Sequence[str]) -> list[str]:
    """Give the versions of workflows near the head of each queue that are not among `versions`."""
    heads = [
        sa.select(WORKFLOW.c.version)
        .where(WORKFLOW.c.status == status(WorkflowStatus.PENDING), WORKFLOW.c.queue == queue)
        .order_by(WORKFLOW.c.priority, WORKFLOW.c.enqueued_at, WORKFLOW.c.id)
        .limit(1_000)
        .subquery()
        for queue in queues
    ]
    found = sa.union(*(sa.select(each.c.version).where(each.c.version.not_in(versions)) for each in heads))
    return sorted(scalars(connectable, found))


def _finish_statement() -> Any:
    batch = table("batch", COMPLETION.columns)
    mine = owned(batch, skip_locked=False)
    ended = (
        sa.update(WORKFLOW)
        .where(WORKFLOW.c.id == mine.c.id, of_owner(batch, mine))
        .values(
            status=batch.c.status,
            output=sa.cast(batch.c.output, JSONB),
            error=sa.cast(batch.c.error, JSONB),
            finished_at=pg.statement_timestamp(),
        )
        .returning(*END_COLUMNS, batch.c.holds)
        .cte("ended")
    )
    return sa.select(ended.c.id).add_cte(*end_notices(ended))


def _release_statement(*, skip_locked: bool) -> Any:
    mine = owned(table("batch", FENCE), skip_locked=skip_locked)
    return (
        sa.update(WORKFLOW)
        .where(WORKFLOW.c.id == mine.c.id)
        .values(status=WorkflowStatus.PENDING, token=sa.null(), worker_id=sa.null())
        .returning(WORKFLOW.c.id)
    )


def _still_owned_statement() -> Any:
    # Row by row, by the primary key: the index of what is running keeps dead entries while a snapshot is open.
    batch = table("batch", FENCE)
    found = (
        sa.select(WORKFLOW.c.status)
        .where(WORKFLOW.c.id == batch.c.id, WORKFLOW.c.token == batch.c.token)
        .limit(ONE)
        .lateral("found")
    )
    running = found.c.status == status(WorkflowStatus.RUNNING)
    return sa.select(batch.c.id, batch.c.token).select_from(batch.join(found, running))


def _finished_by_statement() -> Any:
    return sa.select(WORKFLOW.c.id, WORKFLOW.c.token, WORKFLOW.c.status).where(
        _of_attempts(), WORKFLOW.c.finished_at.is_not(None)
    )


def _of_attempts() -> Condition:
    batch = table("batch", FENCE)
    return sa.tuple_(WORKFLOW.c.id, WORKFLOW.c.token).in_(sa.select(batch.c.id, batch.c.token))


def _wake_due_statement(within: Within) -> tuple[Any, Any]:
    is_due = sa.and_(
        within(WORKFLOW.c.id),
        WORKFLOW.c.status == status(WorkflowStatus.SUSPENDED),
        WORKFLOW.c.wake_at.between(beginning(), pg.statement_timestamp()),
    )
    suspect = WORKFLOW.c.crashes >= SUSPECT
    # Of those that nobody holds: one that is held must not keep the others.
    first = materialized(
        sa.select(WORKFLOW.c.id)
        .where(is_due, suspect)
        .order_by(WORKFLOW.c.wake_at, WORKFLOW.c.id)
        .limit(1)
        .with_for_update(key_share=True, skip_locked=True),
        "first",
    )
    due = materialized(
        sa.select(WORKFLOW.c.id)
        .where(is_due, sa.or_(~suspect, WORKFLOW.c.id == sa.select(first.c.id).scalar_subquery()))
        .order_by(WORKFLOW.c.wake_at)
        .limit(LIMIT)
        .with_for_update(key_share=True, skip_locked=True, of=WORKFLOW),
        "due",
    )
    woken = (
        sa.update(WORKFLOW)
        .where(WORKFLOW.c.id == due.c.id)
        .values(
            status=WorkflowStatus.PENDING,
            enqueued_at=pg.statement_timestamp(),
            wake_at=sa.null(),
            awaits=sa.null(),
        )
        .returning(WORKFLOW.c.id)
    )
    return woken, sa.select(due.c.id)


_FINISH = _finish_statement()
_LOCK = sa.select(owned(table("batch", FENCE), skip_locked=False).c.id)
_RELEASE = _release_statement(skip_locked=False)
_RELEASE_UNLOCKED = _release_statement(skip_locked=True)
_FINISHED_BY = _finished_by_statement()
_STILL_OWNED = _still_owned_statement()
_OUTCOME = sa.select(
    WORKFLOW.c.id, WORKFLOW.c.name, WORKFLOW.c.status, sa.cast(WORKFLOW.c.output, Text), WORKFLOW.c.error
).where(IS_WANTED)
_WAKE_DUE, _WAKE_PART, _DUE = divided(_wake_due_statement)
