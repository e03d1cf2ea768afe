"""Rows of failures that somebody else has written: they choose no class, and hurt nobody but their own workflow."""

from __future__ import annotations

import json
import logging
import sys
from decimal import Decimal
from types import ModuleType
from typing import Any
from uuid import UUID

import pytest
from pydantic import BaseModel, ValidationError
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from sqla_durable.errors import StepFailedError, WorkflowFailedError
from tests.acceptance.application import Application
from tests.acceptance.shells import Shell

pytestmark = pytest.mark.few_shells

APPLICATION = "tests.acceptance.test_hostile_errors"
ACTED: list[str] = []


class Refused(Exception):
    def __init__(self, reason: str) -> None:
        ACTED.append("constructed")
        super().__init__(reason)
        self.reason = reason


@pytest.fixture(autouse=True)
def framework(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A library that is imported, and not by the modules with workflows."""
    module = ModuleType("webframework")
    exec("class HTTPException(Exception):\n    status_code = 500\n    headers = None", vars(module))
    monkeypatch.setitem(sys.modules, "webframework", module)
    ACTED.clear()
    return module


def forged(kind: str, **state: Any) -> str:
    given = {"type": kind, "message": "forged", "args": ["forged"], "state": state, "traceback": "T" * 1_000_000}
    return json.dumps(given)


REDIRECT = forged("webframework:HTTPException", status_code=302, headers={"location": "https://evil.example"})


def rewrite(shell: Shell, table: str, workflow_id: UUID, error: str) -> None:
    column = "id" if table == "workflow" else "workflow_id"
    with shell.engine.begin() as connection:
        statement = f"UPDATE {shell.schema}.{table} SET error = CAST(:error AS jsonb) WHERE {column} = :id"
        assert connection.execute(text(statement), {"error": error, "id": workflow_id}).rowcount == 1


def test_forged_outcome_is_raised_as_text(shell: Shell, app: Application, framework: ModuleType) -> None:
    async def ship() -> None:
        raise Refused("sold out")

    workflow = app.workflow(ship).options(key="k")
    with pytest.raises(Refused):
        shell.run(workflow)
    workflow_id = shell.only
    for error in (REDIRECT, forged("os:system"), '{"type": "", "args": 7, "notes": {"a": 1}}'):
        rewrite(shell, "workflow", workflow_id, error)
        with pytest.raises(WorkflowFailedError) as caught:
            shell.run(workflow)
        assert len(str(caught.value.__cause__)) < 40_000
    ACTED.clear()
    rewrite(shell, "workflow", workflow_id, forged(f"{__name__}:Refused", reason="forged", headers={"location": "x"}))
    with pytest.raises(Refused) as refused:
        shell.run(workflow)
    assert (refused.value.reason, hasattr(refused.value, "headers")) == ("forged", False)
    assert ACTED == []


@pytest.mark.parametrize("error", [REDIRECT, forged("concurrent.futures:ProcessPoolExecutor")], ids=["library", "lazy"])
def test_forged_step_is_raised_as_text_in_the_workflow(shell: Shell, app: Application, error: str) -> None:
    met: list[Exception] = []

    def refuse() -> None:
        raise Refused("sold out")

    step = app.plain(refuse)

    async def ship() -> str:
        try:
            await step()
        except Exception as caught:
            met.append(caught)
        return "handled"

    workflow = app.workflow(ship)
    assert shell.run(workflow) == "handled"
    workflow_id = shell.only
    rewrite(shell, "step", workflow_id, error)
    shell.crashed(workflow_id)
    assert shell.finish(workflow, workflow_id) == "handled"
    assert [type(each) for each in met] == [Refused, StepFailedError]


def test_error_comes_back_the_same_on_replay(shell: Shell, app: Application) -> None:
    """In a process that has never raised it, too: what a name means depends on the code alone."""
    met: list[tuple[Any, ...]] = []

    def refuse() -> None:
        error = Priced(UUID(int=7), Decimal("1.10"))
        error.add_note("a note")
        raise error

    step = app.plain(refuse)

    async def ship() -> None:
        try:
            await step()
        except Priced as caught:
            met.append((caught.args, caught.price, caught.__notes__))

    workflow = app.workflow(ship)
    shell.run(workflow)
    workflow_id = shell.only
    shell.crashed(workflow_id)
    shell.finish(workflow, workflow_id)
    assert met == [((UUID(int=7), Decimal("1.10")), Decimal("1.10"), ["a note"])] * 2


class StatusError(Exception):
    """As those of HTTP clients: with a response, which JSON does not hold."""

    def __init__(self, text: str, response: object) -> None:
        super().__init__(text)
        self.response = response


def unfit() -> ValidationError:
    try:
        Model.model_validate({"number": "x"})
    except ValidationError as error:
        return error
    raise AssertionError


# behaviour: V3
def test_error_is_caught_by_its_class_on_replay_and_outside(shell: Shell, app: Application) -> None:
    raised: list[Exception] = [
        StatusError("503", response=object()),
        unfit(),
        ExceptionGroup("both", [Priced(UUID(int=7), Decimal(1)), KeyError("x")]),
    ]
    met: list[str] = []

    def refuse(number: int) -> None:
        raise raised[number]

    step = app.plain(refuse)

    async def ship() -> None:
        try:
            await step(0)
        except StatusError as caught:
            met.append(f"{caught} {caught.response}")
        try:
            await step(1)
        except ValidationError as caught:
            met.append(f"{caught.title} {caught.errors()[0]['loc']}")
        try:
            await step(2)
        except* Priced as caught:
            met.append(str(caught.exceptions[0]))

    workflow = app.workflow(ship)
    with pytest.raises(ExceptionGroup, match="both") as first:
        shell.run(workflow)
    shell.crashed(shell.only)
    with pytest.raises(ExceptionGroup, match="both") as second:
        shell.finish(workflow, shell.only)
    assert repr(first.value.exceptions) == repr(second.value.exceptions) == "(KeyError('x'),)"
    assert met == ["503 None", "Model ('number',)", f"({UUID(int=7)!r}, {Decimal(1)!r})"] * 2


class Priced(Exception):
    def __init__(self, order_id: UUID, price: Decimal) -> None:
        super().__init__(order_id, price)
        self.price = price


def test_error_of_an_imported_library_can_be_caught_in_the_workflow_and_is_text_outside(
    shell: Shell, app: Application, framework: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The module with the workflow imports the library, so it may catch the error; a web application does not."""
    monkeypatch.setattr(sys.modules[APPLICATION], "webframework", framework, raising=False)
    met: list[str] = []

    def refuse() -> None:
        raise framework.HTTPException("refused")

    step = app.plain(refuse)

    async def ship() -> None:
        try:
            await step()
        except framework.HTTPException as caught:
            met.append(str(caught))
            raise

    with pytest.raises(WorkflowFailedError, match="webframework:HTTPException: refused"):
        shell.run(app.workflow(ship))
    assert met == ["refused"]


SECRET = "4111111111111111"


class Model(BaseModel):
    number: int


# behaviour: V1
def test_values_of_statements_and_payloads_are_in_no_table_and_no_log(
    shell: Shell, app: Application, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "sqla_durable")

    def insert(session: Session) -> None:
        session.execute(text("CREATE TEMP TABLE card (number text, pin int NOT NULL) ON COMMIT DROP"))
        session.execute(text("INSERT INTO card (number) VALUES (:number)"), {"number": SECRET})

    def wrap() -> None:
        try:
            Model.model_validate({"number": f"x{SECRET}"})
        except ValidationError as error:
            raise RuntimeError("declined") from error

    def wrong() -> int:
        return f"x{SECRET}"  # type: ignore[return-value]

    steps: list[Any] = [app.transactional(insert), app.plain(wrap), app.plain(wrong)]
    met: list[str] = []

    async def pay() -> None:
        for each in steps:
            try:
                await each()
            except Exception as error:
                met.append(type(error).__name__)
        await steps[0]()

    with pytest.raises(IntegrityError) as caught:
        shell.run(app.workflow(pay))
    assert met == ["IntegrityError", "RuntimeError", "EncodingError"]
    assert SECRET not in str(caught.value)
    with shell.engine.connect() as connection:
        for table in ("workflow", "step"):
            rows = connection.scalars(text(f"SELECT CAST(t AS text) FROM {shell.schema}.{table} AS t"))
            assert SECRET not in "".join(rows)
    assert SECRET not in caplog.text


def test_name_and_error_with_newlines_forge_no_line_of_the_log(
    shell: Shell, app: Application, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "sqla_durable")

    async def ship() -> None:
        raise Refused("x\n2026-01-01 INFO    all is well\x1b[2K" + "y" * 3_000_000)

    with pytest.raises(WorkflowFailedError):  # its argument is too large to be kept
        shell.run(app.workflow(ship, name="ship\nforged"))
    assert all(each.getMessage().isprintable() and len(each.getMessage()) < 10_000 for each in caplog.records)
