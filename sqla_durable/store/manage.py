"""The statements of operators: resume, retry, rewind; cancel and delete, which concern the tree under a workflow.

The workflows are found and locked by `selecting`. A tree is followed through whatever is in it, down to what is
detached: what is finished may have children that go on. Copies are made by `forks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sqla_durable.definitions.checks import escape_key
from sqla_durable.errors import ArgumentError
from sqla_durable.models import Workflow
from sqla_durable.models.base import FINISHED, StepStatus, Text, WorkflowStatus
from sqla_durable.store.deferred import report_orphans, start_all_of
from sqla_durable.store.failures import REFUSED_TYPE, TIMEOUT_TYPE
from sqla_durable.store.inbox import EARLIER, END_COLUMNS, REFUSED, end_notices, insert_orphan_notices
from sqla_durable.store.places import KEY_UNLESS_FAILED
from sqla_durable.store.selecting import Selection, ids_to_refresh, lock, lock_selected, still_meant, still_wanted
from sqla_durable.store.statements import (
    COMPENSATES,
    EVENT,
    REQUESTED,
    SIGNAL,
    STEP,
    STREAM_ITEM,
    WORKFLOW,
    Condition,
    Connectable,
    Expression,
    bind_arguments,
    execute,
    is_among,
    must_compensate,
    next_attempt,
    pg,
    refresh_loaded,
    reset_cancellation,
    scalars,
    status_literal,
    text_literal,
)
from sqla_durable.store.workers import MAX_ATTEMPTS_TYPE

_SHOWN_KEYS = 20


def workers_of(connectable: Connectable, locked: Sequence[UUID]) -> set[UUID]:
    """Return the workers that are executing these workflows, whose rows are locked."""
    running = sa.and_(is_among(WORKFLOW.c.id, locked), WORKFLOW.c.status == status_literal(WorkflowStatus.RUNNING))
    return set(scalars(connectable, sa.select(WORKFLOW.c.worker_id).where(running).distinct())) if locked else set()


_STOPPED = sa.and_(
    WORKFLOW.c.token.is_(None),  # one that failed by itself keeps its token, whatever its error
    WORKFLOW.c.error["type"].astext.in_(text_literal(each) for each in (MAX_ATTEMPTS_TYPE, REFUSED_TYPE, TIMEOUT_TYPE)),
)
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


def resume(session: Session, wanted: Selection) -> list[UUID]:
    """Enqueue those of the workflows that were cancelled or stopped for crashes or deadlines; return their ids.

    With those of their trees that were cancelled with them. Their histories stay, and their crashes are reset. Waits
    for the locks of their rows. Not those whose keys newer ones have.
    """
    locked = lock_cancelled_with(session, wanted, is_stopped(), keeps_key())
    return _enqueue(session, wanted, locked)


def retry(session: Session, wanted: Selection) -> list[UUID]:
    """Enqueue those of the workflows that failed by themselves, without what made them fail; return their ids.

    Not those with a saga: their recorded steps may have been compensated. Nor those whose keys newer ones have.
    """
    locked = lock_selected(session, wanted, lambda meant: sa.and_(meant, is_retriable()))
    if locked:
        gone = sa.and_(_of(STEP, locked), STEP.c.workflow_id == WORKFLOW.c.id, _made_it_fail())
        execute(session, sa.delete(STEP).where(gone))
        _unconsume(session, locked)
    return _enqueue(session, wanted, locked)


def rewind(session: Session, wanted: Selection, *, to_step: str) -> tuple[list[UUID], set[UUID]]:
    """Enqueue the workflows without that step and what they called after it.

    Not those that are finished and whose keys newer ones have.

    Returns:
        The ids, and the workers that were executing some of them.

    Raises:
        ArgumentError: one of them has no record of that step; nothing is changed.
    """
    locked = lock_selected(session, wanted, lambda meant: sa.and_(meant, is_rewindable()))
    refuse_unrecorded(session, locked, [to_step], verb="rewound")
    workers = workers_of(session, locked)
    if locked:
        cut = STEP.alias("cut")
        here = sa.and_(cut.c.workflow_id == STEP.c.workflow_id, cut.c.key == sa.literal(to_step, Text()))
        execute(session, sa.delete(STEP).where(_of(STEP, locked), here, STEP.c.position >= cut.c.position))
        _delete_published(session, locked)
        _unconsume(session, locked)
        report_orphans(session, locked)
    return _enqueue(session, wanted, locked, cancellation=reset_cancellation()), workers


def refuse_unrecorded(session: Session, ids: Sequence[UUID], keys: Sequence[str], *, verb: str) -> None:
    """Raise if one of the workflows has no record of one of the steps.

    Raises:
        ArgumentError: with the workflow, the step, and the steps that it has.
    """
    recorded: dict[UUID, list[str]] = {each: [] for each in ids}
    for row in execute(
        session, sa.select(STEP.c.workflow_id, STEP.c.key).where(_of(STEP, ids)).order_by(STEP.c.position)
    ):
        recorded[row.workflow_id].append(row.key)
    for workflow_id, found in recorded.items():
        missing = [key for key in keys if key not in found]
        if missing:
            more = ", …" if len(found) > _SHOWN_KEYS else ""
            if (stored := escape_key(missing[0])) in found:
                raise ArgumentError(
                    f"workflow {workflow_id} has no record of a step {missing[0]!r}, but of {stored!r}: so a step key "
                    f"with `#` or `/` is stored. Nothing was {verb}: pass the key as in `Step.key`."
                )
            raise ArgumentError(
                f"workflow {workflow_id} has no record of a step {missing[0]!r}: it has "
                f"{', '.join(map(repr, found[:_SHOWN_KEYS])) or 'none'}{more}. Nothing was {verb}: pass the key of a "
                "recorded step, and only workflows that have it."
            )


def renewed_deadline() -> Expression:
    """Return the deadline of a workflow that is enqueued again: one that has passed would end it at once."""
    now = pg.statement_timestamp()
    return sa.case((WORKFLOW.c.deadline_at <= now, now + WORKFLOW.c.timeout), else_=WORKFLOW.c.deadline_at)


def lock_unfinished_trees(connectable: Connectable, wanted: Selection) -> tuple[list[UUID], bool]:
    """Lock the unfinished members of the trees of unfinished workflows; return the ids that are to change.

    Returns:
        The ids, and whether they are all: False if an attempt has started another child before its row was locked.
        To lock that one now, behind rows whose ids come after its own, may deadlock with statements that lock in the
        order of ids: unlock the rows, and start over.
    """
    locked = lock(connectable, _unfinished_of(is_among(WORKFLOW.c.id, wanted.ids)))
    if not locked:
        return [], True
    meant = _unfinished_of(
        sa.and_(is_among(WORKFLOW.c.id, still_wanted(connectable, wanted)), is_among(WORKFLOW.c.id, locked))
    )
    found = list(scalars(connectable, sa.select(WORKFLOW.c.id).where(meant).order_by(WORKFLOW.c.id)))
    return found, set(found) <= set(locked)


def lock_growing_trees(connectable: Connectable, wanted: Selection) -> list[UUID]:
    """Lock them all however they grow, and unlock nothing: what is locked starts no more children.

    Returns:
        The ids that are to change.
    """
    while True:
        locked, is_complete = lock_unfinished_trees(connectable, wanted)
        if is_complete:
            return locked


def cancel(session: Session, locked: Sequence[UUID], wanted: Selection) -> bool:
    """Cancel the workflows, whose rows are locked, and leave notices to the parents that may wait for them.

    Returns:
        Whether some of them are enqueued, to compensate.
    """
    enqueued = cancel_locked(session, locked)
    refresh_loaded(session, ids_to_refresh(wanted, locked))
    return enqueued


def cancel_locked(connectable: Connectable, locked: Sequence[UUID]) -> bool:
    """Do so without the session's records."""
    if not locked:
        return False
    outcome = {
        "status": WorkflowStatus.CANCELLED,
        "finished_at": pg.statement_timestamp(),
        "wake_at": sa.null(),
        "awaits": sa.null(),
    }
    # What has a saga is enqueued, for a worker that has the code to compensate.
    undone = sa.and_(is_among(WORKFLOW.c.id, locked), WORKFLOW.c.cancellation == COMPENSATES)
    enqueue = sa.update(WORKFLOW).where(undone).values(_COMPENSATION).returning(WORKFLOW.c.id)
    enqueued = bool(scalars(connectable, enqueue).all())
    at_once = sa.and_(is_among(WORKFLOW.c.id, locked), WORKFLOW.c.cancellation.is_(None))
    ended = sa.update(WORKFLOW).where(at_once).values(outcome).returning(*END_COLUMNS).cte("ended")
    notices = *end_notices(ended), insert_orphan_notices(ended).cte("left")
    scalars(connectable, sa.select(ended.c.id).add_cte(*notices)).all()
    return enqueued


