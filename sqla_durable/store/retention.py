"""The statements of retention: which policy is due, what of a part of the table goes, and its deletion.

A batch looks at a bounded number of rows in the order of their ids, from where the one before it ended. So it reads as
many pages however many rows must stay, and what cannot be deleted is not met again until the next walk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, insert

from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.definitions.queues import like
from sqla_durable.definitions.retention import RetentionOptions
from sqla_durable.models import SCHEMA, Base
from sqla_durable.models.base import Text, WorkflowStatus
from sqla_durable.store.deferred import start_all_of
from sqla_durable.store.manage import tree_under
from sqla_durable.store.places import KEY_UNLESS_FAILED
from sqla_durable.store.statements import (
    LIMIT,
    ONE,
    WORKFLOW,
    ZERO,
    Condition,
    Connectable,
    Expression,
    Statement,
    as_uuid,
    count_rows,
    execute,
    integer,
    interval,
    is_among,
    materialized,
    parameter,
    pg,
    scalar,
    status_literal,
    text_literal,
)

RETENTION = Base.metadata.tables[f"{SCHEMA}.retention"]

FRONT = UUID(int=0)
"""The id before all others."""

LOOKED_AT = 5_000
"""How many rows of the table one batch looks at."""

_LONGEST_PAUSE, _SHORTEST_PAUSE = 3_600.0, 1.0  # seconds from the end of a walk to the next
_PAUSES_OF_KEEP = 20  # so many walks in the time for which something is kept


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which finished workflows are to be deleted.

    Attributes:
        cutoff: they were finished before this, with their trees.
        until: and have smaller ids: what was finished before the cutoff was started before it.
        names: of these names, patterns among them; None means any.
        statuses: of these; None means every finished one.
        policy: the policy that says so: workflows that a more specific one fits are left to that. None: nobody else
            is asked.
    """

    cutoff: datetime
    until: UUID
    names: Sequence[str] | None = None
    statuses: Sequence[str] | None = None
    policy: str | None = None

    @classmethod
    def before(cls, cutoff: datetime, **more: Any) -> Wanted:
        """Return what was finished before a time."""
        return cls(cutoff.astimezone(UTC), id_before(cutoff), **more)


@dataclass(frozen=True, slots=True)
class DuePolicy:
    """A policy as its row says; that of `take_due` and `take` is locked.

    Attributes:
        name: its name.
        wanted: what it deletes.
        position: where its walk goes on; None at the beginning of one.
        pause: how many seconds there are from the end of a walk to the next.
    """

    name: str
    wanted: Wanted
    position: UUID | None
    pause: float

    @classmethod
    def of(cls, row: Any) -> DuePolicy:
        """Return what a row holds."""
        named = None if row.workflow is None else [row.workflow]
        wanted = Wanted.before(row.cutoff, names=named, statuses=row.statuses, policy=row.name)
        return cls(row.name, wanted, row.position, float(row.pause))


@dataclass(frozen=True, slots=True)
class Found:
    """What a batch has found.

    Attributes:
        roots: the ids of workflows that may be deleted with their trees, in order.
        seen: the id up to which everything was looked at.
        is_last: whether nothing comes after it.
    """

    roots: list[UUID]
    seen: UUID
    is_last: bool


def is_due() -> Condition:
    """Return whether a worker is to look at a policy now."""
    return sa.or_(RETENTION.c.due_at.is_(None), RETENTION.c.due_at <= pg.statement_timestamp())


def take_due(connectable: Connectable) -> DuePolicy | None:
    """Lock the policy that is due for the longest time, except what others lock; None if there is none."""
    row = execute(connectable, _TAKE_DUE).one_or_none()
    return None if row is None else DuePolicy.of(row)


def take(connectable: Connectable, name: str) -> DuePolicy | None:
    """Lock a policy, whenever it is due; None if none has the name, or others lock it."""
    row = execute(connectable, _TAKE, {"policy_name": name}).one_or_none()
    return None if row is None else DuePolicy.of(row)


def finished_for(
    connectable: Connectable, keep: timedelta, *, names: Sequence[str] | None, statuses: Sequence[str] | None
) -> Wanted:
    """Return what has been finished for longer than this on the database's clock, whatever the policies say."""
    cutoff = scalar(connectable, sa.select(pg.statement_timestamp() - sa.literal(keep, sa.Interval())))
    return Wanted.before(cutoff, names=names, statuses=statuses)


