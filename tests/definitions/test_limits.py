"""The watch over a try: what is left of its time, and of its silence."""

from __future__ import annotations

from datetime import timedelta

import pytest

from sqla_durable import errors
from sqla_durable.definitions import limits
from sqla_durable.definitions.limits import TimeLimits, Watch


class Clock:
    """Stands still."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(limits, "time", clock)
    return clock


def watch(**given: int) -> Watch:
    every = {"timeout": None, "total_timeout": None, **{name: timedelta(seconds=each) for name, each in given.items()}}
    found = TimeLimits.of(**every)
    assert found is not None
    return found.of_try("load", 0.0)


def test_a_heartbeat_puts_the_end_off_but_not_that_of_the_whole_time(clock: Clock) -> None:
    watched = watch(heartbeat_timeout=10, timeout=25)
    for _ in range(2):
        clock.now += 9
        assert watched.left == 1
        watched.note_heartbeat()
    assert watched.left == 7
    clock.now += 7
    assert watched.left == 0
    with pytest.raises(errors.StepTimeoutError, match=r"within 0:00:25, the timeout of each try\.$") as raised:
        watched.note_heartbeat()
    assert type(raised.value) is errors.StepTimeoutError


def test_silence_that_was_too_long_is_not_mended(clock: Clock) -> None:
    watched = watch(heartbeat_timeout=10)
    clock.now += 10
    for call in (watched.note_heartbeat, watched.check, watched.note_heartbeat):
        with pytest.raises(errors.HeartbeatTimeoutError, match="'load' sent no heartbeat within 0:00:10") as raised:
            call()
    assert (raised.value.step, raised.value.seconds, watched.left) == ("load", 10, 0)


def test_a_heartbeat_that_the_database_keeps_waiting_is_no_silence(clock: Clock) -> None:
    watched = watch(heartbeat_timeout=10, timeout=1000)
    with watched.writing():
        clock.now += 500
        assert watched.left == 10
    clock.now += 9
    assert watched.left == 1


def test_the_time_before_a_function_is_called_is_not_silence(clock: Clock) -> None:
    watched = watch(heartbeat_timeout=10)
    clock.now += 500
    with watched.measured():
        clock.now += 9
