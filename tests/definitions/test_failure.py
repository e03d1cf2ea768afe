"""Exceptions on their way to the database and back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, Flag, IntEnum, auto
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any
from uuid import UUID, uuid4

import pytest
from pydantic import BaseModel, ValidationError
from sqlalchemy.exc import IntegrityError

from sqla_durable.definitions.error_classes import KnownErrors, name_of_class
from sqla_durable.definitions.failure import Failure
from sqla_durable.errors import (
    ChildrenFailedError,
    HistoryMismatchError,
    PayloadTooLargeError,
    StepFailedError,
    StepTimeoutError,
)


class WithData(Exception):
    """Arguments and attributes that JSON holds; its constructor is not what its args say."""

    def __init__(self, *, code: int, hints: list[str]) -> None:
        super().__init__(f"code {code}")
        self.code = code
        self.hints = hints


class Detailed(Exception):
    def __init__(self, details: object) -> None:
        super().__init__("declined")
        self.details = details


class Speaking(Exception):
    """Says what it has."""

    def __init__(self, about: object) -> None:
        super().__init__()
        self.about = about

    def __str__(self) -> str:
        return f"about {self.about}"


class StatusError(Exception):
    """As those of httpx: with a request that must have been set, and a response."""

    def __init__(self, message: str, *, request: object, response: object) -> None:
        super().__init__(message)
        self._request = request
        self.response = response

    @property
    def request(self) -> object:
        if self._request is None:
            raise RuntimeError("The .request property has not been set.")
        return self._request


class Line(BaseModel):
    price: int


class Order(BaseModel):
    id: int
    lines: list[Line]


class PsycopgError(Exception):
    """As those of psycopg."""

    def __init__(self, text: str, sqlstate: str) -> None:
        super().__init__(text)
        self.sqlstate = sqlstate


class Psycopg2Error(Exception):
    """As those of psycopg2: https://www.psycopg.org/docs/module.html#psycopg2.Error.pgcode."""

    def __init__(self, text: str, pgcode: str) -> None:
        super().__init__(text)
        self.pgcode = pgcode


class Pg8000Error(Exception):
    """As those of pg8000, whose only argument is what the server has sent."""


