"""The statements on updates: send one, read its state, take it, refuse it, answer it.

An update is a signal whose name the engine has marked. Its answer is an event, whose key and id are made of the
signal's id: so the primary key lets one of two answers commit.
"""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.models.base import Text, WorkflowStatus
from sqla_durable.store.inbox import (
    ANSWER,
    REFUSED,
    UPDATE,
    first_keyed,
    first_untaken,
    is_untaken,
    send_statement,
    take_by,
    take_statement,
)
from sqla_durable.store.keys import require_the_latest
from sqla_durable.store.records import Checkpoint, Fence, Origin, Verdict
from sqla_durable.store.statements import (
    EVENT,
    SIGNAL,
    STEP,
    WANTED_ID,
    WORKFLOW,
    Connectable,
    Expression,
    Statement,
    execute,
    insert_select,
    json_parameter,
    materialized,
    parameter,
    pg,
    scalar,
    text_literal,
)
from sqla_durable.store.steps import (
    GIVEN,
    checkpoint_columns,
    given_fence_parameters,
    given_parameters,
    insert_checkpoints,
    lock_given,
    select_from_owned,
    why_unwritten,
)
from sqla_durable.unwinding import AttemptLost


@dataclass(frozen=True, slots=True)
class Receiver:
    """The workflow that an update is for.

    Attributes:
        workflow_name: that of the workflow.
        status: likewise.
        known: the id of the update that has the key already.
    """

    workflow_name: str
    status: WorkflowStatus
    known: int | None


@dataclass(frozen=True, slots=True)
class Sent:
    """An update as its sender sees it, in one snapshot.

    Attributes:
        name: its name.
        status: that of its workflow.
        is_taken: whether the workflow has taken it, or refused it.
        is_remembered: whether the history still has the step that took it.
        answer: JSON text of `{"reply": value}`, `{"rejected": reason}` or `{"refused": reason}`.
    """

    name: str
    status: WorkflowStatus
    is_taken: bool
    is_remembered: bool
    answer: str | None


@dataclass(frozen=True, slots=True)
class Candidate:
    """An untaken update; the payload is JSON text."""

    id: int
    payload: str


def signal_of(name: str) -> str:
    """Return the name of the signal that an update is."""
    return UPDATE + name


def receiver(session: Session, workflow_id: UUID, *, name: str, key: str | None) -> Receiver | None:
    """Read the workflow that an update is for; None if there is none. Takes no lock."""
    parameters = {"wanted_id": workflow_id, "signal_name": signal_of(name), "signal_key": key}
    row = execute(session, _RECEIVER, parameters).one_or_none()
    return None if row is None else Receiver(row.name, row.status, row.known)


def send(session: Session, workflow_id: UUID, *, name: str, payload: str, key: str | None) -> int | None:
    """Send an update, in the caller's transaction; return its id. None: another of the key was there first.

    Waits for another transaction that is sending the same name and key to the same workflow.

    Raises:
        SnapshotKept: nothing was sent: do it with `send_in_snapshot`, in a savepoint.
    """
    parameters = {"ids": [workflow_id], "signal_name": signal_of(name), "payload": payload, "signal_key": key}
    found: int | None = scalar(session, _SEND, parameters)
    if found is None:
        require_the_latest(session)
    return found


def send_in_snapshot(session: Session, workflow_id: UUID, *, name: str, payload: str, key: str | None) -> int | None:
    """Send it where the transaction keeps a snapshot, in a savepoint.

    Raises:
        DBAPIError: another of the key is newer than the snapshot: roll back to the savepoint.
    """
    parameters = {"ids": [workflow_id], "signal_name": signal_of(name), "payload": payload, "signal_key": key}
    found: int | None = scalar(session, _SEND_IN_SNAPSHOT, parameters)
    return found


def read(session: Session, workflow_id: UUID, update_id: int) -> Sent | None:
    """Read the state of an update; None if there is none. Takes no lock."""
    parameters = {"wanted_id": workflow_id, "update_id": update_id, "answer_key": _answer_key(update_id)}
    row = execute(session, _READ, parameters).one_or_none()
    if row is None:
        return None
    return Sent(row.name.removeprefix(UPDATE), row.status, row.consumed_by is not None, row.is_remembered, row.answer)


