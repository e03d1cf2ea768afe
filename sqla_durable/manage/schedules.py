"""Make, change, pause, run and backfill schedules, in the caller's transaction; a schedule is deleted by its record."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice, takewhile
from typing import Any, NamedTuple, Unpack
from uuid import UUID

from sqlalchemy.orm import Session

import sqla_durable.api.hints as hints
import sqla_durable.api.sessions as sessions
from sqla_durable.api.schedules import require_schedule_name, scheduled
from sqla_durable.api.workflows import BoundWorkflow, start_many
from sqla_durable.definitions.checks import require_moment
from sqla_durable.definitions.schedules import ScheduleKeywords, ScheduleOptions, Tick, decide_to_run
from sqla_durable.errors import ArgumentError, UsageError
from sqla_durable.manage.verbs import cancel
from sqla_durable.models import Schedule
from sqla_durable.store import schedules

_MOST_TICKS = 1_000


class Backfill(NamedTuple):
    """What a call of `backfill_schedule` did.

    Attributes:
        ids: the ids of the workflows of its ticks, in order, those that were there already among them.
        since: where the next call begins; None if the range is done.
    """

    ids: list[UUID]
    since: datetime | None


def put_schedule(session: Session, name: str, workflow: BoundWorkflow, **options: Unpack[ScheduleKeywords]) -> Schedule:
    """Make a schedule, or change the one of that name, in the caller's transaction; return its record.

    ```python
    manage.put_schedule(session, f"digest-{user.id}", digest.bind(user.id), cron="0 7 * * *", tz=user.time_zone)
    ```

    Never commits; locks the schedule's row. A change counts from the next tick on, in running workers. One that is
    paused stays so.

    Args:
        session: the caller's session.
        name: its name in this database.
        workflow: what `workflow.bind(...)` returned; of its options queue, by, priority and timeout count.
        cron: one expression or several: five fields, or six with seconds first.
        every: instead of `cron`, the time between two ticks, counted from `starts_at` or from 1970.
        tz: the time zone of `cron` and of `excluding`, such as "Europe/Berlin"; "UTC" by default.
        starts_at, ends_at: no tick is before the one, or after the other; with a time zone.
        excluding: local dates such as "2026-12-25", or cron expressions, on which it does not tick.
        jitter: each tick is later by a part of this, always the same for the same tick.
        overlap: what a tick does while a workflow of the schedule is unfinished: "skip" it, "queue_one" (the newest
            starts when the other has ended), "allow" both, or "cancel_running".
        missed: what becomes of ticks that no worker saw for over a minute: "run_one", the last; "skip" them all; or
            "run_all", in their order.
        missed_within: only ticks of so long ago are run then.

    Raises:
        ArgumentError: an option is wrong.
        SchemaError, SessionError: the session's database does not hold the tables, or it is in AUTOCOMMIT.
    """
    require_schedule_name(name)
    if not isinstance(workflow, BoundWorkflow):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(f"expected workflow.bind(...), got {workflow!r}. No schedule was made.")
    new, wanted = scheduled(workflow, schedule=name), ScheduleOptions.of(**options)

    def put(session: Session) -> Schedule:
        session.flush()
        schedules.put(session, new, wanted, name=name, declared=False)
        hints.announce(session, hints.EVERYWHERE)
        return session.get_one(Schedule, name, populate_existing=True)

    return sessions.write(session, put, name="manage.put_schedule", rights="scheduler")


def pause_schedule(session: Session, name: str, *, reason: str | None = None) -> None:
    """Pause a schedule: from the caller's commit on its ticks start nothing, and are not caught up later.

    Never commits; locks the schedule's row. What it has started goes on.

    Raises:
        UsageError: there is none of that name.
    """
    _change(session, name, partial(schedules.pause, name=name, reason=reason), verb="pause_schedule")


def resume_schedule(session: Session, name: str) -> None:
    """Let a paused schedule go on with its next tick in the future. Never commits; locks the schedule's row.

    Raises:
        UsageError: there is none of that name.
    """
    _change(session, name, partial(schedules.resume, name=name), verb="resume_schedule")


def run_schedule(session: Session, name: str) -> bool:
    """Start the schedule's workflow now, beside its ticks and also while it is paused, as `overlap` says.

    Never commits; locks the schedule's row, and waits for a worker that fires it.

    Returns:
        Whether one was started. While one is unfinished it is not, with "skip"; with "queue_one" it is when that has
        ended, unless the schedule is paused until then.

    Raises:
        UsageError: there is none of that name.
    """

    def run(session: Session) -> bool:
        found = schedules.due_schedule(_locked(session, name))
        decision = decide_to_run(found.state)
        if decision.cancels:
            cancel(session, schedules.unfinished_of(session, name))
        schedules.advance(session, found, decision)
        hints.announce(session, hints.EVERYWHERE)
        return bool(decision.started)

    return sessions.write(session, run, name="manage.run_schedule", rights="scheduler")


def backfill_schedule(
    session: Session, name: str, *, since: datetime, until: datetime, limit: int = _MOST_TICKS
) -> Backfill:
    """Start the workflows of the ticks in a time that has passed, both ends included; at most `limit` at once.

    ```python
    since: datetime | None = datetime(2026, 1, 1, tzinfo=UTC)
    while since is not None:
        with SessionLocal.begin() as session:
            since = manage.backfill_schedule(session, "nightly", since=since, until=until).since
    ```

    A tick that has started a workflow already starts no other, so it may be repeated. All of them may run at once,
    whatever `overlap` says. Never commits; locks the schedule's row.

    Raises:
        ArgumentError: a time has no time zone, or the limit is none.
        UsageError: there is none of that name.
    """
    require_moment(since, "since")
    require_moment(until, "until")
    if limit < 1:
        raise ArgumentError(f"limit={limit!r} is no number of ticks: pass 1 or more.")

    def backfill(session: Session) -> Backfill:
        found = schedules.due_schedule(_locked(session, name))
        ticks = found.state.options.calendar.times(since - timedelta(microseconds=1))
        wanted = list(islice(takewhile(lambda tick: tick <= until, ticks), limit + 1))
        new = [schedules.for_tick(found.new, Tick(name, tick, None)) for tick in wanted[:limit]]
        ids = start_many(session, map(BoundWorkflow, new)) if new else []
        return Backfill(ids, wanted[limit] if len(wanted) > limit else None)

    return sessions.write(session, backfill, name="manage.backfill_schedule", rights="scheduler")


def next_ticks(schedule: Schedule, count: int, *, after: datetime | None = None) -> list[datetime]:
    """Return the next ticks of a schedule in UTC, without their jitter: after a time, or from now on.

    Now is the time of this process's clock.

    Raises:
        ArgumentError: the record makes no schedule, or the time has no time zone.
    """
    since = datetime.now(UTC) if after is None else after
    require_moment(since, "after")
    options = ScheduleOptions.of(
        cron=schedule.cron,
        every=schedule.every,
        tz=schedule.tz or "UTC",
        starts_at=schedule.starts_at,
        ends_at=schedule.ends_at,
        excluding=schedule.excluding or (),
    )
    return list(islice(options.calendar.times(since), count))


def _change(session: Session, name: str, change: Any, *, verb: str) -> None:
    def apply(session: Session) -> None:
        session.flush()
        if not change(session):
            raise _unknown(name)
        known = session.identity_map.get(session.identity_key(Schedule, name))
        if known is not None:
            session.expire(known)
        hints.announce(session, hints.EVERYWHERE)

    sessions.write(session, apply, name=f"manage.{verb}", rights="scheduler")


def _locked(session: Session, name: str) -> Any:
    session.flush()
    row = schedules.lock(session, name)
    if row is None:
        raise _unknown(name)
    return row


def _unknown(name: str) -> UsageError:
    return UsageError(
        f"there is no schedule {name!r} in this database; `sqla-durable schedules` lists those that exist."
    )
