"""The text and traceback of exceptions without the values of SQL statements and payloads.

SQL parameters, PostgreSQL's DETAIL and CONTEXT, and the inputs in pydantic's errors are left out; statements, SQLSTATE,
and the names of tables, columns and constraints stay. This is decided for each exception, along causes and groups, and
not by searching a formatted traceback, whose texts an attacker may have written.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from typing import Any, cast

from sqlalchemy.exc import DBAPIError, StatementError

from sqla_durable.definitions.libraries import pydantic

_FRAMES = 50  # of each traceback, the last ones
_LINKS = 20  # exceptions of a chain, the last ones
_MEMBERS = 5  # of a group, the first ones
_DEPTH = 3  # levels of nested groups
_PROBLEMS = 20  # of a validation error
_NAMES = {"schema_name": "schema", "table_name": "table", "column_name": "column", "constraint_name": "constraint"}
_PG8000 = {"M": "message", "C": "sqlstate", "s": "schema", "t": "table", "c": "column", "n": "constraint"}
_DATA_EXCEPTION = "22"
"""PostgreSQL's class of codes whose texts quote values: `invalid input syntax for type integer: "4111"`."""
_QUOTED = re.compile(r'".*"', re.DOTALL)
_VALUES = re.compile(r"\[parameters: |DETAIL: |input_value=|invalid input for query argument \$\d+:")
_CAUSE = "\nThe above exception was the direct cause of the following exception:\n\n"
_CONTEXT = "\nDuring handling of the above exception, another exception occurred:\n\n"


def message_of(error: BaseException, *, details: bool = False) -> str:
    """Return the text of an exception without values; never raises.

    Args:
        error: the exception.
        details: whether to include the values; the text is that of `str` then.
    """
    try:
        return str(error) if details else _message(error)
    except Exception as broken:
        return f"<its str() failed with {type(broken).__name__}: {without_values(', '.join(map(repr, broken.args)))}>"


def without_values(text: str) -> str:
    """Return a text up to where it quotes values of another exception's text."""
    found = _VALUES.search(text)
    return text if found is None else f"{text[: found.start()].rstrip()} (values left out)"


def problems_of(error: pydantic.ValidationError, *, below: int = 0) -> str:
    """Return what does not fit, by path and type and without the values.

    Args:
        error: pydantic's error.
        below: how many of the first parts of each path are left out.
    """
    found = error.errors(include_url=False, include_context=False)
    shown = "; ".join(
        f"{_place(each['loc'][below:])}{without_values(each['msg'])}, got {type(each['input']).__name__}"
        for each in found[:_PROBLEMS]
    )
    return shown if len(found) <= _PROBLEMS else f"{shown}; and {len(found) - _PROBLEMS} more"


def traceback_of(error: BaseException, *, details: bool = False) -> str:
    """Return the formatted traceback of an exception, with its causes and the members of groups, without values.

    Its length is bounded, even for long chains, large groups and exceptions that refer to each other.
    """
    return "".join(_chain(error, details, _DEPTH))


def _message(error: BaseException) -> str:
    if isinstance(error, StatementError):
        return _of_statement(error)
    if isinstance(error, pydantic.ValidationError):
        return f"{error.error_count()} validation errors for {error.title}: {problems_of(error)}"
    diagnosis = _diagnosis(error)
    return without_values(str(error)) if diagnosis is None else _in_words(diagnosis)


def _of_statement(error: StatementError) -> str:
    """Return SQLAlchemy's text without the parameters and without the values in the server's message."""
    orig = error.orig
    if orig is None:
        text = without_values(str(error.args[0]) if error.args else "")
    elif isinstance(error, DBAPIError):
        text = f"({_name(type(orig))}) {driver_message(orig)}"
    else:
        text = f"({_name(type(orig))}) {message_of(orig)}"
    return text if error.statement is None else f"{text}\n[SQL: {error.statement}]"


def driver_message(orig: BaseException) -> str:
    """Return a database driver's message in one paragraph, with the names that the server reports."""
    diagnosis = _diagnosis(orig)
    # `DETAIL:` may be translated, so only the first line of a message whose parts are not separate is kept.
    return _in_words(diagnosis) if diagnosis else without_values(next(iter(str(orig).splitlines()), ""))


