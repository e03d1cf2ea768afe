"""The times of cron expressions: against a calculation of its own, where clocks change; and what is refused."""

from __future__ import annotations

import logging
import re
from bisect import bisect_right
from datetime import datetime, timedelta
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqla_durable.definitions.calendar import Calendar
from tests.support.calendars import EXPRESSION, SECOND, count_searches, local, ticks_of, utc, zoned
from tests.support.sampling import thorough_cases
from tests.support.wall_clock import WallClock

YEARS = [
    ("Europe/Berlin", 2026),
    ("Australia/Lord_Howe", 2026),  # set by half an hour
    ("Pacific/Apia", 2011),  # 30 December was skipped
    ("America/Sao_Paulo", 2018),  # set at midnight, forwards from 0:00 to 1:00, and back to the day before
]
LIKEWISE = [("America/New_York", 2026), ("Africa/Cairo", 2026)]
CASES = [*YEARS, *thorough_cases((each,) for each in LIKEWISE)]
FREQUENT = [
    "* * * * *",
    "*/15 * * * *",
    "0 * * * *",
    "30 * * * *",
    "45,15 0-23 * * FRI",
    "*/7 1-3 * * *",
    "* 2 * * *",
    "0 */2 * * *",
    "5/20 4-8/2 * * 1-5",
]
EXPRESSIONS = [
    *FREQUENT,
    "30 2 * * *",
    "0 2 * * *",
    "0 3 * * *",
    "15,45 1,2 * * *",
    "0 0 * * *",
    "30 0 * * *",
    "45 1 * * *",
    "30 23 * * *",
    "59 23 * * 7",
    "0 3 29 3 *",
    "0 12 1 jan,Jul *",
    "15 10 31 * *",
    "0 0 13 * FRI",
    "0 9 1-7 * MON",
    "0 9 */2 * MON",
    "0 9 * * Mon#2",
    "0 9 * * 5L",
    "0 2 L * *",
    "0 3 LW * *",
]
BY_SECONDS = [
    "* 0,29,30,59 * * * *",
    "*/20 * * * * *",
    "59 59 * * * *",
    "0 30 2 * * *",
    "*/10 30 2 * * *",
    "30 */15 0-3 * * *",
    "* 0 0-2 * * *",
    "15 0 0 * * *",
]


@pytest.fixture(
    scope="module",
    params=[*YEARS, *thorough_cases((each,) for each in LIKEWISE)],
    ids=lambda each: f"{each[0]}-{each[1]}",
)
def clock(request: pytest.FixtureRequest) -> WallClock:
    zone, year = request.param
    return WallClock(zone, utc(year - 1, 12, 28), utc(year + 1, 1, 4))


# behaviour: D3
def test_ticks_of_a_year_are_those_of_a_calculation_minute_by_minute(clock: WallClock) -> None:
    assert len(clock.changes) >= 2
    for expression in EXPRESSIONS:
        calendar = Calendar(cron=(expression,), tz=clock.zone)
        if expression in FREQUENT:
            spans = [range(each - 1_600, each + 300) for each in clock.changes]
        else:
            spans = [range(clock.span.start + 4_320, clock.span.stop - 4_320)]
        for span in spans:
            ticks = ticks_of(calendar, clock.moment(span.start), clock.moment(span.stop))
            assert ticks == [clock.moment(each) for each in clock.ticks(expression, span)], expression


# behaviour: D3
def test_ticks_by_seconds_are_those_of_a_calculation_second_by_second(clock: WallClock) -> None:
    for change in map(clock.moment, clock.changes):
        seconds = WallClock(clock.zone, change - timedelta(hours=2), change + timedelta(hours=2), unit=1)
        assert seconds.changes == [int(change.timestamp())]
        for expression in BY_SECONDS:
            ticks = [seconds.moment(each) for each in seconds.ticks(expression)]
            calendar = Calendar(cron=(expression,), tz=clock.zone)
            for moment in some_moments(ticks, change):
                place = bisect_right(ticks, moment)
                if place < len(ticks):
                    assert calendar.next_after(moment) == ticks[place], (expression, moment)
                if place:
                    assert calendar.last_until(moment, after=ticks[0] - SECOND) == ticks[place - 1], (
                        expression,
                        moment,
                    )