def find(
    connectable: Connectable, wanted: Wanted, *, after: UUID | None, limit: int, looked_at: int = LOOKED_AT
) -> Found:
    """Find finished roots that are to be deleted, among the next rows of the table. Locks nothing.

    A root is a workflow without a parent, or a detached one. One whose parent is unfinished is left alone, and so is
    one that failed and keeps others of its key waiting until it is retried or deleted.
    """
    row = execute(
        connectable,
        _FIND,
        {
            "after": after or FRONT,
            "until": wanted.until,
            "cutoff": wanted.cutoff,
            "patterns": None if wanted.names is None else [*map(like, wanted.names)],
            "statuses": None if wanted.statuses is None else list(wanted.statuses),
            "policy_name": wanted.policy,
            "limit": limit,
            "looked_at": looked_at,
        },
    ).one()
    roots = sorted(map(as_uuid, row.roots or ()))
    if len(roots) == limit:
        return Found(roots, roots[-1], is_last=False)
    return Found(roots, row.seen or after or FRONT, is_last=row.number < looked_at)


def lock_trees(connectable: Connectable, roots: Sequence[UUID], wanted: Wanted) -> dict[UUID, list[UUID]]:
    """Lock the trees of these roots, as far as all of each was finished before the cutoff and is locked by nobody.

    Waits for nothing. A tree has the children that are not detached, theirs too.

    Returns:
        For each root the ids of its tree, in the order of the roots.
    """
    trees: dict[UUID, list[UUID]] = {}
    if roots:
        for row in execute(connectable, _LOCK_TREES, {"ids": list(roots), "cutoff": wanted.cutoff}):
            trees.setdefault(row.root_id, []).append(row.id)
    return trees


def delete(connectable: Connectable, ids: Sequence[UUID]) -> None:
    """Delete workflows with all their rows, without the records of a session; their rows are locked."""
    start_all_of(connectable, ids)
    execute(connectable, sa.delete(WORKFLOW).where(is_among(WORKFLOW.c.id, ids)))


def check_at_once(connectable: Connectable) -> None:
    """Let foreign keys of the application that are checked at a commit refuse in the statement that breaks them."""
    execute(connectable, sa.text("SET CONSTRAINTS ALL IMMEDIATE"))


def note(
    connectable: Connectable, policy: DuePolicy, *, position: UUID | None, deleted: int, refused: int, pause: float
) -> None:
    """Write down what a batch of a policy has done, and when the next one is due.

    Args:
        position: where it goes on; None after the end of a walk.
        deleted: how many workflows are gone.
        refused: how many had to be left.
        pause: the seconds until a worker looks at it again.
    """
    before = ZERO if policy.position is None else RETENTION.c.refused
    values = {
        "position": position,
        "deleted": RETENTION.c.deleted + deleted,
        "refused": before + refused,
        "last_at": pg.statement_timestamp(),
        "due_at": pg.statement_timestamp() + interval(sa.literal(pause, sa.Float())),
    }
    execute(connectable, sa.update(RETENTION).where(RETENTION.c.name == policy.name).values(values))


def postpone(connectable: Connectable, name: str, *, seconds: float) -> None:
    """Let workers look at a policy later. Locks its row."""
    later = pg.statement_timestamp() + interval(sa.literal(seconds, sa.Float()))
    execute(connectable, sa.update(RETENTION).where(RETENTION.c.name == name).values(due_at=later))


def policies(connectable: Connectable) -> list[DuePolicy]:
    """Return all policies, whenever they are due, in the order of their names. Locks nothing."""
    return [DuePolicy.of(row) for row in execute(connectable, _take().order_by(RETENTION.c.name))]


def put(connectable: Connectable, name: str, options: RetentionOptions, *, declared: bool) -> bool:
    """Make a policy, or change the one of that name; return whether anything has changed.

    What has changed is due at once, and its walk begins again. Locks its row, unless it is as it is to be.
    """
    statuses = None if options.statuses is None else list(options.statuses)
    values = {"workflow": options.workflow, "statuses": statuses, "keep": options.keep, "declared": declared}
    same = [RETENTION.c[each].is_not_distinct_from(value) for each, value in values.items()]
    if execute(connectable, sa.select(RETENTION.c.name).where(RETENTION.c.name == name, *same)).first() is not None:
        return False
    given = insert(RETENTION).values(name=name, **values)
    changed = given.on_conflict_do_update(
        index_elements=["name"],
        set_={**{each: given.excluded[each] for each in values}, "due_at": sa.null(), "position": sa.null()},
        where=sa.or_(*(RETENTION.c[each].is_distinct_from(given.excluded[each]) for each in values)),
    )
    return execute(connectable, changed.returning(RETENTION.c.name)).first() is not None


