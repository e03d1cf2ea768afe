"""What names, keys, durations and times that users pass must be, and how keys are escaped.

Values of workflows and steps are handled by `codec`.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from sqla_durable.errors import ArgumentError

LONGEST_NAME = 1_000
"""The most bytes of UTF-8 in a name or key: two of them fit into an entry of a B-tree index (2,704 bytes)."""

LONGEST = timedelta(days=36_500)
"""The longest duration, a hundred years: added to the present time, it is one that every driver can read."""

LATEST = datetime(9999, 1, 1, tzinfo=UTC)
"""Every time that is passed must be before this. The tables accept some months more, for delays that add up."""

_ESCAPES = {"#": "%23", "/": "%2F", "%": "%25"}
_ESCAPED = {escape: character for character, escape in _ESCAPES.items()}
_TO_ESCAPE = re.compile("#|/|%(?=23|2F|25)")
_TO_UNESCAPE = re.compile("%23|%2F|%25")

_EARLIEST = datetime(1, 1, 2, tzinfo=UTC)  # the first that a datetime can hold in every time zone


def fault_in(text: object, *, longest: int | None = LONGEST_NAME) -> str | None:
    """Return why something cannot be stored as a name; None when it can. `longest=None` allows any length."""
    if not isinstance(text, str):
        return "is not a text"
    if not text.strip():
        return "is blank"
    if "\0" in text:
        return "holds a NUL character, which PostgreSQL does not store"
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return "holds a lone surrogate, which UTF-8 does not have"
    if longest is not None and size > longest:
        return f"is {size:,} bytes long, more than {longest:,} (use a hash of it)"
    return None


def escape_key(key: str) -> str:
    """Return a name or a key as a part of an operation's identity, where `#` marks occurrences and `/` branches.

    Different texts stay different, and what has no mark is unchanged: a `%` is escaped only before what would be read
    as an escape.
    """
    if "#" in key or "/" in key or "%" in key:
        return _TO_ESCAPE.sub(lambda found: _ESCAPES[found[0]], key)
    return key


def unescape_key(key: str) -> str:
    """Return an operation's identity as it is shown to users; of what `escape_key` returned, the original."""
    return _TO_UNESCAPE.sub(lambda found: _ESCAPED[found[0]], key) if "%" in key else key


def fault_in_key(key: object) -> str | None:
    """Return why something cannot be a name or a key of an operation; None when it can. It is measured escaped."""
    return fault_in(key) or fault_in(escape_key(str(key)))


def require_key(text: object, *, what: str) -> None:
    """Refuse what cannot be a part of an operation's identity.

    Raises:
        ArgumentError: it is no text, is blank, is too long, or holds what PostgreSQL does not store.
    """
    fault = fault_in_key(text)
    if fault is not None:
        raise ArgumentError(f"the {what} is {text!r}, which {fault}: pass another one.")


def require_text(text: object, *, what: str) -> None:
    """Refuse a name or a key that cannot be stored.

    Raises:
        ArgumentError: it is no text, is blank, or holds what PostgreSQL does not store.
    """
    fault = fault_in(text)
    if fault is not None:
        raise ArgumentError(f"the {what} is {text!r}, which {fault}: pass a text that is not blank.")


def require_duration(value: object, name: str) -> None:
    """Refuse what is not a `timedelta`, or longer than `LONGEST`.

    Raises:
        ArgumentError: it is something else, such as a number of seconds, or too long.
    """
    if not isinstance(value, timedelta):
        raise ArgumentError(f"{name}={value!r} is not a timedelta: write, for example, timedelta(seconds=5).")
    if not -LONGEST <= value <= LONGEST:
        raise ArgumentError(f"{name}={value} is longer than {LONGEST.days:,} days, the longest duration.")


def require_positive_duration(value: object, name: str) -> None:
    """Refuse what is not a positive duration.

    Raises:
        ArgumentError: it is not one.
    """
    require_duration(value, name)
    if isinstance(value, timedelta) and value <= timedelta():
        raise ArgumentError(f"{name} must be positive, got {value}: write, for example, timedelta(hours=1).")


def require_moment(value: object, name: str) -> None:
    """Refuse what is not a time with a time zone before `LATEST`.

    Raises:
        ArgumentError: it is something else, has no time zone, or is too late.
    """
    if not isinstance(value, datetime):
        raise ArgumentError(f"{name}={value!r} is not a datetime.")
    if value.utcoffset() is None:
        raise ArgumentError(f"{name}={value!r} has no time zone: add one, for example tzinfo=UTC.")
    if not _EARLIEST <= value < LATEST:
        raise ArgumentError(f"{name}={value!r} is out of range: pass a time before the year {LATEST.year}.")
