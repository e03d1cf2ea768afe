"""A value that JSON would return as something else is refused wherever it would be stored; nothing is committed."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, computed_field
from pydantic.alias_generators import to_camel
from sqlalchemy import select
from sqlalchemy.orm import Session

from sqla_durable import Durable, Workflow, WorkflowStatus, current
from sqla_durable.errors import DefinitionError, EncodingError
from tests.acceptance import either
from tests.acceptance.application import Application
from tests.acceptance.shells import Shell
from tests.support.domain import Entry

pytestmark = pytest.mark.few_shells


async def awaited(outcome: Any) -> Any:
    """Return the outcome of an operation, in either form."""
    return await outcome if inspect.isawaitable(outcome) else outcome


class Order(BaseModel):
    """A model as a web application has it: camel case outside, strict, with a computed field."""

    model_config = ConfigDict(alias_generator=to_camel, extra="forbid")
    order_id: int
    unit_price: Decimal

    @computed_field
    def with_tax(self) -> Decimal:
        return self.unit_price * 2


@dataclass
class Base:
    x: int


@dataclass
class Sub(Base):
    y: int = 0


ORDER = Order.model_validate({"orderId": 7, "unitPrice": Decimal("1.10")})
CHANGED = {"prices": [Decimal("1.10")]}
UNREADABLE = {"prices": [Decimal("NaN")]}


def _entries(shell: Shell) -> list[str]:
    with shell.sessionmaker() as session:
        return list(session.scalars(select(Entry.account)))


def _workflows(shell: Shell) -> list[WorkflowStatus]:
    with shell.sessionmaker() as session:
        return list(session.scalars(select(Workflow.status)))


# behaviour: V1 V2
@pytest.mark.shells(("worker", "asyncpg-worker"))
def test_model_comes_back_equal_on_every_way(shell: Shell, app: Application) -> None:
    def carry(order: Order) -> Order:
        return order

    def book(session: Session, order: Order) -> Order:
        session.add(Entry(account="stock", cents=1))
        return order

    plain, transactional = app.plain(carry), app.transactional(book)

    async def below(order: Order) -> Order:
        assert order == ORDER
        return order

    child = app.workflow(below)

    async def travel(order: Order) -> list[Order]:
        carried = await plain(order)
        booked = await transactional(carried)
        started = await awaited(either.start_child(child, booked))
        await either.set_event("order", booked)
        execution = current()
        assert execution is not None
        seen = await awaited(either.wait_event(execution.workflow_id, "order", Order))
        sent = await awaited(either.wait_signal("order", Order))
        return [carried, booked, await awaited(started.result()), seen, sent]

    workflow = app.workflow(travel)
    workflow_id = shell.begin(workflow, ORDER)
    with shell.client() as client:
        client.signal(workflow_id, "order", ORDER)
        client.commit()
    assert shell.finish(workflow, workflow_id) == [ORDER] * 5


# behaviour: V1 E5
@pytest.mark.parametrize("kind", ["plain", "transactional"])
def test_result_of_a_step_that_would_change_is_refused_and_commits_nothing(
    shell: Shell, app: Application, kind: str
) -> None:
    met: list[str] = []

    def price() -> dict[str, Any]:
        return CHANGED

    def book(session: Session) -> dict[str, Any]:
        session.add(Entry(account="lost", cents=1))
        return CHANGED

    step = app.plain(price) if kind == "plain" else app.transactional(book)

    async def ship() -> str:
        try:
            await step()
        except EncodingError as error:
            met.append(str(error))
        return "went on"

    workflow = app.workflow(ship)
    assert shell.run(workflow) == "went on"
    workflow_id = shell.only
    shell.crashed(workflow_id)
    assert shell.finish(workflow, workflow_id) == "went on"
    assert len(met) == 2
    assert all(r"prices[0] is of type Decimal and would be read back as one of type str" in each for each in met)
    assert _entries(shell) == []


# behaviour: V1
def test_result_of_a_workflow_that_would_change_fails_it(shell: Shell, app: Application) -> None:
    async def give() -> Base:
        return Sub(1, 2)

    with pytest.raises(EncodingError, match=r"result of workflow 'give' .* Annotate it with Sub"):
        shell.run(app.workflow(give))
    assert _workflows(shell) == [WorkflowStatus.FAILED]


# behaviour: V1
def test_argument_that_would_change_starts_nothing(shell: Shell, app: Application) -> None:
    async def ship(given: dict[str, Any]) -> None:
        assert given

    workflow = app.workflow(ship)
    with shell.client() as client:
        for start in (lambda: client.start(workflow, CHANGED), lambda: client.start_many([workflow.bind(CHANGED)])):
            with pytest.raises(EncodingError, match="argument 'given' of workflow 'ship'"):
                start()
        client.commit()
    assert _workflows(shell) == []


# behaviour: V1
def test_argument_of_a_child_and_of_the_next_round_is_refused(shell: Shell, app: Application) -> None:
    async def below(given: dict[str, Any]) -> None:
        assert given

    child = app.workflow(below)
    found: list[Any] = []

    async def ship(given: dict[str, Any]) -> int:
        for call in (lambda: either.start_child(child, CHANGED), lambda: found[0].continue_as_new(CHANGED)):
            with pytest.raises(EncodingError, match=r"given.* prices\[0\] is of type Decimal"):
                await awaited(call())
        return len(given)

    found.append(app.workflow(ship))
    assert shell.run(found[0], {"a": 1}) == 1
    assert _workflows(shell) == [WorkflowStatus.SUCCEEDED]


# behaviour: V1 C6
def test_what_nobody_could_read_is_not_published(shell: Shell, app: Application) -> None:
    refused = pytest.raises(EncodingError, match=r"at prices\[0\], cannot be stored")

    async def load() -> int:
        for publish in (
            lambda: either.set_event("prices", UNREADABLE),
            lambda: either.write_stream("prices", UNREADABLE),
            lambda: either.heartbeat(UNREADABLE),
        ):
            with refused:
                await awaited(publish())
        return 1

    step = app.publishing(load)

    async def ship() -> int:
        with refused:
            await awaited(either.set_event("prices", UNREADABLE))
        return await step()

    assert shell.run(app.workflow(ship)) == 1


# behaviour: V1 C6
def test_what_nobody_could_read_is_not_sent(shell: Shell, app: Application) -> None:
    async def ship() -> int:
        found: int = await awaited(either.wait_signal("prices", int))
        return found

    workflow = app.workflow(ship)
    workflow_id = shell.begin(workflow)
    with shell.client() as client:
        for send in (
            lambda: client.signal(workflow_id, "prices", UNREADABLE),
            lambda: client.update(workflow_id, "prices", UNREADABLE),
            lambda: client.complete_callback(f"{'0' * 32}.{'0' * 48}", UNREADABLE),
        ):
            with pytest.raises(EncodingError, match=r"at prices\[0\], cannot be stored"):
                send()
        client.signal(workflow_id, "prices", 1)
        client.commit()
    assert shell.finish(workflow, workflow_id) == 1


# behaviour: V2
def test_step_and_workflow_whose_values_cannot_come_back_are_refused_at_definition() -> None:
    def price() -> dict[tuple[int, int], int]:
        return {(1, 2): 3}

    async def ship(prices: dict[tuple[int, int], int]) -> int:
        return len(prices)

    for define in (lambda: Durable().step(price), lambda: Durable().workflow(ship).bind({})):
        with pytest.raises(DefinitionError, match="tuples as the keys of a dict"):
            define()
