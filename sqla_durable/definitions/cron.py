"""The times of a cron expression in a time zone, and what expressions and zones must be.

cronsim says which wall-clock times match an expression, and is only ever passed times without a zone. Which instants
these are, where clocks change, is decided here.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from functools import lru_cache
from typing import TYPE_CHECKING, NoReturn

from sqla_durable.definitions.libraries import cronsim, zoneinfo

if TYPE_CHECKING:
    from zoneinfo import ZoneInfo

    from cronsim import CronSim

LONGEST_EXPRESSION = 200
"""The most bytes of a cron expression."""

_ALIASES = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
_FIELDS = {"second": 59, "minute": 59, "hour": 23, "day of the month": 31, "month": 12, "day of the week": 7}
_NOT_SUPPORTED = [
    (r"\d*W", "the weekday nearest to a date is not supported: name the date, or LW, the month's last weekday"),
    (r"L-\d+", "days before the end of the month are not supported: write L, the last day, or LW, the last weekday"),
    (r"H(\(.*\))?(/\d+)?", "H is not supported: write a time, and spread the ticks with jitter"),
    (r"\?", "? is not supported: write *"),
]
EARLIEST = datetime(1, 1, 3, tzinfo=UTC)  # a day later than the first that a datetime can hold in every time zone
REFERENCE = datetime(2000, 1, 1, tzinfo=UTC)  # from where an expression is searched for a match
SECOND = timedelta(seconds=1)


class Expression:
    """A cron expression in a time zone. Immutable."""

    def __init__(self, text: str, zone: ZoneInfo) -> None:
        self._text = text
        self._zone = zone
        self._parsed = _parsed(text, REFERENCE.replace(tzinfo=None))
        self.seconds, self.minutes, self.hours = self._parsed.seconds, self._parsed.minutes, self._parsed.hours
        self._in_real_time = len(self.hours) == 24

    def next_after(self, after: datetime) -> datetime | None:
        """Return the first instant after another, in UTC.

        Raises:
            OverflowError: it would be after the year 9999.
        """
        after = max(after, EARLIEST).replace(microsecond=0)
        wall = self._wall(after)
        found = self._first(wall, after)
        first, second = self._passes(wall)
        if self._in_real_time and first == after < second:
            # In the second pass, clocks show again what they showed before `after`.
            change = _change(first, second, self._zone)
            if found is None or found >= change:
                return self._first(self._wall(change) - SECOND, change - SECOND)
        return found

    def matches(self, local: datetime) -> bool:
        """Return whether a local time matches the expression."""
        fields = self._parsed
        return (
            local.second in fields.seconds
            and local.minute in fields.minutes
            and local.hour in fields.hours
            and local.month in fields.months
            and fields.match_day(local.date())
        )

    def _first(self, wall: datetime, after: datetime) -> datetime | None:
        """Return the first instant after another of the times that match and are after a wall-clock time."""
        while (matching := next(_parsed(self._text, wall), None)) is not None:
            first, second = self._passes(matching)
            if self._wall(first) != matching:  # it is skipped, and the names are exchanged: `second` is the earlier
                change = _change(second, first, self._zone)
                if not self._in_real_time:
                    return change
                wall = self._wall(change) - SECOND
            elif first > after:
                return first
            elif self._in_real_time:
                return second
            else:  # the first pass is over, and nothing runs in the second: go on behind it
                wall = matching + (_change(first, second, self._zone) - first) - SECOND
        return None

    def _wall(self, moment: datetime) -> datetime:
        return moment.astimezone(self._zone).replace(tzinfo=None, fold=0)

    def _passes(self, wall: datetime) -> tuple[datetime, datetime]:
        """Return the instants at which clocks show a time for the first and the last time; mostly the same one."""
        local = wall.replace(tzinfo=self._zone)
        return local.astimezone(UTC), local.replace(fold=1).astimezone(UTC)


@lru_cache(maxsize=4_096)
def expression(text: str, tz: str) -> Expression:
    """Return an expression, or an alias of one, in the time zone of this name."""
    return Expression(expanded(text), zoneinfo.ZoneInfo(tz))


def expanded(text: str) -> str:
    """Return the expression that an alias stands for, or the text itself."""
    return _ALIASES.get(text.strip().lower(), text)


def check_zone(tz: object) -> None:
    """Refuse what is not the name of a time zone.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(tz, str):
        raise ValueError(f"tz={tz!r} is not a text: pass an IANA name, such as 'Europe/Berlin'.")
    try:
        # Others of the files are there on some machines only, and those in right/ count leap seconds.
        if not tz.startswith(("posix", "right/", "localtime")):
            zoneinfo.ZoneInfo(tz)
            return
    except (LookupError, ValueError, OSError):
        pass
    names = {each.lower(): each for each in zoneinfo.available_timezones()}
    close = get_close_matches(tz.lower(), names, n=1)
    hint = f"did you mean {names[close[0]]!r}?" if close else "pass an IANA name, such as 'Europe/Berlin'."
    raise ValueError(f"tz={tz!r} is not a time zone: {hint}")