def drop(connectable: Connectable, name: str) -> bool:
    """Delete a policy; return whether there was one. Waits for a worker whose batch is of it."""
    gone = sa.delete(RETENTION).where(RETENTION.c.name == name).returning(RETENTION.c.name)
    return execute(connectable, gone).first() is not None


def drop_undeclared(
    connectable: Connectable, *, declared: Iterable[str], workflows: Iterable[str]
) -> tuple[list[str], list[str]]:
    """Delete what the code declared once and no longer does, where it is about one workflow that the code knows.

    Returns:
        The names of those that are gone; and of those that stay, because they are about others too.
    """
    known = set(workflows)
    wanted = sa.select(RETENTION.c.name, RETENTION.c.workflow).where(
        RETENTION.c.declared, RETENTION.c.name.not_in(list(declared))
    )
    rows = execute(connectable, wanted.order_by(RETENTION.c.name)).all()
    gone = [row.name for row in rows if row.workflow in known]
    return [each for each in gone if drop(connectable, each)], [row.name for row in rows if row.name not in gone]


def id_before(moment: datetime) -> UUID:
    """Return the least id of what was started at a time; `manage.id_at` for times that lie before all ids, too."""
    milliseconds = max(0, (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1))
    return UUID(int=milliseconds << 80)


def _take(*conditions: Condition) -> Any:
    kept: Expression = sa.cast(sa.func.extract("epoch", RETENTION.c.keep), sa.Double())
    pauses: Expression = sa.cast(_PAUSES_OF_KEEP, sa.Double())
    share = kept / pauses
    pause = sa.func.least(sa.func.greatest(share, _SHORTEST_PAUSE), _LONGEST_PAUSE)
    columns = RETENTION.c.name, RETENTION.c.workflow, RETENTION.c.statuses, RETENTION.c.position
    cutoff = (pg.statement_timestamp() - RETENTION.c.keep).label("cutoff")
    return sa.select(*columns, cutoff, pause.label("pause")).where(*conditions)


def _take_due_statement() -> Any:
    first = _take(is_due()).order_by(RETENTION.c.due_at.nulls_first(), RETENTION.c.name).limit(ONE)
    return first.with_for_update(key_share=True, skip_locked=True, of=RETENTION)


def _fits(policy: sa.FromClause, kind: sa.FromClause) -> Condition:
    """Return whether a policy is about workflows of a name and a status."""
    escaped: Expression = policy.c.workflow
    for character, text in (("\\", "\\\\"), ("%", "\\%"), ("_", "\\_"), ("*", "%")):
        escaped = pg.replace(escaped, text_literal(character), text_literal(text))
    of_name = sa.or_(policy.c.workflow.is_(None), kind.c.name.bool_op("LIKE")(escaped))
    of_status = sa.or_(policy.c.statuses.is_(None), _holds(policy.c.statuses, kind.c.status))
    return sa.and_(of_name, of_status)


def _holds(statuses: Expression, status: Expression) -> Condition:
    return pg.array_position(statuses, sa.cast(status, Text())).is_not(None)


def _specificity(policy: sa.FromClause) -> Any:
    """Return what is greater for the policy that decides.

    A name is more specific than a pattern, a longer pattern than a shorter, and that than none; then one with statuses.
    Of two that are still equal, the one that keeps longer decides.
    """
    is_pattern = pg.strpos(policy.c.workflow, text_literal("*")) > ZERO
    kind = sa.case((policy.c.workflow.is_(None), ZERO), (is_pattern, ONE), else_=integer(2))
    length = sa.func.coalesce(sa.case((is_pattern, pg.length(policy.c.workflow))), ZERO)
    has_statuses = sa.case((policy.c.statuses.is_(None), ZERO), else_=ONE)
    return sa.tuple_(kind, length, has_statuses, policy.c.keep)


def _find_statement() -> Any:
    between = WORKFLOW.c.id > parameter("after", sa.UUID()), WORKFLOW.c.id < parameter("until", sa.UUID())
    columns = [WORKFLOW.c[each] for each in ("id", "name", "status", "finished_at", "parent_id", "detached", "place")]
    next_ones = sa.select(*columns).where(*between).order_by(WORKFLOW.c.id).limit(_LOOKED_AT)
    seen = materialized(next_ones, "seen")
    kinds = sa.select(seen.c.name, seen.c.status).where(seen.c.finished_at.is_not(None)).distinct().cte("kinds")
    decided = materialized(sa.select(kinds.c.name, kinds.c.status).where(_is_decided(kinds)), "decided")
    parent = WORKFLOW.alias("parent")
    asking = sa.select(parent.c.id).where(parent.c.id == seen.c.parent_id, parent.c.finished_at.is_(None)).exists()
    is_root = sa.or_(seen.c.parent_id.is_(None), sa.and_(seen.c.detached, ~asking))
    roots = (
        sa.select(seen.c.id)
        .where(sa.tuple_(seen.c.name, seen.c.status).in_(sa.select(decided.c.name, decided.c.status)))
        .where(seen.c.finished_at < _CUTOFF, is_root, ~_blocks(seen))
        .order_by(seen.c.id)
        .limit(LIMIT)
        .subquery("roots")
    )
    last = sa.select(seen.c.id).order_by(seen.c.id.desc()).limit(ONE).scalar_subquery()
    ids = sa.select(pg.array_agg(roots.c.id)).scalar_subquery()
    number = sa.select(count_rows()).select_from(seen).scalar_subquery()
    return sa.select(ids.label("roots"), last.label("seen"), number.label("number"))


