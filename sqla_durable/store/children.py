"""The statements on children: start them with the parent's checkpoint, read their progress, take their outcomes.

Each is one statement, fenced by the parent's attempt; carried out twice, it finds what the first one has recorded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.errors import NotFoundError
from sqla_durable.models.base import WorkflowStatus
from sqla_durable.store.conflicts import Repeats, settle
from sqla_durable.store.inbox import END_COLUMNS, end_notices, insert_orphan_notices, is_deferred, was_running
from sqla_durable.store.keys import MOST_REPEATS
from sqla_durable.store.records import Awaited, Checkpoint, KeyRule, NewWorkflow, Verdict
from sqla_durable.store.starts import NEW, hidden_among, new_columns
from sqla_durable.store.statements import (
    COMPENSATES,
    ONE,
    REQUESTED,
    STEP,
    WORKFLOW,
    Connectable,
    Statement,
    batch_parameter,
    batch_table,
    count_rows,
    end_or_compensate,
    execute,
    insert_select,
    is_among,
    materialized,
    parameter,
    pg,
    scalar,
    status_literal,
)
from sqla_durable.store.steps import (
    GIVEN,
    checkpoint_columns,
    given_parameters,
    has_outcome,
    insert_checkpoints,
    is_owned,
    lock_given,
    outcome_columns,
    outcome_in,
    record,
)
from sqla_durable.unwinding import AttemptLost

MOST_NAMED = 1_000
"""How many workflows a parent may wait for by name; for the first of more than these, it polls."""

_SAMPLE = 100
_PARENT = parameter("parent", sa.UUID())


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a group of workflows is.

    Attributes:
        there: how many of them there are.
        own: how many are children of the workflow that asks, whose ends leave a notice to it.
        finished: how many have an outcome; `failed` of them did not succeed.
        deferred: how many are deferred until others of the group end.
        active: how many can be executed, or are.
        named: a sample of the active ones, spread evenly over their order.
    """

    there: int
    own: int
    finished: int
    failed: int
    deferred: int
    active: int
    named: Sequence[UUID]


def start(
    connectable: Connectable,
    checkpoint: Checkpoint,
    children: Sequence[NewWorkflow],
    *,
    active: int,
    compensates: bool = False,
) -> str:
    """Start children and record that as the outcome of the step: the list of their ids. JSON text.

    Where a name and key are known, the workflow that has them is used. Children after the first `active` are deferred.
    Those that compensate do not inherit their parent's deadline.

    Raises:
        AttemptLost: the attempt no longer owns the workflow.
        KeyNotVisibleError: the workflow that has one of the keys cannot be seen; others may have been started.
    """
    parameters = given_parameters(checkpoint) | batch_parameter("batch", [NEW.row(each) for each in children])
    parameters |= {"active": active, "compensates": compensates}
    statement = _START if all(each.key is None for each in children) else _START_KEYED
    for _ in range(MOST_REPEATS):
        found = outcome_in(execute(connectable, statement, parameters).one(), checkpoint.fence)
        if found is not None:
            return str(found)
        # Another transaction has inserted one of the keys in between, and the next statement sees it.
    raise hidden_among(connectable, children)


def start_ruled(
    connectable: Connectable, checkpoint: Checkpoint, child: NewWorkflow, rule: KeyRule, *, compensates: bool = False
) -> str:
    """Start one as the rule for its key says, and record that as `start` does. In a transaction: several statements.

    Raises:
        AttemptLost: the attempt no longer owns the workflow.
        KeyTakenError: the key is taken, and the rule refuses.
        UsageError: the workflow itself would be cancelled.
        KeyNotVisibleError: the workflow that has the key cannot be seen.
    """
    given, fence = given_parameters(checkpoint), checkpoint.fence
    known = outcome_in(execute(connectable, _LOCK_PARENT, given).one(), fence)
    if known is not None:
        return known
    if scalar(connectable, _HAS_OUTCOME, given):  # since it was locked: its call was cancelled, and nobody waits for it
        raise hidden_among(connectable, [child])
    found = _started(connectable, given, child, rule, own=fence.workflow_id, compensates=compensates)
    output = json.dumps([str(found)])
    if record(connectable, checkpoint._replace(output=output)) is not Verdict.RECORDED:
        raise AttemptLost(fence.workflow_id)
    return output