def check_expression(text: str, name: str) -> None:
    """Refuse what is not a cron expression, or never matches; `name` is the argument in the message.

    Raises:
        ValueError: it is one of these.
    """
    if len(text.encode(errors="replace")) > LONGEST_EXPRESSION:
        _refuse(name, text[:40], f"is longer than {LONGEST_EXPRESSION} bytes: divide it into several")
    if odd := re.search(r"[^!-~ ]", text):
        _refuse(name, text, f"has {odd[0]!r}: write ASCII, with spaces between the fields")
    if text.strip().startswith("@") and expanded(text) == text:
        _refuse(name, text, f"is not an alias: write one of {', '.join(_ALIASES)}, or five fields")
    fields = expanded(text).upper().split()
    if len(fields) == 7 or (len(fields) == 6 and re.fullmatch(r"[0-9]{4}.*", fields[5])):
        _refuse(name, text, "has a field of years: leave it out, and pass starts_at and ends_at")
    if len(fields) not in (5, 6):
        _refuse(name, text, f"has {len(fields)} fields: write minute, hour, day, month and day of the week")
    for kind, field in zip([*_FIELDS][-len(fields) :], fields, strict=True):
        for term in field.split(","):
            _check_term(name, text, kind, term)
    try:
        matching = next(_parsed(" ".join(fields), REFERENCE.replace(tzinfo=None)), None)
    except cronsim.CronSimError:  # each of its fields is right, but no month has such a day
        matching = None
    if matching is None:
        _refuse(name, text, "matches no time within 50 years: write days that the months have")


def _check_term(name: str, text: str, kind: str, term: str) -> None:
    """Refuse a part of a field that is not one, or that means something else in other programs."""
    for pattern, why in _NOT_SUPPORTED:
        if re.fullmatch(pattern, term):
            _refuse(name, text, f"has {term!r} as its {kind}; {why}")
    step = re.search(r"/0*([0-9]+)$", term)
    if step and int(step[1]) > _FIELDS[kind]:
        _refuse(name, text, f"has {term!r} as its {kind}, a step above {_FIELDS[kind]}: use a smaller one, or every=")
    if re.fullmatch(r"(\w+)-\1/\d+", term):  # cronsim takes 5-5/10 for 5/10, which is 5-59/10
        _refuse(name, text, f"has {term!r} as its {kind}, a range of one with a step: write the one alone")
    parts = [(term or "-") if each == kind else "*" for each in _FIELDS]
    try:
        _parsed(" ".join(parts), REFERENCE.replace(tzinfo=None))
    except cronsim.CronSimError:
        _refuse(name, text, f"has {term!r} as its {kind}: write *, numbers, and ranges, steps and lists of them")


def _refuse(name: str, text: str, why: str) -> NoReturn:
    raise ValueError(f"{name}={text!r} {why}.")


def _change(low: datetime, high: datetime, zone: ZoneInfo) -> datetime:
    """Return when the offset became that of `high`, after `low`."""
    offset = high.astimezone(zone).utcoffset()
    while high - low > SECOND:
        middle = low + (high - low) // SECOND // 2 * SECOND
        if middle.astimezone(zone).utcoffset() == offset:
            high = middle
        else:
            low = middle
    return high


def _parsed(text: str, wall: datetime) -> CronSim:
    """Return an iterator over the wall-clock times after one."""
    return cronsim.CronSim(text, wall)
