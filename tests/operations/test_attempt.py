"""The identity of a step in its workflow."""

from __future__ import annotations

import sys
import threading
from uuid import UUID

import pytest

from sqla_durable.definitions.retry import Tries
from sqla_durable.errors import UsageError
from sqla_durable.operations.attempt import Attempt
from sqla_durable.store import Claimed, Fence
from sqla_durable.unwinding import AttemptLost, Released

WORKFLOW = UUID(int=7)


@pytest.fixture
def attempt() -> Attempt:
    return Attempt(Claimed(Fence(WORKFLOW, UUID(int=8)), "ship", 2, "{}"))


def test_occurrences_are_counted_by_name(attempt: Attempt) -> None:
    keys = [attempt.begin_call(name, name).key for name in ("charge", "ship", "charge", "charge", "ship")]
    assert keys == ["charge", "ship", "charge#2", "charge#3", "ship#2"]


def test_other_steps_do_not_shift_an_occurrence() -> None:
    def keys(names: str) -> list[str]:
        fresh = Attempt(Claimed(Fence(WORKFLOW, UUID(int=8)), "ship", 1, "{}"))
        return [fresh.begin_call(name, name).key for name in names.split() if name]

    assert [each for each in keys("a x a y a") if each.startswith("a")] == keys("a a a")


def test_explicit_key_is_not_counted(attempt: Attempt) -> None:
    assert attempt.begin_call("charge", 1, key="deposit").key == "deposit"
    assert attempt.begin_call("charge", 1).key == "charge"


def test_explicit_key_that_is_another_steps_name_is_refused(attempt: Attempt) -> None:
    attempt.begin_call("charge", 1)
    with pytest.raises(UsageError, match="the step key 'charge' is used twice in workflow 'ship'"):
        attempt.begin_call("ship", 2, key="charge")


def test_marks_in_names_and_keys_are_escaped(attempt: Attempt) -> None:
    positions = [attempt.begin_call("a/b#2", 1) for _ in range(2)] + [attempt.begin_call("a", 2, key="https://x/#y")]
    assert [each.key for each in positions] == ["a%2Fb%232", "a%2Fb%232#2", "https:%2F%2Fx%2F%23y"]
    assert [each.shown for each in positions] == ["a/b#2", "a/b#2#2", "https://x/#y"]


def test_key_with_the_mark_of_an_occurrence_is_not_that_occurrence(attempt: Attempt) -> None:
    keys = [attempt.begin_call("charge", 1, key=key).key for key in ("charge#2", None, None, "#patched/new")]
    assert keys == ["charge%232", "charge", "charge#2", "%23patched%2Fnew"]
    with pytest.raises(UsageError, match="the step key 'charge#2' is used twice in workflow 'ship'"):
        attempt.begin_call("charge", 1, key="charge#2")


def test_steps_begin_and_end_in_threads_while_a_heartbeat_reads_what_is_executed(attempt: Attempt) -> None:
    over = threading.Event()
    positions = [attempt.begin_call(f"step{number}", number) for number in range(50)]

    def execute() -> None:
        while not over.is_set():
            for each in positions:
                attempt.begin_step(each, Tries())
            for each in positions:
                attempt.end_call(each)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=execute)
    thread.start()
    try:
        for _ in range(2_000):
            assert attempt.executing_steps().keys() <= {each.key for each in positions}
    finally:
        over.set()
        thread.join()
        sys.setswitchinterval(interval)


def test_idempotency_key_is_the_same_in_every_attempt(attempt: Attempt) -> None:
    attempt.begin_call("charge", 1)
    assert attempt.idempotency_key(attempt.begin_call("charge", 1)) == f"{WORKFLOW}/charge#2"


def test_first_signal_to_stop_counts(attempt: Attempt) -> None:
    attempt.raise_if_stopped()
    assert not attempt.is_stopped
    attempt.stop(Released)
    attempt.stop(lambda: AttemptLost(WORKFLOW))
    with pytest.raises(Released):
        attempt.raise_if_stopped()


def test_unfinished_steps_are_named_in_their_order(attempt: Attempt) -> None:
    positions = [attempt.begin_call(name, name) for name in ("b", "a", "c")]
    attempt.end_call(positions[1])
    with pytest.raises(UsageError, match=r"workflow 'ship' returned with unfinished calls: 'b', 'c'. Await each"):
        attempt.refuse_unfinished()
    attempt.end_call(positions[0])
    attempt.end_call(positions[2])
    attempt.refuse_unfinished()
