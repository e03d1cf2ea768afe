"""How schedules are declared, and what a schedule does at a time: which ticks start a workflow, and which are skipped.

Nothing here reads a clock or a table: a worker asks with the database's time, and writes what was decided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict, get_args

from sqla_durable.definitions.calendar import Calendar, jitter_of
from sqla_durable.definitions.checks import fault_in, require_duration, require_moment
from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.errors import ArgumentError

Overlap: TypeAlias = Literal["skip", "queue_one", "allow", "cancel_running"]
Missed: TypeAlias = Literal["skip", "run_one", "run_all"]

ON_TIME = timedelta(minutes=1)
"""A tick that a worker finds later than this has been missed."""

MOST_TICKS = 1_000
"""How many workflows of one schedule are started at once; the rest follow at the next poll."""

RECHECK = timedelta(seconds=1)
"""How often a queued tick looks whether the workflow of the one before it has ended."""


class TimingKeywords(TypedDict, total=False):
    """The keyword arguments of `Durable.schedule`, for type checkers; `manage.put_schedule` describes each."""

    every: timedelta | None
    tz: str
    starts_at: datetime | None
    ends_at: datetime | None
    excluding: Iterable[str]
    jitter: timedelta | None
    overlap: Overlap
    missed: Missed
    missed_within: timedelta | None


class ScheduleKeywords(TimingKeywords, total=False):
    """The keyword arguments of `manage.put_schedule`."""

    cron: str | Sequence[str] | None


@dataclass(frozen=True, slots=True)
class ScheduleOptions:
    """When a schedule ticks, and what it does about workflows that overlap and ticks that were missed."""

    calendar: Calendar
    jitter: timedelta | None = None
    overlap: Overlap = "skip"
    missed: Missed = "run_one"
    missed_within: timedelta | None = None

    @classmethod
    def of(
        cls,
        *,
        cron: str | Sequence[str] | None = None,
        every: timedelta | None = None,
        tz: str = "UTC",
        starts_at: datetime | None = None,
        ends_at: datetime | None = None,
        excluding: Iterable[str] = (),
        jitter: timedelta | None = None,
        overlap: Overlap = "skip",
        missed: Missed = "run_one",
        missed_within: timedelta | None = None,
    ) -> ScheduleOptions:
        """Check what `manage.put_schedule` describes.

        Raises:
            ArgumentError: something is out of range, or contradicts something else.
        """
        for name, value, known in (("overlap", overlap, get_args(Overlap)), ("missed", missed, get_args(Missed))):
            if value not in known:
                raise ArgumentError(f"{name}={value!r} is none of {', '.join(map(repr, known))}.")
        for name, moment in (("starts_at", starts_at), ("ends_at", ends_at)):
            if moment is not None:
                require_moment(moment, name)
        for name, duration in (("every", every), ("jitter", jitter), ("missed_within", missed_within)):
            if duration is not None:
                require_duration(duration, name)
                if duration < timedelta():
                    raise ArgumentError(f"{name}={duration} is negative: pass a duration of zero or more.")
        expressions = (cron,) if isinstance(cron, str) else tuple(cron or ())
        left_out = (excluding,) if isinstance(excluding, str) else tuple(excluding)
        calendar = Calendar(expressions, every, tz, starts_at, ends_at, left_out)
        try:
            calendar.check()
        except ValueError as error:
            raise ArgumentError(str(error)) from error
        return cls(calendar, jitter, overlap, missed, missed_within)


class ScheduleDeclaration(NamedTuple):
    """A schedule as the application's code declares it: what it starts, which `bind` returns, and when."""

    name: str
    workflow: str
    bind: Callable[[], Any]
    options: ScheduleOptions


_SCHEDULE, _TICK, _PREVIOUS = "schedule", "schedule-tick", "schedule-previous"  # headers of a workflow


class Tick(NamedTuple):
    """The tick of a schedule that a workflow was started for.

    Attributes:
        schedule: the schedule's name.
        at: the time of the tick, without its jitter, in UTC.
        previous: the time of the tick that started a workflow before; None for the first.
    """

    schedule: str
    at: datetime
    previous: datetime | None


def tick_headers(tick: Tick) -> dict[str, str]:
    """Return the headers in which a workflow finds its tick."""
    headers = {_SCHEDULE: tick.schedule, _TICK: tick.at.astimezone(UTC).isoformat()}
    return headers if tick.previous is None else headers | {_PREVIOUS: tick.previous.astimezone(UTC).isoformat()}


def tick_in(headers: Mapping[str, str]) -> Tick | None:
    """Return the tick in a workflow's headers, if there is one."""
    if _SCHEDULE not in headers or _TICK not in headers:
        return None
    previous = headers.get(_PREVIOUS)
    try:
        times = datetime.fromisoformat(headers[_TICK]), None if previous is None else datetime.fromisoformat(previous)
    except ValueError:  # somebody else's headers
        return None
    return Tick(headers[_SCHEDULE], *times)


