"""The statements of schedules: what is due, what a tick starts, and how a schedule is declared, paused and resumed.

A tick is one statement: it advances the schedule's row, if that is as it was read, and inserts the workflows. So each
tick starts exactly one workflow whoever decides it, without a leader; two workers that decide the same write once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB, insert
from uuid_utils.compat import uuid7

from sqla_durable.definitions.calendar import Calendar
from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.definitions.schedules import Decision, ScheduleOptions, ScheduleState, Tick, tick_headers
from sqla_durable.models.base import Text
from sqla_durable.store.keys import insert_new_keys
from sqla_durable.store.records import NewWorkflow
from sqla_durable.store.starts import NEW, new_columns
from sqla_durable.store.statements import (
    SCHEDULE,
    WORKFLOW,
    Condition,
    Connectable,
    Statement,
    batch_parameter,
    batch_table,
    count_rows,
    execute,
    interval,
    materialized,
    parameter,
    pg,
    row_version,
    scalars,
    text_literal,
)

_PLANNED = ("next_at", "due_at", "last_at", "queued_at")
_SPEC = (
    "workflow",
    "input",
    "queue",
    "priority",
    "by",
    "timeout",
    "version",
    "tags",
    "headers",
    "cron",
    "every",
    "tz",
    "excluding",
    "starts_at",
    "ends_at",
    "jitter",
    "overlap",
    "missed",
    "missed_within",
)
"""What a schedule is; the other columns say how far it is."""

_OF_TICKS = "id", "name", "key", "queue", "priority", "by", "input", "timeout", "version", "tags", "headers", "schedule"
"""What a tick writes of a new workflow, and no more: whoever runs schedules needs no right to make children."""
_TIMES = "cron", "every", "tz", "excluding", "starts_at", "ends_at", "jitter"


@dataclass(frozen=True, slots=True)
class DueSchedule:
    """A schedule that a worker is to look at.

    Attributes:
        state: what `decide` is asked with.
        new: a workflow that it starts, without its key and its id.
        row_version: of the row that was read.
    """

    state: ScheduleState
    new: NewWorkflow
    row_version: str


def due(connectable: Connectable, *, limit: int) -> list[sa.RowMapping]:
    """Read schedules that are due or to be planned, except what others lock; `due_schedule` makes sense of each."""
    return list(execute(connectable, _DUE, {"limit": limit}).mappings())


def due_schedule(row: sa.RowMapping) -> DueSchedule:
    """Return what a row of `due` holds.

    Raises:
        ArgumentError: whoever wrote the row made a schedule that is none, such as one of an unknown time zone.
    """
    options = ScheduleOptions.of(
        cron=row["cron"],
        every=row["every"],
        tz=row["tz"],
        starts_at=row["starts_at"],
        ends_at=row["ends_at"],
        excluding=row["excluding"],
        jitter=row["jitter"],
        overlap=row["overlap"],
        missed=row["missed"],
        missed_within=row["missed_within"],
    )
    now, next_at = row["read_at"], row["next_at"]
    if next_at is None and row["due_at"] is not None:  # it was made, changed or resumed then
        next_at = options.calendar.next_after(min(row["due_at"], now))
    state = ScheduleState(
        row["name"],
        options,
        now,
        next_at=next_at,
        last_at=row["last_at"],
        queued_at=row["queued_at"],
        unfinished=row["unfinished"],
    )
    timeout: timedelta | None = row["timeout"]
    new = NewWorkflow(
        id=UUID(int=0),
        name=row["workflow"],
        input=row["input"],
        queue=row["queue"],
        priority=row["priority"],
        by=row["by"],
        timeout=None if timeout is None else timeout.total_seconds(),
        version=row["version"],
        schedule=row["name"],
        tags=None if row["tags"] is None else json.loads(row["tags"]),
        headers=None if row["headers"] is None else json.loads(row["headers"]),
    )
    return DueSchedule(state, new, row["row_version"])


def for_tick(new: NewWorkflow, tick: Tick) -> NewWorkflow:
    """Return the workflow of a tick; the same tick always has the same key."""
    headers = {**(new.headers or {}), **tick_headers(tick)}
    return new._replace(id=uuid7(), key=tick_key(tick.schedule, tick.at), schedule=tick.schedule, headers=headers)


def tick_key(schedule: str, at: datetime) -> str:
    """Return the key of the workflow that a tick starts."""
    return f"schedule {schedule} {at.astimezone(UTC).isoformat()}"


def advance(connectable: Connectable, found: DueSchedule, decision: Decision) -> int | None:
    """Write what was decided, and start the workflows of its ticks; return how many are new.

    None: the row is locked by others, or is no longer as it was read; nothing was written. Waits for nobody, but for a
    transaction that is starting a workflow with the key of one of the ticks.
    """
    rows = [NEW.row(for_tick(found.new, tick)) for tick in decision.started]
    planned = {name: getattr(decision, name) for name in _PLANNED}
    row = execute(
        connectable,
        _ADVANCE,
        {
            **planned,
            "schedule_name": found.state.name,
            "row_version": found.row_version,
            "more_skipped": decision.skipped,
            **batch_parameter("ticks", rows),
        },
    ).one()
    return row.started if row.advanced else None


def put(connectable: Connectable, new: NewWorkflow, options: ScheduleOptions, *, name: str, declared: bool) -> bool:
    """Make a schedule, or change the one of that name; return whether anything has changed.

    If its times are others, they count from this statement on, whenever a worker plans it. One that is paused stays so,
    unless it was paused because the code no longer declared it. Locks its row, but if it is declared as it was, whoever
    locks it. Headers by themselves change no declared one: interceptors may set others in each process.
    """
    values = {**_spec_values(new, options), "declared": declared}
    compared = [each for each in values if not (declared and each == "headers")]
    is_undeclared = sa.func.coalesce(SCHEDULE.c.pause_reason == text_literal(UNDECLARED), sa.false())
    is_same = [SCHEDULE.c[each].is_not_distinct_from(values[each]) for each in compared]
    known = sa.select(SCHEDULE.c.name).where(SCHEDULE.c.name == name, ~is_undeclared, *is_same)
    if declared and execute(connectable, known).first() is not None:
        return False
    given = insert(SCHEDULE).values(name=name, **_UNPLANNED, **values)

    def differ(columns: Iterable[str]) -> Condition:
        return sa.or_(is_undeclared, *(SCHEDULE.c[each].is_distinct_from(given.excluded[each]) for each in columns))

    changed = given.on_conflict_do_update(
        index_elements=["name"],
        set_={
            **{each: given.excluded[each] for each in values},
            **{each: sa.case((differ(_TIMES), given.excluded[each]), else_=SCHEDULE.c[each]) for each in _UNPLANNED},
            **{each: sa.case((is_undeclared, sa.null()), else_=SCHEDULE.c[each]) for each in _PAUSE},
        },
        where=differ(compared),
    )
    return execute(connectable, changed.returning(SCHEDULE.c.name)).first() is not None


def pause_undeclared(connectable: Connectable, *, names: Sequence[str], workflows: Sequence[str]) -> list[str]:
    """Pause what the code declared once and no longer does, of workflows that it knows; return the names."""
    is_gone = SCHEDULE.c.declared, SCHEDULE.c.name.not_in(names), SCHEDULE.c.workflow.in_(workflows)
    paused = {"paused_at": pg.statement_timestamp(), "pause_reason": text_literal(UNDECLARED)}
    return sorted(scalars(connectable, _changed(paused, *is_gone, SCHEDULE.c.paused_at.is_(None))))


def pause(connectable: Connectable, name: str, *, reason: str | None) -> bool:
    """Pause a schedule: its ticks are passed over. False: there is none of that name. Locks its row."""
    paused_at = sa.func.coalesce(SCHEDULE.c.paused_at, pg.statement_timestamp())
    paused = {"paused_at": paused_at, "pause_reason": sa.literal(reason, Text())}
    return execute(connectable, _changed(paused, SCHEDULE.c.name == name)).first() is not None


def resume(connectable: Connectable, name: str) -> bool:
    """Let a paused schedule go on with its next tick from now on. False: none has that name. Locks its row."""
    is_active = SCHEDULE.c.paused_at.is_(None)
    changes = {**_PAUSE, **_UNPLANNED}
    going_on = {each: sa.case((is_active, SCHEDULE.c[each]), else_=value) for each, value in changes.items()}
    return execute(connectable, _changed(going_on, SCHEDULE.c.name == name)).first() is not None


def postpone(connectable: Connectable, *, name: str, row_version: str, seconds: float) -> bool:
    """Let workers look at a schedule later. False: its row has changed or is locked."""
    given = {"schedule_name": name, "row_version": row_version, "seconds": seconds}
    return execute(connectable, _POSTPONE, given).first() is not None


def unfinished_of(connectable: Connectable, name: str) -> list[UUID]:
    """Return the ids of a schedule's unfinished workflows."""
    return list(scalars(connectable, sa.select(WORKFLOW.c.id).where(*_is_unfinished_of(name))))


