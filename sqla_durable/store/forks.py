"""The statements that copy workflows: the record, and the steps, events and stream items up to a step.

One statement copies all of it, from one snapshot, and locks none of the rows that it reads: a fork of a running
workflow is of what it had committed by then.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import Session

from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.models import Workflow
from sqla_durable.models.base import StepStatus, Text
from sqla_durable.store.keys import insert_new_keys
from sqla_durable.store.selecting import Selection
from sqla_durable.store.statements import (
    EVENT,
    ONE,
    STEP,
    STREAM_ITEM,
    WORKFLOW,
    ZERO,
    Condition,
    Expression,
    Statement,
    batch_parameter,
    batch_table,
    execute,
    insert_select,
    is_among,
    is_open_step,
    json_parameter,
    materialized,
    merge_record,
    next_attempt,
    parameter,
    pg,
    reset_cancellation,
    scalars,
    status_literal,
)

_SUCCEEDED = status_literal(StepStatus.SUCCEEDED)
_SOURCES = parameter("sources", ARRAY(sa.UUID()))
_STANDING = {"status", "output", "error", "crashes", "token", "worker_id", "wake_at", "awaits", "finished_at"}
_NOT_COPIED = _STANDING | {
    "place",
    "created_at",
    "enqueued_at",
    "former_key",
    "parent_id",
    "parent_key",
    "detached",
    "schedule",
}


@dataclass(frozen=True, slots=True)
class Change:
    """How a fork differs from what it is a fork of. `input` and `outcomes` are JSON texts by name and by key."""

    from_step: str | None
    input: Mapping[str, str]
    outcomes: Mapping[str, str]
    version: str | None
    key: str | None
    queue: str | None

    @property
    def steps(self) -> list[str]:
        """The keys of the steps that must be recorded."""
        return list(dict.fromkeys([*([] if self.from_step is None else [self.from_step]), *self.outcomes]))


def sources(session: Session, wanted: Selection) -> dict[UUID, str]:
    """Return those of the workflows that exist with their names, in the order of their ids."""
    rows = execute(
        session,
        sa.select(WORKFLOW.c.id, WORKFLOW.c.name).where(is_among(WORKFLOW.c.id, wanted.ids)).order_by(WORKFLOW.c.id),
    )
    return {row.id: row.name for row in rows}


def find(session: Session, name: str, key: str) -> Workflow | None:
    """Return the record that has this name and key, or None."""
    statement = sa.select(*WORKFLOW.c).where(WORKFLOW.c.name == name, WORKFLOW.c.key == key)
    row = execute(session, statement).mappings().one_or_none()
    return None if row is None else merge_record(session, row)


def records(session: Session, ids: Sequence[UUID]) -> list[Workflow]:
    """Return the records of these ids, in their order."""
    rows = execute(session, sa.select(*WORKFLOW.c).where(is_among(WORKFLOW.c.id, ids))).mappings()
    by_id = {row["id"]: merge_record(session, row) for row in rows}
    return [by_id[each] for each in ids]


def copy(session: Session, ids: Mapping[UUID, UUID], change: Change) -> set[UUID]:
    """Insert a fork of each workflow under its new id; return the new ids.

    None is inserted if one workflow has no record of a step that the change names. A fork whose key exists is left out.
    """
    parameters: dict[str, Any] = {
        "sources": list(ids),
        "new_input": json.dumps({name: json.loads(each) for name, each in change.input.items()}),
        "new_version": change.version,
        "new_key": change.key,
        "new_queue": change.queue,
        "from_step": change.from_step,
    }
    parameters |= batch_parameter("batch", [{"source": source.hex, "id": new.hex} for source, new in ids.items()])
    parameters |= batch_parameter("outcome", [{"key": key, "value": value} for key, value in change.outcomes.items()])
    parameters |= batch_parameter("needed", [{"key": key} for key in change.steps])
    return set(scalars(session, _COPY, parameters))


def _copy_statement() -> Any:
    cut = _cut()
    copied = _copied(cut)
    started = _insert_workflows(cut, copied).cte("started")
    effects = [
        _insert_steps(copied, started),
        _insert_events(cut, copied, started),
        _insert_stream_items(cut, copied, started),
    ]
    return sa.select(started.c.id).add_cte(*(each.cte(f"inserted_{number}") for number, each in enumerate(effects)))


def _cut() -> sa.CTE:
    """Select the workflows with the position from which nothing is copied; none if one lacks a step."""
    batch = batch_table("batch", {"source": sa.UUID(), "id": sa.UUID()})
    needed = batch_table("needed", {"key": Text()})
    same = sa.and_(_of_source(STEP.c.workflow_id, batch), STEP.c.key == needed.c.key)
    lacking = (
        sa.select(batch.c.id)
        .select_from(batch.join(needed, sa.true()).outerjoin(STEP, same))
        .where(STEP.c.key.is_(None))
    )
    at = sa.and_(_of_source(STEP.c.workflow_id, batch), STEP.c.key == parameter("from_step", Text()))
    chosen = sa.select(batch.c.source, batch.c.id, STEP.c.position).select_from(batch.outerjoin(STEP, at))
    return materialized(chosen.where(~lacking.correlate(None).exists()), "cut")


def _copied(cut: sa.CTE) -> sa.CTE:
    """Select the outcomes before the cut, and those that the change replaces."""
    outcome = batch_table("outcome", {"key": Text(), "value": Text()})
    before = sa.and_(~is_open_step(), STEP.c.position < cut.c.position)
    replaced = outcome.c.key.is_not(None)
    columns = [each for each in STEP.c if each.name not in ("workflow_id", "status", "output", "error", "wake_at")]
    rows = (
        sa.select(
            cut.c.id.label("workflow_id"),
            cut.c.source,
            sa.func.coalesce(before, sa.false()).label("is_before"),
            sa.case((replaced, _SUCCEEDED), else_=sa.cast(STEP.c.status, Text)).label("status"),
            sa.case((replaced, sa.cast(outcome.c.value, JSONB)), else_=STEP.c.output).label("output"),
            sa.case((replaced, sa.null()), else_=STEP.c.error).label("error"),
            *columns,
        )
        .select_from(
            cut.join(STEP, _of_source(STEP.c.workflow_id, cut)).outerjoin(outcome, outcome.c.key == STEP.c.key)
        )
        .where(sa.or_(before, replaced))
    )
    return materialized(rows, "copied")


def _insert_workflows(cut: sa.CTE, copied: sa.CTE) -> Any:
    # As if its copied steps were of earlier attempts: what they recorded is no progress of the first one.
    attempts = sa.select(pg.max(copied.c.attempt)).where(copied.c.workflow_id == cut.c.id).scalar_subquery()
    now = pg.statement_timestamp()
    changed: dict[str, Expression] = {
        "id": cut.c.id,
        "key": parameter("new_key", Text()),
        "queue": sa.func.coalesce(parameter("new_queue", Text()), WORKFLOW.c.queue),
        "input": WORKFLOW.c.input.op("||")(json_parameter("new_input")),
        "attempt": next_attempt(sa.func.coalesce(attempts, ZERO)),
        "started_at": sa.case((attempts.is_not(None), now)),  # only what was started before has a history to be read
        "deadline_at": now + WORKFLOW.c.timeout,
        "forked_from": cut.c.source,
        "cancellation": reset_cancellation(),
        "version": sa.func.coalesce(parameter("new_version", Text()), WORKFLOW.c.version),
    }
    columns = {each.name: each for each in WORKFLOW.c if each.name not in _NOT_COPIED} | changed
    source = sa.select(*columns.values()).join_from(cut, WORKFLOW, _of_source(WORKFLOW.c.id, cut))
    return insert_new_keys(WORKFLOW, columns, source.order_by(cut.c.source)).returning(WORKFLOW.c.id)


def _insert_steps(copied: sa.CTE, started: sa.CTE) -> Any:
    columns = [each for each in copied.c if each.name in STEP.c]
    source = sa.select(*columns).join_from(copied, started, started.c.id == copied.c.workflow_id)
    return insert_select(STEP, [each.name for each in columns], source)


def _insert_events(cut: sa.CTE, copied: sa.CTE, started: sa.CTE) -> Any:
    names = ("key", "value", "step_key", "created_at")
    source = sa.select(cut.c.id, *(EVENT.c[name] for name in names)).select_from(_shown(EVENT, cut, copied, started))
    return insert_select(EVENT, ["workflow_id", *names], source.order_by(EVENT.c.id))


def _insert_stream_items(cut: sa.CTE, copied: sa.CTE, started: sa.CTE) -> Any:
    """Insert the items with new numbers: items that are left out may have been in between."""
    number = pg.row_number().over(partition_by=(cut.c.id, STREAM_ITEM.c.name), order_by=STREAM_ITEM.c.number)
    names = ("name", "value", "closed", "step_key", "attempt", "try_number", "created_at")
    columns = [cut.c.id, number - ONE, *(STREAM_ITEM.c[name] for name in names)]
    source = sa.select(*columns).select_from(_shown(STREAM_ITEM, cut, copied, started))
    return insert_select(STREAM_ITEM, ["workflow_id", "number", *names], source)


def _shown(what: Any, cut: sa.CTE, copied: sa.CTE, started: sa.CTE) -> Any:
    """Join with what the copied steps before the cut have published."""
    theirs = sa.and_(copied.c.source == what.c.workflow_id, copied.c.key == what.c.step_key, copied.c.is_before)
    own = sa.and_(copied.c.workflow_id == cut.c.id, _of_source(what.c.workflow_id, cut))
    return what.join(copied, theirs).join(cut, own).join(started, started.c.id == cut.c.id)


def _of_source(column: sa.ColumnElement[UUID], rows: sa.FromClause) -> Condition:
    """Compare with the workflows that are copied; with the array too, whose length the planner knows."""
    return sa.and_(column == rows.c.source, column == sa.func.any(_SOURCES))


_COPY = Statement(_copy_statement)
