"""What a wall clock shows, minute by minute or second by second, and the ticks that follow: a calculation of its own.

It uses neither cronsim nor anything of `definitions.calendar`: it walks through every unit of a span and notes what the
clock of a zone shows. Times are counted in units since 1970, of UTC or of the wall clock.
"""

from __future__ import annotations

import calendar
from collections.abc import Iterable, Iterator
from datetime import UTC, date, datetime, timedelta
from itertools import product
from zoneinfo import ZoneInfo

EPOCH = date(1970, 1, 1)
MONTHS = {name.upper(): number for number, name in enumerate(calendar.month_abbr) if name}
WEEKDAYS = {name.upper(): (number + 1) % 7 for number, name in enumerate(calendar.day_abbr)}


class WallClock:
    """The clock of a zone during a span.

    Attributes:
        first: of each time that the clock shows, the unit in which it does so for the first time.
        again: likewise for the second time, where it is set back.
        skipped: of each time that it does not show because it is set forward, the unit in which it was.
        changes: the units in which it was set.
    """

    def __init__(self, zone: str, start: datetime, end: datetime, *, unit: int = 60) -> None:
        self.zone, self.unit = zone, unit
        self.span = range(int(start.timestamp()) // unit, int(end.timestamp()) // unit)
        self.first: dict[int, int] = {}
        self.again: dict[int, int] = {}
        self.skipped: dict[int, int] = {}
        self.changes: list[int] = []
        latest = highest = -1
        for number, offset in _offsets(self.span, ZoneInfo(zone), unit):
            shown = number + offset
            if shown != latest + 1 and latest > 0:
                self.changes.append(number)
                self.skipped |= dict.fromkeys(range(latest + 1, shown), number)
            if shown > highest:
                self.first[shown], highest = number, shown
            else:
                self.again[shown] = number
            latest = shown

    def ticks(self, expression: str, span: range | None = None) -> list[int]:
        """Return the units in which an expression ticks."""
        span = self.span if span is None else span
        days = range(span.start * self.unit // 86_400 - 2, span.stop * self.unit // 86_400 + 2)
        fields = Fields(expression, self.unit)
        in_real_time = len(fields.hours) == 24
        others = self.again if in_real_time else self.skipped
        found = {each[shown] for shown in fields.times(days) for each in (self.first, others) if shown in each}
        return sorted(each for each in found if each in span)

    def moment(self, number: int) -> datetime:
        """Return the beginning of a unit."""
        return datetime.fromtimestamp(number * self.unit, UTC)


def _offsets(span: range, tz: ZoneInfo, unit: int) -> Iterator[tuple[int, int]]:
    """Yield each unit with what the clock adds to it. Clocks are set at quarters of an hour."""
    added = 0
    for number in span:
        if number % (900 // unit) == 0 or number == span.start:
            offset = datetime.fromtimestamp(number * unit, tz).utcoffset() or timedelta()
            added = offset // timedelta(seconds=unit)
        yield number, added


class Fields:
    """What the fields of a cron expression match, in minutes or in seconds."""

    def __init__(self, expression: str, unit: int) -> None:
        fields = expression.upper().split()
        *seconds, minutes, hours, self.days, months, self.weekdays = fields
        self.hours = numbers(hours, range(24))
        self.months = numbers(months, range(1, 13), MONTHS)
        self.day_and_weekday = self.days.startswith("*") or self.weekdays.startswith("*")
        clock = product(self.hours, numbers(minutes, range(60)), numbers("".join(seconds) or "0", range(60)))
        self.clock = sorted((hour * 3600 + minute * 60 + second) // unit for hour, minute, second in clock)
        self.day_length = 86_400 // unit

    def times(self, days: Iterable[int]) -> Iterator[int]:
        """Yield the times of the wall clock that match, in units since 1970."""
        for day in days:
            if self._matches(EPOCH + timedelta(days=day)):
                yield from (day * self.day_length + each for each in self.clock)

    def _matches(self, day: date) -> bool:
        both = self._day(day), self._weekday(day)
        return day.month in self.months and (all(both) if self.day_and_weekday else any(both))

    def _day(self, day: date) -> bool:
        last = calendar.monthrange(day.year, day.month)[1]
        for term in self.days.split(","):
            if term == "L":
                if day.day == last:
                    return True
            elif term == "LW":
                if day.day == max(each for each in range(1, last + 1) if day.replace(day=each).weekday() < 5):
                    return True
            elif day.day in numbers(term, range(1, 32)):
                return True
        return False

    def _weekday(self, day: date) -> bool:
        last = calendar.monthrange(day.year, day.month)[1]
        today = day.isoweekday() % 7
        for term in self.weekdays.split(","):
            if term.endswith("L"):
                if today == int(term[:-1]) % 7 and day.day > last - 7:
                    return True
            elif "#" in term:
                name, count = term.split("#")
                if today == WEEKDAYS.get(name, name) and (day.day - 1) // 7 == int(count) - 1:
                    return True
            elif today in {each % 7 for each in numbers(term, range(8), WEEKDAYS)}:
                return True
        return False


def numbers(field: str, every: range, names: dict[str, int] | None = None) -> set[int]:
    """Return the numbers that a field of stars, numbers, names, ranges, steps and lists stands for."""
    found: set[int] = set()
    for term in field.split(","):
        text, _, step = term.partition("/")
        low, _, high = text.partition("-")
        if text == "*":
            chosen = every
        else:
            start = _number(low, names)
            end = _number(high, names) if high else every[-1] if step else start
            chosen = range(start, end + 1)
        found.update(chosen[:: int(step or 1)])
    return found


def _number(text: str, names: dict[str, int] | None) -> int:
    return names[text] if names and text in names else int(text)
