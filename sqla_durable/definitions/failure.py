"""Stores exceptions as JSON, and rebuilds them.

A failure has the class, message, arguments and attributes as far as they can be stored, notes, and traceback.
`error_classes` decides which classes it may be rebuilt as. Rebuilding executes no constructor and no other code of a
class: the builtin base is created with the recorded arguments, and the attributes that the class declares are set.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any, cast
from uuid import UUID

from sqlalchemy.exc import DBAPIError, StatementError

from sqla_durable.definitions.database_errors import sqlstate
from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.definitions.error_classes import (
    DEFAULT,
    Find,
    KnownErrors,
    declared_by,
    is_subclass,
    members_of,
    name_of_class,
    native_base,
)
from sqla_durable.definitions.json_values import dump
from sqla_durable.definitions.libraries import pydantic
from sqla_durable.definitions.redaction import driver_message, message_of, notes_of, traceback_of, without_values
from sqla_durable.errors import StepFailedError

_TEXT_LIMIT = 32_000
_STATE_LIMIT = 32_000
_INNER_LIMIT = 500
_GROUPS = 3  # levels of nested groups whose members are rebuilt
_PROBLEMS = 100  # of a validation error
_NOTES = 20
_NOTE_LIMIT = 2_000
_TAG = "$"
"""The key of a JSON object that stands for a value of a type that JSON lacks: `{"$": ["uuid", "0190..."]}`."""
_LOST: Any = {_TAG: ["lost", None]}
"""Stands for an attribute that could not be recorded."""


class RecordedTraceback(Exception):
    """The traceback of a recorded exception, as text; the `__cause__` of an exception rebuilt from a record."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


class RecordedDriverError(Exception):
    """The error of a database driver, as the `orig` of a recorded SQLAlchemy error.

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
        message: its text, without the values of SQL statements and payloads unless these are included.
        args: its arguments, or None if JSON cannot represent them.
        state: the attributes that its class declares, or None likewise.
        traceback: the formatted traceback.
        notes: its notes.
    """

    type: str
    message: str
    args: list[Any] | None = None
    state: dict[str, Any] | None = None
    traceback: str = ""
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, error: BaseException, *, limit: int = _STATE_LIMIT, details: bool = False) -> Failure:
        """Return the description of an exception; never raises, whatever its arguments or its `str` do.

        Args:
            error: the exception.
            limit: the most bytes of JSON for its arguments, and for its attributes.
            details: whether to include the values of SQL statements and payloads.
        """
        args, state = _contents(error, limit, details)
        return cls(
            type=_clean(name_of_class(type(error))),
            message=_clean(message_of(error, details=details)),
            args=args,
            state=state,
            traceback=_clean(traceback_of(error, details=details)),
            notes=tuple(_clean(each)[-_NOTE_LIMIT:] for each in _notes(error, details)),
        )

    @classmethod
    def from_text(cls, text: str | None) -> Failure:
        """Return the failure of a stored JSON text, which anybody may have written."""
        try:
            stored: object = json.loads(text or "null")
        except (ValueError, RecursionError):
            stored = None
        return cls.from_json(stored)

    @classmethod
    def from_json(cls, stored: object) -> Failure:
        """Return a stored failure, which anybody may have written; only its type is required."""
        given: dict[str, Any] = _of_kind(dict, stored) or {}
        notes: list[object] = _of_kind(list, given.get("notes")) or []
        return cls(
            type=_text(given.get("type"), "unknown"),
            message=_text(given.get("message")),
            args=_of_kind(list, given.get("args")),
            state=_of_kind(dict, given.get("state")),
            traceback=_text(given.get("traceback")),
            notes=tuple(_text(each) for each in notes[:_NOTES]),
        )

    def to_json(self) -> str:
        """Return the JSON text to store."""
        return json.dumps(
            {
                "type": self.type,
                "message": self.message,
                "args": self.args,
                "state": self.state,
                "traceback": self.traceback,
                "notes": list(self.notes),
            },
            ensure_ascii=False,
        )

    def rebuild(self, find: Find = DEFAULT.outside, *, levels: int = _GROUPS) -> Exception | None:
        """Return the rebuilt exception, or None if its class or its arguments are not available here.

        An attribute that could not be recorded is None, and a note says so.

        Args:
            find: returns the class of a name, if it may be rebuilt.
            levels: how many levels of exceptions inside exceptions are rebuilt.
        """
        if self.args is None or self.state is None:
            return None
        try:
            kind = find(self.type)
            if not is_subclass(kind, Exception):
                return None
            depth = levels if is_subclass(kind, ExceptionGroup) else min(levels, 1)
            error = _rebuilt(cast("type[Exception]", kind), self.args, self.state, _Reader(find, depth))
            lost = [name for name, value in self.state.items() if value == _LOST]
            if lost and not self._is_text_of(error):
                return None
            str(error)
        except Exception:
            return None
        self.complete(error)
        if lost:
            add_notes(error, f"{', '.join(lost)}: not recorded, and None here.")
        return error

    def _is_text_of(self, error: Exception) -> bool:
        """Return whether an exception has the recorded text, although some of its attributes are lost."""
        texts = (message_of(error), message_of(error, details=True))
        return any(_clean(each)[: len(self.message)] == self.message for each in texts)

    def complete(self, error: Exception) -> None:
        """Set the recorded traceback as the cause of an exception, and add its notes, although it may be frozen."""
        Exception.__setattr__(error, "__cause__", RecordedTraceback(self.traceback))
        add_notes(error, *self.notes)