def lock_cancelled_with(
    session: Session, wanted: Selection, condition: Condition, of_each: Condition | None = None
) -> list[UUID]:
    """Lock those of the workflows that fit a condition, and what of their trees was cancelled together with them.

    Each of these fits the other condition too, if there is one.
    """
    cancelled = sa.and_(WORKFLOW.c.status == status_literal(WorkflowStatus.CANCELLED), is_not_compensated())

    def meant(roots: Condition) -> Condition:
        tree = tree_under(sa.and_(roots, condition), WORKFLOW.c.finished_at.label("moment"))
        together = sa.and_(cancelled, WORKFLOW.c.finished_at == tree.c.moment)
        found = sa.select(WORKFLOW.c.id).join(tree, tree.c.id == WORKFLOW.c.id).where(sa.or_(tree.c.is_root, together))
        return WORKFLOW.c.id.in_(found) if of_each is None else sa.and_(WORKFLOW.c.id.in_(found), of_each)

    return lock_selected(session, wanted, meant)


def is_stopped() -> Condition:
    """Return whether a workflow was cancelled, or stopped for crashes or a deadline: then it can be resumed."""
    stopped = sa.and_(WORKFLOW.c.status == status_literal(WorkflowStatus.FAILED), _STOPPED)
    cancelled = sa.and_(WORKFLOW.c.status == status_literal(WorkflowStatus.CANCELLED), is_not_compensated())
    return sa.or_(cancelled, stopped)