@dataclass(frozen=True, slots=True)
class ScheduleState:
    """A schedule as a worker finds it: its options, and how far it is on the database's clock.

    Attributes:
        now: the time of the database.
        next_at: the next tick; None if it is to be planned.
        last_at: the last tick that has started a workflow.
        queued_at: a tick that waits for the workflow of an earlier one to end.
        unfinished: how many of its workflows are unfinished.
    """

    name: str
    options: ScheduleOptions
    now: datetime
    next_at: datetime | None = None
    last_at: datetime | None = None
    queued_at: datetime | None = None
    unfinished: int = 0


@dataclass(slots=True)
class Decision:
    """What a schedule does now, and where it stands afterwards.

    Attributes:
        started: the ticks to start a workflow for, in order.
        skipped: how many ticks start nothing, as far as they were counted.
        cancels: whether its unfinished workflows are cancelled first.
        next_at, due_at, last_at, queued_at: as in the table; without a next tick and a queued one it has ended.
    """

    started: list[Tick] = field(default_factory=list[Tick])
    skipped: int = 0
    cancels: bool = False
    next_at: datetime | None = None
    due_at: datetime | None = None
    last_at: datetime | None = None
    queued_at: datetime | None = None


def decide(state: ScheduleState) -> Decision:
    """Decide what a schedule does now.

    A tick that is found within `ON_TIME` of its time is never taken for a missed one, however many there are.
    """
    made = _planned(state)
    return _started(state, made, _due_ticks(state, made))


def decide_to_run(state: ScheduleState) -> Decision:
    """Decide what becomes of a tick that somebody asks for now, beside those of the calendar."""
    return _started(state, _planned(state), [state.now])


def _planned(state: ScheduleState) -> Decision:
    """Return where the schedule stands, with its next tick."""
    next_at = state.next_at or state.options.calendar.next_after(state.now)
    return Decision(next_at=next_at, last_at=state.last_at, queued_at=state.queued_at)


def _looked_at(state: ScheduleState, made: Decision) -> datetime | None:
    """Return when a worker looks at it next: at its next tick, or soon if a queued one waits."""
    due_at = _due_at(state, made.next_at)
    if made.queued_at is None:
        return due_at
    recheck = state.now + RECHECK
    return recheck if due_at is None else min(due_at, recheck)


def _due_at(state: ScheduleState, tick: datetime | None) -> datetime | None:
    jitter = state.options.jitter
    if tick is None or not jitter:
        return tick
    return tick + jitter_of(state.name, tick, jitter, state.options.calendar.next_after(tick))


def _due_ticks(state: ScheduleState, made: Decision) -> list[datetime]:
    """Return the ticks that are due and not left out as missed; move on to the first that is not due."""
    calendar, jitter = state.options.calendar, state.options.jitter or timedelta()
    ticks: list[datetime] = []
    tick = made.next_at
    missed_until = state.now - ON_TIME - jitter
    if tick is not None and tick <= missed_until:
        tick = _pass_missed(state, made, ticks, missed_until)
    while tick is not None and len(ticks) < MOST_TICKS and (_due_at(state, tick) or tick) <= state.now:
        ticks.append(tick)
        tick = calendar.next_after(tick)
    made.next_at = tick
    return ticks


def _pass_missed(state: ScheduleState, made: Decision, ticks: list[datetime], until: datetime) -> datetime | None:
    """Add those of the missed ticks that are to run; return the first tick that is neither added nor left out."""
    options, calendar, first = state.options, state.options.calendar, made.next_at
    assert first is not None  # noqa: S101 (it was missed)
    after = first - timedelta(microseconds=1)
    if options.missed_within is not None:
        after = max(after, state.now - options.missed_within)
    if options.missed == "run_all":
        tick = calendar.next_after(after)
        made.skipped += tick != first
        while tick is not None and tick <= until and len(ticks) < MOST_TICKS:
            ticks.append(tick)
            tick = calendar.next_after(tick)
        return tick
    last = calendar.last_until(until, after=after) if options.missed == "run_one" else None
    made.skipped += last != first
    if last is not None:
        ticks.append(last)
    return calendar.next_after(until)


def _started(state: ScheduleState, made: Decision, ticks: Sequence[datetime]) -> Decision:
    """Return the decision with workflows for ticks, as far as the overlap policy lets them start."""
    unfinished = state.unfinished
    if made.queued_at is not None and not unfinished:
        ticks, made.queued_at = [made.queued_at, *ticks], None
    for tick in ticks:
        match state.options.overlap:
            case "skip" if unfinished:
                made.skipped += 1
                continue
            case "queue_one" if unfinished:
                made.skipped += made.queued_at is not None
                made.queued_at = tick  # the newest is the one that waits
                continue
            case "cancel_running" if unfinished:
                made.cancels = state.unfinished > 0
                made.skipped += len(made.started)
                made.started.clear()
                made.last_at = state.last_at
            case _:
                pass
        made.started.append(Tick(state.name, tick, made.last_at))
        made.last_at = tick
        unfinished += 1
    made.due_at = _looked_at(state, made)
    return made


def fault_in_schedule_name(name: object) -> str | None:
    """Return why something cannot be the name of a schedule; None when it can."""
    return fault_in(name, longest=900)  # the key of its workflows holds a time as well