def is_recorded_error(error: BaseException) -> bool:
    """Return whether an error was raised by something durable and recorded: by a step, a child, or another workflow.

    ```python
    except Exception as error:
        if not is_recorded_error(error):
            report(error)
    ```

    Where it was first raised it is another object, and this is False. So what reports errors around steps and around
    workflows can report each of them once.
    """
    return isinstance(error.__cause__, RecordedTraceback)


def add_notes(error: Exception, *notes: str) -> None:
    """Add notes to an exception, although it may be frozen."""
    if notes:
        Exception.__setattr__(error, "__notes__", [*notes_of(error), *notes])


def record(error: BaseException, known: KnownErrors = DEFAULT) -> str:
    """Return the JSON text to store for an exception that was raised by the code of a `Durable`."""
    return Failure.of(error, details=known.details).to_json()


def _rebuilt(kind: type[Exception], args: list[Any], state: dict[str, Any], reader: _Reader) -> Exception:
    if is_subclass(kind, StatementError):
        return _rebuilt_statement(kind, state)
    if kind is pydantic.ValidationError:
        return _rebuilt_validation(state)
    given = [reader.value(each) for each in args]
    native = native_base(kind)
    error = native.__new__(kind, *given)
    native.__init__(error, *given)
    declared = declared_by(kind)
    attributes = {name: reader.value(value) for name, value in state.items() if name in declared}
    cast("dict[str, Any]", _instance_dict(error)).update(attributes)
    return error


def _rebuilt_statement(kind: type[Exception], state: dict[str, Any]) -> Exception:
    text, statement = _text(state.get("text")), _text(state.get("statement")) or None
    error: Any = Exception.__new__(kind)
    if is_subclass(kind, DBAPIError):
        orig = RecordedDriverError(text, _text(state.get("sqlstate")) or None)
        DBAPIError.__init__(error, cast("str", statement), None, orig)
    else:
        StatementError.__init__(error, text, statement, None, None)
    return cast("Exception", error)


def _rebuilt_validation(state: dict[str, Any]) -> Exception:
    """Return pydantic's error rebuilt: what was wrong, and where, without the input."""
    from pydantic_core import InitErrorDetails, PydanticCustomError

    problems: list[InitErrorDetails] = [
        {"type": PydanticCustomError(kind, message), "loc": tuple(location), "input": None}
        for kind, location, message in state["problems"]
    ]
    return pydantic.ValidationError.from_exception_data(_text(state.get("title")), problems, hide_input=True)


_instance_dict: Callable[[BaseException], Any] = BaseException.__dict__["__dict__"].__get__


def _contents(error: BaseException, limit: int, details: bool) -> tuple[list[Any] | None, dict[str, Any] | None]:
    """Return the stored form of the arguments and of the attributes."""
    try:
        return _Writer(details, _GROUPS if _is_group(error) else 1).contents(error, limit)
    except Exception:  # hostile arguments or attributes must not break the recording
        return None, None