def is_retriable() -> Condition:
    """Return whether a workflow has failed by itself, and can be retried."""
    failed = sa.and_(WORKFLOW.c.status == status_literal(WorkflowStatus.FAILED), sa.not_(_STOPPED))
    return sa.and_(failed, WORKFLOW.c.cancellation.is_(None), keeps_key())


def is_rewindable() -> Condition:
    """Return whether a workflow can be rewound: it is not finished, or has its key still."""
    return sa.or_(WORKFLOW.c.finished_at.is_(None), keeps_key())


def is_cancellable() -> Condition:
    """Return whether a workflow is unfinished, and does not compensate already."""
    return sa.and_(sa.or_(*(WORKFLOW.c.status == status_literal(each) for each in _UNFINISHED)), ~must_compensate())


def names_in_trees(connectable: Connectable, ids: Sequence[UUID]) -> dict[UUID, str]:
    """Return the names of the workflows and of what is under them, for the log of their deletion."""
    tree = tree_under(is_among(WORKFLOW.c.id, ids))
    rows = execute(connectable, sa.select(WORKFLOW.c.id, WORKFLOW.c.name).join(tree, tree.c.id == WORKFLOW.c.id))
    return {row.id: row.name for row in rows}


def keeps_key() -> Condition:
    """Return whether no newer workflow has taken the key: then it can be finished, and enqueued again."""
    return WORKFLOW.c.former_key.is_(None)