def oldest(connectable: Connectable, *, workflow_id: UUID, name: str) -> Candidate | None:
    """Return the oldest untaken update of a name. Takes no lock."""
    row = execute(connectable, _OLDEST, {"wanted_id": workflow_id, "signal_name": signal_of(name)}).one_or_none()
    return None if row is None else Candidate(row.id, row.payload)


def take(connectable: Connectable, checkpoint: Checkpoint, *, update_id: int) -> str | None:
    """Take an update and record it as the outcome of the step: JSON text of its `id` and `payload`.

    None: it was taken before. Locks the workflow's row.

    Raises:
        AttemptLost: the attempt no longer owns the workflow.
    """
    return take_by(connectable, _TAKE, checkpoint, {"update_id": update_id})


def refuse(connectable: Connectable, fence: Fence, *, update_id: int, reason: str) -> None:
    """Refuse an untaken update: answer it, so that no step takes it; no step is recorded.

    Locks the workflow's row.

    Raises:
        AttemptLost: the attempt no longer owns the workflow.
    """
    parameters = given_fence_parameters(fence)
    if not scalar(connectable, _REFUSE, parameters | _answer_row(update_id, json.dumps({"refused": reason}))):
        raise AttemptLost(fence.workflow_id)


def record_answer(connectable: Connectable, checkpoint: Checkpoint, *, update_id: int, answer: str) -> Verdict:
    """Answer an update and record that as a step, in one statement; once, however often it is executed.

    DUPLICATE wrote nothing: another step has answered it. Waits for the lock of the workflow's row.
    """
    row = execute(connectable, _RECORD, given_parameters(checkpoint) | _answer_row(update_id, answer)).one()
    if not row.owned:
        return Verdict.LOST
    if row.answered:
        return Verdict.RECORDED
    answered_by = {"wanted_id": checkpoint.fence.workflow_id, "answer_id": update_id}
    by = scalar(connectable, _ANSWERED_BY, answered_by | {"answer_key": _answer_key(update_id)})
    return Verdict.RECORDED if by == checkpoint.key else Verdict.DUPLICATE


def put_answer(connectable: Connectable, origin: Origin, *, update_id: int, answer: str) -> Verdict:
    """Answer an update in a step's transaction. DUPLICATE and LOST wrote nothing.

    Waits for the lock of the workflow's row.
    """
    parameters = given_fence_parameters(origin.fence, origin.step_key)
    if scalar(connectable, _PUT, parameters | _answer_row(update_id, answer)) is not None:
        return Verdict.RECORDED
    return why_unwritten(connectable, parameters)


def _answer_key(update_id: int) -> str:
    return f"{ANSWER}{update_id}"


def _answer_row(update_id: int, answer: str) -> dict[str, Any]:
    return {"update_id": update_id, "answer_id": update_id, "answer_key": _answer_key(update_id), "answer": answer}


def _columns(workflow_id: Expression, step_key: Any) -> dict[str, Any]:
    return {
        "workflow_id": workflow_id,
        "key": parameter("answer_key", Text()),
        "id": parameter("answer_id", sa.BigInteger()),
        "value": json_parameter("answer"),
        "step_key": step_key,
        "created_at": pg.statement_timestamp(),
    }


def _answering(columns: dict[str, Any], source: Any) -> Any:
    inserted = insert_select(EVENT, columns, source)
    return inserted.on_conflict_do_nothing(index_elements=["workflow_id", "key", "id"])


def _receiver_statement() -> Any:
    key = parameter("signal_key", Text())
    first = first_keyed(_WANTED, _NAME, key).subquery("first")
    known = sa.select(first.c.id).where(first.c.name == _NAME, first.c.key == key)
    columns = WORKFLOW.c.name, WORKFLOW.c.status, known.scalar_subquery().label("known")
    return sa.select(*columns).where(WORKFLOW.c.id == _WANTED)