def _of_statement(error: StatementError, details: bool) -> dict[str, Any]:
    """Return what is stored of the error of a statement: not its parameters, which may be secret."""
    orig = error.orig
    if orig is None or not isinstance(error, DBAPIError):
        text = without_values(str(error.args[0])) if error.args else ""
    else:
        text = str(orig) if details else driver_message(orig)
    code = sqlstate(error) if isinstance(error, DBAPIError) else None
    statement = None if error.statement is None else _clean(error.statement)
    return {"statement": statement, "text": _clean(text), "sqlstate": code if isinstance(code, str) else None}


def _of_validation(error: pydantic.ValidationError, details: bool) -> dict[str, Any]:
    """Return what is stored of pydantic's error: what is wrong, and where, without the input."""
    found = error.errors(include_url=False, include_context=False, include_input=False)[:_PROBLEMS]
    shown = [(each["type"], [*each["loc"]], each["msg"]) for each in found]
    problems = [[kind, where, text if details else without_values(text)] for kind, where, text in shown]
    return {"title": error.title, "problems": problems}


def _is_group(error: BaseException) -> bool:
    return isinstance(error, ExceptionGroup)


def _arguments(error: BaseException) -> list[Any]:
    """Return the arguments, with the file names of an `OSError`, which Python removes from them."""
    args = list(error.args)
    if isinstance(error, OSError) and len(args) == 2 and error.filename is not None:
        args.append(error.filename)
        if error.filename2 is not None:
            args += [None, error.filename2]
    return args


def _attributes(error: BaseException) -> dict[str, Any]:
    declared = declared_by(type(error))
    kept: dict[str, Any] = _instance_dict(error)
    return {name: value for name, value in kept.items() if name in declared}


def _notes(error: BaseException, details: bool) -> list[str]:
    notes = notes_of(error)[-_NOTES:]
    return notes if details else [without_values(each) for each in notes]


