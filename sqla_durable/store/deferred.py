"""The statements that start deferred children: those of a map with `max_concurrency` that wait for others to end.

Their parent's attempt starts them as others end. Those of a parent that goes on without them, because it has ended,
was continued as new or rewound, are orphans: the workers start them, asked by a notice, `#orphans`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY

from sqla_durable.models.base import Text, WorkflowStatus
from sqla_durable.store.inbox import ORPHANS, insert_orphan_notices, is_deferred, is_undelivered
from sqla_durable.store.records import Checkpoint
from sqla_durable.store.statements import (
    ALL,
    BEGINNING,
    LIMIT,
    SIGNAL,
    STEP,
    WORKFLOW,
    Condition,
    Connectable,
    Restriction,
    Statement,
    Subset,
    execute,
    integer,
    is_among,
    materialized,
    parameter,
    pg,
    scalars,
    subset_forms,
    text_literal,
)
from sqla_durable.store.steps import given_parameters, is_owned

_MOST_PARENTS = 100


def start_some(connectable: Connectable, *, ids: Sequence[UUID], limit: int) -> list[UUID]:
    """Enqueue deferred children in the order of their ids; return these. Rows that others have locked are skipped."""
    return list(scalars(connectable, _START_SOME, {"ids": list(ids), "limit": limit}))


def start_rest(connectable: Connectable, checkpoint: Checkpoint, *, ids: Sequence[UUID]) -> None:
    """Enqueue all of these children that are deferred, waiting for their locks; a no-op if the attempt is lost."""
    execute(connectable, _START_REST, given_parameters(checkpoint) | {"ids": list(ids)})


def start_all_of(connectable: Connectable, parents: Sequence[UUID]) -> None:
    """Enqueue the deferred children of these workflows, whose rows are locked."""
    execute(connectable, _START_ALL_OF, {"ids": list(parents)})


def start_orphans(connectable: Connectable, *, limit: int, since: str = BEGINNING, subset: Subset = ALL) -> int:
    """Enqueue orphans, at most `limit` of each parent; return how many.

    Those whose rows others have locked are enqueued another time. Notices from before `since` are skipped.
    """
    parameters = {"limit": limit, "since": since, **subset.parameters}
    return len(execute(connectable, subset.form_of(_START_ORPHANS, _START_SOME_ORPHANS), parameters).all())


def parents_of_orphans(
    connectable: Connectable, *, limit: int, since: str = BEGINNING, subset: Subset = ALL
) -> list[UUID]:
    """Return the ids of the parents whose orphans this would enqueue."""
    return subset.find_ids(connectable, _PARENTS_OF_ORPHANS, {"limit": limit, "since": since})


def report_orphans(connectable: Connectable, parents: Sequence[UUID]) -> None:
    """Leave notices that deferred children of these workflows may be orphans."""
    execute(connectable, _REPORT_ORPHANS, {"ids": list(parents)})


def _enqueue_statement(first: Any) -> Any:
    return (
        sa.update(WORKFLOW)
        .where(WORKFLOW.c.id == first.c.id, is_deferred())
        .values(status=WorkflowStatus.PENDING, enqueued_at=pg.statement_timestamp())
        .returning(WORKFLOW.c.id)
    )


def _start_some_statement() -> Any:
    first = _deferred_children().limit(LIMIT)
    return _enqueue_statement(
        materialized(first.with_for_update(key_share=True, skip_locked=True, of=WORKFLOW), "first")
    )


def _start_rest_statement() -> Any:
    owner = WORKFLOW.alias("owner")
    owned = sa.select(owner.c.id).where(*is_owned(owner)).exists()
    return _enqueue_statement(
        materialized(_deferred_children().where(owned).with_for_update(key_share=True, of=WORKFLOW), "first")
    )


def _start_all_of_statement() -> Any:
    parents = sa.func.any(parameter("ids", ARRAY(sa.UUID())))
    return _enqueue_statement(
        materialized(sa.select(WORKFLOW.c.id).where(WORKFLOW.c.parent_id == parents, is_deferred()), "first")
    )


def _deferred_children() -> sa.Select[tuple[UUID]]:
    given = is_among(WORKFLOW.c.id)
    return sa.select(WORKFLOW.c.id).where(given, is_deferred()).order_by(WORKFLOW.c.id)


def _start_orphans_statement(within: Restriction) -> tuple[Any, Any]:
    left = materialized(
        sa.select(SIGNAL.c.workflow_id, SIGNAL.c.id)
        .where(is_undelivered(), SIGNAL.c.name == text_literal(ORPHANS), within(SIGNAL.c.workflow_id))
        .order_by(SIGNAL.c.created_at)
        .limit(integer(_MOST_PARENTS))
        .with_for_update(key_share=True, skip_locked=True),
        "left",
    )
    child = WORKFLOW.alias("child")
    known = _recorded_children(left).cte("known")
    is_known = sa.cast(child.c.id, Text).in_(sa.select(known.c.child_id))
    forgotten = sa.or_(_has_ended(child), ~is_known)
    orphans = sa.select(child.c.id).where(child.c.parent_id == left.c.workflow_id, is_deferred(child), forgotten)
    some = (
        orphans.order_by(child.c.id)
        .limit(LIMIT)
        .with_for_update(key_share=True, skip_locked=True, of=child)
        .lateral("some")
    )
    first = materialized(sa.select(some.c.id).select_from(left.join(some, sa.true())), "first")
    rest = orphans.where(child.c.id.not_in(sa.select(first.c.id))).correlate(left).exists()
    same = sa.and_(SIGNAL.c.workflow_id == left.c.workflow_id, SIGNAL.c.id == left.c.id)
    gone = sa.delete(SIGNAL).where(same, ~rest).returning(SIGNAL.c.id).cte("gone")
    return _enqueue_statement(first).add_cte(gone), sa.select(left.c.workflow_id)


def _has_ended(child: sa.FromClause) -> Condition:
    """Return whether a child's parent has ended, and so will not start it."""
    parent = WORKFLOW.alias("parent")
    ended = sa.select(parent.c.id).where(parent.c.id == child.c.parent_id, parent.c.finished_at.is_not(None))
    return ended.correlate(child).exists()


def _recorded_children(left: sa.CTE) -> Any:
    """Select the children that the parents have recorded as started.

    By their ids: a parent that was rewound or continued as new may have started others under the same key since.
    """
    listed = sa.case((pg.jsonb_typeof(STEP.c.output) == text_literal("array"), STEP.c.output))
    children = pg.jsonb_array_elements_text(listed).table_valued("value").render_derived(name="started")
    starts = sa.and_(STEP.c.workflow_id == left.c.workflow_id, STEP.c.name.startswith(text_literal("start:")))
    known = sa.select(children.c.value.label("child_id")).select_from(left.join(STEP, starts).join(children, sa.true()))
    return known.where(children.c.value.is_not(None))


def _report_orphans_statement() -> Any:
    given = sa.select(WORKFLOW.c.id).where(is_among(WORKFLOW.c.id))
    return insert_orphan_notices(given.cte("parents"))


_START_SOME = Statement(_start_some_statement)
_START_REST = Statement(_start_rest_statement)
_START_ALL_OF = Statement(_start_all_of_statement)
_START_ORPHANS, _START_SOME_ORPHANS, _PARENTS_OF_ORPHANS = subset_forms(Statement, _start_orphans_statement)
_REPORT_ORPHANS = Statement(_report_orphans_statement)
