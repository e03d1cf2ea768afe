"""The bounds of durations and times, wherever they are given."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from itertools import product

import pytest
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Durable, Executor, Worker, sleep, sleep_until, wait_signal
from sqla_durable.api.polling import pauses
from sqla_durable.definitions.checks import (
    LATEST,
    LONGEST,
    escape_key,
    fault_in_key,
    require_duration,
    require_moment,
    unescape_key,
)
from sqla_durable.errors import ArgumentError

durable = Durable()
LONG = LONGEST + timedelta.resolution


@durable.workflow
def ship() -> None: ...


@durable.step
def load() -> bool:
    return True


GIVEN: list[tuple[str, Callable[[timedelta], object]]] = [
    ("timeout", lambda long: ship.options(timeout=long)),
    ("deadline", lambda long: ship.options(deadline=long)),
    ("delay", lambda long: ship.options(delay=long)),
    ("duration", lambda long: sleep(long)),
    ("timeout", lambda long: wait_signal("go", timeout=long)),
    ("timeout", lambda long: load.until(timeout=long)),
    ("timeout", lambda long: next(pauses(long))),
    ("total_timeout", lambda long: durable.step(total_timeout=long)),
    ("heartbeat_timeout", lambda long: durable.step(heartbeat_timeout=long)),
    ("lease", lambda long: Executor(Session(), lease=long)),
    ("lease", lambda long: Worker(durable, sessionmaker=sessionmaker(), lease=long)),
    ("grace", lambda long: Worker(durable, sessionmaker=sessionmaker(), grace=long)),
]


@pytest.mark.parametrize(("name", "give"), GIVEN)
def test_a_duration_that_no_clock_can_hold_is_refused_by_name(name: str, give: Callable[[timedelta], object]) -> None:
    for long in (LONG, timedelta.max):
        with pytest.raises(ArgumentError, match=rf"^{name}=.* is longer than 36,500 days"):
            give(long)


def test_durations_are_bounded_on_both_sides() -> None:
    require_duration(LONGEST, "delay")
    require_duration(-LONGEST, "delay")
    with pytest.raises(ArgumentError, match="delay"):
        require_duration(timedelta.min, "delay")


@pytest.mark.parametrize("zone", [UTC, timezone(timedelta(hours=14)), timezone(-timedelta(hours=12))])
def test_a_time_that_no_driver_can_read_is_refused_by_name(zone: timezone) -> None:
    for moment in (datetime.max, datetime.min):
        ways: dict[str, Callable[[datetime], object]] = {
            "at": lambda moment: ship.options(at=moment),
            "deadline": lambda moment: ship.options(deadline=moment),
            "moment": sleep_until,
        }
        for name, give in ways.items():
            with pytest.raises(ArgumentError, match=rf"^{name}=.* is out of range"):
                give(moment.replace(tzinfo=zone))
    require_moment(LATEST - timedelta.resolution, "at")


def test_keys_are_escaped_without_loss_and_no_two_alike() -> None:
    pieces = ["#", "/", "%", "%23", "%2F", "2", "3", "5", "F", "a"]
    keys = {"".join(each) for length in range(1, 5) for each in product(pieces, repeat=length)}
    escaped = {key: escape_key(key) for key in keys}
    assert len(set(escaped.values())) == len(keys)
    assert all(unescape_key(found) == key for key, found in escaped.items())
    assert not any("#" in found or "/" in found for found in escaped.values())


@pytest.mark.parametrize("key", ["charge", "order 7", "100%", "50%2", "%2f", "ünï"])
def test_key_without_a_mark_is_stored_as_it_is(key: str) -> None:
    assert escape_key(key) == unescape_key(key) == key


def test_key_is_measured_as_it_is_stored() -> None:
    assert fault_in_key("a" * 1000) is None
    assert "is 1,200 bytes long" in (fault_in_key("/" * 400) or "")