@dataclass(frozen=True, slots=True)
class _Writer:
    """Converts values to JSON, with tags for types that JSON lacks.

    Attributes:
        details: whether to include the values of SQL statements and payloads.
        levels: how many more levels of exceptions inside exceptions are stored.
        room: the most bytes of JSON for the arguments of an inner exception, and for its attributes.
    """

    details: bool
    levels: int
    room: int = _INNER_LIMIT

    def contents(self, error: BaseException, limit: int) -> tuple[list[Any] | None, dict[str, Any] | None]:
        """Return the stored form of the arguments and of the attributes of an exception, each within the limit."""
        match error:
            case StatementError():
                return [], self.value(_of_statement(error, self.details), limit)
            case pydantic.ValidationError():
                return [], self.value(_of_validation(error, self.details), limit)
            case ExceptionGroup():
                shared = replace(self, room=max(_INNER_LIMIT, limit // (2 * len(error.exceptions))))
                return shared.value(_arguments(error), limit), shared.state(error, limit)
            case _:
                return self.value(_arguments(error), limit), self.state(error, limit)

    def state(self, error: BaseException, limit: int) -> dict[str, Any]:
        """Return the stored form of the attributes; one that JSON cannot represent, or too large, is marked as lost."""
        state: dict[str, Any] = {}
        for name, value in _attributes(error).items():
            written = None if value is None else self.value(value, limit)
            state[name] = written if written is not None or value is None else _LOST
            limit -= len(json.dumps(state[name]))
        return state

    def value(self, value: Any, limit: int) -> Any:
        """Return the stored form of a value, or None if there is none or it is too large."""
        try:
            written = self._written(value)
            dump(written, what="error", limit=limit)
        except Exception:
            return None
        return written

    def _written(self, value: Any) -> Any:
        kind = cast("type[object]", type(value))
        if value is None or kind in (bool, int, float):
            return value
        if kind is str:
            return value if self.details else without_values(value)
        if kind is list:
            return [self._written(each) for each in value]
        if kind is dict:
            return self._mapping(value)
        return {_TAG: self._tagged(value)}

    def _mapping(self, value: dict[Any, Any]) -> dict[str, Any]:
        if any(type(key) is not str for key in value):
            raise TypeError("the keys of an object in JSON are texts")
        written = {key: self._written(each) for key, each in value.items()}
        return {_TAG: ["dict", written]} if _TAG in written else written

    def _tagged(self, value: Any) -> list[Any]:
        kind = cast("type[object]", type(value))
        if isinstance(value, Enum):
            return ["enum", _member(value)]
        if isinstance(value, Exception) and self.levels:
            return ["error", self._error(value)]
        if kind is tuple:
            return ["tuple", [self._written(each) for each in cast("tuple[Any, ...]", value)]]
        tag, write, _ = _FORMS[kind]
        return [tag, write(value)]

    def _error(self, error: Exception) -> dict[str, Any]:
        """Return a brief description of an error inside another one, of which there may be many."""
        levels = self.levels - 1 if _is_group(error) else 0
        args, state = replace(self, levels=levels).contents(error, self.room)
        notes = [each[:_INNER_LIMIT] for each in _notes(error, self.details)[-1:]]
        if len(json.dumps([args, state, notes])) > self.room:
            args, state, notes = None, None, []
        message = _clean(message_of(error, details=self.details))[:_INNER_LIMIT]
        name = name_of_class(type(error))
        return {"type": name, "message": message, "args": args, "state": state, "notes": [*map(_clean, notes)]}


def _member(value: Enum) -> list[str]:
    kind: type = type(value)
    name: Any = value.name  # a combination of flags may have none
    if members_of(kind).get(name) is not value:
        raise TypeError("this is a combination of members")
    return [name_of_class(kind), name]


_FORMS: Mapping[type, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = {
    UUID: ("uuid", str, UUID),
    Decimal: ("decimal", str, Decimal),
    datetime: ("datetime", datetime.isoformat, datetime.fromisoformat),
    date: ("date", date.isoformat, date.fromisoformat),
    time: ("time", time.isoformat, time.fromisoformat),
    timedelta: ("seconds", lambda value: [value.days, value.seconds, value.microseconds], lambda of: timedelta(*of)),
    bytes: ("bytes", bytes.hex, bytes.fromhex),
}
_READERS = {tag: read for tag, _, read in _FORMS.values()}


@dataclass(frozen=True, slots=True)
class _Reader:
    """Converts values from their stored form.

    Attributes:
        find: returns the class of a name, if it may be rebuilt.
        levels: how many more levels of exceptions inside exceptions are rebuilt.
    """

    find: Find
    levels: int

    def value(self, value: Any) -> Any:
        match value:
            case {"$": [str(tag), content]} if len(value) == 1:
                return self._tagged(tag, content)
            case list():
                return [self.value(each) for each in cast("Any", value)]
            case dict():
                return {key: self.value(each) for key, each in cast("dict[str, Any]", value).items()}
            case _:
                return value

    def _tagged(self, tag: str, content: Any) -> Any:
        match tag:
            case "tuple":
                return tuple(self.value(each) for each in content)
            case "dict":
                return {key: self.value(each) for key, each in content.items()}
            case "error" if self.levels:
                return self._error(Failure.from_json(content))
            case "lost":
                return None
            case "enum":
                name, member = content
                kind = self.find(name)
                if kind is None or not is_subclass(kind, Enum):
                    raise LookupError(name)
                return members_of(kind)[member]
            case _:
                return _READERS[tag](content)

    def _error(self, failure: Failure) -> Exception:
        error = failure.rebuild(self.find, levels=self.levels - 1)
        if error is None:
            message = f"{failure.type}: {failure.message}"
            return StepFailedError(message, error_type=failure.type, error_message=failure.message)
        Exception.__setattr__(error, "__cause__", None)
        return error


def _of_kind(kind: type, value: Any) -> Any:
    return value if isinstance(value, kind) else None


def _text(value: object, default: str = "") -> str:
    return _clean(value) if isinstance(value, str) else default


def _clean(text: str) -> str:
    """Return a storable text: no NUL, no lone surrogates, cut at the beginning, because the cause is at the end."""
    kept = text if len(text) <= _TEXT_LIMIT else "… " + text[-_TEXT_LIMIT:]
    return kept.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()