def _read_statement() -> Any:
    """Read each row by its primary key: joined, a plan may read all steps of the workflow."""
    sent = materialized(
        sa.select(SIGNAL.c.workflow_id, SIGNAL.c.id, SIGNAL.c.name, SIGNAL.c.consumed_by).where(
            SIGNAL.c.workflow_id == _WANTED, _IS_UPDATE
        ),
        "sent",
    )
    answer = sa.select(sa.cast(EVENT.c.value, Text)).where(
        EVENT.c.workflow_id == sent.c.workflow_id,
        EVENT.c.key == parameter("answer_key", Text()),
        EVENT.c.id == sent.c.id,
    )
    # A workflow that continued as new has forgotten what it had taken; another update may have that step's key since.
    holding = sa.select(STEP.c.key).where(
        STEP.c.workflow_id == sent.c.workflow_id,
        STEP.c.key == sent.c.consumed_by,
        STEP.c.output.op("->>", return_type=Text())(_ID) == sa.cast(sent.c.id, Text),
    )
    return (
        sa.select(
            sent.c.name,
            sent.c.consumed_by,
            WORKFLOW.c.status,
            answer.scalar_subquery().label("answer"),
            holding.scalar_subquery().is_not(None).label("is_remembered"),
        )
        .select_from(sent.join(WORKFLOW, WORKFLOW.c.id == sent.c.workflow_id))
        .where(sent.c.name.startswith(_UPDATE_LITERAL))
    )


def _refuse_statement() -> Any:
    owned = lock_given()
    refused = (
        sa.update(SIGNAL)
        .where(SIGNAL.c.workflow_id == owned.c.id, _IS_UPDATE, is_untaken())
        .values(consumed_by=REFUSED, delivered_at=sa.func.coalesce(SIGNAL.c.delivered_at, pg.statement_timestamp()))
        .returning(SIGNAL.c.workflow_id)
        .cte("refused")
    )
    columns = _columns(refused.c.workflow_id, sa.null())
    answered = _answering(columns, sa.select(*columns.values())).returning(EVENT.c.id).cte("answered")
    return sa.select(sa.select(owned.c.id).exists()).add_cte(answered)


def _record_statement() -> Any:
    owned = lock_given()
    columns = _columns(owned.c.id, GIVEN["key"])
    answered = _answering(columns, sa.select(*columns.values())).returning(EVENT.c.workflow_id).cte("answered")
    checkpoint = checkpoint_columns(GIVEN) | {"workflow_id": answered.c.workflow_id}
    recorded = insert_checkpoints(checkpoint, sa.select(*checkpoint.values())).returning(STEP.c.key).cte("recorded")
    return sa.select(
        sa.select(owned.c.id).exists().label("owned"), sa.select(answered.c.workflow_id).exists().label("answered")
    ).add_cte(recorded)


def _put_statement() -> Any:
    columns = _columns(WORKFLOW.c.id, GIVEN["key"])
    return _answering(columns, select_from_owned(columns)).returning(EVENT.c.id)


def _shown(taken: Any) -> Expression:
    return pg.jsonb_build_object(_ID, taken.c.id, _PAYLOAD, taken.c.payload, type_=JSONB())


_WANTED = WANTED_ID
_NAME = parameter("signal_name", Text())
_IS_UPDATE = SIGNAL.c.id == parameter("update_id", sa.BigInteger())
_ID: sa.ColumnElement[str] = text_literal("id")
_PAYLOAD: sa.ColumnElement[str] = text_literal("payload")
_UPDATE_LITERAL: sa.ColumnElement[str] = text_literal(UPDATE)
_RECEIVER = Statement(_receiver_statement)
_SEND = Statement(lambda: send_statement(is_update=True))
_SEND_IN_SNAPSHOT = Statement(lambda: send_statement(in_snapshot=True, is_update=True))
_READ = Statement(_read_statement)
_FIRST = first_untaken(_WANTED, _NAME, sa.cast(SIGNAL.c.payload, Text).label("payload")).subquery("first")
_OLDEST = sa.select(_FIRST.c.id, _FIRST.c.payload).where(_FIRST.c.name == _NAME)
_WANTED_UPDATE = sa.select(parameter("update_id", sa.BigInteger()).label("id")).subquery("wanted")
_TAKE = Statement(lambda: take_statement(_WANTED_UPDATE, _shown))
_REFUSE = Statement(_refuse_statement)
_RECORD = Statement(_record_statement)
_PUT = Statement(_put_statement)
_ANSWERED_BY = sa.select(EVENT.c.step_key).where(
    EVENT.c.workflow_id == _WANTED,
    EVENT.c.key == parameter("answer_key", Text()),
    EVENT.c.id == parameter("answer_id", sa.BigInteger()),
)