def some_moments(ticks: list[datetime], change: datetime) -> list[datetime]:
    """Return some of the ticks, and moments near the change."""
    near = [timedelta(seconds=each, microseconds=7) for each in (-3_601, -1_801, -2, -1, 0, 1, 1_799, 3_599)]
    return [*ticks[:: max(1, len(ticks) // 20)], *(change + each for each in near)]


# behaviour: D3
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_ticks_of_any_expression_are_those_of_a_calculation(clock: WallClock, data: st.DataObject) -> None:
    expression = data.draw(EXPRESSION)
    change = data.draw(st.sampled_from(clock.changes))
    start = change + data.draw(st.integers(-1_800, 200))
    expected = clock.ticks(expression, range(start, min(start + 40_000, clock.span.stop - 3 * 1_440)))[:20]
    calendar = Calendar(cron=(expression,), tz=clock.zone)
    before = clock.moment(start) - SECOND
    assert [*islice(calendar.times(before), len(expected))] == [clock.moment(each) for each in expected]
    if expected:
        assert calendar.last_until(clock.moment(expected[-1]) + SECOND, after=before) == clock.moment(expected[-1])


# behaviour: D3
@pytest.mark.parametrize("seconds", ["", "0 "])
@pytest.mark.parametrize(
    ("expressions", "day", "expected"),
    [
        (("30 2 * * *",), (2026, 3, 29), ["29 03:00"]),
        (("0,15,30 2 * * *", "0 3 * * *"), (2026, 3, 29), ["29 03:00"]),
        (("0 */2 * * *",), (2026, 3, 29), ["29 00:00", "29 03:00", "29 04:00"]),
        (("0 * * * *",), (2026, 3, 29), ["29 00:00", "29 01:00", "29 03:00", "29 04:00"]),
        (("30 2 * * *",), (2026, 10, 25), ["25 02:30"]),
        (("0 */2 * * *",), (2026, 10, 25), ["25 00:00", "25 02:00", "25 04:00"]),
        (("30 * * * *",), (2026, 10, 25), ["25 00:30", "25 01:30", "25 02:30", "25 02:30", "25 03:30", "25 04:30"]),
    ],
)
def test_clocks_of_berlin_are_set(
    expressions: tuple[str, ...], day: tuple[int, int, int], expected: list[str], seconds: str
) -> None:
    calendar = Calendar(cron=tuple(seconds + each for each in expressions), tz="Europe/Berlin")
    start, end = zoned(calendar.tz, *day), zoned(calendar.tz, *day, 5)
    assert local(calendar, *ticks_of(calendar, start, end)) == expected


def test_day_that_a_zone_skipped_runs_at_its_end() -> None:
    calendar = Calendar(cron=("0 9 * * *", "0 17 30 12 *"), tz="Pacific/Apia")
    ticks = ticks_of(calendar, zoned(calendar.tz, 2011, 12, 29), zoned(calendar.tz, 2012, 1, 1))
    assert local(calendar, *ticks) == ["29 09:00", "31 00:00", "31 09:00"]


def test_leap_days() -> None:
    yearly = Calendar(cron=("0 0 29 2 *",))
    assert [each.year for each in islice(yearly.times(utc(2089, 3, 1)), 3)] == [2092, 2096, 2104]
    fifth_monday = Calendar(cron=("0 0 * 2 MON#5",))
    assert fifth_monday.next_after(utc(2016, 3, 1)) == utc(2044, 2, 29)
    assert fifth_monday.last_until(utc(2044, 2, 28), after=utc(2000, 1, 1)) == utc(2016, 2, 29)


def test_day_of_the_month_and_day_of_the_week_mean_either_and_nothing_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    calendar = Calendar(cron=("0 0 13 * FRI",))
    with caplog.at_level(logging.DEBUG):
        calendar.check()
        ticks = ticks_of(calendar, utc(2026, 12, 1), utc(2027, 1, 1))
    assert [each.day for each in ticks] == [4, 11, 13, 18, 25]
    assert caplog.records == []


@pytest.mark.parametrize(
    ("alias", "expression"),
    [
        ("@hourly", "0 * * * *"),
        ("@daily", "0 0 * * *"),
        ("@midnight", "0 0 * * *"),
        ("@Weekly", "0 0 * * SUN"),
        ("@monthly", "0 0 1 * *"),
        ("@yearly", "0 0 1 1 *"),
        ("@annually", "0 0 1 1 *"),
    ],
)
def test_alias_is_its_expression(alias: str, expression: str) -> None:
    calendar = Calendar(cron=(alias,), tz="Africa/Cairo")
    calendar.check()
    same = Calendar(cron=(expression,), tz="Africa/Cairo")
    assert [*islice(calendar.times(utc(2026, 4, 23)), 30)] == [*islice(same.times(utc(2026, 4, 23)), 30)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 9 * *", "has 4 fields: write minute, hour, day, month and day of the week."),
        ("", "has 0 fields"),
        ("0 0 9 * * 1 2026", "has a field of years: leave it out, and pass starts_at and ends_at."),
        ("0 9 * * 1 2026", "has a field of years"),
        ("0 0 9 * * 1 *", "has a field of years"),
        ("0 9 * * 1 2026-2030", "has a field of years"),
        ("0 " + "1," * 100 + "1 * * *", "is longer than 200 bytes: divide it into several."),
        ("0 9 * * " + "1" * 5_000, "is longer than 200 bytes"),
        ("0 9 * * ١", "has '١': write ASCII, with spaces between the fields."),  # an Arabic digit
        ("0\xa09 * * *", r"has '\xa0': write ASCII"),
        ("0\t9 * * *", r"has '\t': write ASCII"),
        ("0 9 * * *\n", r"has '\n': write ASCII"),
        ("0 9 * * \ud800", r"has '\ud800': write ASCII"),
        ("*/60 * * * *", "has '*/60' as its minute, a step above 59: use a smaller one, or every=."),
        ("*/90 * * * * *", "has '*/90' as its second, a step above 59"),
        ("0 5,*/24 * * *", "has '*/24' as its hour, a step above 23"),
        ("0 0 1/032 * *", "has '1/032' as its day of the month, a step above 31"),
        ("0 0 1 */13 *", "has '*/13' as its month, a step above 12"),
        ("0 0 * * 1-5/8", "has '1-5/8' as its day of the week, a step above 7"),
        ("0 0 5-5/10 * *", "has '5-5/10' as its day of the month, a range of one with a step: write the one alone."),
        ("0 0 15W * *", "has '15W' as its day of the month; the weekday nearest to a date is not supported"),
        ("0 0 1,w * *", "has 'W' as its day of the month; the weekday nearest"),
        (
            "0 0 L-3 * *",
            "has 'L-3' as its day of the month; days before the end of the month are not supported: write L",
        ),
        ("H 9 * * *", "has 'H' as its minute; H is not supported: write a time, and spread the ticks with jitter."),
        ("H(0-29)/10 9 * * *", "has 'H(0-29)/10' as its minute; H is not supported"),
        ("0 9 ? * 1", "has '?' as its day of the month; ? is not supported: write *."),
        ("60 9 * * *", "has '60' as its minute: write *, numbers, and ranges, steps and lists of them."),
        ("0 24 * * *", "has '24' as its hour: write"),
        ("0 9 0 * *", "has '0' as its day of the month: write"),
        ("0 9 * 13 *", "has '13' as its month: write"),
        ("0 9 * * 8", "has '8' as its day of the week: write"),
        ("0 22-2 * * *", "has '22-2' as its hour: write"),
        ("0 9 * * FRI-MON", "has 'FRI-MON' as its day of the week: write"),
        ("0 9 * * MON#6", "has 'MON#6' as its day of the week: write"),
        ("*/0 9 * * *", "has '*/0' as its minute: write"),
        ("0 9, * * *", "has '' as its hour: write"),
        ("0 9 * FEBRUARY *", "has 'FEBRUARY' as its month: write"),
        ("0 0 31 2 *", "matches no time within 50 years: write days that the months have."),
        ("* * */20 * 1L", "matches no time within 50 years"),
        ("@reboot", "is not an alias: write one of @yearly, @annually, @monthly, @weekly, @daily, @midnight, @hourly"),
    ],
)
@pytest.mark.parametrize("name", ["cron", "excluding"])
def test_expression_is_refused(name: str, text: str, message: str) -> None:
    with_it: dict[str, Any] = {"cron": ("0 9 * * *",), name: (text,)}
    if name == "excluding" and len(text.split()) < 5 and text != "@reboot":
        message = "is neither a date such as '2026-12-25' nor a cron expression."
    shown = text[:40] if "longer" in message else text
    with pytest.raises(ValueError, match=f"^{re.escape(f'{name}={shown!r} {message}')}"):
        Calendar(**with_it).check()


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.text("0123456789*/-,#LWHMONJA?@ ", max_size=7), min_size=4, max_size=7).map(" ".join) | st.text())
def test_any_text_is_an_expression_or_refused_by_a_value_error(text: str) -> None:
    calendar = Calendar(cron=(text,), tz="Europe/Berlin")
    try:
        calendar.check()
    except ValueError as error:
        assert str(error).startswith("cron=")  # noqa: PT017
    else:
        assert calendar.next_after(utc(2026, 1, 1)) is not None


@pytest.mark.parametrize("tz", ["UTC", "Europe/Berlin", "Australia/Lord_Howe"])
def test_next_tick_is_found_by_few_searches(tz: str, monkeypatch: pytest.MonkeyPatch) -> None:
    searches = count_searches(monkeypatch)
    for expression in ("0 0 * 2 MON#5", "30 2 29 2 *", "* * * * * *", "* * 2 * * *", "0 * 29 2 *"):
        calendar = Calendar(cron=(expression,), tz=tz)
        for start in (
            utc(2026, 11, 30),
            utc(2026, 3, 29, 0, 59, 59),
            utc(2026, 10, 25, 0, 30),
            utc(2026, 10, 25, 1, 30),
        ):
            searches.clear()
            assert calendar.next_after(start) is not None
            assert 1 <= len(searches) <= 3
