"""`Durable.schedule`: what it declares, what it leaves as it is, and what it refuses, by message."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from sqla_durable import Durable
from sqla_durable.definitions.schedules import ScheduleOptions
from sqla_durable.errors import ArgumentError, DefinitionError
from sqla_durable.store import NewWorkflow

HOUR = timedelta(hours=1)
SINCE = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def durable() -> Durable:
    return Durable()


def test_the_workflow_is_declared_under_its_name_and_stays_what_it_was(durable: Durable) -> None:
    @durable.workflow(name="report", queue="slow")
    def report(day: str = "today") -> str:
        return day

    assert durable.schedule("0 9 * * 1-5", tz="Europe/Berlin", overlap="allow")(report) is report
    assert report("x") == "x"
    (declared,) = durable.registry.schedules()
    assert (declared.name, declared.workflow) == ("report", "report")
    assert declared.options == ScheduleOptions.of(cron="0 9 * * 1-5", tz="Europe/Berlin", overlap="allow")
    new: NewWorkflow = declared.bind()
    assert (new.name, new.input, new.queue, new.key) == ("report", "{}", "slow", None)


def test_one_workflow_may_have_several_with_arguments_and_options_of_their_own(durable: Durable) -> None:
    @durable.schedule(every=HOUR, name="hourly", arguments={"day": "today"})
    @durable.schedule(["0 3 * * *", "0 15 * * *"], name="daily")
    @durable.workflow
    async def report(day: str = "") -> None: ...

    durable.schedule(every=HOUR, name="urgent")(report.options(queue="fast", priority=-1, timeout=HOUR))
    found = {each.name: each.bind() for each in durable.registry.schedules()}
    assert list(found) == ["daily", "hourly", "urgent"]
    assert {name: each.input for name, each in found.items()} == {
        "daily": "{}",
        "hourly": '{"day":"today"}',
        "urgent": "{}",
    }
    urgent = found["urgent"]
    assert (urgent.queue, urgent.priority, urgent.timeout) == ("fast", -1, 3600)


def test_the_two_objects_of_two_applications_do_not_share_them(durable: Durable) -> None:
    other = Durable()

    @other.schedule(every=HOUR)
    @durable.schedule(every=HOUR)
    @durable.workflow
    def report() -> None: ...

    assert len(durable.registry.schedules()) == len(other.registry.schedules()) == 1


def test_the_same_name_twice_is_refused(durable: Durable) -> None:
    @durable.schedule(every=HOUR)
    @durable.workflow
    def report() -> None: ...

    with pytest.raises(DefinitionError, match=r"two schedules are named 'report': give one of them another name=\."):
        durable.schedule("0 3 * * *")(report)


def test_what_is_no_workflow_is_refused(durable: Durable) -> None:
    def plain() -> None: ...

    for wrong in (plain, None, durable.step(plain)):
        any_: Any = wrong
        with pytest.raises(DefinitionError, match=r"which is no workflow: write it above @durable\.workflow"):
            durable.schedule(every=HOUR)(any_)


def test_it_is_a_method_of_an_object() -> None:
    unbound: Any = Durable.schedule
    with pytest.raises(DefinitionError):
        unbound("0 3 * * *")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "cron"),
        ({"cron": "0 3 * * *", "every": HOUR}, "every"),
        ({"cron": "at noon"}, "at noon"),
        ({"cron": []}, "cron"),
        ({"cron": "0 0 30 2 *"}, "0 0 30 2"),
        ({"every": timedelta()}, "every"),
        ({"every": 5}, "every"),
        ({"every": HOUR, "jitter": timedelta(-1)}, "jitter"),
        ({"every": HOUR, "tz": "Mars/Olympus"}, "Mars/Olympus"),
        ({"every": HOUR, "tz": ""}, "tz"),
        ({"every": HOUR, "starts_at": SINCE, "ends_at": SINCE - HOUR}, "starts_at"),
        ({"every": HOUR, "overlap": "never"}, "overlap='never' is none of"),
        ({"every": HOUR, "missed": None}, "missed=None is none of"),
    ],
)
def test_wrong_options_are_refused_where_they_are_written(durable: Durable, options: Any, message: str) -> None:
    cron = options.pop("cron", None)
    with pytest.raises(ArgumentError, match=re.escape(message)):
        durable.schedule(cron, **options)


@pytest.mark.parametrize("name", ["", " ", "a" * 901])
def test_what_is_no_name_is_refused(durable: Durable, name: str) -> None:
    @durable.workflow
    def report() -> None: ...

    with pytest.raises(ArgumentError, match="a schedule is named"):
        durable.schedule(every=HOUR, name=name)(report)


@pytest.mark.parametrize(
    "wrong", [{"key": "k"}, {"delay": HOUR}, {"at": SINCE}, {"deadline": HOUR}, {"detached": True}]
)
def test_options_that_a_tick_decides_are_refused_where_the_schedule_is_declared(durable: Durable, wrong: Any) -> None:
    @durable.workflow
    def report() -> None: ...

    with pytest.raises(DefinitionError, match=r"options that each tick decides by itself: leave [a-z]+ out; queue"):
        durable.schedule(every=HOUR)(report.options(**wrong))


@pytest.mark.parametrize("arguments", [{"unknown": 1}, {}, {"day": object()}])
def test_arguments_that_do_not_fit_are_refused_when_they_are_bound(durable: Durable, arguments: Any) -> None:
    """Not before: a value may need what is defined further down."""

    @durable.schedule(every=HOUR, arguments=arguments)
    @durable.workflow
    def report(day: str) -> None: ...

    (declared,) = durable.registry.schedules()
    with pytest.raises(ArgumentError, match="report"):
        declared.bind()
