"""Times and durations as command lines have them: `2026-11-29T08:00`, `90d`."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import typer

from sqla_durable.definitions.texts import duration_text
from sqla_durable.tools.cli.errors import CommandError

_UNITS = {"ms": "milliseconds", "s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|[smhdw])")


_LONGEST = "365d"
"""A longer one is taken for a mistake."""


def duration_option(name: str, *, help: str, default: timedelta | None = None, least: str = "0") -> Any:  # noqa: A002
    """Return an option whose value is a duration with its unit, and not a number of something.

    Args:
        name: its name, with dashes.
        help: what it is.
        default: what is taken without it.
        least: the shortest one that is allowed.
    """

    def parsed(given: str | timedelta) -> timedelta:
        if isinstance(given, timedelta):  # the default
            return given
        found = parsed_duration(name, given)
        if not parsed_duration(name, least) <= found <= parsed_duration(name, _LONGEST):
            raise CommandError(f"{name} must be between {least} and {_LONGEST}, got {given}.")
        return found

    shown = False if default is None else duration_text(default)
    return typer.Option(name, metavar="DURATION", help=help, parser=parsed, show_default=shown)


def parsed_duration(option: str, text: str) -> timedelta:
    """Return a duration: 500ms, 30s, 5m, 2h, 7d, 1w, or 0.

    Raises:
        CommandError: it is none.
    """
    found = _duration("0s" if text == "0" else text)
    if found is None:
        raise CommandError(f"{option} {text!r} is no duration: write a number with a unit, such as 30s, 5m, 2h or 7d.")
    return found


def moment(option: str, text: str) -> datetime:
    """Return a time: one in ISO 8601, in UTC where it has no zone, or so long ago: 30s, 5m, 2h, 7d, 1w.

    Raises:
        CommandError: it is none.
    """
    ago = _duration(text)
    try:
        return _iso(text) if ago is None else datetime.now(UTC) - ago
    except (ValueError, OverflowError):
        raise CommandError(
            f"{option} {text!r} is no time: write 2026-11-29T08:00, or how long ago, such as 2h."
        ) from None


def parsed_moment(option: str, text: str) -> datetime:
    """Return a time in ISO 8601, in UTC where it has no zone.

    Raises:
        CommandError: it is none.
    """
    try:
        return _iso(text)
    except ValueError:
        raise CommandError(f"{option} {text!r} is no time: write 2026-11-29T08:00, or with a zone +01:00.") from None


def _duration(text: str) -> timedelta | None:
    """Return a duration; None if it is none, or longer than Python's."""
    matched = _DURATION.fullmatch(text)
    try:
        return None if matched is None else timedelta(**{_UNITS[matched[2]]: float(matched[1])})
    except OverflowError:
        return None


def _iso(text: str) -> datetime:
    found = datetime.fromisoformat(text)
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)
