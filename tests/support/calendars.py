"""Times, ticks and expressions for the tests of calendars."""

from __future__ import annotations

from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

import cronsim
import pytest
from hypothesis import strategies as st

from sqla_durable.definitions.calendar import Calendar

SECOND = timedelta(seconds=1)


def zoned(zone: str, *parts: int, fold: int = 0) -> datetime:
    year, month, day, *rest = parts
    hour, minute, second = (*rest, 0, 0, 0)[:3]
    return datetime(year, month, day, hour, minute, second, tzinfo=ZoneInfo(zone), fold=fold)


def utc(*parts: int) -> datetime:
    return zoned("UTC", *parts)


def ticks_of(calendar: Calendar, start: datetime, end: datetime) -> list[datetime]:
    """Return the ticks in [start, end)."""
    found: list[datetime] = []
    for tick in calendar.times(start - timedelta(microseconds=1)):
        if tick >= end:
            break
        found.append(tick)
    return found


def naive(moment: datetime) -> datetime:
    return moment.replace(tzinfo=None)


def local(calendar: Calendar, *ticks: datetime) -> list[str]:
    return [f"{each.astimezone(ZoneInfo(calendar.tz)):%d %H:%M}" for each in ticks]


def field(low: int, high: int) -> st.SearchStrategy[str]:
    number = st.integers(low, high)
    span = st.sets(number, min_size=2, max_size=2).map(lambda each: f"{min(each)}-{max(each)}")
    step = st.tuples(span | number.map(str) | st.just("*"), st.integers(1, high)).map(
        lambda each: f"{each[0]}/{each[1]}"
    )
    return st.just("*") | st.lists(number.map(str) | span | step, min_size=1, max_size=3).map(",".join)


EXPRESSION = st.tuples(
    field(0, 59),
    st.sampled_from(["*", "0-23", "0", "1-3", "2", "*/2", "23", "0,1"]) | field(0, 23),
    st.sampled_from(["*", "*", "L", "LW", "1,L"]) | field(1, 31),
    st.just("*") | field(1, 12),
    st.sampled_from(["*", "*", "*/2", "SAT,SUN", "sun#1", "5L"]) | field(0, 7),
).map(" ".join)


def count_searches(monkeypatch: pytest.MonkeyPatch) -> list[datetime]:
    """Return a list that gets each time that cronsim returns."""
    found: list[datetime] = []
    original = cronsim.CronSim.__next__

    def counted(self: cronsim.CronSim) -> datetime:
        found.append(original(self))
        return found[-1]

    monkeypatch.setattr(cronsim.CronSim, "__next__", counted)
    return found
