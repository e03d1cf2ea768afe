"""What names and durations that users give must be. Values of workflows and steps are the business of `codec`."""

from __future__ import annotations

from datetime import timedelta

from sqla_durable.errors import ArgumentError

LONGEST_NAME = 1_000
"""How many bytes of UTF-8 a name or key may have: two of them fit into an entry of a B-tree index (2,704 bytes)."""


def fault_in(text: object, *, longest: int | None = LONGEST_NAME) -> str | None:
    """Say why something cannot be stored as a name; None when it can. What is not indexed may have any length."""
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
        return f"is {size:,} bytes long, and {longest:,} are the most (a hash of it is shorter)"
    return None


def require_text(text: object, *, what: str) -> None:
    """Refuse a name or a key that cannot be stored.

    Raises:
        ArgumentError: it is no text, is blank, or holds what PostgreSQL does not store.
    """
    fault = fault_in(text)
    if fault is not None:
        raise ArgumentError(f"the {what} is {text!r}, which {fault}: give a text that is not blank.")


def require_duration(value: object, name: str) -> None:
    """Refuse what is not a `timedelta`.

    Raises:
        ArgumentError: it is something else, such as a number of seconds.
    """
    if not isinstance(value, timedelta):
        raise ArgumentError(f"{name}={value!r} is not a timedelta: write, for example, timedelta(seconds=5).")
