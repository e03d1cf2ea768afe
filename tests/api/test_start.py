"""The options of a start, and what is bound before a session is there; the stories are in `acceptance`."""

from __future__ import annotations

import sys
from dataclasses import FrozenInstanceError
from datetime import UTC, datetime, timedelta, timezone
from types import FrameType

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Durable, StartOptions, Workflow, start_many
from sqla_durable.errors import ArgumentError

durable = Durable()


@durable.workflow(queue="shipping")
def ship(order_id: int) -> int:
    return order_id


def test_options_are_added_to_those_that_are_there() -> None:
    keyed = ship.options(key="k")
    urgent = keyed.options(priority=-5)
    assert urgent.start_options == StartOptions(key="k", priority=-5)
    assert keyed.start_options == StartOptions(key="k")
    assert ship.start_options == StartOptions()


def test_options_cannot_be_changed_behind_our_back() -> None:
    with pytest.raises(FrozenInstanceError):
        StartOptions().key = ""  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


def test_bound_workflow_keeps_the_arguments_of_its_time() -> None:
    @durable.workflow
    def collect(numbers: list[int]) -> int:
        return sum(numbers)

    numbers = [1, 2]
    bound = collect.bind(numbers)
    numbers.append(3)
    assert bound.new.input == '{"numbers":[1,2]}'


def test_few_functions_are_called_for_a_start() -> None:
    """What can be decided for all starts of a workflow is decided once; the name of each function is its share."""
    ship.bind(1)
    called: list[str] = []

    def note(frame: FrameType, event: str, _argument: object) -> None:
        code = frame.f_code
        if event == "call" and not code.co_name.startswith("<") and "sqla_durable" in code.co_filename:
            called.append(code.co_name)

    sys.setprofile(note)
    try:
        ship.bind(2)
    finally:
        sys.setprofile(None)
    value = ["_is_sure", "dump", "_as_jsonb"]
    arguments = ["encode", "encode", "_encode", "is_mapped", "encode_argument", *value, "refuse_large"]
    assert called == ["bind", *arguments, "with_headers"]


def test_ids_are_in_the_order_of_their_making() -> None:
    ids = [ship.bind(number).new.id for number in range(1_000)]
    assert ids == sorted(ids)
    assert {each.version for each in ids} == {7}


def test_queue_of_the_workflow_is_the_default() -> None:
    assert ship.bind(1).new.queue == "shipping"
    assert ship.options(queue="express").bind(1).new.queue == "express"


@pytest.mark.parametrize("priority", [-32_767, 0, 32_767])
def test_priority_fits_its_column(session_factory: sessionmaker[Session], priority: int) -> None:
    with session_factory() as session:
        ship.options(priority=priority).start(session, 1)
        start_many(session, [ship.options(priority=priority).bind(2)])
        session.commit()
        assert session.scalars(select(Workflow.priority)).all() == [priority, priority]


@pytest.mark.parametrize("priority", [-32_768, 32_768, 1.5, "high"])
def test_priority_out_of_range_is_refused(priority: int) -> None:
    with pytest.raises(ArgumentError, match="is not an integer from -32,767 to 32,767"):
        StartOptions(priority=priority)


def test_time_of_another_zone_is_the_same_time(session_factory: sessionmaker[Session]) -> None:
    at = datetime(2100, 1, 1, 12, tzinfo=timezone(timedelta(hours=5)))
    with session_factory() as session:
        record = ship.options(at=at).start(session, 1)
        (many,) = start_many(session, [ship.options(at=at).bind(1)])
        session.commit()
        assert record.wake_at == at == session.get_one(Workflow, many).wake_at
        assert record.wake_at == datetime(2100, 1, 1, 7, tzinfo=UTC)
