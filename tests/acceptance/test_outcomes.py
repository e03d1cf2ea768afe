"""What goes into a workflow and comes out of it: typed values, errors, and what is recorded of them."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from typing import Any, Literal, NamedTuple
from uuid import UUID

import pytest
from pydantic import BaseModel
from sqlalchemy import select, update
from typing_extensions import TypedDict

from sqla_durable import Step, Workflow, WorkflowStatus
from sqla_durable.errors import (
    EncodingError,
    MaxAttemptsError,
    StepFailedError,
    WorkflowCancelledError,
    WorkflowFailedError,
)
from tests.acceptance.application import AnyWorkflow, Application
from tests.acceptance.shells import Shell

pytestmark = pytest.mark.few_shells


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Level(IntEnum):
    LOW = 1


class Mode(StrEnum):
    FAST = "fast"


class Point(NamedTuple):
    x: int
    y: int


class Address(TypedDict):
    street: str
    zip: int | None


class Customer(BaseModel):
    name: str
    born: date
    address: Address


@dataclass(frozen=True)
class Line:
    product: str
    price: Decimal
    quantity: int = 1


@dataclass
class Everything:
    lines: list[Line]
    customer: Customer
    colours: dict[Colour, int]
    level: Level
    mode: Mode
    point: Point
    id: UUID
    at: datetime
    on: date
    daily: time
    lasts: timedelta
    blob: bytes
    tags: set[str]
    frozen: frozenset[int]
    maybe: Line | None
    kind: Literal["a", "b"]
    either: int | str
    pair: tuple[int, Decimal]
    many: tuple[str, ...]
    ratio: float
    big: int
    text: str
    nested: dict[str, list[dict[str, Line]]] = field(default_factory=dict[str, list[dict[str, Line]]])


EVERYTHING = Everything(
    lines=[Line("tea", Decimal("2.50")), Line("cup", Decimal("0.10"), 3)],
    customer=Customer(name="Ada", born=date(1815, 12, 10), address={"street": "St James's", "zip": None}),
    colours={Colour.RED: 1, Colour.BLUE: 2},
    level=Level.LOW,
    mode=Mode.FAST,
    point=Point(1, 2),
    id=UUID(int=7),
    at=datetime(2026, 3, 29, 1, 30, 0, 123456, tzinfo=UTC),
    on=date(2026, 3, 29),
    daily=time(23, 59, 59),
    lasts=timedelta(days=14, microseconds=1),
    blob=b"\x00\xff\x80",
    tags={"a", "b"},
    frozen=frozenset({1, 2}),
    maybe=None,
    kind="b",
    either="7",
    pair=(1, Decimal("1.10")),
    many=("x", "y"),
    ratio=0.1,
    big=2**60,
    text='öäü 漢字 🎁 "quoted" \\ \n \\u0000',
    nested={"k": [{"l": Line("x", Decimal("1E+3"))}]},
)


class Refused(Exception):
    """What a workflow of these stories raises."""

    def __init__(self, order_id: int, reason: str) -> None:
        super().__init__(f"order {order_id}: {reason}")
        self.order_id = order_id
        self.reason = reason


# behaviour: E10
def test_values_come_back_as_what_they_were(shell: Shell, app: Application) -> None:
    def carry(value: Everything) -> Everything:
        return value

    carrying = app.plain(carry)

    async def travel(value: Everything) -> Everything:
        assert value == EVERYTHING
        carried = await carrying(value)
        assert carried == EVERYTHING
        assert carried is not value
        return carried

    travelling = app.workflow(travel)
    result = shell.run(travelling, EVERYTHING)
    assert result == EVERYTHING
    assert type(result.customer) is Customer
    assert type(result.point) is Point
    assert result.lines[1].price.as_tuple() == Decimal("0.10").as_tuple()
    workflow_id = _only(shell)
    shell.crashed(workflow_id)
    assert shell.finish(travelling, workflow_id) == EVERYTHING


# behaviour: E10
def test_first_execution_sees_what_a_replay_will_see(shell: Shell, app: Application) -> None:
    def unannotated() -> Any:
        return {"b": [1, 2.50, None], "a": True, "longer": 1e22, "zero": -0.0}

    seen: list[str] = []
    step = app.plain(unannotated)

    async def show() -> str:
        seen.append(repr(await step()))
        return seen[-1]

    showing = app.workflow(show)
    shell.run(showing)
    workflow_id = _only(shell)
    shell.crashed(workflow_id)
    shell.finish(showing, workflow_id)
    assert seen[0] == seen[1]


# behaviour: E10
def test_result_of_a_run_is_what_a_handle_gives(shell: Shell, app: Application) -> None:
    async def give() -> tuple[Line, ...]:
        return (Line("tea", Decimal("2.50")),)

    giving = app.workflow(give)
    first = shell.run(giving)
    assert first == shell.result(giving, _only(shell)) == (Line("tea", Decimal("2.50")),)


def test_defaults_are_taken_from_the_code(shell: Shell, app: Application) -> None:
    async def greet(name: str, greeting: str = "hello", *, loud: bool = False) -> str:
        return f"{greeting} {name}{'!' if loud else ''}"

    greeting = app.workflow(greet)
    assert shell.run(greeting, "Ada") == "hello Ada"
    assert shell.run(greeting, "Ada", loud=True) == "hello Ada!"
    with shell.sessionmaker() as session:
        assert session.scalars(select(Workflow.input).order_by(Workflow.id)).all() == [
            {"name": "Ada"},
            {"name": "Ada", "loud": True},
        ]


@pytest.mark.parametrize("value", [None, 0, "", [], {}, False])
def test_empty_results_are_results(shell: Shell, app: Application, value: object) -> None:
    def empty() -> Any:
        return value

    step = app.plain(empty)

    async def give() -> Any:
        return await step()

    assert shell.run(app.workflow(give)) == value


# behaviour: E4
def test_error_of_a_workflow_is_recorded_with_its_type_and_raised_as_its_own(shell: Shell, app: Application) -> None:
    async def refuse(order_id: int) -> None:
        raise Refused(order_id, "no customer")

    refusing = app.workflow(refuse)
    with pytest.raises(Refused, match="order 7: no customer") as caught:
        shell.run(refusing, 7)
    assert (caught.value.order_id, caught.value.reason) == (7, "no customer")
    assert "raised in workflow 'refuse'" in caught.value.__notes__[0]
    record = shell.one(_only(shell))
    assert record.status is WorkflowStatus.FAILED
    assert record.output is None
    assert record.error is not None
    assert record.error["type"] == f"{__name__}:Refused"
    assert record.error["message"] == "order 7: no customer"
    assert 'raise Refused(order_id, "no customer")' in record.error["traceback"]
    with pytest.raises(Refused, match="order 7: no customer") as again:
        shell.result(refusing, record.id)
    assert again.value.order_id == 7


# behaviour: E1 E4
def test_failed_key_raises_the_recorded_error_and_runs_nothing(shell: Shell, app: Application) -> None:
    calls: list[int] = []

    async def refuse(order_id: int) -> None:
        calls.append(order_id)
        raise Refused(order_id, "no customer")

    refusing = app.workflow(refuse).options(key="k")
    for _ in range(2):
        with pytest.raises(Refused):
            shell.run(refusing, 7)
    assert calls == [7]


# behaviour: E4
def test_error_type_that_is_not_here_is_a_workflow_failed_error(shell: Shell, app: Application) -> None:
    class Local(Exception):
        pass

    async def refuse() -> None:
        raise Local("seven")

    with pytest.raises(WorkflowFailedError, match=r"workflow 'refuse' .* failed with .*Local: seven") as caught:
        shell.run(app.workflow(refuse))
    assert caught.value.error_type.endswith("Local")
    assert caught.value.error_message == "seven"
    assert caught.value.workflow_id == _only(shell)
    assert 'raise Local("seven")' in str(caught.value.__cause__)


# behaviour: E4
def test_step_error_that_the_workflow_lets_out_is_the_workflows(shell: Shell, app: Application) -> None:
    def refuse() -> None:
        raise Refused(8, "sold out")

    step = app.plain(refuse)

    async def buy() -> None:
        await step()

    with pytest.raises(Refused) as caught:
        shell.run(app.workflow(buy))
    assert (caught.value.order_id, caught.value.reason) == (8, "sold out")


# behaviour: E5
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (object(), "has no annotation and is of type object"),
        (float("nan"), "not JSON compliant"),
        ("a\0b", "NUL"),
        ("\ud800", "surrogate"),
        ({1: "one"}, "has no annotation and is of type dict"),
    ],
    ids=["object", "nan", "nul", "surrogate", "keys"],
)
def test_result_that_cannot_be_encoded_ends_the_workflow_as_failed(
    shell: Shell, app: Application, value: object, reason: str
) -> None:
    async def give() -> Any:
        return value

    with pytest.raises(EncodingError, match="the result of workflow 'give'") as caught:
        shell.run(app.workflow(give))
    assert reason in str(caught.value)
    assert shell.one(_only(shell)).status is WorkflowStatus.FAILED


# behaviour: E5
def test_error_that_cannot_be_encoded_ends_the_workflow_as_failed(shell: Shell, app: Application) -> None:
    class Hostile(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    async def refuse() -> None:
        raise Hostile(object(), "\0", "\ud800", float("nan"))

    with pytest.raises(WorkflowFailedError, match="Hostile") as caught:
        shell.run(app.workflow(refuse))
    assert "no text" in caught.value.error_message
    assert shell.one(_only(shell)).status is WorkflowStatus.FAILED


def test_error_with_text_that_postgresql_cannot_hold_is_recorded(shell: Shell, app: Application) -> None:
    async def refuse() -> None:
        raise ValueError("nul \0 and surrogate \ud800 and " + "long " * 20_000)

    with pytest.raises(WorkflowFailedError, match="builtins:ValueError"):
        shell.run(app.workflow(refuse))
    error = shell.one(_only(shell)).error
    assert error is not None
    assert len(error["message"]) < 40_000


@pytest.mark.parametrize("where", ["workflow", "step"])
def test_sys_exit_ends_the_workflow_and_not_the_process(shell: Shell, app: Application, where: str) -> None:
    def leave() -> None:
        sys.exit(3)

    step = app.plain(leave)

    async def exiting() -> None:
        await step() if where == "step" else leave()

    with pytest.raises((WorkflowFailedError, StepFailedError), match="SystemExit: 3"):
        shell.run(app.workflow(exiting))
    assert shell.one(_only(shell)).status is WorkflowStatus.FAILED


def test_except_exception_in_a_workflow_does_not_swallow_a_lost_step(shell: Shell, app: Application) -> None:
    def refuse() -> None:
        raise Refused(1, "x")

    step = app.plain(refuse)

    async def careless() -> str:
        try:
            await step()
        except Exception:
            return "swallowed"
        return "passed"

    assert shell.run(app.workflow(careless)) == "swallowed"


@pytest.fixture
def greeting(app: Application) -> AnyWorkflow[..., str]:
    async def greet() -> str:
        return "hello"

    return app.workflow(greet)


ENDS = pytest.mark.shells(("executor", "async-executor", "worker", "asyncpg-worker"))


@ENDS
def test_cancelled_workflow_raises_on_its_handle(shell: Shell, greeting: AnyWorkflow[..., str]) -> None:
    workflow_id = _start(shell, greeting)
    _end(shell, workflow_id, status=WorkflowStatus.CANCELLED)
    with pytest.raises(WorkflowCancelledError, match=r"workflow 'greet' .* was cancelled") as caught:
        shell.finish(greeting, workflow_id)
    assert caught.value.workflow_id == workflow_id


@ENDS
def test_error_written_by_sql_is_readable(shell: Shell, greeting: AnyWorkflow[..., str]) -> None:
    workflow_id = _start(shell, greeting)
    _end(shell, workflow_id, status=WorkflowStatus.FAILED, error={"type": "ops"})
    with pytest.raises(WorkflowFailedError, match="failed with ops") as caught:
        shell.finish(greeting, workflow_id)
    assert caught.value.error_type == "ops"


@ENDS
def test_spent_attempts_are_an_error_of_their_own(shell: Shell, greeting: AnyWorkflow[..., str]) -> None:
    workflow_id = _start(shell, greeting)
    error = {"type": "sqla_durable.errors:MaxAttemptsError", "message": "its worker died in attempt 10"}
    _end(shell, workflow_id, status=WorkflowStatus.FAILED, error=error)
    with pytest.raises(MaxAttemptsError, match="its worker died in attempt 10") as caught:
        shell.finish(greeting, workflow_id)
    assert caught.value.workflow_id == workflow_id


def test_steps_of_a_workflow_are_joined_in_order(shell: Shell, app: Application) -> None:
    def one() -> int:
        return 1

    step = app.plain(one)

    async def thrice() -> int:
        return await step() + await step() + await step()

    shell.run(app.workflow(thrice))
    with shell.sessionmaker() as session:
        record = session.scalars(select(Workflow)).one()
        assert [each.key for each in record.steps] == ["one", "one#2", "one#3"]
        assert session.scalars(select(Step.key).join(Step.workflow).where(Workflow.name == "thrice")).all()


def test_wrong_json_in_a_step_is_a_clear_error_on_replay(shell: Shell, app: Application) -> None:
    def number() -> int:
        return 1

    step = app.plain(number)

    async def count() -> int:
        return await step()

    counting = app.workflow(count)
    assert shell.run(counting) == 1
    workflow_id = _only(shell)
    shell.crashed(workflow_id)
    with shell.sessionmaker.begin() as session:
        session.execute(update(Step).values(output="not a number"))
    with pytest.raises(Exception, match="the stored result of step 'number' does not fit the annotation") as caught:
        shell.finish(counting, workflow_id)
    assert "got str" in str(caught.value)


def _start(shell: Shell, workflow: AnyWorkflow[[], Any]) -> UUID:
    with shell.client() as client:
        workflow_id: UUID = client.start(workflow).id
        client.commit()
    return workflow_id


def _end(shell: Shell, workflow_id: UUID, **values: Any) -> None:
    with shell.sessionmaker.begin() as session:
        record = session.get_one(Workflow, workflow_id)
        record.finished_at = record.created_at
        for name, value in values.items():
            setattr(record, name, value)


def _only(shell: Shell) -> UUID:
    with shell.sessionmaker() as session:
        return session.scalars(select(Workflow.id)).one()
