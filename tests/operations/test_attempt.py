"""The identity of a step in its workflow."""

from __future__ import annotations

import sys
import threading
from uuid import UUID

import pytest

from sqla_durable.definitions.retry import Tries
from sqla_durable.errors import UnfinishedStepError, UsageError
from sqla_durable.operations.attempt import Attempt
from sqla_durable.store import Claimed, Fence
from sqla_durable.unwinding import AttemptLost, Released

WORKFLOW = UUID(int=7)


@pytest.fixture
def attempt() -> Attempt:
    return Attempt(Claimed(Fence(WORKFLOW, UUID(int=8)), "ship", 2, "{}"))


def test_occurrences_are_counted_by_name(attempt: Attempt) -> None:
    keys = [attempt.visit(name, name).key for name in ("charge", "ship", "charge", "charge", "ship")]
    assert keys == ["charge", "ship", "charge#2", "charge#3", "ship#2"]


def test_other_steps_do_not_shift_an_occurrence() -> None:
    def keys(names: str) -> list[str]:
        fresh = Attempt(Claimed(Fence(WORKFLOW, UUID(int=8)), "ship", 1, "{}"))
        return [fresh.visit(name, name).key for name in names.split() if name]

    assert [each for each in keys("a x a y a") if each.startswith("a")] == keys("a a a")


def test_explicit_key_is_not_counted(attempt: Attempt) -> None:
    assert attempt.visit("charge", 1, key="deposit").key == "deposit"
    assert attempt.visit("charge", 1).key == "charge"


def test_explicit_key_that_is_another_steps_name_is_refused(attempt: Attempt) -> None:
    attempt.visit("charge", 1)
    with pytest.raises(UsageError, match="the step key 'charge' is used twice in workflow 'ship'"):
        attempt.visit("ship", 2, key="charge")


def test_steps_begin_and_end_in_threads_while_a_heartbeat_reads_what_is_executed(attempt: Attempt) -> None:
    over = threading.Event()
    positions = [attempt.visit(f"step{number}", number) for number in range(50)]

    def execute() -> None:
        while not over.is_set():
            for each in positions:
                attempt.executes(each, Tries())
            for each in positions:
                attempt.operation_ended(each)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=execute)
    thread.start()
    try:
        for _ in range(2_000):
            assert attempt.executed_steps().keys() <= {each.key for each in positions}
    finally:
        over.set()
        thread.join()
        sys.setswitchinterval(interval)


def test_idempotency_key_is_the_same_in_every_attempt(attempt: Attempt) -> None:
    attempt.visit("charge", 1)
    assert attempt.idempotency_key(attempt.visit("charge", 1)) == f"{WORKFLOW}/charge#2"


def test_first_signal_to_stop_counts(attempt: Attempt) -> None:
    attempt.proceed()
    assert not attempt.stopped
    attempt.stop(Released)
    attempt.stop(lambda: AttemptLost(WORKFLOW))
    with pytest.raises(Released):
        attempt.proceed()


def test_unfinished_steps_are_named_in_their_order(attempt: Attempt) -> None:
    positions = [attempt.visit(name, name) for name in ("b", "a", "c")]
    attempt.operation_ended(positions[1])
    with pytest.raises(UnfinishedStepError, match="workflow 'ship' returned while 'b', 'c' was not finished") as caught:
        attempt.refuse_unfinished()
    assert caught.value.steps == ["b", "c"]
    attempt.operation_ended(positions[0])
    attempt.operation_ended(positions[2])
    attempt.refuse_unfinished()