def _diagnosis(orig: BaseException) -> dict[str, str] | None:
    """Return the parts of PostgreSQL's message, from any driver's exception; None if it is not from the server."""
    reported = getattr(orig, "diag", None)  # psycopg, psycopg2
    if getattr(reported, "message_primary", None):
        return _parts(reported, "message_primary", getattr(reported, "sqlstate", None))
    reported = orig if hasattr(orig, "constraint_name") else orig.__cause__  # asyncpg, as SQLAlchemy wraps it
    if hasattr(reported, "constraint_name") and hasattr(reported, "sqlstate"):
        parts = _parts(reported, "message", getattr(reported, "sqlstate", None))
        return {**parts, "message": parts["message"] or str(reported)}
    match orig.args:  # pg8000
        case ({"C": str(), "M": str(), **reported}, *_):
            return {_PG8000[key]: str(value) for key, value in orig.args[0].items() if key in _PG8000}
        case _:
            return None


def _parts(reported: Any, message: str, sqlstate: str | None) -> dict[str, str]:
    names = {word: getattr(reported, name, None) for name, word in _NAMES.items()}
    given = {word: str(name) for word, name in names.items() if name}
    return {"message": str(getattr(reported, message, None) or ""), "sqlstate": sqlstate or "", **given}


def _in_words(diagnosis: dict[str, str]) -> str:
    text = without_values(diagnosis["message"])
    if diagnosis.get("sqlstate", "").startswith(_DATA_EXCEPTION):
        text = _QUOTED.sub('"…"', text)
    names = [f"{word} {diagnosis[word]}" for word in _NAMES.values() if word in diagnosis]
    return f"{text} (SQLSTATE {diagnosis.get('sqlstate')}, {', '.join(names)})" if names else text


def _place(location: tuple[int | str, ...]) -> str:
    inner = ".".join(str(each)[:100] for each in location)
    return f"{inner}: " if inner else ""


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _chain(error: BaseException, details: bool, depth: int) -> Iterator[str]:
    links = _links(error)
    for number, (each, joint) in enumerate(links):
        yield from _one(each, details, depth)
        if number + 1 < len(links):
            yield joint


def _links(error: BaseException) -> list[tuple[BaseException, str]]:
    """Return the exceptions of a chain, the first cause first, each with the text between it and the next."""
    links: list[tuple[BaseException, str]] = []
    seen: set[int] = set()
    following: BaseException | None = error
    joint = ""
    while following is not None and id(following) not in seen and len(links) < _LINKS:
        seen.add(id(following))
        links.append((following, joint))
        cause = following.__cause__
        joint = _CAUSE if cause is not None else _CONTEXT
        following = cause if cause is not None or following.__suppress_context__ else following.__context__
    return links[::-1]


def _one(error: BaseException, details: bool, depth: int) -> Iterator[str]:
    if error.__traceback__ is not None:
        yield "Traceback (most recent call last):\n"
        yield from traceback.format_tb(error.__traceback__, limit=-_FRAMES)
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else _name(kind)
    text = message_of(error, details=details)
    yield f"{name}: {text}\n" if text else f"{name}\n"
    for note in notes_of(error):
        yield f"{note if details else without_values(note)}\n"
    if isinstance(error, BaseExceptionGroup):
        yield from _members(cast("BaseExceptionGroup[BaseException]", error), details, depth)


def _members(group: BaseExceptionGroup[BaseException], details: bool, depth: int) -> Iterator[str]:
    members = group.exceptions
    shown = members[:_MEMBERS] if depth else ()
    for number, each in enumerate(shown, 1):
        yield f"  | member {number} of {len(members)}:\n"
        text = "".join(_chain(each, details, depth - 1))
        yield "".join(f"  | {line}\n" for line in text.splitlines())
    if len(members) > len(shown):
        yield f"  | and {len(members) - len(shown)} more\n"


def notes_of(error: BaseException) -> list[str]:
    """Return those notes of an exception that are texts."""
    notes: object = getattr(error, "__notes__", None)
    return [each for each in cast("list[object]", notes) if isinstance(each, str)] if isinstance(notes, list) else []


def brief(error: BaseException) -> str:
    """Return the class and the text of an exception in one line, without values, for use in another message."""
    text = message_of(error)
    return f"{type(error).__name__}({text!r})" if text else f"{type(error).__name__}()"