def limit_lock_waits(connectable: Connectable) -> None:
    """Let the statements of this transaction fail where they would wait for a lock."""
    setting, value = text_literal("lock_timeout"), text_literal("50ms")
    execute(connectable, sa.select(pg.set_config(setting, value, sa.true())))


def lock(connectable: Connectable, name: str) -> sa.RowMapping | None:
    """Lock a schedule's row, and read it as `due` does."""
    wanted = _read(SCHEDULE.c.name == name).with_for_update(key_share=True, of=SCHEDULE)
    return execute(connectable, wanted).mappings().one_or_none()


def is_due() -> Condition:
    """Return whether a worker is to look at a schedule now."""
    return sa.and_(
        SCHEDULE.c.paused_at.is_(None),
        SCHEDULE.c.ended_at.is_(None),
        sa.or_(SCHEDULE.c.due_at <= pg.statement_timestamp(), SCHEDULE.c.due_at.is_(None)),
    )


def first_due_at(ahead: Any) -> Any:
    """Return the time of the first schedule that is due between now and then."""
    open_ = sa.and_(SCHEDULE.c.paused_at.is_(None), SCHEDULE.c.ended_at.is_(None))
    between = sa.and_(SCHEDULE.c.due_at > pg.statement_timestamp(), SCHEDULE.c.due_at <= ahead)
    return sa.select(pg.min(SCHEDULE.c.due_at)).where(open_, between).scalar_subquery()


