"""The statements that put workflows back into their queues: resume, retry, rewind.

They lock rows in the order of ids until the caller commits. Cancel and delete are in `trees`, copies in `forks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sqla_durable.errors import ArgumentError
from sqla_durable.models.column_types import Text
from sqla_durable.models.status import StepStatus, WorkflowStatus
from sqla_durable.store._rows import (
    EVENT,
    SIGNAL,
    STEP,
    STREAM_ITEM,
    WORKFLOW,
    Condition,
    Expression,
    among,
    execute,
    next_attempt,
    pg,
    refresh_known,
    scalars,
    status,
    still_compensates,
    words,
)
from sqla_durable.store.crashes import MAX_ATTEMPTS_TYPE
from sqla_durable.store.deadlines import TIMEOUT_TYPE
from sqla_durable.store.held import leave
from sqla_durable.store.refused import REFUSED_TYPE
from sqla_durable.store.selection import Wanted, hold, known, workers_of
from sqla_durable.store.signals import EARLIER, REFUSED
from sqla_durable.store.trees import hold_cancelled_with, is_not_undone

_STOPPED = sa.and_(
    WORKFLOW.c.token.is_(None),  # one that failed by itself keeps its token, whatever its error is
    WORKFLOW.c.error["type"].astext.in_(words(each) for each in (MAX_ATTEMPTS_TYPE, REFUSED_TYPE, TIMEOUT_TYPE)),
)
_SHOWN_KEYS = 20


def resume(session: Session, wanted: Wanted) -> list[UUID]:
    """Enqueue those of the workflows that were cancelled or stopped for their crashes or deadlines; give the ids.

    With those of their trees that were cancelled with them. Their histories stand, and their crashes are forgiven.
    Waits for whoever holds a row.
    """
    stopped = sa.and_(WORKFLOW.c.status == status(WorkflowStatus.FAILED), _STOPPED)
    cancelled = sa.and_(WORKFLOW.c.status == status(WorkflowStatus.CANCELLED), is_not_undone())
    held = hold_cancelled_with(session, wanted, sa.or_(cancelled, stopped))
    return _enqueue(session, wanted, held)


def retry(session: Session, wanted: Wanted) -> list[UUID]:
    """Enqueue those of the workflows that failed by themselves, without what made them fail; give the ids.

    Not those with a saga: what is recorded of them may have been undone.
    """
    failed = sa.and_(
        WORKFLOW.c.status == status(WorkflowStatus.FAILED), sa.not_(_STOPPED), WORKFLOW.c.cancellation.is_(None)
    )
    held = hold(session, wanted, lambda meant: sa.and_(meant, failed))
    if held:
        gone = sa.and_(_of(STEP, held), STEP.c.workflow_id == WORKFLOW.c.id, _made_it_fail())
        execute(session, sa.delete(STEP).where(gone))
        _give_back(session, held)
    return _enqueue(session, wanted, held)


def rewind(session: Session, wanted: Wanted, *, to_step: str) -> tuple[list[UUID], set[UUID]]:
    """Enqueue the workflows without that step and what they called after it.

    Returns:
        The ids, and the workers that were executing some of them.

    Raises:
        ArgumentError: one of them has no record of that step; nothing is changed.
    """
    held = hold(session, wanted, lambda meant: meant)
    refuse_unrecorded(session, held, [to_step], verb="rewound")
    workers = workers_of(session, held)
    if held:
        cut = STEP.alias("cut")
        here = sa.and_(cut.c.workflow_id == STEP.c.workflow_id, cut.c.key == sa.literal(to_step, Text()))
        execute(session, sa.delete(STEP).where(_of(STEP, held), here, STEP.c.position >= cut.c.position))
        _hide(session, held)
        _give_back(session, held)
        leave(session, held)
    return _enqueue(session, wanted, held, cancellation=still_compensates()), workers


def refuse_unrecorded(session: Session, ids: Sequence[UUID], keys: Sequence[str], *, verb: str) -> None:
    """Refuse workflows that have no record of one of the steps.

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
            raise ArgumentError(
                f"workflow {workflow_id} has no record of a step {missing[0]!r}: it has "
                f"{', '.join(map(repr, found[:_SHOWN_KEYS])) or 'none'}{more}. Nothing was {verb}: give the key of a "
                "step that is recorded, and only workflows that have it."
            )


