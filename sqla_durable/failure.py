"""Exceptions on their way to the database and back.

A failure is stored as JSON: type, message, arguments and attributes as far as JSON holds them, and the traceback as
text. It is rebuilt only from exception classes that this process has already imported: a row never imports a module.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import UUID

from sqlalchemy.exc import DBAPIError

from sqla_durable.codec import dump
from sqla_durable.errors import StepFailedError

_TEXT_LIMIT = 32_000
_STATE_LIMIT = 32_000
_INNER_LIMIT = 500


class RecordedTraceback(Exception):
    """The traceback of a recorded exception, as text; the `__cause__` of what is raised from a record."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


class RecordedDriverError(Exception):
    """What a database driver raised, as the `orig` of a recorded SQLAlchemy error.

    Attributes:
        sqlstate: PostgreSQL's code of the error.
    """

    def __init__(self, text: str, sqlstate: str | None) -> None:
        super().__init__(text)
        self.sqlstate = sqlstate


@dataclass(frozen=True, slots=True)
class Failure:
    """A recorded exception.

    Attributes:
        type: `module:qualified_name` of its class.
        message: its `str`.
        args: its arguments, or None where JSON does not hold them.
        state: its attributes, likewise.
        traceback: the formatted traceback.
    """

    type: str
    message: str
    args: list[Any] | None = None
    state: dict[str, Any] | None = None
    traceback: str = ""

    @classmethod
    def of(cls, error: BaseException, *, limit: int = _STATE_LIMIT) -> Failure:
        """Describe an exception; never raises, whatever its arguments or its `str` do.

        Args:
            error: the exception.
            limit: up to how many bytes of JSON its arguments are kept, and its attributes.
        """
        kind = type(error)
        return cls(
            type=f"{kind.__module__}:{kind.__qualname__}",
            message=_clean(_message(error)),
            args=[] if isinstance(error, DBAPIError) else _storable(list(error.args), limit),
            state=_of_driver(error) if isinstance(error, DBAPIError) else _storable(_attributes(error), limit),
            traceback=_clean("".join(traceback.format_exception(error, limit=-50))),
        )

    @classmethod
    def from_text(cls, text: str | None) -> Failure:
        """Read a stored failure's JSON text."""
        return cls.from_json(json.loads(text or '{"type": "unknown"}'))

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Failure:
        """Read a stored failure; one written by SQL needs no more than a type."""
        return cls(
            type=str(stored["type"]),
            message=str(stored.get("message", "")),
            args=stored.get("args"),
            state=stored.get("state"),
            traceback=str(stored.get("traceback", "")),
        )

    def to_json(self) -> str:
        """Give the JSON text to store."""
        return json.dumps(
            {
                "type": self.type,
                "message": self.message,
                "args": self.args,
                "state": self.state,
                "traceback": self.traceback,
            },
            ensure_ascii=False,
        )

    def rebuild(self) -> Exception | None:
        """Make the exception again, or give None where its class or its arguments cannot be had here."""
        kind = _imported(self.type)
        if kind is None or self.args is None or self.state is None:
            return None
        try:
            error = _rebuilt(kind, self.args, self.state)
            str(error)
        except Exception:
            return None
        error.__cause__ = self.cause()
        return error

    def cause(self) -> RecordedTraceback:
        """Give the recorded traceback as an exception to raise from."""
        return RecordedTraceback(self.traceback)


def _rebuilt(kind: type[Exception], args: list[Any], state: dict[str, Any]) -> Exception:
    if issubclass(kind, DBAPIError):
        return kind(state.get("statement"), None, RecordedDriverError(state.get("text", ""), state.get("sqlstate")))
    error = kind.__new__(kind, *args)
    error.args = tuple(args)
    error.__dict__.update({name: _read(value) for name, value in state.items()})
    return error


def _of_driver(error: DBAPIError) -> dict[str, Any]:
    """Give what is kept of a database error: not its parameters, which may be secret."""
    code = getattr(error.orig, "sqlstate", None)
    statement = None if error.statement is None else _clean(error.statement)
    return {"statement": statement, "text": _clean(_message(error.orig or error)), "sqlstate": code}


def _attributes(error: BaseException, *, inner: bool = False) -> dict[str, Any]:
    return {name: _written(value, inner=inner) for name, value in vars(error).items() if name != "__notes__"}


def _written(value: Any, *, inner: bool) -> Any:
    """Give what JSON holds of a value: errors of ours are about workflows, by their ids, and about other errors."""
    match value:
        case UUID():
            return {"uuid": str(value)}
        case {"uuid": _} | {"error": _} if len(value) == 1:  # which is not to be read as one
            return {"uuid": value}
        case Exception() if not inner:
            return {"error": _inner(value)}
        case list():
            return _each(value, partial(_written, inner=inner))
        case _:
            return value


def _each(values: Any, change: Callable[[Any], Any]) -> list[Any]:
    return [change(each) for each in values]


def _inner(error: Exception) -> dict[str, Any]:
    """Describe an error that is part of another one: briefly, for there may be many."""
    kind = type(error)
    state = _attributes(error, inner=True)
    described = {"args": _storable(list(error.args), _INNER_LIMIT), "state": _storable(state, _INNER_LIMIT)}
    if isinstance(error, DBAPIError) or len(json.dumps(described)) > _INNER_LIMIT:
        described = {"args": None, "state": None}
    message = _clean(_message(error))[:_INNER_LIMIT]
    return {"type": f"{kind.__module__}:{kind.__qualname__}", "message": message, **described}


def _read(value: Any) -> Any:
    match value:
        case {"uuid": str(text)} if len(value) == 1:
            return UUID(text)
        case {"uuid": dict()} if len(value) == 1:
            return value["uuid"]
        case {"error": {"type": str(), "message": str()} as inner} if len(value) == 1:
            return _read_inner(Failure.from_json(inner))
        case list():
            return _each(value, _read)
        case _:
            return value


def _read_inner(failure: Failure) -> Exception:
    error = failure.rebuild()
    if error is None:
        message = f"{failure.type}: {failure.message}"
        return StepFailedError(message, error_type=failure.type, error_message=failure.message)
    error.__cause__ = None
    return error


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as broken:
        return f"<its str() failed: {broken!r}>"


def _storable(value: Any, limit: int) -> Any:
    """Give the value if JSON gives back the same, else None; comparing calls the user's code, which may raise."""
    try:
        text = dump(value, what="error", limit=limit)
        return value if json.loads(text) == value else None
    except Exception:
        return None


def _clean(text: str) -> str:
    """Make any text storable: no NUL, no lone surrogates, bounded, its end kept (where the cause stands)."""
    kept = text if len(text) <= _TEXT_LIMIT else "… " + text[-_TEXT_LIMIT:]
    return kept.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()


def _imported(name: str) -> type[Exception] | None:
    module_name, _, qualified = name.partition(":")
    found: Any = sys.modules.get(module_name)
    for part in qualified.split("."):
        found = getattr(found, part, None)
    if isinstance(found, type) and issubclass(found, Exception):
        return found
    return None