class Broken(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


KNOWN = KnownErrors()
KNOWN.add_module(__name__)


def _round_trip(error: Exception) -> Exception | None:
    return Failure.from_text(Failure.of(error).to_json()).rebuild(KNOWN.outside)


class Colour(Enum):
    RED = Decimal("1.0")


class Level(IntEnum):
    LOW = 1


class Permission(Flag):
    READ = auto()
    WRITE = auto()


@dataclass(frozen=True)
class Frozen(Exception):
    code: int
    reason: str


class Computing(Exception):
    """Sets an attribute that is no parameter."""

    def __init__(self, wanted: int, available: int) -> None:
        super().__init__(f"wanted {wanted}, available {available}")
        self.missing = wanted - available


@pytest.mark.parametrize(
    "error",
    [
        ValueError("seven"),
        ValueError(),
        KeyError("missing"),
        OSError(2, "No such file"),
        ZeroDivisionError("division by zero"),
        LookupError("a", 1, None, [1.5]),
        WithData(code=7, hints=["a"]),
        Detailed({"$": ["uuid", "no id"]}),
        Detailed({"$": ["dict", {"$": 1}]}),
        Detailed([{"a": (UUID(int=7), Decimal("1.10"), b"x")}]),
        ValueError(UUID(int=7), Decimal("1.10"), date(2026, 2, 28), time(1, 2, 3), timedelta(days=-1, microseconds=1)),
        ValueError(datetime(2026, 1, 1, 12, tzinfo=UTC), (1, "a"), b"x", Colour.RED, Level.LOW),
        CalledProcessError(2, ["ls", "-l"], b"out", b"err"),
        Computing(3, 1),
        Frozen(7, "sold out"),
        StepTimeoutError("too late", step="charge", seconds=2.5),
        PayloadTooLargeError("too large", size=2, limit=1),
        HistoryMismatchError("moved", workflow_id=UUID(int=7), recorded=("a", "b"), visited=("b", "a")),
    ],
    ids=repr,
)
def test_exception_is_rebuilt_as_it_was(error: Exception) -> None:
    rebuilt = _round_trip(error)
    assert type(rebuilt) is type(error)
    assert rebuilt is not None
    assert rebuilt.args == error.args
    assert str(rebuilt) == str(error)
    assert vars(rebuilt) == vars(error)


def test_recorded_traceback_is_the_cause() -> None:
    try:
        raise ValueError("seven")
    except ValueError as error:
        rebuilt = _round_trip(error)
    assert rebuilt is not None
    assert 'raise ValueError("seven")' in str(rebuilt.__cause__)
    assert rebuilt.__traceback__ is None


@pytest.mark.parametrize(
    "error",
    [ValueError(object()), ValueError({1: 2}), ValueError(Permission.READ | Permission.WRITE)],
    ids=["object", "keys", "flags"],
)
def test_exception_whose_arguments_json_does_not_hold_is_not_rebuilt(error: Exception) -> None:
    assert _round_trip(error) is None
    assert Failure.of(error).message == str(error)


# behaviour: V3
def test_attribute_that_json_does_not_hold_is_none_and_a_note_says_so() -> None:
    for lost in (object(), "x" * 40_000, {1: 2}):
        rebuilt = _round_trip(Detailed(lost))
        assert isinstance(rebuilt, Detailed)
        assert (str(rebuilt), rebuilt.details) == ("declined", None)
        assert rebuilt.__notes__ == ["details: not recorded, and None here."]
    rebuilt = _round_trip(Detailed(None))
    assert isinstance(rebuilt, Detailed)
    assert not hasattr(rebuilt, "__notes__")


def test_exception_whose_text_needs_a_lost_attribute_is_not_rebuilt() -> None:
    assert isinstance(_round_trip(Speaking("seven")), Speaking)
    assert _round_trip(Speaking(object())) is None


# behaviour: V3
@pytest.mark.parametrize("with_request", [True, False])
def test_error_of_an_http_client_comes_back_without_its_request(with_request: bool) -> None:
    error = StatusError("503", request=object() if with_request else None, response=object())
    rebuilt = _round_trip(error)
    assert isinstance(rebuilt, StatusError)
    assert (str(rebuilt), rebuilt.response) == ("503", None)
    with pytest.raises(RuntimeError, match="has not been set"):
        _ = rebuilt.request


# behaviour: V3
def test_validation_error_of_pydantic_comes_back_without_what_was_given() -> None:
    secret = "-".join(["hunter", "2"])
    with pytest.raises(ValidationError) as caught:
        Order.model_validate({"id": secret, "lines": [{}, {"price": f"{{{secret}}}"}]})
    rebuilt = _round_trip(caught.value)
    assert isinstance(rebuilt, ValidationError)
    assert rebuilt.title == "Order"
    kept = [(each["type"], each["loc"], each["msg"]) for each in caught.value.errors()]
    assert [(each["type"], each["loc"], each["msg"]) for each in rebuilt.errors()] == kept
    assert len(kept) == 3
    assert secret not in Failure.of(caught.value).to_json() + str(rebuilt)


@pytest.mark.parametrize("problems", ["7", "[7]", '[["int_parsing", []]]', '[[1, [], "text"]]', '[["x", 7, "text"]]'])
def test_forged_validation_error_is_none(problems: str) -> None:
    state = {"title": "Order", "problems": json.loads(problems)}
    forged: dict[str, Any] = {"type": name_of_class(ValidationError), "args": [], "state": state}
    assert Failure.from_json(forged).rebuild() is None


# behaviour: V3
def test_members_of_a_group_come_back_as_what_they_were() -> None:
    noted = ValueError(UUID(int=7))
    noted.add_note("a note")
    duplicate = IntegrityError("INSERT INTO book", {"a": 1}, PsycopgError("duplicate key", "23505"))
    inner = ExceptionGroup("inner", [WithData(code=7, hints=["a"]), ExceptionGroup("innermost", [Frozen(1, "x")])])
    rebuilt = _round_trip(ExceptionGroup("several", [noted, inner, duplicate, ValueError(object())]))
    assert type(rebuilt) is ExceptionGroup
    first, second, third, fourth = rebuilt.exceptions
    assert (repr(first), first.__notes__) == (repr(noted), ["a note"])
    assert repr(second) == repr(inner)
    assert isinstance(third, IntegrityError)
    assert third.orig is not None
    assert getattr(third.orig, "sqlstate", None) == "23505"
    assert isinstance(fourth, StepFailedError)
    matched, rest = rebuilt.split(Frozen)
    assert matched is not None
    assert rest is not None
    assert str(rebuilt) == "several (4 sub-exceptions)"


def test_groups_are_bounded() -> None:
    deep: Exception = ValueError("x")
    for _ in range(100):
        deep = ExceptionGroup[Exception]("deep", [deep])
    assert isinstance(_round_trip(deep), ExceptionGroup)
    wide = ExceptionGroup("wide", [ValueError("x" * 10_000) for _ in range(1_000)])
    assert len(Failure.of(wide).to_json()) < 100_000


# behaviour: V3
@pytest.mark.parametrize("error", ["psycopg", "psycopg2", "pg8000"])
def test_recorded_error_of_any_driver_has_its_sqlstate(error: str) -> None:
    orig = {
        "psycopg": PsycopgError("duplicate key", "23505"),
        "psycopg2": Psycopg2Error("duplicate key", "23505"),
        "pg8000": Pg8000Error({"S": "ERROR", "C": "23505", "M": "duplicate key", "D": "Key (a)=(4111) exists."}),
    }[error]
    rebuilt = _round_trip(IntegrityError("INSERT INTO book", {"a": 4111}, orig))
    assert isinstance(rebuilt, IntegrityError)
    assert getattr(rebuilt.orig, "sqlstate", None) == "23505"
    assert "duplicate key" in str(rebuilt)
    assert "4111" not in str(rebuilt)


# behaviour: V3
def test_what_an_error_was_raised_from_is_part_of_the_recorded_traceback() -> None:
    try:
        try:
            raise KeyError("the cause")
        except KeyError as cause:
            raise ValueError("seven") from cause
    except ValueError as error:
        rebuilt = _round_trip(error)
    assert rebuilt is not None
    assert "KeyError: 'the cause'" in str(rebuilt.__cause__)
    assert "direct cause" in str(rebuilt.__cause__)


def test_attribute_that_the_class_does_not_declare_is_left_out() -> None:
    error = ValueError("seven")
    error.connection = object()  # type: ignore[attr-defined]
    rebuilt = _round_trip(error)
    assert rebuilt is not None
    assert vars(rebuilt) == {}


# behaviour: V3
def test_file_names_are_kept(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        (tmp_path / "missing").open()
    rebuilt = _round_trip(caught.value)
    assert isinstance(rebuilt, FileNotFoundError)
    assert (rebuilt.errno, rebuilt.filename, str(rebuilt)) == (2, str(tmp_path / "missing"), str(caught.value))
    with pytest.raises(FileNotFoundError) as renamed:
        (tmp_path / "missing").rename(tmp_path / "other")
    assert str(_round_trip(renamed.value)) == str(renamed.value)


# behaviour: V3
def test_notes_are_kept_and_bounded() -> None:
    error = ValueError("seven")
    for number in range(1_000):
        error.add_note(f"note {number} " + "x" * 10_000)
    rebuilt = _round_trip(error)
    assert rebuilt is not None
    assert len(rebuilt.__notes__) == 20
    assert len(Failure.of(error).to_json()) < 100_000


def test_local_class_is_not_rebuilt() -> None:
    class Local(Exception):
        pass

    assert _round_trip(Local("x")) is None


def test_hostile_exception_is_described_all_the_same() -> None:
    failure = Failure.of(Broken(object()))
    assert failure.type.endswith(":Broken")
    assert "no text" in failure.message
    json.loads(failure.to_json())


def test_text_that_postgresql_cannot_hold_is_escaped() -> None:
    text = Failure.of(ValueError("nul \0, surrogate \ud800")).to_json()
    assert "\\u0000" not in text
    text.encode()


def test_long_text_is_bounded_and_keeps_its_end() -> None:
    failure = Failure.of(ValueError("x" * 100_000 + "the end"))
    assert len(failure.message) < 33_000
    assert failure.message.endswith("the end")
    assert failure.args is None


def test_recursion_is_described() -> None:
    def recurse() -> None:
        recurse()

    with pytest.raises(RecursionError) as caught:
        recurse()
    failure = Failure.of(caught.value)
    assert failure.type == "builtins:RecursionError"
    assert len(failure.to_json()) < 100_000


@pytest.mark.parametrize("stored", [None, '{"type": "ops"}'])
def test_failure_written_by_sql_needs_no_more_than_a_type(stored: str | None) -> None:
    failure = Failure.from_text(stored)
    assert failure.message == ""
    assert failure.rebuild() is None


class Unknown(Exception):
    def __init__(self, text: str, value: object) -> None:
        super().__init__(text)
        self.value = value


def test_errors_of_children_survive_whatever_they_are() -> None:
    given = [ValueError("bad"), Unknown("odd", object()), KeyError("x" * 40_000)]
    ids = [uuid4() for _ in given]
    error = ChildrenFailedError("3 failed", count=3, indices=[0, 1, 2], workflow_ids=ids, errors=[*given])
    again = Failure.from_text(Failure.of(error).to_json()).rebuild(KNOWN.inside)
    assert isinstance(again, ChildrenFailedError)
    assert (str(again), again.count, again.indices, again.workflow_ids) == ("3 failed", 3, [0, 1, 2], ids)
    first, second, third = again.errors
    assert repr(first) == repr(given[0])
    assert isinstance(second, Unknown)
    assert second.value is None
    assert isinstance(third, StepFailedError)
    assert third.error_type == "builtins:KeyError"
    twenty = ChildrenFailedError("many", count=99, errors=[Unknown("é" * 40_000, 1) for _ in range(20)])
    assert Failure.from_text(Failure.of(twenty).to_json()).rebuild() is not None
    twenty.errors.append(twenty)
    assert Failure.of(twenty).to_json()