def renewed_deadline() -> Expression:
    """Give the deadline of a workflow that is enqueued anew: one that has passed would end it again at once."""
    now = pg.statement_timestamp()
    return sa.case((WORKFLOW.c.deadline_at <= now, now + WORKFLOW.c.timeout), else_=WORKFLOW.c.deadline_at)


def _enqueue(session: Session, wanted: Wanted, held: Sequence[UUID], **more: Any) -> list[UUID]:
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
        **more,
    }
    if held:
        scalars(
            session, sa.update(WORKFLOW).where(among(WORKFLOW.c.id, held)).values(again).returning(WORKFLOW.c.id)
        ).all()
    refresh_known(session, known(wanted, held))
    return list(held)


def _of(table: sa.FromClause, ids: Sequence[UUID]) -> Condition:
    return among(table.c.workflow_id, ids)


def _made_it_fail() -> Condition:
    """Tell which steps a workflow that failed is to execute again: its failed ones, except what it had got over.

    It has got over a failed step if it went on: if it began another one after that, which succeeded. Unless it failed
    with that step's error all the same, after cleaning up. Tries that were left are begun anew.
    """
    failed = STEP.c.status == status(StepStatus.FAILED)
    later = STEP.alias("later")
    went_on = sa.select(later.c.key).where(
        later.c.workflow_id == STEP.c.workflow_id,
        later.c.status == status(StepStatus.SUCCEEDED),
        later.c.position > STEP.c.position,
        later.c.started_at >= STEP.c.finished_at,
    )
    raised = sa.and_(failed, sa.or_(~went_on.exists(), STEP.c.position == _last_shown_in_error()))
    return sa.or_(raised, STEP.c.status == status(StepStatus.RETRYING))


def _last_shown_in_error() -> Any:
    """Give the position of the last failed step whose error is the workflow's, its cause, or one of its group."""
    each = STEP.alias("each")
    kind = pg.split_part(each.c.error["type"].astext, ":", 2, type_=Text())
    message = sa.func.coalesce(each.c.error["message"].astext, words(""))
    line = sa.case((message == words(""), kind), else_=kind + words(": ") + message)
    shown = pg.strpos(sa.func.coalesce(WORKFLOW.c.error["traceback"].astext, words("")), line) > 0
    same = sa.and_(
        each.c.error["type"] == WORKFLOW.c.error["type"], each.c.error["message"] == WORKFLOW.c.error["message"]
    )
    of_failed = sa.and_(each.c.workflow_id == WORKFLOW.c.id, each.c.status == status(StepStatus.FAILED))
    last: sa.Select[Any] = sa.select(pg.max(each.c.position)).where(of_failed, sa.or_(same, shown))
    return last.correlate(WORKFLOW).scalar_subquery()


def _hide(session: Session, held: Sequence[UUID]) -> None:
    """Take back what steps without a record have shown; not what those of earlier rounds have."""
    began = sa.select(WORKFLOW.c.begun_anew_at)
    for shown in (EVENT, STREAM_ITEM):
        began_at = began.where(WORKFLOW.c.id == shown.c.workflow_id).scalar_subquery()
        this_round = sa.or_(began_at.is_(None), shown.c.created_at >= began_at)
        execute(session, sa.delete(shown).where(_of(shown, held), _has_no_step(shown, shown.c.step_key), this_round))


def _give_back(session: Session, held: Sequence[UUID]) -> None:
    """Put back into the inbox what steps without a record have consumed."""
    gone = sa.and_(
        _has_no_step(SIGNAL, SIGNAL.c.consumed_by), SIGNAL.c.consumed_by.not_in([words(REFUSED), words(EARLIER)])
    )
    consumed = sa.update(SIGNAL).where(_of(SIGNAL, held), gone)
    execute(session, consumed.values(consumed_by=sa.null()))


def _has_no_step(table: sa.FromClause, key: Expression) -> Condition:
    step = sa.select(STEP.c.key).where(STEP.c.workflow_id == table.c.workflow_id, STEP.c.key == key)
    return sa.and_(key.is_not(None), ~step.exists())
