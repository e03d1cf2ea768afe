"""What is easily got wrong in a first program: each mistake is refused before it does harm, and says what to do."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator
from datetime import timedelta
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import (
    Durable,
    Executor,
    Workflow,
    send_signal,
    sleep,
    start_many,
    update_handle,
    wait_update,
)
from sqla_durable.errors import ArgumentError, DefinitionError, EncodingError, UsageError
from tests.support.domain import Order

pytestmark = pytest.mark.few_shells

durable = Durable()
TOO_LONG = "ä" * 501


@durable.workflow
def ship(order_id: int) -> int:
    return order_id


@pytest.mark.parametrize("many", [False, True])
def test_start_in_workflow_code_would_be_repeated_and_is_refused(
    session_factory: sessionmaker[Session], many: bool
) -> None:
    app = Durable()

    @app.workflow
    def checkout() -> None:
        with session_factory.begin() as own:
            start_many(own, [ship.bind(1)]) if many else ship.start(own, 1)

    with session_factory() as session:
        with pytest.raises(UsageError, match=r"'ship' was started in .* 'checkout'.*start_child\(ship"):
            Executor(session).run(checkout)
        assert session.scalar(select(func.count()).where(Workflow.name == "ship")) == 0


def test_start_in_workflow_code_with_a_key_is_once(session_factory: sessionmaker[Session]) -> None:
    app = Durable()

    @app.workflow
    def checkout() -> str:
        with session_factory.begin() as own:
            return str(ship.options(key="only").start(own, 1).id)

    with session_factory() as session:
        found = Executor(session).run(checkout)
        assert session.scalars(select(Workflow.id).where(Workflow.key == "only")).all() == [UUID(found)]


def test_name_that_no_index_holds_is_refused(session_factory: sessionmaker[Session]) -> None:
    with session_factory.begin() as session:
        workflow = ship.options(key="ä" * 500).start(session, 1)
        for use in (
            lambda: ship.options(key=TOO_LONG),
            lambda: ship.options(queue=TOO_LONG),
            lambda: send_signal(session, workflow, TOO_LONG),
            lambda: send_signal(session, workflow, "go", key=TOO_LONG),
        ):
            with pytest.raises(ArgumentError, match="1,002 bytes long, more than 1,000"):
                use()


def numbers() -> Generator[int]:
    yield 1


async def anumbers() -> AsyncGenerator[int]:
    yield 1


@pytest.mark.parametrize("fn", [numbers, anumbers])
@pytest.mark.parametrize("kind", ["step", "workflow"])
def test_function_that_yields_is_refused(fn: Callable[[], Any], kind: str) -> None:
    with pytest.raises(DefinitionError, match=f"{kind} '{fn.__name__}' yields.*return a list"):
        getattr(Durable(), kind)(fn)


def test_message_proposes_no_annotation_where_none_would_help(session_factory: sessionmaker[Session]) -> None:
    @durable.workflow
    def give(kind: str):  # type: ignore[no-untyped-def]  # the mistake
        return Order() if kind == "orm" else iter([1])

    with session_factory() as session:
        with pytest.raises(EncodingError, match="pass its primary key"):
            Executor(session).run(give, "orm")
        with pytest.raises(EncodingError, match="Pass plain values"):
            Executor(session).run(give, "iterator")


def test_wrong_type_is_called_by_its_name(session_factory: sessionmaker[Session]) -> None:
    with pytest.raises(DefinitionError, match=r"timeout=5 is not a timedelta"):
        durable.step(timeout=cast("timedelta", 5))(numbers)
    with pytest.raises(ArgumentError, match=r"'x' is no id of an update"):
        update_handle(session_factory, uuid4(), cast("int", "x"))
    with pytest.raises(UsageError, match=r"outside of one: call it in a workflow's function"):
        sleep(timedelta(seconds=1))


def test_validator_that_cannot_be_called_is_refused_before_the_wait(session_factory: sessionmaker[Session]) -> None:
    @durable.workflow
    def wait() -> None:
        wait_update("add", int, validate=cast("Any", 5))

    with session_factory() as session, pytest.raises(ArgumentError, match="validate=5 is no function"):
        Executor(session).run(wait)