def _is_decided(kinds: sa.CTE) -> Condition:
    """Return whether the wanted ones are of this name and status, and no more specific policy fits those."""
    patterns, statuses = parameter("patterns", ARRAY(Text())), parameter("statuses", ARRAY(Text()))
    mine, other = RETENTION.alias("mine"), RETENTION.alias("other")
    more_specific = (
        sa.select(other.c.name)
        .select_from(other.join(mine, mine.c.name == _POLICY))
        .where(other.c.name != mine.c.name, _fits(other, kinds), _specificity(other) > _specificity(mine))
        .correlate(kinds)
        .exists()
    )
    is_there = sa.or_(_POLICY.is_(None), sa.select(mine.c.name).where(mine.c.name == _POLICY).exists())
    return sa.and_(
        is_there,
        sa.or_(patterns.is_(None), kinds.c.name.bool_op("LIKE")(sa.func.any(patterns))),
        sa.or_(statuses.is_(None), _holds(statuses, kinds.c.status)),
        ~more_specific,
    )


def _blocks(workflow: sa.FromClause) -> Condition:
    """Return whether a workflow keeps others of its key waiting until it is retried or deleted."""
    waited_for = sa.and_(
        workflow.c.place == KEY_UNLESS_FAILED, workflow.c.status == status_literal(WorkflowStatus.FAILED)
    )
    return sa.func.coalesce(waited_for, sa.false())


def _lock_trees_statement() -> Any:
    """Lock each member by the primary key, as the writer of a worker does: another plan reads more of the table."""
    tree = tree_under(is_among(WORKFLOW.c.id), WORKFLOW.c.id.label("root_id"))
    members = materialized(sa.select(tree.c.id).distinct().order_by(tree.c.id), "members")
    finished = (
        sa.select(WORKFLOW.c.id)
        .where(WORKFLOW.c.id == members.c.id, WORKFLOW.c.finished_at < _CUTOFF, ~_blocks(WORKFLOW))
        .limit(ONE)
        .with_for_update(key_share=True, skip_locked=True, of=WORKFLOW)
        .lateral("finished")
    )
    locked = materialized(sa.select(members.c.id).join(finished, sa.true()), "locked")
    others = sa.select(tree.c.root_id).where(tree.c.id.not_in(sa.select(locked.c.id)))
    # A parent that is enqueued again meanwhile may ask for a detached one: its row is locked too.
    child, parent = WORKFLOW.alias("child"), WORKFLOW.alias("parent")
    has_parent = sa.select(child.c.id, child.c.parent_id).where(is_among(child.c.id), child.c.parent_id.is_not(None))
    asking = materialized(has_parent, "asking")
    ended = (
        sa.select(parent.c.id)
        .where(parent.c.id == asking.c.parent_id, parent.c.finished_at.is_not(None))
        .limit(ONE)
        .with_for_update(key_share=True, skip_locked=True, of=parent)
        .lateral("ended")
    )
    free = materialized(sa.select(asking.c.id).join(ended, sa.true()), "free")
    asked = sa.select(asking.c.id).where(asking.c.id.not_in(sa.select(free.c.id)))
    return (
        sa.select(tree.c.root_id, tree.c.id)
        .where(tree.c.root_id.not_in(others), tree.c.root_id.not_in(asked))
        .order_by(tree.c.root_id, tree.c.id)
    )


_LOOKED_AT = parameter("looked_at", sa.Integer())
_CUTOFF = parameter("cutoff", sa.DateTime(timezone=True))
_POLICY = parameter("policy_name", Text())
_TAKE_DUE = Statement(_take_due_statement)
_TAKE = Statement(
    lambda: _take(RETENTION.c.name == _POLICY).with_for_update(key_share=True, skip_locked=True, of=RETENTION)
)
_FIND = Statement(_find_statement)
_LOCK_TREES = Statement(_lock_trees_statement)
