"""What is shown of an exception: never the values of statements and payloads."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from sqlalchemy import Engine, bindparam, text
from sqlalchemy.exc import DBAPIError, PendingRollbackError, StatementError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.types import TypeDecorator, Uuid

from sqla_durable.definitions.failure import Failure, RecordedDriverError
from sqla_durable.definitions.redaction import brief, driver_message, message_of, traceback_of, without_values

SECRET = "4111111111111111"
CARD = "INSERT INTO card (number, pin) VALUES (CAST(:number AS text), CAST(:pin AS int))"
SETUP = "CREATE TEMP TABLE card (number text UNIQUE, pin int CONSTRAINT known_pin NOT NULL)"


class Card(BaseModel):
    number: int
    pins: list[int]


class Refusing(TypeDecorator[str]):
    impl = Uuid
    cache_ok = True

    def process_bind_param(self, value: object, dialect: object) -> str:
        raise ValueError("no parameter of this kind")


def met(engine: Engine, *values: dict[str, object]) -> DBAPIError:
    """Return the error of inserting rows into a table with a NOT NULL and a unique constraint."""
    with engine.connect() as connection:
        connection.execute(text(SETUP))
        for each in values[:-1]:
            connection.execute(text(CARD), each)
        with pytest.raises(DBAPIError) as caught:
            connection.execute(text(CARD), values[-1])
    return caught.value


def shown(error: BaseException) -> str:
    """Return all that is recorded of an exception."""
    return Failure.of(error).to_json() + brief(error)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([{"number": SECRET, "pin": None}], ["SQLSTATE 23502", "table card", "column pin"]),
        ([{"number": SECRET, "pin": 1}] * 2, ["SQLSTATE 23505", "constraint card_number_key"]),
        ([{"number": "1", "pin": SECRET}], ["is out of range for type integer"]),
        ([{"number": "1", "pin": f"x{SECRET}"}], ["invalid input syntax for type integer"]),
    ],
    ids=["not null", "unique", "range", "syntax"],
)
def test_database_error_keeps_its_names_and_no_values(
    engine: Engine, values: list[dict[str, object]], names: list[str]
) -> None:
    error = met(engine, *values)
    assert SECRET in str(error)
    assert SECRET not in shown(error)
    for name in [*names, "INSERT INTO card"]:
        assert name in message_of(error)
    assert message_of(error, details=True) == str(error)
    assert SECRET in Failure.of(error, details=True).to_json()


def test_code_stays_where_the_values_go(engine: Engine) -> None:
    rebuilt = Failure.of(met(engine, {"number": SECRET, "pin": None})).rebuild()
    assert isinstance(rebuilt, DBAPIError)
    assert isinstance(rebuilt.orig, RecordedDriverError)
    assert rebuilt.orig.sqlstate == "23502"
    assert "known_pin" not in str(rebuilt)
    assert "column pin" in str(rebuilt.orig)


async def test_drivers_without_a_diagnosis_of_libpq_are_read_too(async_engine: AsyncEngine) -> None:
    for value in (SECRET, int(SECRET)):
        given = {"number": SECRET, "pin": None if value == SECRET else value}
        async with async_engine.connect() as connection:
            await connection.execute(text(SETUP))
            with pytest.raises(DBAPIError) as caught:
                await connection.execute(text(CARD), given)
        assert SECRET not in shown(caught.value)


def test_errors_of_pg8000_are_read() -> None:
    raw = Exception({"S": "ERROR", "C": "23505", "M": "duplicate key", "D": f"Key ({SECRET})", "n": "card_number_key"})
    assert driver_message(raw) == "duplicate key (SQLSTATE 23505, constraint card_number_key)"


def test_error_of_a_bind_parameter_has_no_parameters(engine: Engine) -> None:
    statement = text("SELECT :number, :other").bindparams(bindparam("number", "x", Refusing()))
    with pytest.raises(StatementError) as caught, engine.connect() as connection:
        connection.execute(statement, {"number": "x", "other": SECRET})
    assert SECRET in str(caught.value)
    assert SECRET not in shown(caught.value)
    rebuilt = Failure.of(caught.value).rebuild()
    assert type(rebuilt) is StatementError
    assert "no parameter of this kind" in str(rebuilt)


def _raised(error: Exception, cause: BaseException | None) -> Exception:
    try:
        raise error from cause
    except Exception as raised:
        return raised


def _in_context(error: BaseException, context: BaseException) -> BaseException:
    try:
        try:
            raise context
        except BaseException:
            raise error  # noqa: B904 (the context is what is tested)
    except BaseException as raised:
        return raised


WRAPS: dict[str, Callable[[Any], BaseException]] = {
    "cause": lambda error: _raised(RuntimeError("declined"), error),
    "context": lambda error: _in_context(RuntimeError("declined"), error),
    "group": lambda error: ExceptionGroup("declined", [ValueError("x"), error]),
    "text": lambda error: RuntimeError(f"declined: {error}"),
    "argument": lambda error: RuntimeError("declined", str(error)),
    "error as argument": lambda error: RuntimeError("declined", error),
    "pending rollback": lambda error: PendingRollbackError(f"Original exception was: {error}"),
    "driver's": lambda error: error.orig,
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_values_stay_out_however_a_database_error_is_wrapped(engine: Engine, wrap: str) -> None:
    forging = f"{SECRET}\nHINT: nothing\n[SQL: x]\n{SECRET}"
    assert SECRET not in shown(WRAPS[wrap](met(engine, {"number": forging, "pin": None})))


def test_values_stay_out_of_notes(engine: Engine) -> None:
    noted = ValueError("seven")
    noted.add_note(str(met(engine, {"number": SECRET, "pin": None})))
    assert SECRET not in shown(noted)


def test_validation_error_names_path_and_type() -> None:
    with pytest.raises(ValidationError) as caught:
        Card.model_validate({"number": f"x{SECRET}", "pins": [1, f"y{SECRET}"]})
    assert SECRET not in shown(caught.value)
    assert "number: Input should be a valid integer" in message_of(caught.value)
    assert "pins.1: Input should be" in message_of(caught.value)
    assert "got str" in message_of(caught.value)
    assert SECRET not in shown(_raised(RuntimeError("declined"), caught.value))
    assert SECRET not in shown(RuntimeError(str(caught.value)))


def test_text_without_values_is_as_it_was() -> None:
    assert without_values("a card was declined [7]") == "a card was declined [7]"
    assert without_values("refused\nDETAIL:  Key (number)=(4111)") == "refused (values left out)"


def test_traceback_has_causes_groups_and_notes_like_pythons() -> None:
    inner = _raised(KeyError("missing"), None)
    group = ExceptionGroup("two", [_raised(ValueError("a"), inner), ValueError("b")])
    group.add_note("a note")
    formatted = traceback_of(_raised(group, None))
    for expected in (
        "Traceback (most recent call last):",
        "  | KeyError: 'missing'",
        "  | The above exception was the direct cause of the following exception:",
        "  | ValueError: a",
        "ExceptionGroup: two (2 sub-exceptions)",
        "a note",
        "  | member 2 of 2:",
    ):
        assert expected in formatted
    suppressed = _in_context(RuntimeError("shown"), ValueError("hidden"))
    suppressed.__suppress_context__ = True
    assert "hidden" not in traceback_of(suppressed)


def test_whatever_is_large_or_refers_to_itself_is_bounded() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert traceback_of(first).count("ValueError: ") == 2
    chain: Exception = ValueError("0")
    for number in range(10_000):
        chain = _raised(ValueError(str(number)), chain)
    assert traceback_of(chain).count("ValueError: ") == 20
    wide = ExceptionGroup("wide", [ValueError("x")] * 10_000)
    assert "and 9995 more" in traceback_of(wide)
    deep: Any = ValueError("x")
    for _ in range(10_000):
        deep = ExceptionGroup("deep", [deep])
    for error in (chain, wide, deep):
        assert len(Failure.of(error).to_json()) < 200_000


def test_exception_whose_text_fails_is_shown() -> None:
    class Broken(Exception):
        def __str__(self) -> str:
            raise RuntimeError(os.sep)

    assert "its str() failed with RuntimeError" in message_of(Broken())
