"""The statements of starts whose key has a rule: replace what has the key, take the key from it, or cancel it.

A workflow name and a key are one row at any time. Where a newer workflow is to have the key, the row that has it loses
it in the same transaction, and notes it as `former_key`. So each race is decided by the lock of that row or by the
unique index: whoever is second waits for the first one's end, and then decides by what is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum, auto
from typing import Any, TypeAlias
from uuid import UUID

import sqlalchemy as sa

from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.errors import KeyTakenError, UsageError
from sqla_durable.models.base import Text, WorkflowStatus
from sqla_durable.store import manage, starts
from sqla_durable.store.inbox import is_deferred
from sqla_durable.store.keys import MOST_REPEATS
from sqla_durable.store.records import KeyRule, NewWorkflow
from sqla_durable.store.selecting import Selection
from sqla_durable.store.starts import NEW, new_columns
from sqla_durable.store.statements import (
    WORKFLOW,
    Columns,
    Condition,
    Connectable,
    Statement,
    batch_parameter,
    batch_table,
    execute,
    interval,
    materialized,
    pg,
    status_literal,
    text_literal,
)

RuledStart: TypeAlias = tuple[NewWorkflow, KeyRule]

_SPAN: Columns = {"unique": Text(), "period": sa.Float(), "longest_wait": sa.Float()}
_KEYS: Columns = {"id": sa.UUID(), "name": Text(), "key": Text(), **_SPAN}
_TAKING: Columns = {"id": sa.UUID(), "holder": sa.UUID(), "key": Text(), **_SPAN}
_REPLACING: Columns = {**NEW.columns, "longest_wait": sa.Float()}
_IDENTITY = "id", "name", "key", "parent_id", "parent_key", "detached", "schedule"
_REPLACED = [each for each in NEW.columns if each in WORKFLOW.c and each not in (*_IDENTITY, "wake_at")]
_MOST_LOST = 1_000  # times that another caller of the same key is first; each waits for the end of its transaction
_CANCELLED = "cancelled"  # in the place of `unique`: the workflow loses its key whatever its state


class _Step(Enum):
    """What a start does about the workflow that has its key."""

    USE = auto()
    CANCEL = auto()
    TAKE_KEY = auto()
    REPEAT = auto()


_TAKES_KEY = {_Step.CANCEL, _Step.TAKE_KEY}


@dataclass(frozen=True, slots=True)
class Settled:
    """What was done so that workflows can be started.

    Attributes:
        ids: by the ids of the starts, those of the workflows that are there for them. The other starts can be inserted.
        changed: the workflows that were replaced or cancelled, or lost their keys.
        workers: those that execute cancelled ones.
        seen: the starts whose keys a visible workflow has had.
    """

    ids: dict[UUID, UUID]
    changed: set[UUID]
    workers: set[UUID]
    seen: frozenset[UUID] = frozenset()

    def __or__(self, other: Settled) -> Settled:
        changed, workers = self.changed | other.changed, self.workers | other.workers
        return Settled(self.ids | other.ids, changed, workers, self.seen | other.seen)


class Repeats:
    """Counts how often starts were settled, and others had their keys when they were to be inserted.

    Of many callers with one key, one is first each time, and the others begin once more: that is seen, and may happen
    often. What is not seen, and has the key nevertheless, is hidden.
    """

    def __init__(self) -> None:
        self._unseen = self._lost = 0

    def count(self, settled: Settled, missing: Iterable[UUID]) -> bool:
        """Count one more time; return whether to try again."""
        self._lost += 1
        self._unseen += not settled.seen.issuperset(missing)
        return self._unseen < MOST_REPEATS and self._lost < _MOST_LOST


def insert(connectable: Connectable, wanted: Sequence[RuledStart], *, own: UUID | None = None) -> Settled:
    """Start workflows, each of another name or key, as their rules say; return the ids for all of them.

    Waits for transactions that start workflows under these keys, or change the ones that have them. In a savepoint
    where the transaction keeps a snapshot, or where more than one is started.

    Args:
        wanted: the starts and their rules, in the order of their keys.
        own: the workflow whose code starts them.

    Raises:
        KeyTakenError, UsageError: as `settle`.
        KeyNotVisibleError: the workflow that has one of the keys cannot be seen.
        DBAPIError: it is newer than the transaction's snapshot, or was changed since.
    """
    done, missing, repeats = Settled({}, set(), set()), list(wanted), Repeats()
    while True:
        settled = settle(connectable, missing, own=own)
        done |= settled
        absent = [new for new, _ in missing if new.id not in done.ids]
        done |= Settled(starts.insert_absent(connectable, absent), set(), set())
        missing = [each for each in missing if each[0].id not in done.ids]
        if not missing:
            return done
        if not repeats.count(settled, [new.id for new, _ in missing]):
            raise starts.hidden_among(connectable, [new for new, _ in missing])


def settle(connectable: Connectable, wanted: Sequence[RuledStart], *, own: UUID | None) -> Settled:
    """Do once what the rules say about the workflows that have the keys now.

    Again for what is in no `ids` and cannot be inserted afterwards: another transaction was first. Each statement locks
    in the order of ids.

    Raises:
        KeyTakenError: a key is taken, and its rule refuses.
        UsageError: `own` would be cancelled, itself or in a tree.
    """
    replaceable = [each for each in wanted if each[1].on_conflict == "replace"]
    replaced = _changed(connectable, _REPLACE, [_replacing(*each) for each in replaceable])
    rest = [each for each in wanted if each[0].id not in replaced]
    found = _holders(connectable, rest)
    steps = {new.id: _step(new, rule, found[new.id]) for new, rule in rest if new.id in found}
    doomed = [found[each].id for each, step in steps.items() if step is _Step.CANCEL]
    cancelled, workers = _cancel(connectable, doomed, own=own)
    taking = [_taking(*each, found[each[0].id].id) for each in rest if steps.get(each[0].id) in _TAKES_KEY]
    lost = _changed(connectable, _TAKE_KEY, taking)
    used = {each: found[each].id for each, step in steps.items() if step is _Step.USE}
    changed = {*cancelled, *replaced.values(), *lost.values()}
    return Settled(used | replaced, changed, workers, seen=frozenset(found))


def _step(new: NewWorkflow, rule: KeyRule, holder: sa.Row[Any]) -> _Step:
    """Decide what a start does, from what the workflow that has its key was like when it was read."""
    if holder.is_over:
        return _Step.TAKE_KEY
    match rule.on_conflict:
        case "existing":
            return _Step.USE
        case "cancel_running":
            return _Step.CANCEL
        case "replace":  # it was not there yet when others were replaced
            return _Step.REPEAT
        case _:
            raise _taken(new, holder)


def _holders(connectable: Connectable, wanted: Sequence[RuledStart]) -> dict[UUID, sa.Row[Any]]:
    """Read the workflows that have the keys, by the ids of the starts."""
    if not wanted:
        return {}
    rows = [_key_row(*each) for each in wanted]
    return {row.start_id: row for row in execute(connectable, _HOLDERS, batch_parameter("batch", rows))}


def _cancel(connectable: Connectable, ids: Sequence[UUID], *, own: UUID | None) -> tuple[list[UUID], set[UUID]]:
    """Cancel workflows with their trees; return the ids of all that were cancelled, and the workers that have them."""
    locked = manage.lock_growing_trees(connectable, Selection(ids)) if ids else []
    if own in locked:
        raise UsageError(
            f"workflow {own} starts a workflow that would cancel it, because it or one above it has that name and key. "
            "Nothing was started: use another key, or continue_as_new()."
        )
    workers = manage.workers_of(connectable, locked)
    manage.cancel_locked(connectable, locked)
    return locked, workers


def _changed(connectable: Connectable, statement: Statement, rows: Sequence[dict[str, Any]]) -> dict[UUID, UUID]:
    """Change workflows, and return their ids by those of the starts."""
    if not rows:
        return {}
    return {row.start_id: row.id for row in execute(connectable, statement, batch_parameter("batch", rows))}


def _key_row(new: NewWorkflow, rule: KeyRule) -> dict[str, Any]:
    return {"id": new.id.hex, "name": new.name, "key": new.key, **_span(rule)}


def _replacing(new: NewWorkflow, rule: KeyRule) -> dict[str, Any]:
    return {**NEW.row(new), "longest_wait": rule.longest_wait}


def _taking(new: NewWorkflow, rule: KeyRule, holder: UUID) -> dict[str, Any]:
    span = {"unique": _CANCELLED} if rule.on_conflict == "cancel_running" else _span(rule)
    return {"id": new.id.hex, "holder": holder.hex, "key": new.key, **span}


def _span(rule: KeyRule) -> dict[str, Any]:
    return {each: getattr(rule, each) for each in _SPAN}


def _taken(new: NewWorkflow, holder: sa.Row[Any]) -> KeyTakenError:
    return KeyTakenError(
        f"workflow {new.name!r} with the key {new.key!r} is not started: workflow {holder.id} "
        f"({holder.status}) has that key. Nothing was written, and the transaction is usable.",
        workflow_id=UUID(bytes=holder.id.bytes),  # asyncpg has a class of its own, which is not recorded with an error
        name=new.name,
        key=new.key or "",
    )


def _has_key(batch: sa.FromClause) -> Condition:
    return sa.and_(WORKFLOW.c.name == batch.c.name, WORKFLOW.c.key == batch.c.key)


def _is_over(batch: sa.FromClause) -> Condition:
    """Return whether a key is no longer taken by the workflow that has it."""
    has_started, has_finished = WORKFLOW.c.started_at.is_not(None), WORKFLOW.c.finished_at.is_not(None)
    until = WORKFLOW.c.created_at + interval(batch.c.period)
    return sa.or_(
        batch.c.unique == text_literal(_CANCELLED),
        sa.and_(batch.c.unique == text_literal("unfinished"), has_finished),
        sa.and_(batch.c.unique == text_literal("unstarted"), sa.or_(has_started, has_finished, ~_can_wait(batch))),
        sa.and_(batch.c.unique == text_literal("period"), until <= pg.statement_timestamp()),
    )


def _can_wait(batch: sa.FromClause) -> Condition:
    """Return whether the longest wait of a workflow is not over; without one, it is not.

    What has waited for so long is changed no more: callers that follow each other closely lock its row all the time,
    and workers pass by what is locked.
    """
    until = WORKFLOW.c.created_at + interval(batch.c.longest_wait)
    return sa.func.coalesce(until > pg.statement_timestamp(), sa.true())


def _holders_statement() -> Any:
    batch = batch_table("batch", _KEYS)
    is_over = sa.func.coalesce(_is_over(batch), sa.false()).label("is_over")
    return sa.select(batch.c.id.label("start_id"), WORKFLOW.c.id, WORKFLOW.c.status, is_over).join_from(
        batch, WORKFLOW, _has_key(batch)
    )


def _take_key_statement() -> Any:
    batch = batch_table("batch", _TAKING)
    locked = materialized(
        sa.select(batch.c.id.label("start_id"), WORKFLOW.c.id, WORKFLOW.c.key.label("former_key"))
        .join_from(batch, WORKFLOW, sa.and_(WORKFLOW.c.id == batch.c.holder, WORKFLOW.c.key == batch.c.key))
        .where(_is_over(batch))
        .order_by(WORKFLOW.c.id)
        .with_for_update(key_share=True, of=WORKFLOW),
        "locked",
    )
    return (
        sa.update(WORKFLOW)
        .where(WORKFLOW.c.id == locked.c.id)
        .values(key=sa.null(), former_key=locked.c.former_key)
        .returning(locked.c.start_id, WORKFLOW.c.id)
    )


def _replace_statement() -> Any:
    batch = batch_table("batch", _REPLACING)
    given = new_columns(batch.c)
    columns = [given[each].label(each) for each in _REPLACED]
    # It is due at most so long after its own start. LEAST ignores NULL.
    wake_at = sa.func.least(given["wake_at"], WORKFLOW.c.created_at + interval(batch.c.longest_wait))
    was_pending = WORKFLOW.c.status == status_literal(WorkflowStatus.PENDING)
    locked = materialized(
        sa.select(
            batch.c.id.label("start_id"),
            WORKFLOW.c.id,
            *columns,
            wake_at.label("due_at"),
            sa.case((was_pending, WORKFLOW.c.enqueued_at), else_=pg.statement_timestamp()).label("enqueued_at"),
            is_deferred().label("is_deferred"),
        )
        .join_from(batch, WORKFLOW, _has_key(batch))
        .where(WORKFLOW.c.started_at.is_(None), WORKFLOW.c.finished_at.is_(None), _can_wait(batch))
        .order_by(WORKFLOW.c.id)
        .with_for_update(key_share=True, of=WORKFLOW),
        "locked",
    )
    # A deferred child stays so, until others have ended.
    is_later = sa.and_(~locked.c.is_deferred, locked.c.due_at > pg.statement_timestamp())
    waits = sa.or_(locked.c.is_deferred, sa.func.coalesce(is_later, sa.false()))
    found = materialized(
        sa.select(
            *(each for each in locked.c if each.name not in ("due_at", "is_deferred")),
            sa.case((is_later, locked.c.due_at)).label("wake_at"),
            sa.case((waits, WorkflowStatus.SUSPENDED.value), else_=WorkflowStatus.PENDING.value).label("status"),
        ),
        "found",
    )
    values = {each: found.c[each] for each in (*_REPLACED, "enqueued_at", "wake_at", "status")}
    return (
        sa.update(WORKFLOW)
        .where(WORKFLOW.c.id == found.c.id)
        .values(**values, awaits=sa.null())
        .returning(found.c.start_id, WORKFLOW.c.id)
    )


_HOLDERS = Statement(_holders_statement)
_TAKE_KEY = Statement(_take_key_statement)
_REPLACE = Statement(_replace_statement)