def _started(
    connectable: Connectable,
    given: dict[str, Any],
    child: NewWorkflow,
    rule: KeyRule,
    *,
    own: UUID,
    compensates: bool,
) -> UUID:
    more = batch_parameter("batch", [NEW.row(child)]) | {"active": 1, "compensates": compensates}
    repeats = Repeats()
    while True:
        settled = settle(connectable, [(child, rule)], own=own)
        if child.id in settled.ids:
            return settled.ids[child.id]
        if execute(connectable, _INSERT, given | more).first() is not None:
            return child.id
        if not repeats.count(settled, [child.id]):
            raise hidden_among(connectable, [child])


def progress(connectable: Connectable, parent_id: UUID, *, ids: Sequence[UUID]) -> Progress:
    """Return how far these children are."""
    row = execute(connectable, _PROGRESS, {"parent": parent_id, "ids": list(ids)}).one()
    return Progress(row.there, row.own, row.finished, row.failed, row.deferred, row.active, row.named or ())


def sample(ids: Sequence[UUID]) -> list[UUID]:
    """Return a sample of the ids, spread evenly over their order."""
    return sorted(ids)[:: -(-len(ids) // _SAMPLE) or 1]


def outcomes(connectable: Connectable, *, ids: Sequence[UUID]) -> list[dict[str, Any]]:
    """Read the outcomes of children, in the order of their ids, in which they were started."""
    rows = execute(connectable, _OUTCOMES, {"ids": list(ids)})
    return [{"id": str(row.id), "status": row.status.value, "output": row.output, "error": row.error} for row in rows]


def take_outcome(connectable: Connectable, checkpoint: Checkpoint, *, workflow_id: UUID) -> str | None:
    """Record the outcome of a finished workflow as that of the step; return it as JSON text, or None."""
    return _taken(connectable, checkpoint, _TAKE_OUTCOME, {"ids": [workflow_id]})


def take_first(connectable: Connectable, checkpoint: Checkpoint, *, workflow_ids: Sequence[UUID]) -> str | None:
    """Record the id of the workflow that finished first, and return it as JSON text; None if none has finished."""
    return _taken(connectable, checkpoint, _TAKE_FIRST, {"ids": list(workflow_ids)})


def awaited(connectable: Connectable, parent_id: UUID, *, workflow_ids: Sequence[UUID]) -> tuple[Awaited, ...]:
    """Return what a parent awaits in order to wait for the first of these.

    Nothing, if one of them is not its child, whose end leaves it no notice, or if they are too many to name.

    Raises:
        NotFoundError: one of them is not there.
    """
    rows = execute(connectable, _AWAITED, {"parent": parent_id, "ids": list(workflow_ids)}).all()
    missing = set(workflow_ids) - {row.id for row in rows}
    for each in missing:
        raise NotFoundError(f"no workflow {each} is there to wait for: was it deleted?", workflow_id=each)
    if len(rows) > MOST_NAMED or not all(row.is_child for row in rows):
        return ()
    return (Awaited.any_of([row.id for row in rows]),)


def cancel_rest(connectable: Connectable, checkpoint: Checkpoint, *, ids: Sequence[UUID]) -> int:
    """Cancel what is unfinished of these children, with the trees under them; wait for the locks of their rows.

    Raises:
        AttemptLost: the attempt does not own the workflow: another attempt may use its children.
    """
    cancelled = 0
    # Again until there is nothing: one of them may have started another child before its row was locked.
    while True:
        row = execute(connectable, _CANCEL_REST, given_parameters(checkpoint) | {"ids": list(ids)}).one()
        if not row.owned:
            raise AttemptLost(checkpoint.fence.workflow_id)
        if not row.cancelled:
            return cancelled
        cancelled += row.cancelled


def _taken(connectable: Connectable, checkpoint: Checkpoint, statement: Any, more: dict[str, Any]) -> str | None:
    return outcome_in(execute(connectable, statement, given_parameters(checkpoint) | more).one(), checkpoint.fence)


def _recorded(output: Any, source: Any) -> Any:
    """Record an output that a CTE gives, where it gives one."""
    columns = checkpoint_columns(GIVEN) | {"output": output}
    return insert_checkpoints(columns, sa.select(*columns.values()).select_from(source)).returning(STEP.c.output)


def _new_children(owned: sa.CTE) -> tuple[sa.CTE, dict[str, Any]]:
    """Return the batch, numbered in the order of ids, and the columns of the children to be inserted."""
    given = batch_table("batch", NEW.columns)
    batch = materialized(
        sa.select(*given.c, pg.row_number().over(order_by=given.c.id).label("number")),
        "new",
    )
    columns = new_columns(batch.c)
    deferred = sa.and_(columns["wake_at"].is_(None), batch.c.number > parameter("active", sa.Integer()))
    columns["status"] = sa.case((deferred, WorkflowStatus.SUSPENDED.value), else_=columns["status"])
    inherited = sa.case((parameter("compensates", sa.Boolean()), sa.null()), else_=owned.c.deadline_at)
    columns["deadline_at"] = sa.func.least(columns["deadline_at"], inherited)
    return batch, columns


def _listed(ids: sa.FromClause) -> Any:
    return pg.jsonb_agg(ids.c.id.op("ORDER BY")(ids.c.number))


def _start_statement() -> Any:
    """Start children without keys, whose ids are known beforehand: what is recorded is started.

    In this order, because the call may have been cancelled, and that recorded, while this waited for the row's lock:
    only the insertion of the checkpoint sees that.
    """
    owned = lock_given()
    batch, columns = _new_children(owned)
    every = sa.select(_listed(batch).label("list")).cte("every")
    recorded = _recorded(every.c.list, every.join(owned, sa.true())).cte("recorded")
    source = sa.select(*columns.values()).select_from(batch.join(owned, sa.true()).join(recorded, sa.true()))
    inserted = insert_select(WORKFLOW, columns, source.order_by(batch.c.id)).returning(WORKFLOW.c.id).cte("inserted")
    return sa.select(*outcome_columns(owned, recorded)).add_cte(inserted)


def _start_keyed_statement() -> Any:
    """Start children with keys, or find those that have these: their ids are known only when they are inserted."""
    owned = lock_given()
    batch, columns = _new_children(owned)
    source = sa.select(*columns.values()).select_from(batch.join(owned, sa.true())).where(~has_outcome())
    inserted = (
        insert_select(WORKFLOW, columns, source.order_by(batch.c.name, batch.c.key, batch.c.id))
        .on_conflict_do_nothing()
        .returning(WORKFLOW.c.id)
        .cte("inserted")
    )
    earlier, keyed = WORKFLOW.alias("earlier"), WORKFLOW.alias("keyed")
    # Each looked up by an index: as joins, the planner would read the table for them.
    known = (
        sa.select(earlier.c.id).where(earlier.c.id == batch.c.id).scalar_subquery(),
        sa.select(keyed.c.id).where(keyed.c.name == batch.c.name, keyed.c.key == batch.c.key).scalar_subquery(),
    )
    child_id = sa.func.coalesce(inserted.c.id, *known).label("id")
    ids = sa.select(batch.c.number, child_id).outerjoin_from(batch, inserted, inserted.c.id == batch.c.id).cte("ids")
    every = sa.select(_listed(ids).label("list")).having(pg.count(ids.c.id) == count_rows()).cte("every")
    recorded = _recorded(every.c.list, every.join(owned, sa.true())).cte("recorded")
    return sa.select(*outcome_columns(owned, recorded))


def _insert_statement() -> Any:
    owned = lock_given()
    batch, columns = _new_children(owned)
    source = sa.select(*columns.values()).select_from(batch.join(owned, sa.true()))
    return insert_select(WORKFLOW, columns, source).on_conflict_do_nothing().returning(WORKFLOW.c.id)


def _lock_parent_statement() -> Any:
    return sa.select(*outcome_columns(lock_given(), sa.select(sa.null().label("output")).cte("recorded")))


def _take_outcome_statement() -> Any:
    owned = lock_given()
    outcome = pg.jsonb_build_object(
        "id", WORKFLOW.c.id, "name", WORKFLOW.c.name, "status", WORKFLOW.c.status,
        "output", WORKFLOW.c.output, "error", WORKFLOW.c.error,
    )  # fmt: skip
    finished = sa.select(outcome.label("value")).where(_wanted(), WORKFLOW.c.finished_at.is_not(None)).cte("finished")
    return sa.select(
        *outcome_columns(owned, _recorded(finished.c.value, finished.join(owned, sa.true())).cte("recorded"))
    )


def _take_first_statement() -> Any:
    owned = lock_given()
    first = (
        sa.select(pg.to_jsonb(WORKFLOW.c.id).label("value"))
        .where(_wanted(), WORKFLOW.c.finished_at.is_not(None))
        .order_by(WORKFLOW.c.finished_at, WORKFLOW.c.id)
        .limit(ONE)
        .cte("first")
    )
    return sa.select(*outcome_columns(owned, _recorded(first.c.value, first.join(owned, sa.true())).cte("recorded")))


def _wanted() -> Any:
    return is_among(WORKFLOW.c.id)


def _progress_statement() -> Any:
    finished = WORKFLOW.c.finished_at.is_not(None)
    succeeded = WORKFLOW.c.status == status_literal(WorkflowStatus.SUCCEEDED)
    active = sa.and_(~finished, ~is_deferred())
    place = pg.row_number().over(partition_by=active, order_by=WORKFLOW.c.id)
    seen = materialized(
        sa.select(
            WORKFLOW.c.id,
            (WORKFLOW.c.parent_id == _PARENT).label("own"),
            finished.label("finished"),
            sa.and_(finished, ~succeeded).label("failed"),
            is_deferred().label("deferred"),
            active.label("active"),
            place.label("place"),
        ).where(_wanted()),
        "seen",
    )
    count = sa.select(count_rows()).select_from(seen).where(seen.c.active).scalar_subquery()
    apart = sa.func.greatest((count + (_SAMPLE - 1)) // _SAMPLE, 1)
    named = sa.select(pg.array_agg(seen.c.id)).where(seen.c.active, (seen.c.place - 1) % apart == 0)
    return sa.select(
        count_rows().label("there"),
        *(
            count_rows().filter(seen.c[each]).label(each)
            for each in ("own", "finished", "failed", "deferred", "active")
        ),
        named.scalar_subquery().label("named"),
    ).select_from(seen)


def _awaited_statement() -> Any:
    is_child = sa.func.coalesce(WORKFLOW.c.parent_id == _PARENT, sa.false())
    return sa.select(WORKFLOW.c.id, is_child.label("is_child")).where(_wanted()).order_by(WORKFLOW.c.id)


def _cancel_rest_statement() -> Any:
    # Not locked: it may come after its children in the order of ids.
    owner = materialized(sa.select(WORKFLOW.c.id).where(*is_owned()), "owner")
    own = WORKFLOW.c.parent_id.in_(sa.select(owner.c.id))
    tree = sa.select(WORKFLOW.c.id).where(_wanted(), own, ~WORKFLOW.c.detached).cte("tree", recursive=True)
    below = WORKFLOW.alias("below")
    tree = tree.union(sa.select(below.c.id).join(tree, below.c.parent_id == tree.c.id).where(~below.c.detached))
    unfinished = WORKFLOW.c.finished_at.is_(None)
    rest = materialized(
        sa.select(WORKFLOW.c.id, was_running(), pg.statement_timestamp().label("locked_at"))
        .where(WORKFLOW.c.id.in_(sa.select(tree.c.id)), unfinished)
        .order_by(WORKFLOW.c.id)
        .with_for_update(key_share=True, of=WORKFLOW),
        "rest",
    )
    undone = WORKFLOW.c.cancellation == COMPENSATES
    cancelled = (
        sa.update(WORKFLOW)
        # What compensates already goes on with that.
        .where(
            WORKFLOW.c.id == rest.c.id,
            unfinished,
            sa.func.coalesce(WORKFLOW.c.cancellation, COMPENSATES) == COMPENSATES,
        )
        .values(end_or_compensate(undone, WorkflowStatus.CANCELLED, reason=REQUESTED, now=rest.c.locked_at))
        .returning(*END_COLUMNS, rest.c.was_running)
        .cte("cancelled")
    )
    count = sa.select(count_rows()).select_from(cancelled).scalar_subquery()
    answer = sa.select(sa.select(owner.c.id).exists().label("owned"), count.label("cancelled"))
    # To their parent too: while this waited for a row, another attempt may have reclaimed it, and may wait.
    return answer.add_cte(*end_notices(cancelled), insert_orphan_notices(cancelled).cte("left"))


_START = Statement(_start_statement)
_START_KEYED = Statement(_start_keyed_statement)
_LOCK_PARENT = Statement(_lock_parent_statement)
_HAS_OUTCOME = Statement(lambda: sa.select(has_outcome()))
_INSERT = Statement(_insert_statement)
_PROGRESS = Statement(_progress_statement)
_OUTCOMES = Statement(
    lambda: (
        sa.select(WORKFLOW.c.id, WORKFLOW.c.status, WORKFLOW.c.output, WORKFLOW.c.error)
        .where(_wanted(), WORKFLOW.c.finished_at.is_not(None))
        .order_by(WORKFLOW.c.id)
    )
)
_TAKE_OUTCOME = Statement(_take_outcome_statement)
_TAKE_FIRST = Statement(_take_first_statement)
_AWAITED = Statement(_awaited_statement)
_CANCEL_REST = Statement(_cancel_rest_statement)
