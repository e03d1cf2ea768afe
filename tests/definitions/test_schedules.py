"""What a schedule does at a time: which ticks start a workflow, which wait, and which are skipped."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqla_durable.definitions.schedules import (
    MOST_TICKS,
    ON_TIME,
    RECHECK,
    Decision,
    ScheduleOptions,
    ScheduleState,
    Tick,
    decide,
    decide_to_run,
    tick_headers,
    tick_in,
)
from sqla_durable.errors import ArgumentError

NOON = datetime(2026, 6, 1, 12, tzinfo=UTC)
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)


def state(now: datetime = NOON, *, options: dict[str, Any] | None = None, **known: Any) -> ScheduleState:
    """Return an hourly schedule, with other options."""
    chosen: dict[str, Any] = {"cron": "0 * * * *", **(options or {})}
    return ScheduleState("hourly", ScheduleOptions.of(**chosen), now, **known)


def started(made: Decision) -> list[datetime]:
    return [each.at for each in made.started]


def test_a_new_schedule_is_planned_and_starts_nothing() -> None:
    made = decide(state(NOON - MINUTE))
    assert (started(made), made.next_at, made.due_at, made.last_at) == ([], NOON, NOON, None)


def test_a_tick_at_the_moment_of_planning_is_the_next_one() -> None:
    """A schedule that is made at twelve does not tick at twelve: else a deploy would."""
    assert decide(state(NOON)).next_at == NOON + HOUR


def test_a_due_tick_starts_a_workflow_that_gets_it_and_the_one_before() -> None:
    made = decide(state(NOON, next_at=NOON, last_at=NOON - HOUR))
    assert made.started == [Tick("hourly", NOON, NOON - HOUR)]
    assert (made.next_at, made.last_at, made.skipped) == (NOON + HOUR, NOON, 0)


def test_a_tick_that_is_not_due_changes_nothing() -> None:
    made = decide(state(NOON - timedelta(microseconds=1), next_at=NOON))
    assert (started(made), made.next_at, made.due_at) == ([], NOON, NOON)


@pytest.mark.parametrize(
    ("missed", "expected", "skipped"),
    [("run_one", [12], True), ("skip", [], True), ("run_all", [9, 10, 11, 12], False)],
)
def test_ticks_that_no_worker_saw(missed: str, expected: list[int], skipped: bool) -> None:
    # behaviour: D2
    late = NOON + 30 * MINUTE
    made = decide(state(late, options={"missed": missed, "overlap": "allow"}, next_at=NOON - 3 * HOUR))
    assert [each.hour for each in started(made)] == expected
    assert made.next_at == NOON + HOUR
    assert bool(made.skipped) is skipped


@pytest.mark.parametrize(("missed", "expected"), [("run_one", []), ("run_all", [])])
def test_what_was_missed_too_long_ago_is_left_out(missed: str, expected: list[int]) -> None:
    made = decide(
        state(NOON + 30 * MINUTE, options={"missed": missed, "missed_within": 20 * MINUTE}, next_at=NOON - 3 * HOUR)
    )
    assert started(made) == expected
    assert (made.next_at, made.skipped) == (NOON + HOUR, 1)


def test_only_what_was_missed_lately_is_run() -> None:
    options = {"missed": "run_all", "missed_within": 2 * HOUR, "overlap": "allow"}
    made = decide(state(NOON + 30 * MINUTE, options=options, next_at=NOON - DAY))
    assert [each.hour for each in started(made)] == [11, 12]


def test_a_tick_within_a_minute_is_not_missed() -> None:
    made = decide(state(NOON + ON_TIME - timedelta(seconds=1), options={"missed": "skip"}, next_at=NOON))
    assert (started(made), made.skipped) == ([NOON], 0)
    made = decide(state(NOON + ON_TIME, options={"missed": "skip"}, next_at=NOON))
    assert (started(made), made.skipped) == ([], 1)


def test_ticks_of_one_poll_are_none_that_were_missed() -> None:
    options = {"cron": "* * * * * *", "missed": "skip", "overlap": "allow"}
    made = decide(state(NOON + timedelta(seconds=3), options=options, next_at=NOON))
    assert [each.second for each in started(made)] == [0, 1, 2, 3]


def test_a_tick_is_missed_a_minute_after_its_jitter_and_not_after_its_time() -> None:
    options = {"jitter": HOUR / 2, "missed": "skip"}
    made = decide(state(NOON + 20 * MINUTE, options=options, next_at=NOON))
    assert started(made) in ([], [NOON])  # as its jitter is
    assert made.skipped == 0
    made = decide(state(NOON + 50 * MINUTE, options=options, next_at=NOON))
    assert (started(made), made.skipped) == ([], 1)


def test_jitter_moves_when_it_is_looked_at_and_not_the_tick() -> None:
    first = decide(state(options={"jitter": HOUR}))
    assert first.next_at == NOON + HOUR
    assert first.due_at is not None
    assert NOON + HOUR <= first.due_at < NOON + 2 * HOUR
    assert (
        decide(state(first.due_at - timedelta(seconds=1), options={"jitter": HOUR}, next_at=NOON + HOUR)).started == []
    )
    assert started(decide(state(first.due_at, options={"jitter": HOUR}, next_at=NOON + HOUR))) == [NOON + HOUR]


def test_many_missed_ticks_are_started_in_portions() -> None:
    options = {"cron": "* * * * * *", "missed": "run_all", "overlap": "allow"}
    found, next_at, polls = list[datetime](), NOON, 0
    while next_at <= NOON + HOUR:
        made = decide(state(NOON + HOUR, options=options, next_at=next_at))
        assert len(made.started) <= MOST_TICKS
        assert made.next_at is not None
        found, next_at, polls = found + started(made), made.next_at, polls + 1
    assert found == [NOON + timedelta(seconds=each) for each in range(3_601)]
    assert polls == 4


def test_a_year_of_seconds_is_passed_over_at_once() -> None:
    made = decide(state(NOON, options={"cron": "* * * * * *"}, next_at=NOON - 365 * DAY))
    assert started(made)[0] == NOON - ON_TIME  # the last one that was missed; skipping overlaps leaves the others out
    assert made.next_at == NOON + timedelta(seconds=1)


@pytest.mark.parametrize(
    ("overlap", "expected", "queued", "cancels", "skipped"),
    [
        ("skip", [], None, False, 1),
        ("queue_one", [], NOON, False, 0),
        ("allow", [NOON], None, False, 0),
        ("cancel_running", [NOON], None, True, 0),
    ],
)
def test_a_tick_while_a_workflow_is_unfinished(
    overlap: str, expected: list[datetime], queued: datetime | None, cancels: bool, skipped: int
) -> None:
    made = decide(state(options={"overlap": overlap}, next_at=NOON, unfinished=1, last_at=NOON - HOUR))
    assert (started(made), made.queued_at, made.cancels, made.skipped) == (expected, queued, cancels, skipped)
    assert made.last_at == (NOON if expected else NOON - HOUR)


def test_of_two_that_wait_the_newest_runs() -> None:
    waits = decide(
        state(options={"overlap": "queue_one"}, next_at=NOON, unfinished=1, queued_at=NOON - HOUR, last_at=NOON - DAY)
    )
    assert (waits.queued_at, waits.skipped, waits.due_at) == (NOON, 1, NOON + RECHECK)
    runs = decide(state(NOON + MINUTE, options={"overlap": "queue_one"}, next_at=NOON + HOUR, queued_at=NOON))
    assert (started(runs), runs.queued_at, runs.due_at) == ([NOON], None, NOON + HOUR)


def test_what_waits_runs_before_the_next_tick_which_waits_in_its_place() -> None:
    made = decide(state(options={"overlap": "queue_one"}, next_at=NOON, queued_at=NOON - HOUR))
    assert (started(made), made.queued_at) == ([NOON - HOUR], NOON)


def test_ticks_that_come_together_overlap_with_each_other() -> None:
    late = NOON + 2 * HOUR
    found = {}
    for overlap in ("skip", "queue_one", "allow", "cancel_running"):
        options = {"overlap": overlap, "missed": "run_all"}
        made = decide(state(late, options=options, next_at=NOON))
        found[overlap] = [each.hour for each in started(made)], made.queued_at and made.queued_at.hour, made.cancels
    assert found == {
        "skip": ([12], None, False),
        "queue_one": ([12], 14, False),
        "allow": ([12, 13, 14], None, False),
        "cancel_running": ([14], None, False),
    }


def test_a_schedule_without_another_tick_has_ended() -> None:
    made = decide(state(NOON, options={"ends_at": NOON}, next_at=NOON))
    assert (started(made), made.next_at, made.due_at) == ([NOON], None, None)


def test_what_waits_is_looked_at_when_no_tick_is_left() -> None:
    options = {"ends_at": NOON, "overlap": "queue_one"}
    made = decide(state(NOON, options=options, next_at=NOON, unfinished=1))
    assert (made.next_at, made.queued_at, made.due_at) == (None, NOON, NOON + RECHECK)


def test_run_now_leaves_the_ticks_as_they_are() -> None:
    now = NOON + 7 * MINUTE
    made = decide_to_run(state(now, next_at=NOON + HOUR, last_at=NOON))
    assert made.started == [Tick("hourly", now, NOON)]
    assert (made.next_at, made.due_at, made.last_at) == (NOON + HOUR, NOON + HOUR, now)


@given(
    missed=st.sampled_from(["skip", "run_one", "run_all"]),
    pauses=st.lists(st.integers(1, 5_000), min_size=1, max_size=30),
    jitter=st.sampled_from([None, MINUTE, HOUR]),
)
@settings(max_examples=60, deadline=None)
def test_no_tick_comes_twice_none_early_and_with_run_all_none_is_lost(
    missed: str, pauses: list[int], jitter: timedelta | None
) -> None:
    # behaviour: D4
    options: dict[str, Any] = {"cron": "*/7 * * * *", "missed": missed, "jitter": jitter, "overlap": "allow"}
    made = decide(state(NOON, options=options))
    first, now, found = made.next_at, NOON, list[datetime]()
    for seconds in pauses:
        now += timedelta(seconds=seconds)
        made = decide(state(now, options=options, next_at=made.next_at, last_at=made.last_at))
        assert all(each <= now for each in started(made))
        found += started(made)
        assert made.due_at is not None
        assert made.due_at > now
    assert found == sorted(set(found))
    calendar = ScheduleOptions.of(**options).calendar
    assert first is not None
    if missed == "run_all" and jitter is None:
        every = list(iter_until(calendar.times(NOON), now))
        assert found == every


def iter_until(times: Any, until: datetime) -> list[datetime]:
    found: list[datetime] = []
    for each in times:
        if each > until:
            break
        found.append(each)
    return found


def test_headers_hold_the_tick() -> None:
    for tick in (Tick("hourly", NOON, None), Tick("hourly", NOON, NOON - HOUR)):
        assert tick_in(tick_headers(tick)) == tick
    assert tick_in({}) is None
    assert tick_in({"schedule": "hourly", "schedule-tick": "noon"}) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"overlap": "wait"}, "overlap='wait' is none of 'skip', 'queue_one', 'allow', 'cancel_running'"),
        ({"missed": "all"}, "missed='all' is none of"),
        ({"jitter": 5}, "jitter=5 is not a timedelta"),
        ({"jitter": -MINUTE}, "jitter=.* is negative"),
        ({"missed_within": -MINUTE}, "missed_within=.* is negative"),
        ({"starts_at": datetime(2026, 1, 1)}, "starts_at=.* has no time zone"),
        ({"cron": "61 * * * *"}, "61"),
        ({"cron": None}, "cron"),
        ({"cron": None, "every": timedelta(0)}, "every"),
        ({"every": HOUR}, "every"),
        ({"tz": "Europe/Berlinn"}, "Europe/Berlin"),
    ],
)
def test_what_is_no_schedule_is_refused_with_the_value(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        state(options=options)
