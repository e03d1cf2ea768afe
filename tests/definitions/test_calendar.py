"""When schedules tick: bounds, intervals, exclusions, the last of many ticks, jitter, and what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from bisect import bisect_right
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from itertools import islice, pairwise
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqla_durable.definitions.calendar import Calendar, jitter_of
from tests.support.calendars import EXPRESSION, SECOND, count_searches, local, naive, ticks_of, utc, zoned
from tests.support.wall_clock import Fields, WallClock


def test_interval_counts_from_its_anchor_whatever_clocks_show() -> None:
    weekly = timedelta(days=7)
    epoch = Calendar(every=weekly, tz="Europe/Berlin")
    assert epoch.next_after(utc(2026, 11, 30)) == utc(2026, 12, 3)  # a Thursday, as 1970-01-01
    start = zoned("Europe/Berlin", 2026, 10, 20, 9, 0, 17)
    anchored = Calendar(every=weekly, tz="Europe/Berlin", starts_at=start, ends_at=utc(2026, 11, 3, 7, 0, 17))
    assert [*anchored.times(utc(2020, 1, 1))] == [
        start.astimezone(UTC) + each * weekly for each in range(3)
    ]  # the last one at 8 o'clock
    third = Calendar(every=timedelta(seconds=1) / 3 + timedelta(seconds=1))
    assert third.next_after(utc(1970, 1, 1)) == utc(1970, 1, 1, 0, 0, 1).replace(microsecond=333_333)


def test_first_and_last_tick_are_within_the_bounds_and_may_be_on_them() -> None:
    calendar = Calendar(cron=("0 9 * * *",), starts_at=utc(2026, 1, 1, 9), ends_at=utc(2026, 1, 3, 9))
    assert [each.day for each in calendar.times(utc(1, 1, 1))] == [1, 2, 3]
    assert calendar.last_until(utc(9999, 1, 1), after=utc(1, 1, 1)) == utc(2026, 1, 3, 9)
    assert calendar.last_until(utc(2026, 1, 2, 9), after=utc(2026, 1, 2, 9)) is None
    assert calendar.last_until(utc(2025, 1, 1), after=utc(2024, 1, 1)) is None
    assert calendar.last_until(utc(2026, 1, 2), after=utc(2026, 1, 3)) is None
    open_end = Calendar(cron=("0 9 * * *",), starts_at=datetime.min.replace(tzinfo=UTC))
    assert open_end.next_after(utc(2026, 1, 1)) == utc(2026, 1, 1, 9)
    earliest = Calendar(cron=("0 0 1 1 *",), tz="America/New_York").next_after(datetime.min.replace(tzinfo=UTC))
    assert earliest is not None
    assert earliest.year == 2


@pytest.mark.parametrize("tz", ["UTC", "America/New_York", "Asia/Tokyo"])
@pytest.mark.parametrize("excluding", [(), ("2026-12-25", "0 1 * * *")])
def test_there_is_no_tick_after_the_year_9999(tz: str, excluding: tuple[str, ...]) -> None:
    latest = datetime.max.replace(tzinfo=UTC)
    for calendar in (
        Calendar(cron=("0 0 1 1 *", "0 * 29 2 *", "* * * * *"), tz=tz, excluding=excluding),
        Calendar(every=timedelta(days=300), tz=tz, excluding=excluding),
        Calendar(every=timedelta.max, tz=tz, excluding=excluding),
    ):
        assert calendar.next_after(latest) is None
        last = calendar.last_until(latest, after=utc(1969, 1, 1))
        assert last is not None
        assert calendar.next_after(last) is None


def test_several_expressions_are_one_calendar() -> None:
    calendar = Calendar(cron=("0 9 * * *", "0 9,10 * * *", "30 9 * * *"))
    ticks = ticks_of(calendar, utc(2026, 1, 1), utc(2026, 1, 2))
    assert local(calendar, *ticks) == ["01 09:00", "01 09:30", "01 10:00"]


CALENDARS = st.builds(
    Calendar,
    cron=st.lists(
        st.sampled_from(["*/20 1-3 * * *", "0 * * * *", "30 2 * * *", "0 9 * * MON", "*/15 30 2 * * *"]) | EXPRESSION,
        min_size=1,
        max_size=3,
    ).map(tuple),
    tz=st.sampled_from(["UTC", "Europe/Berlin", "Australia/Lord_Howe", "Africa/Cairo"]),
    starts_at=st.none() | st.just(utc(2026, 4, 4, 15)),
    ends_at=st.none() | st.just(utc(2026, 4, 26, 1)),
    excluding=st.sampled_from([(), ("2026-04-05", "2026-04-24"), ("0 1-2 * * *", "2026-04-06"), ("* 0 * * *",)]),
)
INTERVALS = st.builds(
    Calendar,
    every=st.timedeltas(min_value=timedelta(seconds=1), max_value=timedelta(days=9)),
    tz=st.just("Europe/Berlin"),
    starts_at=st.none() | st.just(utc(2026, 4, 4, 15).replace(microsecond=7)),
    excluding=st.sampled_from([(), ("2026-04-05",), ("* * * * SUN", "*/2 * * * * *")]),
)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(calendar=CALENDARS | INTERVALS, data=st.data())
def test_next_and_last_and_all_ticks_agree(calendar: Calendar, data: st.DataObject) -> None:
    after = utc(2026, 4, 3) + data.draw(st.timedeltas(timedelta(), timedelta(days=22)))
    ticks = [*islice(calendar.times(after), 60)]
    assert all(earlier < later for earlier, later in pairwise([after, *ticks]))
    assert all(each.tzinfo is UTC for each in ticks)
    if not ticks:
        assert calendar.last_until(after + timedelta(days=9_999), after=after) is None
        return
    moment = data.draw(st.sampled_from(ticks) | st.datetimes(naive(after), naive(ticks[-1]), timezones=st.just(UTC)))
    since = data.draw(st.sampled_from([after, ticks[0], moment - SECOND]))
    following, last = calendar.next_after(moment), calendar.last_until(moment, after=since)
    if moment < ticks[-1]:
        assert following == ticks[bisect_right(ticks, moment)]
    assert last == max((each for each in ticks if since < each <= moment), default=None) or since < after


@pytest.mark.parametrize(
    ("calendar", "expected"),
    [
        (Calendar(cron=("0 9 * * *",), excluding=("2026-12-25", "2026-12-26")), ["24 09:00", "27 09:00"]),
        (Calendar(cron=("0 9 * * *",), excluding=("* * * * FRI,SAT",)), ["24 09:00", "27 09:00"]),
        (
            Calendar(cron=("0 */8 * * *",), excluding=("0 8-23 * * *", "2026-12-25")),
            ["24 00:00", "26 00:00", "27 00:00"],
        ),
        (
            Calendar(cron=("0,30 9 * * *", "0 10 * * *"), excluding=("0 9 * * *", "* * 25-27 * *")),
            ["24 09:30", "24 10:00"],
        ),
        (Calendar(cron=("@daily",), excluding=("@weekly", "* * 25 12 *")), ["24 00:00", "26 00:00"]),
        # The date is that of the zone.
        (
            Calendar(cron=("0 20 * * *",), tz="Pacific/Apia", excluding=("2026-12-25",)),
            ["24 20:00", "26 20:00", "27 20:00"],
        ),
        # An expression of five fields excludes whole minutes, one of six the seconds.
        (Calendar(every=timedelta(minutes=719, seconds=50), excluding=("* * 25-27 * *",)), ["24 04:21", "24 16:21"]),
        (Calendar(cron=("0,30 0 9 26 * *",), excluding=("0 9 * * *",)), []),
        (Calendar(cron=("0,30 0 9 26 * *",), excluding=("0 0 9 * * *",)), ["26 09:00"]),
    ],
)
def test_dates_and_times_are_excluded(calendar: Calendar, expected: list[str]) -> None:
    start, end = zoned(calendar.tz, 2026, 12, 24), zoned(calendar.tz, 2026, 12, 28)
    assert local(calendar, *ticks_of(calendar, start, end)) == expected


# behaviour: D3
@pytest.mark.parametrize(
    ("tz", "cron", "excluding", "day", "expected"),
    [
        # Both passes of an hour show an excluded time.
        ("Europe/Berlin", "0,30 * * * *", "* 2 * * *", (2026, 10, 25), ["00:00", "00:30", "01:00", "01:30", "03:00"]),
        (
            "Europe/Berlin",
            "*/30 * * * *",
            "0 2,3 * * *",
            (2026, 10, 25),
            ["00:00", "00:30", "01:00", "01:30"] + ["02:30"] * 2,
        ),
        # A skipped time is excluded where it would run, and a tick is where it runs.
        ("Europe/Berlin", "30 2 * * *", "30 2 29 3 *", (2026, 3, 29), []),
        ("Europe/Berlin", "30 2 * * *", "0 3 29 3 *", (2026, 3, 29), []),
        ("Europe/Berlin", "30 2 * * *", "* 4-23 29 3 *", (2026, 3, 29), ["03:00"]),
        ("Africa/Cairo", "30 0,1,2 * * *", "30 0 * * *", (2026, 4, 24), ["01:30", "02:30"]),
        ("Africa/Cairo", "0 0 * * *", "2026-04-24", (2026, 4, 24), []),
        ("Africa/Cairo", "0 0 * * *", "2026-04-23", (2026, 4, 24), ["01:00"]),
    ],
)
def test_exclusions_where_clocks_change(
    tz: str, cron: str, excluding: str, day: tuple[int, int, int], expected: list[str]
) -> None:
    calendar = Calendar(cron=(cron,), tz=tz, excluding=(excluding,))
    start = zoned(tz, *day)
    ticks = ticks_of(calendar, start, start.astimezone(UTC) + timedelta(hours=4, minutes=30))
    assert [each[3:] for each in local(calendar, *ticks)] == expected


# behaviour: D3
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_excluded_are_the_ticks_at_excluded_times(data: st.DataObject) -> None:
    tz = data.draw(st.sampled_from(["Europe/Berlin", "Australia/Lord_Howe", "Africa/Cairo"]))
    cron = data.draw(st.sampled_from(["*/20 * * * *", "0 */2 * * *", "*/30 1-3 * * *"]))
    texts = st.sampled_from(["2026-03-29", "2026-04-05", "2026-04-24", "2026-10-31"]) | EXPRESSION
    excluding = tuple(data.draw(st.lists(texts, min_size=1, max_size=3)))
    start = data.draw(st.sampled_from([utc(2026, 3, 28), utc(2026, 4, 4), utc(2026, 4, 23), utc(2026, 10, 29)]))
    end = start + timedelta(days=3)
    excluded: set[datetime] = set()
    clock = WallClock(tz, start - timedelta(days=2), end)
    for text in excluding:
        if text.startswith("2026"):
            _, month, day = text.split("-")
            text = f"* * {day} {month} *"
        fields, days = Fields(text, 60), range(clock.span.start // 1_440 - 1, clock.span.stop // 1_440 + 2)
        excluded |= {clock.moment(each) for each in clock.ticks(text)}
        shown = set(fields.times(days))
        excluded |= {
            clock.moment(at) for each in (clock.first, clock.again) for time, at in each.items() if time in shown
        }
    every = ticks_of(Calendar(cron=(cron,), tz=tz), start, end)
    rest = ticks_of(Calendar(cron=(cron,), tz=tz, excluding=excluding, ends_at=end), start, end)
    assert rest == [each for each in every if each not in excluded]


def test_jitter_is_the_same_each_time_and_before_the_next_tick() -> None:
    tick, longest = utc(2026, 11, 30, 9), timedelta(minutes=10)
    jitter = jitter_of("report", tick, longest, None)
    assert jitter == timedelta(minutes=4, seconds=14, microseconds=205_476)
    assert jitter_of("report", tick.astimezone(ZoneInfo("Asia/Tokyo")), longest, None) == jitter
    assert jitter_of("report", tick, longest, tick + timedelta(days=1)) == jitter
    ticks = [tick + timedelta(minutes=each) for each in range(200)]
    for following in (timedelta(minutes=1), timedelta(seconds=1), timedelta(microseconds=1)):
        limited = [jitter_of("report", each, longest, each + following) for each in ticks]
        assert all(timedelta() <= each < following for each in limited)
    spread = sorted(jitter_of(f"report {each}", each, longest, None) for each in ticks)
    assert spread[0] < longest / 20
    assert longest > spread[-1] > longest * 19 / 20
    assert len({*spread}) == len(ticks)
    for none in (timedelta(), timedelta(microseconds=1), -longest):
        assert jitter_of("report", tick, none, None) == timedelta()
    assert jitter_of("report", tick, longest, tick) == timedelta()


DAILY = ("0 9 * * *",)
untyped: Any = Calendar


@pytest.mark.parametrize(
    ("calendar", "message"),
    [
        (lambda: untyped(), "cron=() and every=None: pass one of the two."),
        (
            lambda: untyped(cron=DAILY, every=SECOND),
            "cron=('0 9 * * *',) and every=datetime.timedelta(seconds=1): pass one",
        ),
        (
            lambda: untyped(every=timedelta()),
            "every must be at least one second, got datetime.timedelta(0): write, for",
        ),
        (lambda: untyped(every=-SECOND), "every must be at least one second, got"),
        (lambda: untyped(every=SECOND / 2), "every must be at least one second, got"),
        (lambda: untyped(every=5), "every=5 is not a timedelta: write, for example, timedelta(minutes=5)."),
        (
            lambda: untyped(cron="0 9 * * *"),
            "cron='0 9 * * *' is not a tuple of texts: write, for example, cron=('0 9",
        ),
        (lambda: untyped(cron=(5,)), "cron=(5,) is not a tuple of texts"),
        (lambda: untyped(cron=DAILY, excluding=[]), "excluding=[] is not a tuple of texts"),
        (lambda: untyped(cron=DAILY, tz=5), "tz=5 is not a text: pass an IANA name, such as 'Europe/Berlin'."),
        (lambda: untyped(cron=DAILY, tz="Berlin"), "tz='Berlin' is not a time zone: did you mean 'Europe/Berlin'?"),
        (
            lambda: untyped(cron=DAILY, tz="Europe/Kyiw"),
            "tz='Europe/Kyiw' is not a time zone: did you mean 'Europe/Kyiv'?",
        ),
        (
            lambda: untyped(every=SECOND, tz="america/new york"),
            "tz='america/new york' is not a time zone: did you mean",
        ),
        (lambda: untyped(cron=DAILY, tz="???"), "tz='???' is not a time zone: pass an IANA name"),
        (lambda: untyped(cron=DAILY, tz=""), "tz='' is not a time zone"),
        (lambda: untyped(cron=DAILY, tz="Europe"), "tz='Europe' is not a time zone"),
        (lambda: untyped(cron=DAILY, tz="../UTC"), "tz='../UTC' is not a time zone"),
        (lambda: untyped(cron=DAILY, tz="a\0"), r"tz='a\x00' is not a time zone"),
        (lambda: untyped(cron=DAILY, tz="right/UTC"), "tz='right/UTC' is not a time zone"),
        (lambda: untyped(cron=DAILY, tz="localtime"), "tz='localtime' is not a time zone"),
        (
            lambda: untyped(cron=DAILY, starts_at=naive(utc(2026, 1, 1))),
            "starts_at=datetime.datetime(2026, 1, 1, 0, 0) has no",
        ),
        (
            lambda: untyped(cron=DAILY, ends_at=naive(utc(2026, 1, 1))),
            "ends_at=datetime.datetime(2026, 1, 1, 0, 0) has no time",
        ),
        (
            lambda: untyped(cron=DAILY, starts_at="2026-01-01"),
            "starts_at='2026-01-01' is not a datetime: pass one with a",
        ),
        (
            lambda: untyped(cron=DAILY, ends_at=datetime.max.replace(tzinfo=timezone(-SECOND))),
            "ends_at=datetime.datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=",
        ),
        (
            lambda: untyped(cron=DAILY, starts_at=utc(2026, 1, 2), ends_at=zoned("Europe/Berlin", 2026, 1, 2)),
            "starts_at=2026-01-02 00:00:00+00:00 is after ends_at=2026-01-01 23:00:00+00:00: exchange them",
        ),
        (
            lambda: untyped(cron=DAILY, excluding=("2026-02-30",)),
            "excluding='2026-02-30' is not a date: write one such as",
        ),
        (lambda: untyped(cron=DAILY, excluding=("2026-1-1",)), "excluding='2026-1-1' is not a date"),
        (lambda: untyped(cron=DAILY, excluding=("Christmas",)), "excluding='Christmas' is neither a date such as"),
        (
            lambda: untyped(every=SECOND, excluding=("* * * * *",)),
            "excluding=('* * * * *',) leaves no tick: exclude less.",
        ),
    ],
)
def test_calendar_is_refused(calendar: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        calendar().check()


def test_bounds_may_be_equal_and_in_the_past() -> None:
    once = Calendar(cron=DAILY, starts_at=utc(2020, 1, 1, 9), ends_at=utc(2020, 1, 1, 9), excluding=("2026-01-01",))
    once.check()
    assert [*once.times(utc(2019, 1, 1))] == [utc(2020, 1, 1, 9)]


def test_moment_without_a_zone_is_refused() -> None:
    moment, calendar = utc(2026, 1, 1), Calendar(cron=DAILY)
    for call, name in (
        (lambda: calendar.next_after(naive(moment)), "moment"),
        (lambda: calendar.last_until(naive(moment), after=moment), "moment"),
        (lambda: calendar.last_until(moment, after=naive(moment)), "after"),
        (lambda: next(calendar.times(naive(moment))), "moment"),
    ):
        with pytest.raises(ValueError, match=f"^{name}=.* has no time zone: add one"):
            call()


@pytest.mark.parametrize(
    ("calendar", "expected"),
    [
        (Calendar(cron=("* * * * * *",), tz="Europe/Berlin"), utc(2026, 11, 30, 9, 30, 17)),
        (Calendar(cron=("* * * 1 *",)), utc(2026, 1, 31, 23, 59)),
        (Calendar(cron=("* * * * * *",), excluding=("* * * 1-11 *",)), utc(2025, 12, 31, 23, 59, 59)),
        (Calendar(cron=("* * * * * *",), tz="Africa/Cairo", excluding=("2026-11-30",)), utc(2026, 11, 29, 21, 59, 59)),
        (Calendar(cron=("0 0 * 2 MON#5",)), utc(2016, 2, 29)),
        (Calendar(cron=("0 0 29 2 *", "0 0 31 12 *")), utc(2025, 12, 31)),
    ],
)
def test_last_of_many_ticks_is_found_by_few_searches(
    calendar: Calendar, expected: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    searches = count_searches(monkeypatch)
    moment = utc(2026, 11, 30, 9, 30, 17).replace(microsecond=5)
    assert calendar.last_until(moment, after=utc(1990, 1, 1)) == expected
    assert 2 <= len(searches) < 100 + (20 * 365 if calendar.excluding else 0)


def test_excluded_days_are_passed_over_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    searches = count_searches(monkeypatch)
    dates = tuple(f"{utc(2026, 1, 1) + timedelta(days=each):%Y-%m-%d}" for each in range(500))
    calendar = Calendar(cron=("* * * * * *",), tz="Europe/Berlin", excluding=dates)
    first = calendar.next_after(utc(2026, 1, 1))
    assert first == zoned("Europe/Berlin", 2027, 5, 16).astimezone(UTC)
    assert len(searches) < 1_000


def test_libraries_are_imported_when_a_tick_is_computed() -> None:
    script = (
        "import sys, sqla_durable.definitions.calendar as calendar\n"
        "print([each for each in ('cronsim', 'zoneinfo', 'tzdata') if each in sys.modules])\n"
        "calendar.Calendar(cron=('0 9 * * *',)).check()\n"
        "print([each for each in ('cronsim', 'zoneinfo') if each in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "['cronsim', 'zoneinfo']"]