UNDECLARED = "the code no longer declares it"
"""The reason of a pause that ends when the code declares the schedule again."""

_PAUSE = {name: sa.null() for name in ("paused_at", "pause_reason")}
_UNPLANNED = {
    **{name: sa.null() for name in ("next_at", "queued_at", "ended_at")},
    "due_at": pg.statement_timestamp(),
}
"""A worker looks at it at once, and plans it from then on."""


def _spec_values(new: NewWorkflow, options: ScheduleOptions) -> dict[str, Any]:
    calendar: Calendar = options.calendar
    return {
        "workflow": new.name,
        "input": sa.cast(sa.literal(new.input, Text()), JSONB),
        "queue": new.queue,
        "priority": new.priority,
        "by": new.by,
        "timeout": None if new.timeout is None else timedelta(seconds=new.timeout),
        "version": new.version,
        "tags": sa.null() if new.tags is None else new.tags,
        "headers": sa.null() if new.headers is None else new.headers,
        "cron": list(calendar.cron),
        "every": calendar.every,
        "tz": calendar.tz,
        "excluding": list(calendar.excluding),
        "starts_at": calendar.starts_at,
        "ends_at": calendar.ends_at,
        "jitter": options.jitter,
        "overlap": options.overlap,
        "missed": options.missed,
        "missed_within": options.missed_within,
    }


