"""When a schedule ticks: cron expressions and intervals, in a time zone, with exclusions; and the jitter of a tick.

Computes times; nothing here waits, reads a clock or knows the database. `cron` has the times of one expression.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from hashlib import sha256
from typing import TypeAlias, cast

from sqla_durable.definitions.cron import (
    EARLIEST,
    LONGEST_EXPRESSION,
    REFERENCE,
    SECOND,
    Expression,
    check_expression,
    check_zone,
    expanded,
    expression,
)
from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.definitions.libraries import zoneinfo

_MOST_EXCLUDED = 20_000  # times in a row, or days if whole days are excluded
_LONGEST_EXCLUDED = timedelta(days=18_263)  # 50 years
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Calendar:
    """When a schedule ticks.

    Where clocks change, an expression of all 24 hours runs in real time: at each instant that exists and matches, so in
    both passes of a repeated hour, and not in a skipped one. Every other one follows the wall clock: a time that is
    skipped runs once, when the clocks have changed, together with what is due then; a repeated time runs in the first
    pass only.

    A tick is excluded if its local date is, if its local time matches an excluded expression (one of five fields stands
    for whole minutes), or if a time of that expression was moved to it because clocks changed.

    Args:
        cron: expressions of five fields, or of six with seconds first; the ticks are those of all together.
        every: the time between two ticks, counted from `starts_at`, or from 1970-01-01 UTC. Instead of `cron`.
        tz: the IANA name of the time zone of `cron` and `excluding`.
        starts_at: the time before which there is no tick.
        ends_at: the time after which there is no tick.
        excluding: local dates such as "2026-12-25", and cron expressions.
    """

    cron: tuple[str, ...] = ()
    every: timedelta | None = None
    tz: str = "UTC"
    starts_at: datetime | None = None
    ends_at: datetime | None = None
    excluding: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse what is not a calendar.

        Raises:
            ValueError: a part of it is wrong, or it has no tick.
        """
        check_zone(self.tz)
        _check_texts(self.cron, "cron")
        _check_texts(self.excluding, "excluding")
        _check_interval(self.every, self.cron)
        for text in self.cron:
            check_expression(text, "cron")
        for text in self.excluding:
            _check_excluded(text)
        starts, ends = _checked(self.starts_at, "starts_at"), _checked(self.ends_at, "ends_at")
        if starts and ends and starts > ends:
            raise ValueError(f"starts_at={starts} is after ends_at={ends}: exchange them, or leave one out.")
        first = starts or REFERENCE
        if self.excluding and not any(self._next_of(each, first, None) for each in self._sources()):
            raise ValueError(f"excluding={self.excluding!r} leaves no tick: exclude less.")

    def next_after(self, moment: datetime) -> datetime | None:
        """Return the first tick after a moment, in UTC, or None if there is none.

        There is none after `ends_at` and after the year 9999, nor if an expression matches no time within 50 years, or
        if all times within 50 years, or 20,000 in a row, are excluded.

        Raises:
            ValueError: the moment has no time zone.
        """
        return self._next(_utc(moment, "moment"), None)

    def last_until(self, moment: datetime, *, after: datetime) -> datetime | None:
        """Return the last tick that is not after `moment`, in UTC, or None if there is none later than `after`.

        The time that this takes hardly depends on how many there are.

        Raises:
            ValueError: one of the two has no time zone.
        """
        limit, step = _utc(moment, "moment"), SECOND
        last = self._next(_utc(after, "after"), limit)
        if last is None:
            return None
        # There is none between `limit` and `moment`, and `last` is one: they approach each other. The steps back from
        # `limit` grow until a tick is found; from then on half of the distance is tried.
        while True:
            probe = limit - min(step, limit - last)
            tick = self._next(probe, limit)
            if tick is not None:
                last, step = tick, (limit - tick) / 2
            elif probe == last:
                return last
            else:
                limit, step = probe, step * 4

    def times(self, after: datetime) -> Iterator[datetime]:
        """Return an iterator over the ticks after a moment, in UTC. It may have no end.

        Raises:
            ValueError: the moment has no time zone.
        """
        tick = self.next_after(after)
        while tick is not None:
            yield tick
            tick = self.next_after(tick)

    def _next(self, after: datetime, until: datetime | None) -> datetime | None:
        """Return the first tick after a moment and not after another."""
        if self.starts_at is not None:
            after = max(after, max(self.starts_at, EARLIEST).astimezone(UTC) - _MICROSECOND)
        until = min((each for each in (until, self.ends_at) if each is not None), default=None)
        found = None
        for source in self._sources():
            found = self._next_of(source, after, until) or found
            until = found or until
        return found

    def _sources(self) -> list[_Source]:
        if self.every is not None:
            return [_Interval(self.starts_at or _EPOCH, self.every)]
        return [expression(each, self.tz) for each in self.cron]

    def _next_of(self, source: _Source, after: datetime, until: datetime | None) -> datetime | None:
        exclusions, start = _exclusions(self.excluding, self.tz), after
        with suppress(OverflowError):  # after the year 9999
            for _ in range(_MOST_EXCLUDED):
                tick = source.next_after(after)
                if tick is None or (until is not None and tick > until):
                    return None
                end = exclusions.end_of_excluded(tick, source) if self.excluding else None
                if end is None:
                    return tick
                if end - start > _LONGEST_EXCLUDED:
                    return None
                after = end
        return None


