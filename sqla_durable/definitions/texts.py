"""How times and durations are written in messages, and by commands."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

_UNITS = ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "m"), (60, "m", 1, "s"))


def time_text(moment: datetime) -> str:
    """Return a time in UTC, to the second: `2026-11-30 03:01:26Z`."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"


def duration_text(value: timedelta) -> str:
    """Return a duration in its two largest units: `2d 3h`, `5m 1s`, `0.25s`, `0.07ms`."""
    seconds = value.total_seconds()
    for size, unit, smaller_size, smaller_unit in _UNITS:
        if abs(seconds) >= size:
            whole, rest = divmod(int(abs(seconds)), size)
            smaller = f" {rest // smaller_size}{smaller_unit}" if rest >= smaller_size else ""
            return f"{'-' if seconds < 0 else ''}{whole}{unit}{smaller}"
    return f"{seconds * 1_000:.2g}ms" if 0 < abs(seconds) < 0.001 else f"{seconds:.3g}s"