def is_not_compensated() -> Condition:
    """Return whether a cancelled workflow has not compensated: one that has cannot go on."""
    return WORKFLOW.c.cancellation.is_distinct_from(REQUESTED)


def lock_deletable_trees(session: Session, wanted: Selection) -> list[UUID]:
    """Lock the trees of which every member is finished; return the ids of all members."""
    deletable = _deletable_trees(is_among(WORKFLOW.c.id, wanted.ids))
    child = WORKFLOW.alias("left")
    # A detached child is written too: it loses its parent.
    written = sa.union(deletable, sa.select(child.c.id).where(child.c.parent_id.in_(deletable)))
    locked = lock(session, WORKFLOW.c.id.in_(written))
    if not locked:
        return []
    still = sa.and_(is_among(WORKFLOW.c.id, still_wanted(session, wanted)), is_among(WORKFLOW.c.id, locked))
    return still_meant(session, locked, WORKFLOW.c.id.in_(_deletable_trees(still)))


def delete(session: Session, ids: Sequence[UUID]) -> None:
    """Delete the workflows with all their rows, and expunge those that the session has loaded.

    Their deferred children, which are detached, are enqueued: nothing could do that later.
    """
    start_all_of(session, ids)
    statement = sa.delete(Workflow).where(is_among(WORKFLOW.c.id, ids))
    options = {"synchronize_session": "fetch"}
    session.execute(statement, execution_options=options, bind_arguments=bind_arguments())


def _enqueue(session: Session, wanted: Selection, locked: Sequence[UUID], **more: Any) -> list[UUID]:
    """Enqueue the workflows, whose rows are locked, as their next attempts; with values of more columns."""
    again = {
        "status": WorkflowStatus.PENDING,
        "attempt": next_attempt(),
        "crashes": 0,
        "token": sa.null(),
        "worker_id": sa.null(),
        "output": sa.null(),
        "error": sa.null(),
        "enqueued_at": pg.statement_timestamp(),
        "wake_at": sa.null(),
        "awaits": sa.null(),
        "deadline_at": renewed_deadline(),
        "finished_at": sa.null(),
        "place": _place_again(),
        **more,
    }
    if locked:
        scalars(
            session, sa.update(WORKFLOW).where(is_among(WORKFLOW.c.id, locked)).values(again).returning(WORKFLOW.c.id)
        ).all()
    refresh_loaded(session, ids_to_refresh(wanted, locked))
    return list(locked)


def _place_again() -> Expression:
    """Return the place of a workflow that is enqueued again: what had finished has none, unless its key waits."""
    waits_for_it = WORKFLOW.c.place == KEY_UNLESS_FAILED
    return sa.case((sa.or_(WORKFLOW.c.finished_at.is_(None), waits_for_it), WORKFLOW.c.place))


def _of(table: sa.FromClause, ids: Sequence[UUID]) -> Condition:
    return is_among(table.c.workflow_id, ids)


def _made_it_fail() -> Condition:
    """Return which steps a failed workflow executes again: its failed ones, except those that it recovered from.

    It has recovered from a failed step if it began another one afterwards, which succeeded; unless it failed with that
    step's error all the same, after cleaning up. A step that was between two tries starts with its first one.
    """
    failed = STEP.c.status == status_literal(StepStatus.FAILED)
    later = STEP.alias("later")
    went_on = sa.select(later.c.key).where(
        later.c.workflow_id == STEP.c.workflow_id,
        later.c.status == status_literal(StepStatus.SUCCEEDED),
        later.c.position > STEP.c.position,
        later.c.started_at >= STEP.c.finished_at,
    )
    raised = sa.and_(failed, sa.or_(~went_on.exists(), STEP.c.position == _last_shown_in_error()))
    return sa.or_(raised, STEP.c.status == status_literal(StepStatus.RETRYING))


