"""The statements on held children: those of a map with `max_concurrency` that wait for others of it to end.

They are let go by their parent's attempt, as others end. What a parent leaves behind that goes on without them, because
it has ended, begun anew or been rewound, is let go by the workers: a row of the engine's own, `#left`, asks for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY

from sqla_durable.models.column_types import Text
from sqla_durable.models.status import WorkflowStatus
from sqla_durable.store._rows import (
    BEGINNING,
    LIMIT,
    ONE,
    SIGNAL,
    STEP,
    WORKFLOW,
    Checkpoint,
    Condition,
    Connectable,
    among,
    execute,
    has_status,
    integer,
    materialized,
    parameter,
    pg,
    scalars,
    words,
)
from sqla_durable.store.parts import WHOLE, Part, Within, divided
from sqla_durable.store.signals import LEFT, is_new, noting
from sqla_durable.store.steps import given_row, mine

_MOST_LEAVERS = 100


def release(connectable: Connectable, *, ids: Sequence[UUID], limit: int) -> list[UUID]:
    """Let held children go, the first ones first; return their ids. Those whose rows somebody holds are passed over."""
    return list(scalars(connectable, _RELEASE, {"ids": list(ids), "limit": limit}))


def release_rest(connectable: Connectable, checkpoint: Checkpoint, *, ids: Sequence[UUID]) -> None:
    """Let all that are held of these children go; wait for whoever holds a row. Nothing, if the attempt is lost."""
    execute(connectable, _RELEASE_REST, given_row(checkpoint) | {"ids": list(ids)})


def release_of(connectable: Connectable, parents: Sequence[UUID]) -> None:
    """Let go what these workflows hold, whose children's rows are locked."""
    execute(connectable, _RELEASE_OF, {"ids": list(parents)})


def release_left(connectable: Connectable, *, limit: int, since: str = BEGINNING, part: Part = WHOLE) -> int:
    """Let go what parents have left behind, at most `limit` of each; give how many.

    What does not go now, because somebody holds its row, goes another time. What was left before `since` is passed
    over.
    """
    parameters = {"limit": limit, "since": since, **part.parameters}
    return len(execute(connectable, part.choose(_RELEASE_LEFT, _RELEASE_PART), parameters).all())


def leavers(connectable: Connectable, *, limit: int, since: str = BEGINNING, part: Part = WHOLE) -> list[UUID]:
    """Return the ids of the parents whose children this would let go."""
    return part.found(connectable, _LEAVERS, {"limit": limit, "since": since})


def leave(connectable: Connectable, parents: Sequence[UUID]) -> None:
    """Ask that what these workflows hold is let go, as far as they will not do it themselves."""
    execute(connectable, _LEAVE, {"ids": list(parents)})


def leaving(parents: sa.FromClause) -> Any:
    """Insert the same for those of a statement's workflows that hold something."""
    # LIMIT: probed by the index of children, whatever the planner believes of the number of parents.
    holds = sa.select(WORKFLOW.c.id).where(WORKFLOW.c.parent_id == parents.c.id, is_held()).limit(ONE).lateral("holds")
    return noting(sa.select(parents.c.id, words(LEFT), sa.true()).select_from(parents.join(holds, sa.true())))


def is_held(table: sa.FromClause = WORKFLOW) -> Condition:
    """Tell a child that waits for others to end."""
    return sa.and_(
        has_status(table, WorkflowStatus.SUSPENDED),
        table.c.wake_at.is_(None),
        table.c.awaits.is_(None),
        table.c.started_at.is_(None),
    )


def _let_go(first: Any) -> Any:
    return (
        sa.update(WORKFLOW)
        .where(WORKFLOW.c.id == first.c.id, is_held())
        .values(status=WorkflowStatus.PENDING, enqueued_at=pg.statement_timestamp())
        .returning(WORKFLOW.c.id)
    )


def _release_statement() -> Any:
    first = _held_ones().limit(LIMIT)
    return _let_go(materialized(first.with_for_update(key_share=True, skip_locked=True, of=WORKFLOW), "first"))


def _release_rest_statement() -> Any:
    owner = WORKFLOW.alias("owner")
    owned = sa.select(owner.c.id).where(*mine(owner)).exists()
    return _let_go(materialized(_held_ones().where(owned).with_for_update(key_share=True, of=WORKFLOW), "first"))


def _release_of_statement() -> Any:
    parents = sa.func.any(parameter("ids", ARRAY(sa.UUID())))
    return _let_go(materialized(sa.select(WORKFLOW.c.id).where(WORKFLOW.c.parent_id == parents, is_held()), "first"))


def _held_ones() -> sa.Select[tuple[UUID]]:
    given = among(WORKFLOW.c.id)
    return sa.select(WORKFLOW.c.id).where(given, is_held()).order_by(WORKFLOW.c.id)


def _release_left_statement(within: Within) -> tuple[Any, Any]:
    left = materialized(
        sa.select(SIGNAL.c.workflow_id, SIGNAL.c.id)
        .where(is_new(), SIGNAL.c.name == words(LEFT), within(SIGNAL.c.workflow_id))
        .order_by(SIGNAL.c.created_at)
        .limit(integer(_MOST_LEAVERS))
        .with_for_update(key_share=True, skip_locked=True),
        "left",
    )
    child = WORKFLOW.alias("child")
    known = _known_statement(left).cte("known")
    is_known = sa.cast(child.c.id, Text).in_(sa.select(known.c.child_id))
    forgotten = sa.or_(_has_ended(child), ~is_known)
    orphans = sa.select(child.c.id).where(child.c.parent_id == left.c.workflow_id, is_held(child), forgotten)
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
    return _let_go(first).add_cte(gone), sa.select(left.c.workflow_id)


def _has_ended(child: sa.FromClause) -> Condition:
    """Tell that the parent will not let it go, because it has ended."""
    parent = WORKFLOW.alias("parent")
    ended = sa.select(parent.c.id).where(parent.c.id == child.c.parent_id, parent.c.finished_at.is_not(None))
    return ended.correlate(child).exists()


def _known_statement(left: sa.CTE) -> Any:
    """Give the children that the parents know to have started: of one key, only those that were started last.

    By their ids: a parent that was rewound or has begun anew may have started others under the same key since.
    """
    listed = sa.case((pg.jsonb_typeof(STEP.c.output) == words("array"), STEP.c.output))
    children = pg.jsonb_array_elements_text(listed).table_valued("value").render_derived(name="started")
    starts = sa.and_(STEP.c.workflow_id == left.c.workflow_id, STEP.c.name.startswith(words("start:")))
    known = sa.select(children.c.value.label("child_id")).select_from(left.join(STEP, starts).join(children, sa.true()))
    return known.where(children.c.value.is_not(None))


def _leave_statement() -> Any:
    given = sa.select(WORKFLOW.c.id).where(among(WORKFLOW.c.id))
    return leaving(given.cte("parents"))


_RELEASE = _release_statement()
_RELEASE_REST = _release_rest_statement()
_RELEASE_OF = _release_of_statement()
_RELEASE_LEFT, _RELEASE_PART, _LEAVERS = divided(_release_left_statement)
_LEAVE = _leave_statement()