def _read(*conditions: Condition) -> Any:
    # Said explicitly: from within a subquery, SQLAlchemy refers to the table of the next outer select only.
    own = sa.select(WORKFLOW.c.id).where(*_is_unfinished_of(SCHEDULE.c.name)).correlate(SCHEDULE)
    unfinished = own.limit(100).subquery("unfinished")
    columns: dict[str, Any] = {each: SCHEDULE.c[each] for each in _SPEC}
    columns |= {each: sa.cast(SCHEDULE.c[each], Text).label(each) for each in ("input", "tags", "headers")}
    return sa.select(
        SCHEDULE.c.name,
        *columns.values(),
        *(SCHEDULE.c[each] for each in _PLANNED),
        sa.select(count_rows()).select_from(unfinished).scalar_subquery().label("unfinished"),
        _VERSION.label("row_version"),
        pg.statement_timestamp().label("read_at"),
    ).where(*conditions)


def _is_unfinished_of(name: Any) -> tuple[Condition, ...]:
    return WORKFLOW.c.schedule == name, WORKFLOW.c.schedule.is_not(None), WORKFLOW.c.finished_at.is_(None)


def _due_statement() -> Any:
    # Locked for as long as the statement takes: what a long transaction has locked is not in the way of the others.
    first = _read(is_due()).order_by(SCHEDULE.c.due_at.nulls_first(), SCHEDULE.c.name).limit(_LIMIT)
    return first.with_for_update(key_share=True, skip_locked=True, of=SCHEDULE)


def _postpone_statement() -> Any:
    later = pg.statement_timestamp() + interval(parameter("seconds", sa.Float()))
    return _changed({"due_at": later}, *_IS_AS_READ, skip_locked=True)


def _changed(values: Mapping[str, Any], *conditions: Condition, skip_locked: bool = False) -> Any:
    """Change schedules, and return their names."""
    columns = [value.label(name) for name, value in values.items()]
    found = _locked(*columns, where=conditions, skip_locked=skip_locked)
    return (
        sa.update(SCHEDULE)
        .where(SCHEDULE.c.name == found.c.name)
        .values({name: found.c[name] for name in values})
        .returning(SCHEDULE.c.name)
    )


def _locked(*columns: Any, where: Iterable[Condition], skip_locked: bool) -> sa.CTE:
    """Lock schedules, in the order of their names; with more columns."""
    found = sa.select(SCHEDULE.c.name, *columns).where(*where).order_by(SCHEDULE.c.name)
    return materialized(found.with_for_update(key_share=True, skip_locked=skip_locked, of=SCHEDULE), "found")


def _advance_statement() -> Any:
    moment = sa.DateTime(timezone=True)
    given = {name: parameter(name, moment) for name in _PLANNED}
    skipped = SCHEDULE.c.skipped + parameter("more_skipped", sa.BigInteger())
    has_ended = sa.and_(given["next_at"].is_(None), given["queued_at"].is_(None))
    ended_at = sa.case((has_ended, pg.statement_timestamp()))
    more = skipped.label("skipped"), ended_at.label("ended_at")
    found = _locked(*more, where=_IS_AS_READ, skip_locked=True)
    ticks = batch_table("ticks", NEW.columns)
    columns = {name: value for name, value in new_columns(ticks.c).items() if name in _OF_TICKS}
    source = sa.select(*columns.values()).select_from(ticks.join(found, sa.true())).order_by(ticks.c.key)
    started = insert_new_keys(WORKFLOW, columns, source).returning(WORKFLOW.c.id).cte("started")
    advanced = (
        sa.update(SCHEDULE)
        .where(SCHEDULE.c.name == found.c.name)
        .values(skipped=found.c.skipped, ended_at=found.c.ended_at, **given)
        .returning(SCHEDULE.c.name)
        .cte("advanced")
    )
    return sa.select(
        sa.select(advanced.c.name).exists().label("advanced"),
        sa.select(count_rows()).select_from(started).scalar_subquery().label("started"),
    )


_LIMIT = parameter("limit", sa.Integer())
_VERSION = sa.cast(row_version(SCHEDULE), Text)
_IS_AS_READ: tuple[Condition, ...] = (
    SCHEDULE.c.name == parameter("schedule_name", Text()),
    parameter("row_version", Text()) == _VERSION,
)
_DUE = Statement(_due_statement)
_ADVANCE = Statement(_advance_statement)
_POSTPONE = Statement(_postpone_statement)
