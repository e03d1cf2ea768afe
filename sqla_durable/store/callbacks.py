"""The statements on callbacks: find one by its token, answer it, keep it alive, read it, expire it.

A callback is the record of the step that made it; its outcome is a row of the inbox, under a key that can exist once.
An answer locks the step's record, which nothing else of the workflow waits for; the workflow's attempt expires the
callback only if that record is not locked. So of an answer and an expiry at the same time, exactly one is written.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.models.base import Text, WorkflowStatus
from sqla_durable.store.inbox import first_keyed
from sqla_durable.store.keys import insert_new_keys, require_the_latest, sees_the_latest
from sqla_durable.store.records import Checkpoint
from sqla_durable.store.statements import (
    ONE,
    SIGNAL,
    STEP,
    WORKFLOW,
    ZERO,
    Condition,
    Connectable,
    Expression,
    Statement,
    execute,
    json_parameter,
    materialized,
    parameter,
    pg,
    scalar,
    text_literal,
)
from sqla_durable.store.steps import given_parameters, lock_given
from sqla_durable.unwinding import AttemptLost

NAME = "create_callback"
"""The name of the step whose record is a callback."""

OUTCOME = "outcome"
"""The key of the row that is a callback's outcome."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A callback's outcome: `value` and `details` are JSON text; a row written by other SQL may have none of them."""

    value: str | None
    error: str | None
    details: str | None
    expired: str | None


@dataclass(frozen=True, slots=True)
class Callback:
    """The state of a callback.

    Attributes:
        workflow_status: that of the workflow that made it.
        signal: the name of the row that is its outcome; None if there is no such callback any more.
        answer: its outcome.
        is_same: whether the outcome is what was asked about.
        due_in: seconds until it expires, infinite if it does not.
        due_to: what it expires for first, `timeout` or `heartbeat`.
    """

    workflow_status: WorkflowStatus
    signal: str | None
    answer: Answer | None
    is_same: bool
    due_in: float
    due_to: str


class Locked(NamedTuple):
    """A callback whose record is locked: the key of its step, and the name of its workflow."""

    key: str
    workflow_name: str


def hold(session: Session, workflow_id: UUID, *, digest: str) -> Locked | None:
    """Lock a callback's record; return None if the workflow has no such callback.

    Waits only for transactions that answer it or keep it alive. The workflow's row is locked against deletion, as a
    foreign key does it.

    Args:
        digest: SHA-256 of the token, in hexadecimal digits: so the token is in no log of statements.
    """
    row = execute(session, _HOLD, {"owner_id": workflow_id, "digest": digest}).first()
    return None if row is None else Locked(row.key, row.name)


def read(
    connectable: Connectable, workflow_id: UUID, key: str, *, signal: str | None = None, payload: str | None = None
) -> Callback | None:
    """Return the state of a callback, or None if there is no such workflow. Takes no lock.

    Args:
        signal: the name of its outcome, where a later callback may have the same key.
        payload: JSON text of the outcome that is asked about.
    """
    parameters = {"owner_id": workflow_id, "callback_key": key, "signal_name": signal, "payload": payload}
    row = execute(connectable, _READ, parameters).one_or_none()
    if row is None:
        return None
    answer = Answer(row.value, row.error, row.details, row.expired) if row.is_answered else None
    due_in = float("inf") if row.due_in is None else float(row.due_in)
    return Callback(row.status, row.signal, answer, bool(row.is_same), due_in, row.due_to)


def answer(session: Session, workflow_id: UUID, *, signal: str, payload: str) -> bool:
    """Insert a callback's outcome (JSON text), in the caller's transaction; False if there is one.

    Waits for another transaction that inserts an outcome without a lock on the callback.

    Raises:
        SnapshotKept: nothing was inserted: do it with `answer_in_snapshot`, in a savepoint.
    """
    parameters = {"owner_id": workflow_id, "signal_name": signal, "payload": payload}
    if scalar(session, _ANSWER, parameters) is not None:
        return True
    require_the_latest(session)
    return False


def answer_in_snapshot(session: Session, workflow_id: UUID, *, signal: str, payload: str) -> bool:
    """Insert the outcome where the transaction keeps a snapshot, in a savepoint.

    Raises:
        DBAPIError: the outcome is newer than the snapshot: roll back to the savepoint.
    """
    parameters = {"owner_id": workflow_id, "signal_name": signal, "payload": payload}
    return scalar(session, _ANSWER_IN_SNAPSHOT, parameters) is not None


def beat(session: Session, workflow_id: UUID, key: str) -> None:
    """Record that a callback is alive, in its own record."""
    execute(session, _BEAT, {"owner_id": workflow_id, "callback_key": key})


def expire(connectable: Connectable, checkpoint: Checkpoint, *, key: str) -> bool:
    """Record that a callback has expired, if it has; False if not, or if it is being answered at this moment.

    Waits for the lock of the workflow's row, never for an answer. After True there is an outcome, this one or another.

    Args:
        checkpoint: any of the attempt's, for its fence.
        key: that of the callback's step.

    Raises:
        AttemptLost: the attempt no longer owns the workflow.
    """
    row = execute(connectable, _EXPIRE, given_parameters(checkpoint) | {"callback_key": key}).one()
    if not row.owned:
        raise AttemptLost(checkpoint.fence.workflow_id)
    return bool(row.expired)


def is_callback() -> Condition:
    """Return whether the record of a step is that of a callback."""
    return STEP.c.name == text_literal(NAME)


def _made(name: str) -> Expression:
    return _text_in(STEP.c.output, name)


def _text_in(value: Expression, name: str) -> Expression:
    return value.op("->>", return_type=Text())(text_literal(name))


def _json_in(value: Expression, name: str) -> Expression:
    return sa.cast(value.op("->", return_type=JSONB())(text_literal(name)), Text)


def _left(name: str, since: Expression) -> Expression:
    """Return how many seconds are left of a duration; as a number, since a sum of times may be out of range."""
    return sa.cast(_made(name), sa.Float) - sa.cast(
        sa.func.extract("epoch", pg.statement_timestamp() - since), sa.Float
    )


def _timeout_in() -> Expression:
    return _left("timeout", STEP.c.started_at)


def _silent_in() -> Expression:
    return _left("heartbeat", STEP.c.finished_at)


def _due_in() -> Expression:
    return sa.func.least(_timeout_in(), _silent_in())  # LEAST ignores NULL


def _due_to() -> Expression:
    silent_first = _silent_in() < sa.func.coalesce(_timeout_in(), sa.cast(text_literal("infinity"), sa.Float))
    return sa.case((silent_first, text_literal("heartbeat")), else_=text_literal("timeout"))


def _hold_statement() -> Any:
    # The workflow first, as a statement that deletes it does.
    owner = materialized(
        sa.select(WORKFLOW.c.id, WORKFLOW.c.name)
        .where(WORKFLOW.c.id == parameter("owner_id", sa.UUID()))
        .with_for_update(read=True, key_share=True, of=WORKFLOW),
        "owner",
    )
    return (
        sa.select(STEP.c.key, owner.c.name)
        .join(owner, owner.c.id == STEP.c.workflow_id)
        .where(is_callback(), _made("digest") == parameter("digest", Text()))
        .with_for_update(key_share=True, of=STEP)
    )


def _read_statement() -> Any:
    wanted = parameter("signal_name", Text())
    callback = sa.and_(
        STEP.c.workflow_id == WORKFLOW.c.id,
        STEP.c.key == parameter("callback_key", Text()),
        is_callback(),
        _made("signal") == sa.func.coalesce(wanted, _made("signal")),
    )
    first = first_keyed(STEP.c.workflow_id, _made("signal"), text_literal(OUTCOME), SIGNAL.c.payload).lateral("outcome")
    outcome = sa.and_(first.c.name == _made("signal"), first.c.key == text_literal(OUTCOME))
    return (
        sa.select(
            WORKFLOW.c.status,
            _made("signal").label("signal"),
            first.c.id.is_not(None).label("is_answered"),
            (first.c.payload == json_parameter("payload")).label("is_same"),
            _json_in(first.c.payload, "value").label("value"),
            _text_in(first.c.payload, "error").label("error"),
            _json_in(first.c.payload, "details").label("details"),
            _text_in(first.c.payload, "expired").label("expired"),
            _due_in().label("due_in"),
            _due_to().label("due_to"),
        )
        .select_from(WORKFLOW.outerjoin(STEP, callback).outerjoin(first, outcome))
        .where(WORKFLOW.c.id == parameter("owner_id", sa.UUID()))
    )


def _insert_outcome(source: Any, *more: str) -> Any:
    columns = ["workflow_id", "name", "payload", "key", "is_answer", *more]
    return insert_new_keys(SIGNAL, columns, source).returning(SIGNAL.c.id)


def _answer_statement(*conditions: Condition) -> Any:
    given = parameter("owner_id", sa.UUID()), parameter("signal_name", Text()), json_parameter("payload")
    return _insert_outcome(sa.select(*given, text_literal(OUTCOME), sa.true()).where(*conditions))


def _beat_statement() -> Any:
    this = STEP.c.workflow_id == parameter("owner_id", sa.UUID())
    return (
        sa.update(STEP)
        .where(this, STEP.c.key == parameter("callback_key", Text()), is_callback())
        .values(finished_at=sa.func.greatest(pg.statement_timestamp(), STEP.c.started_at))
    )


def _expire_statement() -> Any:
    owned = lock_given()
    expired = materialized(
        sa.select(STEP.c.workflow_id, _made("signal").label("signal"), _due_to().label("due_to"))
        .join(owned, owned.c.id == STEP.c.workflow_id)
        .where(
            STEP.c.key == parameter("callback_key", Text()),
            is_callback(),
            _due_in() <= sa.cast(ZERO, sa.Float),
        )
        .with_for_update(key_share=True, skip_locked=True, of=STEP),
        "expired",
    )
    payload = pg.jsonb_build_object(text_literal("expired"), expired.c.due_to)
    source = sa.select(
        expired.c.workflow_id, expired.c.signal, payload, text_literal(OUTCOME), sa.true(), pg.statement_timestamp()
    )
    written = _insert_outcome(source, "delivered_at").cte("written")
    return sa.select(_any(owned).label("owned"), _any(expired).label("expired")).add_cte(written)


def _any(rows: sa.CTE) -> Any:
    return sa.select(ONE).select_from(rows).exists()


_HOLD = Statement(_hold_statement)
_READ = Statement(_read_statement)
_ANSWER = Statement(lambda: _answer_statement(sees_the_latest()))
_ANSWER_IN_SNAPSHOT = Statement(_answer_statement)
_BEAT = Statement(_beat_statement)
_EXPIRE = Statement(_expire_statement)
