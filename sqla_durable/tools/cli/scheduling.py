"""The commands `schedule ...`: pause schedules, let them go on, run them now, and start what ticks have missed."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sqla_durable.tools.cli.acting import Act, counted
from sqla_durable.tools.cli.groups import grouped
from sqla_durable.tools.cli.times import moment

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

schedule = typer.Typer(
    name="schedule",
    help="Pause schedules, run them now, and start what ticks have missed.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_Name = Annotated[str, typer.Argument(metavar="NAME", help="The schedule.")]


@schedule.command("pause")
@grouped
def pause(name: _Name, *, act: Act) -> None:
    """Pause a schedule: its ticks start nothing, and are not caught up later. --reason is shown with it."""
    from sqla_durable import manage

    _switch(
        name, act, partial(manage.pause_schedule, name=name, reason=act.reason), verb="schedule pause", state="paused"
    )


@schedule.command("resume")
@grouped
def resume(name: _Name, *, act: Act) -> None:
    """Let a paused schedule go on with its next tick."""
    from sqla_durable import manage

    _switch(name, act, partial(manage.resume_schedule, name=name), verb="schedule resume", state="not paused")


@schedule.command("run")
@grouped
def run(name: _Name, *, act: Act) -> None:
    """Start a schedule's workflow now, beside its ticks and also while it is paused, as its overlap says."""
    with act.session() as session:
        from sqla_durable import manage

        with act.transaction(session):
            started = manage.run_schedule(session, name)
            if started:
                act.note_subject(session, name, "schedule run")
    message = (
        f"Schedule {name!r} has started its workflow."
        if started
        else f"Schedule {name!r} has started nothing now: an earlier workflow of it is unfinished."
    )
    act.print(message, value=name if started else None, verb="schedule run", schedule=name, started=started)


@schedule.command("backfill")
@grouped
def backfill(
    name: _Name,
    *,
    since: Annotated[str, typer.Option("--since", metavar="TIME", help="The first time, or how long ago: 2h, 7d.")],
    until: Annotated[str | None, typer.Option("--until", metavar="TIME", help="The last time; by default now.")] = None,
    act: Act,
) -> None:
    """Start the workflows of the ticks in a time that has passed; those that were started are not started again.

    At most 1,000 in one transaction. All of them may run at once, whatever the schedule's overlap is.
    """
    begin: datetime | None = moment("--since", since)
    end = datetime.now(UTC) if until is None else moment("--until", until)
    number = 0
    with act.session() as session:
        while begin is not None:
            with act.transaction(session):
                ids, following = _backfilled(session, name, begin, end)
                if ids:
                    act.note_subject(
                        session, name, "schedule backfill", {"since": begin, "until": end, "started": len(ids)}
                    )
            number += len(ids)
            if act.quiet and not act.as_json:
                for each in ids:
                    print(each)
            begin = following
    message = f"Schedule {name!r}: {counted(number)} started."
    act.print(message, value=None, verb="schedule backfill", schedule=name, workflows=number)


def _backfilled(session: Session, name: str, begin: datetime, end: datetime) -> tuple[list[Any], datetime | None]:
    """Start the workflows of a portion; return the ids of those that are new, and where the next portion begins."""
    from sqlalchemy import func, select

    from sqla_durable import Workflow, manage

    before = session.scalar(select(func.pg_catalog.statement_timestamp()))
    done = manage.backfill_schedule(session, name, since=begin, until=end)
    new = select(Workflow.id).where(Workflow.id.in_(done.ids), Workflow.created_at >= before).order_by(Workflow.id)
    return list(session.scalars(new)), done.since


def _pause_of(session: Session, name: str) -> tuple[Any, ...] | None:
    """Return since when a schedule is paused, and why."""
    from sqlalchemy import select

    from sqla_durable import Schedule

    row = session.execute(select(Schedule.paused_at, Schedule.pause_reason).where(Schedule.name == name)).one_or_none()
    return None if row is None else tuple(row)


def _switch(name: str, act: Act, change: Callable[[Session], None], *, verb: str, state: str) -> None:
    with act.session() as session, act.transaction(session):
        before = _pause_of(session, name)
        change(session)
        changed = before != _pause_of(session, name)
        if changed:
            act.note_subject(session, name, verb)
    message = f"Schedule {name!r} is {state}." if changed else f"Schedule {name!r} was already {state}."
    act.print(message, value=name, verb=verb, schedule=name, changed=changed)