def _last_shown_in_error() -> Any:
    """Return the position of the last failed step whose error is the workflow's, its cause, or one of its group."""
    each = STEP.alias("each")
    kind = pg.split_part(each.c.error["type"].astext, ":", 2, type_=Text())
    message = sa.func.coalesce(each.c.error["message"].astext, text_literal(""))
    line = sa.case((message == text_literal(""), kind), else_=kind + text_literal(": ") + message)
    shown = pg.strpos(sa.func.coalesce(WORKFLOW.c.error["traceback"].astext, text_literal("")), line) > 0
    same = sa.and_(
        each.c.error["type"] == WORKFLOW.c.error["type"], each.c.error["message"] == WORKFLOW.c.error["message"]
    )
    of_failed = sa.and_(each.c.workflow_id == WORKFLOW.c.id, each.c.status == status_literal(StepStatus.FAILED))
    last: sa.Select[Any] = sa.select(pg.max(each.c.position)).where(of_failed, sa.or_(same, shown))
    return last.correlate(WORKFLOW).scalar_subquery()


def _delete_published(session: Session, locked: Sequence[UUID]) -> None:
    """Delete what steps without a record have published; not what steps of earlier rounds have."""
    began = sa.select(WORKFLOW.c.continued_at)
    for shown in (EVENT, STREAM_ITEM):
        began_at = began.where(WORKFLOW.c.id == shown.c.workflow_id).scalar_subquery()
        this_round = sa.or_(began_at.is_(None), shown.c.created_at >= began_at)
        execute(session, sa.delete(shown).where(_of(shown, locked), _has_no_step(shown, shown.c.step_key), this_round))


def _unconsume(session: Session, locked: Sequence[UUID]) -> None:
    """Return to the inbox what steps without a record have consumed."""
    gone = sa.and_(
        _has_no_step(SIGNAL, SIGNAL.c.consumed_by),
        SIGNAL.c.consumed_by.not_in([text_literal(REFUSED), text_literal(EARLIER)]),
    )
    consumed = sa.update(SIGNAL).where(_of(SIGNAL, locked), gone)
    execute(session, consumed.values(consumed_by=sa.null()))


def _has_no_step(table: sa.FromClause, key: Expression) -> Condition:
    step = sa.select(STEP.c.key).where(STEP.c.workflow_id == table.c.workflow_id, STEP.c.key == key)
    return sa.and_(key.is_not(None), ~step.exists())


def _unfinished_of(roots: Condition) -> Condition:
    """Return the condition of what a cancel changes: unfinished workflows, without those that compensate already."""
    open_ones = sa.or_(*(WORKFLOW.c.status == status_literal(each) for each in _UNFINISHED))
    tree = tree_under(sa.and_(roots, open_ones))
    return sa.and_(WORKFLOW.c.id.in_(sa.select(tree.c.id)), open_ones, ~must_compensate())


def _deletable_trees(roots: Condition) -> sa.Select[tuple[UUID]]:
    """Select the finished trees, except those whose parent may still ask for their outcome."""
    parent, member = WORKFLOW.alias("parent"), WORKFLOW.alias("member")
    asked = sa.select(parent.c.id).where(parent.c.id == WORKFLOW.c.parent_id, parent.c.finished_at.is_(None)).exists()
    free = sa.or_(WORKFLOW.c.detached, ~asked)
    tree = tree_under(sa.and_(roots, WORKFLOW.c.finished_at.is_not(None), free), WORKFLOW.c.id.label("root_id"))
    going_on = sa.select(tree.c.root_id).join(member, member.c.id == tree.c.id).where(member.c.finished_at.is_(None))
    return sa.select(tree.c.id).where(tree.c.root_id.not_in(going_on))


def tree_under(roots: Condition, *carried: sa.Label[Any]) -> sa.CTE:
    """Select the trees under the roots, with the carried columns of the root in each row."""
    tree = sa.select(WORKFLOW.c.id, sa.true().label("is_root"), *carried).where(roots).cte("tree", recursive=True)
    child = WORKFLOW.alias("child")
    below = sa.select(child.c.id, sa.false(), *(tree.c[each.name] for each in carried))
    return tree.union(below.join(tree, child.c.parent_id == tree.c.id).where(~child.c.detached))
