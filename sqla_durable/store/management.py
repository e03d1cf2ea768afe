"""The statements that put workflows back into their queues: resume, retry, rewind.

They lock rows in the order of ids until the caller commits. Cancel and delete are in `trees`, copies in `forks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    FromClause,
    Select,
    and_,
    case,
    delete,
    func,
    literal,
    literal_column,
    not_,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.dialects.postgresql import UUID as PG_UUID
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
from sqla_durable.store.selection import Wanted, among, hold, known, workers_of
from sqla_durable.store.signals import EARLIER, REFUSED
from sqla_durable.store.trees import hold_cancelled_with, is_not_undone

_STOPPED = and_(
    WORKFLOW.c.token.is_(None),  # one that failed by itself keeps its token, whatever its error is
    WORKFLOW.c.error["type"].astext.in_(
        literal_column(f"'{each}'") for each in (MAX_ATTEMPTS_TYPE, REFUSED_TYPE, TIMEOUT_TYPE)
    ),
)
_SHOWN_KEYS = 20


def resume(session: Session, wanted: Wanted) -> list[UUID]:
    """Enqueue those of the workflows that were cancelled or stopped for their crashes or deadlines; give the ids.

    With those of their trees that were cancelled with them. Their histories stand, and their crashes are forgiven.
    Waits for whoever holds a row.
    """
    stopped = and_(WORKFLOW.c.status == status(WorkflowStatus.FAILED), _STOPPED)
    cancelled = and_(WORKFLOW.c.status == status(WorkflowStatus.CANCELLED), is_not_undone())
    held = hold_cancelled_with(session, wanted, or_(cancelled, stopped))
    return _enqueue(session, wanted, held)


def retry(session: Session, wanted: Wanted) -> list[UUID]:
    """Enqueue those of the workflows that failed by themselves, without what made them fail; give the ids.

    Not those with a saga: what is recorded of them may have been undone.
    """
    failed = and_(WORKFLOW.c.status == status(WorkflowStatus.FAILED), not_(_STOPPED), WORKFLOW.c.cancellation.is_(None))
    held = hold(session, wanted, lambda meant: and_(meant, failed))
    if held:
        gone = and_(_of(STEP, held), STEP.c.workflow_id == WORKFLOW.c.id, _made_it_fail())
        execute(session, delete(STEP).where(gone))
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
        here = and_(cut.c.workflow_id == STEP.c.workflow_id, cut.c.key == literal(to_step, Text()))
        execute(session, delete(STEP).where(_of(STEP, held), here, STEP.c.position >= cut.c.position))
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
    for row in execute(session, select(STEP.c.workflow_id, STEP.c.key).where(_of(STEP, ids)).order_by(STEP.c.position)):
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


def renewed_deadline() -> ColumnElement[Any]:
    """Give the deadline of a workflow that is enqueued anew: one that has passed would end it again at once."""
    now = pg.statement_timestamp()
    return case((WORKFLOW.c.deadline_at <= now, now + WORKFLOW.c.timeout), else_=WORKFLOW.c.deadline_at)


def _enqueue(session: Session, wanted: Wanted, held: Sequence[UUID], **more: Any) -> list[UUID]:
    """Enqueue the workflows, whose rows are locked, as their next attempts; with values of more columns."""
    again = {
        "status": WorkflowStatus.PENDING,
        "attempt": next_attempt(),
        "crashes": 0,
        "token": null(),
        "worker_id": null(),
        "output": null(),
        "error": null(),
        "enqueued_at": pg.statement_timestamp(),
        "wake_at": null(),
        "awaits": null(),
        "deadline_at": renewed_deadline(),
        "finished_at": null(),
        **more,
    }
    if held:
        scalars(session, update(WORKFLOW).where(among(held)).values(again).returning(WORKFLOW.c.id)).all()
    refresh_known(session, known(wanted, held))
    return list(held)


def _of(table: FromClause, ids: Sequence[UUID]) -> ColumnElement[bool]:
    return table.c.workflow_id == func.any(literal(list(ids), ARRAY(PG_UUID())))


def _made_it_fail() -> ColumnElement[bool]:
    """Tell which steps a workflow that failed is to execute again: its failed ones, except what it had got over.

    It has got over a failed step if it went on: if it began another one after that, which succeeded. Unless it failed
    with that step's error all the same, after cleaning up. Tries that were left are begun anew.
    """
    failed = STEP.c.status == _step_status(StepStatus.FAILED)
    later = STEP.alias("later")
    went_on = select(later.c.key).where(
        later.c.workflow_id == STEP.c.workflow_id,
        later.c.status == _step_status(StepStatus.SUCCEEDED),
        later.c.position > STEP.c.position,
        later.c.started_at >= STEP.c.finished_at,
    )
    raised = and_(failed, or_(~went_on.exists(), STEP.c.position == _last_shown_in_error()))
    return or_(raised, STEP.c.status == _step_status(StepStatus.RETRYING))


def _last_shown_in_error() -> Any:
    """Give the position of the last failed step whose error is the workflow's, its cause, or one of its group."""
    each = STEP.alias("each")
    kind = pg.split_part(each.c.error["type"].astext, ":", 2, type_=Text())
    message = func.coalesce(each.c.error["message"].astext, words(""))
    line = case((message == words(""), kind), else_=kind + words(": ") + message)
    shown = pg.strpos(func.coalesce(WORKFLOW.c.error["traceback"].astext, words("")), line) > 0
    same = and_(
        each.c.error["type"] == WORKFLOW.c.error["type"], each.c.error["message"] == WORKFLOW.c.error["message"]
    )
    of_failed = and_(each.c.workflow_id == WORKFLOW.c.id, each.c.status == _step_status(StepStatus.FAILED))
    last: Select[Any] = select(pg.max(each.c.position)).where(of_failed, or_(same, shown))
    return last.correlate(WORKFLOW).scalar_subquery()


def _hide(session: Session, held: Sequence[UUID]) -> None:
    """Take back what steps without a record have shown; not what those of earlier rounds have."""
    began = select(WORKFLOW.c.begun_anew_at)
    for shown in (EVENT, STREAM_ITEM):
        began_at = began.where(WORKFLOW.c.id == shown.c.workflow_id).scalar_subquery()
        this_round = or_(began_at.is_(None), shown.c.created_at >= began_at)
        execute(session, delete(shown).where(_of(shown, held), _has_no_step(shown, shown.c.step_key), this_round))


def _give_back(session: Session, held: Sequence[UUID]) -> None:
    """Put back into the inbox what steps without a record have consumed."""
    gone = and_(
        _has_no_step(SIGNAL, SIGNAL.c.consumed_by), SIGNAL.c.consumed_by.not_in([words(REFUSED), words(EARLIER)])
    )
    consumed = update(SIGNAL).where(_of(SIGNAL, held), gone)
    execute(session, consumed.values(consumed_by=null()))


def _has_no_step(table: FromClause, key: ColumnElement[Any]) -> ColumnElement[bool]:
    step = select(STEP.c.key).where(STEP.c.workflow_id == table.c.workflow_id, STEP.c.key == key)
    return and_(key.is_not(None), ~step.exists())


def _step_status(value: StepStatus) -> ColumnElement[Any]:
    return literal_column(f"'{value}'", type_=STEP.c.status.type)
