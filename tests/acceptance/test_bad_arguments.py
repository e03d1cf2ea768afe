"""Arguments and results that do not fit, that JSON cannot hold, and that are too large: nothing is lost by them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from sqla_durable import BoundWorkflow, Durable, Executor, Worker, Workflow, WorkflowStatus, start_many
from sqla_durable.errors import (
    ArgumentError,
    DecodingError,
    DefinitionError,
    EncodingError,
    PayloadTooLargeError,
)
from tests.acceptance.bad_input import Sessions, carry, durable, ship
from tests.acceptance.shells import POLL
from tests.support.domain import Order

pytestmark = pytest.mark.few_shells


@contextmanager
def caller_survives(maker: Sessions) -> Generator[Session]:
    """Do something wrong in a caller's transaction: what the caller has written before and after is committed."""
    with maker.begin() as session:
        session.add(Order(customer="before", total_cents=1))
        session.flush()
        yield session
        session.add(Order(customer="after", total_cents=2))
    with maker() as session:
        assert session.scalars(select(Order.customer).order_by(Order.id)).all() == ["before", "after"]
        assert session.scalars(select(Workflow)).all() == []


# Arguments that do not fit


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        (("seven",), {}, "argument 'order_id' of workflow 'ship' does not fit its annotation: .*, got str"),
        (("7",), {}, "got str"),
        ((7.0,), {}, "got float"),
        ((True,), {}, "got bool"),
        ((1, "free"), {}, "argument 'price' of workflow 'ship' .*, got str"),
        ((1,), {"note": 7}, "argument 'note' of workflow 'ship' .*, got int"),
        ((), {}, r"workflow 'ship' takes \(order_id: .*missing a required argument: 'order_id'"),
        ((1,), {"colour": "red"}, "unexpected keyword argument 'colour'"),
        ((1, Decimal(1), "", 1.0, 5), {}, "too many positional arguments"),
    ],
)
def test_argument_that_does_not_fit_is_refused(
    session_factory: Sessions, args: tuple[Any, ...], kwargs: dict[str, Any], said: str
) -> None:
    with caller_survives(session_factory) as session:
        with pytest.raises(ArgumentError, match=said) as caught:
            ship.start(session, *args, **kwargs)
        assert isinstance(caught.value, TypeError)
        assert "Nothing was started" in str(caught.value)


def test_option_in_the_place_of_an_argument_is_explained(session_factory: Sessions) -> None:
    said = r"Options go before the call: ship.options\(key=...\).start\(session"
    with caller_survives(session_factory) as session, pytest.raises(ArgumentError, match=said):
        ship.start(session, 1, key="order-1")  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "stored",
    [{}, {"order_id": "seven"}, {"order_id": 1, "colour": "red"}],
    ids=["missing", "wrong", "unknown"],
)
def test_row_whose_input_does_not_fit_fails_alone_and_says_so(
    session_factory: Sessions, stored: dict[str, Any]
) -> None:
    with session_factory.begin() as session:
        bad = Workflow(name="ship", input=stored)
        session.add(bad)
        good_id = ship.start(session, 7).id
        session.flush()
        bad_id = bad.id
    with Worker(durable, sessionmaker=session_factory, async_sessionmaker=None, poll_interval=POLL):
        assert ship.handle(session_factory, good_id).result(timeout=timedelta(seconds=30)).startswith("7 ")
        with pytest.raises(DecodingError, match=r"stored .* of workflow 'ship'"):
            ship.handle(session_factory, bad_id).result(timeout=timedelta(seconds=30))


def test_orm_instance_as_an_argument_is_refused(session_factory: Sessions) -> None:
    with caller_survives(session_factory) as session:
        order = session.scalars(select(Order)).one()
        with pytest.raises(
            ArgumentError, match=r"argument 'anything' .* is an ORM instance of Order: pass its primary"
        ):
            carry.start(session, order)
        with pytest.raises((ArgumentError, EncodingError)):
            carry.start(session, [order])


def test_orm_class_as_an_annotation_is_refused() -> None:
    def wrong(order: Order) -> None: ...

    with pytest.raises(DefinitionError, match=r"annotated with the ORM class Order: .*Pass its primary key"):
        Durable().workflow(wrong)


# What PostgreSQL's jsonb cannot hold, and what is too large


@pytest.mark.parametrize(
    ("bound", "said"),
    [
        (lambda: ship.bind(1, note="a\0b"), r"argument 'note' .*PostgreSQL stores no NUL character"),
        (lambda: carry.bind({"a\0": 1}), "NUL"),
        (lambda: ship.bind(1, note="\ud800"), "argument 'note' .*surrogate"),
        (lambda: carry.bind(["\udfff"]), "surrogate"),
        (lambda: ship.bind(1, weight=float("nan")), "argument 'weight' .*(nan|NaN|float)"),
        (lambda: ship.bind(1, weight=float("-inf")), "argument 'weight' .*(inf|float)"),
        (lambda: carry.bind([float("inf")]), "argument 'anything' .*(inf|float)"),
        (lambda: carry.bind(b"bytes"), "no annotation and is of type bytes.*Annotate it, for example with 'bytes'"),
        (lambda: carry.bind(object()), "no annotation and is of type object"),
        (lambda: carry.bind({1: 2}), "no annotation and is of type dict"),
    ],
)
def test_value_that_jsonb_cannot_hold_is_refused(
    session_factory: Sessions, bound: Callable[[], BoundWorkflow], said: str
) -> None:
    with caller_survives(session_factory) as session, pytest.raises(EncodingError, match=said):
        start_many(session, (bound() for _ in range(2)))


def test_payload_over_the_limit_is_refused_with_both_sizes(session_factory: Sessions) -> None:
    with caller_survives(session_factory) as session:
        with pytest.raises(
            PayloadTooLargeError, match=r"argument 'note' .* is 10,\d\d\d bytes .* limit of 10,000"
        ) as caught:
            ship.start(session, 1, note="x" * 10_500)
        assert (caught.value.size, caught.value.limit) == (10_502, 10_000)
        assert "Write it with create_blob() and pass the Blob" in str(caught.value)
        with pytest.raises(PayloadTooLargeError):
            carry.start(session, ["ö" * 5_000])  # counted in bytes, not in characters


def test_limit_counts_all_arguments_together(session_factory: Sessions) -> None:
    limited = Durable(payload_limit=100)

    @limited.workflow
    def pair(one: str, two: str) -> str:
        return one + two

    said = "the input of workflow 'pair'"
    with caller_survives(session_factory) as session, pytest.raises(PayloadTooLargeError, match=said):
        pair.start(session, "x" * 60, "y" * 60)


def test_result_over_the_limit_fails_the_workflow(session_factory: Sessions) -> None:
    limited = Durable(payload_limit=100)

    @limited.workflow
    def long(times: int) -> str:
        return "x" * times

    with session_factory() as session:
        assert Executor(session).run(long, 50) == "x" * 50
        with pytest.raises(PayloadTooLargeError, match="the result of workflow 'long' is 202 bytes"):
            Executor(session).run(long, 200)
        assert set(session.scalars(select(Workflow.status))) == {WorkflowStatus.SUCCEEDED, WorkflowStatus.FAILED}