def jitter_of(name: str, tick: datetime, longest: timedelta, following: datetime | None) -> timedelta:
    """Return how long after its tick a schedule starts its workflow: always the same for a name and a tick.

    Args:
        name: the name of the schedule.
        tick: the time of the tick.
        longest: the jitter is shorter than this.
        following: the next tick, which the jitter does not reach.
    """
    limit = longest if following is None else min(longest, following - tick)
    seed = f"{tick.astimezone(UTC).isoformat()} {name}"
    share = int.from_bytes(sha256(seed.encode()).digest()[:8])
    return timedelta(microseconds=(max(limit, timedelta()) // _MICROSECOND * share) >> 64)


class _Interval:
    """Instants at equal distances from an anchor."""

    seconds = minutes = frozenset(range(60))
    hours = frozenset(range(24))

    def __init__(self, anchor: datetime, every: timedelta) -> None:
        self._anchor = anchor.astimezone(UTC)
        self._every = every

    def next_after(self, after: datetime) -> datetime | None:
        """Return the first instant after another.

        Raises:
            OverflowError: it would be after the year 9999.
        """
        return self._anchor + ((after - self._anchor) // self._every + 1) * self._every


_Source: TypeAlias = "Expression | _Interval"


class _Exclusions:
    """The local dates and the expressions that are excluded. Immutable."""

    def __init__(self, texts: tuple[str, ...], tz: str) -> None:
        self._zone = zoneinfo.ZoneInfo(tz)
        self._dates = frozenset(date.fromisoformat(each) for each in texts if _is_like_a_date(each))
        self._expressions = [expression(_by_seconds(each), tz) for each in texts if not _is_like_a_date(each)]

    def end_of_excluded(self, tick: datetime, source: _Source) -> datetime | None:
        """Return until when this tick and all later ones of its source are excluded; None if this one is not."""
        local = tick.astimezone(self._zone)
        if local.date() in self._dates:
            return self._end(tick, local, 3)
        sizes = [_size_of_common_unit(source, each) for each in self._expressions if each.matches(local)]
        if sizes:
            return self._end(tick, local, max(sizes))
        moved = tick.replace(microsecond=0)
        if local.utcoffset() != (moved - SECOND).astimezone(self._zone).utcoffset() and any(
            each.next_after(moved - SECOND) == moved for each in self._expressions
        ):
            return tick
        return None

    def _end(self, tick: datetime, local: datetime, size: int) -> datetime:
        """Return the end of the minute, the hour or the day of a tick: of the longest in which no clock changes."""
        minute = local.replace(second=0, microsecond=0)
        starts = [minute, minute.replace(minute=0), minute.replace(hour=0, minute=0)]
        lengths = [timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)]
        for start, length in reversed([*zip(starts, lengths, strict=True)][:size]):
            end = tick + (length - (local.replace(tzinfo=None) - start.replace(tzinfo=None))) - _MICROSECOND
            if end.astimezone(self._zone).utcoffset() == local.utcoffset():
                return end
        return tick


def _size_of_common_unit(source: _Source, exclusion: Expression) -> int:
    """Return of what all is excluded, after a time that is: 1 its minute, 2 its hour, 3 its day, 0 only itself."""
    size = 0
    for name in ("seconds", "minutes", "hours"):
        if not getattr(source, name) <= getattr(exclusion, name):
            break
        size += 1
    return size


@lru_cache(maxsize=1_024)
def _exclusions(texts: tuple[str, ...], tz: str) -> _Exclusions:
    return _Exclusions(texts, tz)


def _by_seconds(text: str) -> str:
    """Return an expression of six fields that matches each second of the minutes of one of five."""
    text = expanded(text)
    return f"* {text}" if len(text.split()) == 5 else text


def _utc(moment: datetime, name: str) -> datetime:
    if moment.utcoffset() is None:
        raise ValueError(f"{name}={moment!r} has no time zone: add one, for example tzinfo=UTC.")
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError(f"{name}={moment!r} is out of range: pass a time of the years 1 to 9999.") from None


def _is_like_a_date(text: str) -> bool:
    return re.fullmatch(r"[0-9]+-[0-9]+-[0-9]+", text) is not None


def _checked(moment: object, name: str) -> datetime | None:
    if moment is None:
        return None
    if not isinstance(moment, datetime):
        raise ValueError(f"{name}={moment!r} is not a datetime: pass one with a time zone.")
    return _utc(moment, name)


def _check_texts(texts: object, name: str) -> None:
    if not isinstance(texts, tuple) or not all(isinstance(each, str) for each in cast("tuple[object, ...]", texts)):
        raise ValueError(f"{name}={texts!r} is not a tuple of texts: write, for example, {name}=('0 9 * * *',).")


def _check_interval(every: object, cron: tuple[str, ...]) -> None:
    if (every is None) == (not cron):
        raise ValueError(f"cron={cron!r} and every={every!r}: pass one of the two.")
    if every is None:
        return
    if not isinstance(every, timedelta):
        raise ValueError(f"every={every!r} is not a timedelta: write, for example, timedelta(minutes=5).")
    if every < SECOND:
        raise ValueError(f"every must be at least one second, got {every!r}: write, for example, timedelta(minutes=5).")


def _check_excluded(text: str) -> None:
    if _is_like_a_date(text):
        try:
            date.fromisoformat(text)
        except ValueError:
            raise ValueError(f"excluding={text!r} is not a date: write one such as '2026-12-25'.") from None
    elif len(text.split()) < 5 and not text.strip().startswith("@"):
        raise ValueError(
            f"excluding={text[:LONGEST_EXPRESSION]!r} is neither a date such as '2026-12-25' nor a cron expression."
        )
    else:
        check_expression(text, "excluding")
