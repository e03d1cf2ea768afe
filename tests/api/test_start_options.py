"""Options of a start that say what becomes of others with its key: those that make no sense are refused."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from sqla_durable import Durable, StartOptions, manage
from sqla_durable.errors import ArgumentError

MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)
durable = Durable()


@durable.workflow
def checkout(cents: int) -> int:
    return cents


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"debounce": MINUTE}, "given together"),
        ({"longest_wait": MINUTE}, "given together"),
        ({"debounce": HOUR, "longest_wait": MINUTE}, "is shorter than"),
        ({"debounce": timedelta(0), "longest_wait": MINUTE}, "must be positive"),
        ({"debounce": 5, "longest_wait": MINUTE}, "not a timedelta"),
        ({"throttle": -MINUTE}, "must be positive"),
        ({"unique": timedelta(0)}, "must be positive"),
        ({"unique": "running"}, "is none of 'forever', 'unfinished', 'unstarted', or a timedelta"),
        ({"on_conflict": "ignore"}, "is none of 'existing', 'refuse'"),
        ({"on_conflict": HOUR}, "is none of 'existing', 'refuse'"),
        ({"throttle": MINUTE, "debounce": MINUTE, "longest_wait": HOUR}, "debounce and throttle contradict"),
        ({"throttle": MINUTE, "unique": "unfinished"}, "throttle and unique contradict"),
        ({"throttle": MINUTE, "on_conflict": "replace"}, "throttle and replace contradict"),
        ({"unique": "forever", "on_conflict": "cancel_running"}, "unique and cancel_running contradict"),
        ({"debounce": MINUTE, "longest_wait": HOUR, "delay": MINUTE}, "debounce and delay contradict"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ArgumentError, match=reason):
        StartOptions(key="k", **options)
    with pytest.raises(ArgumentError, match=reason):
        checkout.options(**options)


def test_a_rule_needs_a_key_by_the_time_of_the_start(engine: Engine) -> None:
    preset = checkout.options(throttle=HOUR)
    with Session(engine) as session:
        with pytest.raises(ArgumentError, match=r"started with throttle, and without a key: add options\(key=...\)"):
            preset.start(session, 1)
        assert preset.options(key="k").start(session, 1).key == "k"


def test_a_schedule_has_keys_of_its_own(engine: Engine) -> None:
    with Session(engine) as session, pytest.raises(ArgumentError, match="decides by itself: leave key out"):
        manage.put_schedule(session, "nightly", checkout.options(key="k", unique="unfinished").bind(1), every=HOUR)
    with pytest.raises(TypeError, match="leave debounce, longest_wait out"):
        durable.schedule(every=HOUR, arguments={"cents": 1})(checkout.options(debounce=MINUTE, longest_wait=HOUR))
