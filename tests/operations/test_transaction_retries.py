"""What undid a transaction, by the error and by where in the transaction it was raised."""

from __future__ import annotations

import pytest
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from sqla_durable.definitions.database_errors import mark_engine_error
from sqla_durable.operations.transaction_retries import (
    LOSSES,
    Phase,
    Setback,
    TransactionRetry,
    describe,
    wait_after_loss,
)
from tests.definitions.test_database_errors import Driver

CONFLICT, LOSS, OBSTACLE = Setback.CONFLICT, Setback.LOSS, Setback.OBSTACLE
BEFORE, FUNCTION, COMMIT = Phase.BEFORE, Phase.FUNCTION, Phase.COMMIT


def _error(state: str | None, *, lost: bool = False) -> DBAPIError:
    return DBAPIError("SELECT", None, Driver(state), connection_invalidated=lost)


# behaviour: O1
@pytest.mark.parametrize(
    ("state", "before", "function", "engine", "commit"),
    [
        ("55P03", OBSTACLE, None, OBSTACLE, OBSTACLE),  # lock_timeout
        ("57014", OBSTACLE, None, OBSTACLE, OBSTACLE),  # statement_timeout, pg_cancel_backend
        ("53100", OBSTACLE, OBSTACLE, OBSTACLE, OBSTACLE),  # disk full
        ("58030", OBSTACLE, OBSTACLE, OBSTACLE, OBSTACLE),  # I/O error
        ("25006", OBSTACLE, OBSTACLE, OBSTACLE, OBSTACLE),  # a standby
        ("53400", OBSTACLE, None, OBSTACLE, OBSTACLE),  # temp_file_limit: of the step's statement
        ("58P01", OBSTACLE, None, OBSTACLE, OBSTACLE),  # a file that the step's statement names
        ("53200", OBSTACLE, LOSS, LOSS, LOSS),  # memory, which the step may ask for
        ("25P03", OBSTACLE, LOSS, LOSS, LOSS),  # idle_in_transaction_session_timeout
        ("25P04", OBSTACLE, LOSS, LOSS, LOSS),  # transaction_timeout
        ("57P01", OBSTACLE, LOSS, LOSS, LOSS),  # pg_terminate_backend
        ("08006", OBSTACLE, LOSS, LOSS, LOSS),
        ("42501", OBSTACLE, None, LOSS, None),  # privileges, which the step can change for its session
        ("42P01", OBSTACLE, None, LOSS, None),  # no such table: of a deferred trigger at COMMIT
        ("23505", None, None, None, None),
        ("P0001", None, None, None, None),
        ("40001", CONFLICT, CONFLICT, CONFLICT, CONFLICT),
        ("26000", OBSTACLE, CONFLICT, CONFLICT, CONFLICT),  # a pooler
    ],
)
def test_the_same_code_is_the_steps_error_at_its_own_statement_only(
    state: str, before: Setback | None, function: Setback | None, engine: Setback | None, commit: Setback | None
) -> None:
    ours = _error(state)
    mark_engine_error(ours)
    found = [Setback.of(_error(state), phase) for phase in (BEFORE, FUNCTION, COMMIT)]
    assert found == [before, function, commit]
    assert Setback.of(ours, FUNCTION) is engine


def test_errors_without_a_code() -> None:
    invalid = PendingRollbackError("Can't reconnect until invalid transaction is rolled back.", code="8s2b")
    for error in (_error(None, lost=True), invalid, PoolTimeoutError("QueuePool limit")):
        assert Setback.of(error, FUNCTION) is LOSS
    assert Setback.of(PendingRollbackError("a failed flush", code="7s2a"), FUNCTION) is None
    assert Setback.of(OSError("of the function"), FUNCTION) is None
    assert [Setback.of(OSError("of asyncpg"), phase) for phase in (BEFORE, COMMIT)] == [OBSTACLE, LOSS]
    assert Setback.of(ValueError("x"), COMMIT) is None


# behaviour: T4
def test_conflicts_are_tried_a_bounded_number_of_times() -> None:
    again = TransactionRetry(conflicts=3)
    waits = [again.wait_before_next(CONFLICT, _error("40001"), what="w") for _ in range(4)]
    assert all(each is not None and 0 <= each <= 2 for each in waits[:3])
    assert waits[3] is None


@pytest.mark.parametrize("state", ["57P03", "53300", "25006", "08006", "53100", "55P03"])
def test_obstacles_are_waited_for_without_an_end(state: str) -> None:
    again = TransactionRetry()
    assert all(again.wait_before_next(OBSTACLE, _error(state), what="w") is not None for _ in range(100))


def test_an_executor_waits_for_what_is_busy_and_not_for_what_is_away() -> None:
    again = TransactionRetry(obstacles=2, outages=False)
    assert again.wait_before_next(LOSS, _error("57P01"), what="w") is None
    assert again.wait_before_next(OBSTACLE, _error("57P03"), what="w") is None
    waits = [again.wait_before_next(OBSTACLE, _error("55P03"), what="w") is not None for _ in range(3)]
    assert waits == [True, True, False]


# behaviour: O2
def test_obstacles_are_logged_and_more_and_more_seldom(caplog: pytest.LogCaptureFixture) -> None:
    again = TransactionRetry()
    for _ in range(20):
        again.wait_before_next(OBSTACLE, _error("55P03"), what="workflow 7, step 'pay'")
    repeats = [record.getMessage().rpartition(" ")[2] for record in caplog.records]
    assert repeats == ["1", "2", "4", "8", "16"]
    assert (
        caplog.records[0]
        .getMessage()
        .startswith("workflow 7, step 'pay': (tests.definitions.test_database_errors.Driver) 55")
    )


@pytest.mark.parametrize(
    ("state", "phase", "said"),
    [
        ("25P03", FUNCTION, "idle_in_transaction_session_timeout is shorter"),
        ("25P03", COMMIT, "before_commit listener"),
        ("25P04", FUNCTION, "transaction_timeout is shorter"),
        ("57P05", FUNCTION, "idle_session_timeout is shorter"),
        ("57P01", FUNCTION, "pg_terminate_backend"),
        (None, FUNCTION, "idle_in_transaction_session_timeout, transaction_timeout and idle_session_timeout"),
    ],
)
def test_the_likely_setting_is_named(state: str | None, phase: Phase, said: str) -> None:
    line = describe(_error(state, lost=True), phase)
    assert said in line
    assert state is None or f"[{state}]" in line
    assert "\n" not in line


def test_waits_after_losses_grow_to_five_seconds() -> None:
    longest = [max(wait_after_loss(count) for _ in range(300)) for count in (1, 3, LOSSES)]
    assert longest[0] <= 0.1 < longest[1] <= 0.4 < longest[2] <= 5
