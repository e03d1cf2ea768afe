"""The statements on trees of workflows: a workflow with its children, theirs, and so on, down to what is detached.

A tree is followed through whatever is in it: what is finished may have children that go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sqla_durable.models import Workflow
from sqla_durable.models.status import FINISHED, WorkflowStatus
from sqla_durable.store._rows import (
    COMPENSATES,
    REQUESTED,
    WORKFLOW,
    Condition,
    among,
    bind_arguments,
    next_attempt,
    pg,
    refresh_known,
    scalars,
    status,
    undoes,
)
from sqla_durable.store.held import leaving, release_of
from sqla_durable.store.selection import Wanted, hold, known, lock, look_again, still_wanted
from sqla_durable.store.signals import END_COLUMNS, end_notices

_COMPENSATION = {
    "cancellation": REQUESTED,
    "status": WorkflowStatus.PENDING,
    "attempt": next_attempt(),
    "token": sa.null(),
    "worker_id": sa.null(),
    "wake_at": sa.null(),
    "awaits": sa.null(),
    "enqueued_at": pg.statement_timestamp(),
}
_UNFINISHED = sorted(set(WorkflowStatus) - FINISHED)


def hold_unfinished(session: Session, wanted: Wanted) -> tuple[list[UUID], bool]:
    """Lock what is unfinished of the trees under those of the workflows that are; give the ids that are to change.

    Returns:
        The ids, and whether they are all: False if an attempt has started another child before its row was locked.
        To lock that one now, behind rows whose ids come after its own, may deadlock with whoever locks in the order of
        ids: let go of the rows, and begin again.
    """
    held = lock(session, _unfinished_of(among(WORKFLOW.c.id, wanted.ids)))
    if not held:
        return [], True
    meant = _unfinished_of(sa.and_(among(WORKFLOW.c.id, still_wanted(session, wanted)), among(WORKFLOW.c.id, held)))
    found = list(scalars(session, sa.select(WORKFLOW.c.id).where(meant).order_by(WORKFLOW.c.id)))
    return found, set(found) <= set(held)


def cancel(session: Session, held: Sequence[UUID], wanted: Wanted) -> bool:
    """Cancel the workflows, whose rows are locked, and tell the parents that may wait for them.

    Returns:
        Whether some of them are enqueued, to undo what they did.
    """
    enqueued = False
    outcome = {
        "status": WorkflowStatus.CANCELLED,
        "finished_at": pg.statement_timestamp(),
        "wake_at": sa.null(),
        "awaits": sa.null(),
    }
    if held:
        # What may have something to undo is enqueued, for a worker that has the code to undo it.
        undone = sa.and_(among(WORKFLOW.c.id, held), WORKFLOW.c.cancellation == COMPENSATES)
        enqueue = sa.update(WORKFLOW).where(undone).values(_COMPENSATION).returning(WORKFLOW.c.id)
        enqueued = bool(scalars(session, enqueue).all())
        at_once = sa.and_(among(WORKFLOW.c.id, held), WORKFLOW.c.cancellation.is_(None))
        ended = sa.update(WORKFLOW).where(at_once).values(outcome).returning(*END_COLUMNS).cte("ended")
        notices = *end_notices(ended), leaving(ended).cte("left")
        scalars(session, sa.select(ended.c.id).add_cte(*notices)).all()
    refresh_known(session, known(wanted, held))
    return enqueued


def hold_cancelled_with(session: Session, wanted: Wanted, condition: Condition) -> list[UUID]:
    """Lock those of the workflows that fit a condition, and what of their trees was cancelled together with them."""
    cancelled = sa.and_(WORKFLOW.c.status == status(WorkflowStatus.CANCELLED), is_not_undone())

    def meant(roots: Condition) -> Condition:
        tree = _tree(sa.and_(roots, condition), WORKFLOW.c.finished_at.label("moment"))
        together = sa.and_(cancelled, WORKFLOW.c.finished_at == tree.c.moment)
        found = sa.select(WORKFLOW.c.id).join(tree, tree.c.id == WORKFLOW.c.id).where(sa.or_(tree.c.is_root, together))
        return WORKFLOW.c.id.in_(found)

    return hold(session, wanted, meant)


def is_not_undone() -> Condition:
    """Tell what was cancelled from what has undone besides what it did: nothing can go on from there."""
    return WORKFLOW.c.cancellation.is_distinct_from(REQUESTED)


def hold_deletable(session: Session, wanted: Wanted) -> list[UUID]:
    """Lock the trees of those of the workflows whose trees are finished to the last one; give the ids of all of it."""
    deletable = _deletable(among(WORKFLOW.c.id, wanted.ids))
    child = WORKFLOW.alias("left")
    # A detached child is written too: it loses its parent.
    written = sa.union(deletable, sa.select(child.c.id).where(child.c.parent_id.in_(deletable)))
    held = lock(session, WORKFLOW.c.id.in_(written))
    if not held:
        return []
    still = sa.and_(among(WORKFLOW.c.id, still_wanted(session, wanted)), among(WORKFLOW.c.id, held))
    return look_again(session, held, WORKFLOW.c.id.in_(_deletable(still)))


def erase(session: Session, ids: Sequence[UUID]) -> None:
    """Delete the workflows with everything that is theirs, and tell the session of those that it knows.

    Children that they hold, which are detached, are let go: nobody could do that later.
    """
    release_of(session, ids)
    statement = sa.delete(Workflow).where(among(WORKFLOW.c.id, ids))
    options = {"synchronize_session": "fetch"}
    session.execute(statement, execution_options=options, bind_arguments=bind_arguments())


def _unfinished_of(roots: Condition) -> Condition:
    """Return the condition of what a cancel changes: unfinished workflows, without those that compensate already."""
    open_ones = sa.or_(*(WORKFLOW.c.status == status(each) for each in _UNFINISHED))
    tree = _tree(sa.and_(roots, open_ones))
    return sa.and_(WORKFLOW.c.id.in_(sa.select(tree.c.id)), open_ones, ~undoes())


def _deletable(roots: Condition) -> sa.Select[tuple[UUID]]:
    """Give the trees that are finished, except those whose parent may still ask for their outcome."""
    parent, member = WORKFLOW.alias("parent"), WORKFLOW.alias("member")
    asked = sa.select(parent.c.id).where(parent.c.id == WORKFLOW.c.parent_id, parent.c.finished_at.is_(None)).exists()
    free = sa.or_(WORKFLOW.c.detached, ~asked)
    tree = _tree(sa.and_(roots, WORKFLOW.c.finished_at.is_not(None), free), WORKFLOW.c.id.label("root_id"))
    going_on = sa.select(tree.c.root_id).join(member, member.c.id == tree.c.id).where(member.c.finished_at.is_(None))
    return sa.select(tree.c.id).where(tree.c.root_id.not_in(going_on))


def _tree(roots: Condition, *carried: sa.Label[Any]) -> sa.CTE:
    """Give the trees under the roots, with a column of the root in each row."""
    tree = sa.select(WORKFLOW.c.id, sa.true().label("is_root"), *carried).where(roots).cte("tree", recursive=True)
    child = WORKFLOW.alias("child")
    below = sa.select(child.c.id, sa.false(), *(tree.c[each.name] for each in carried))
    return tree.union(below.join(tree, child.c.parent_id == tree.c.id).where(~child.c.detached))
