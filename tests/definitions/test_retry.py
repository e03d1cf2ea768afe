"""When to try again."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
import tenacity
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from sqla_durable.definitions.database_errors import is_conflict, is_outage, is_transient, is_unreachable
from sqla_durable.definitions.retry import RetryPolicy, Tries
from sqla_durable.errors import DefinitionError
from sqla_durable.operations.runtime import run_blocking


class Driver(Exception):
    """An exception of a driver, with PostgreSQL's code."""

    def __init__(self, sqlstate: str | None) -> None:
        super().__init__(sqlstate)
        self.sqlstate = sqlstate


def _error(state: str | None, *, lost: bool = False) -> DBAPIError:
    return DBAPIError("SELECT", None, Driver(state), connection_invalidated=lost)


def _tried(error: Exception, *, count: int = 1) -> Tries:
    tries = Tries()
    for _ in range(count):
        tries.begin()
    tries.failed(error)
    return tries


def _decide(policy: RetryPolicy, tries: Tries) -> float | None:
    return run_blocking(policy.wait_before_next(tries))


def test_nothing_given_is_one_try() -> None:
    assert RetryPolicy.of(retry=None, stop=None, wait=None) is None


def test_stop_alone_tries_any_exception_again() -> None:
    policy = RetryPolicy.of(retry=None, stop=tenacity.stop_after_attempt(3), wait=None)
    assert policy is not None
    assert _decide(policy, _tried(ValueError(), count=2)) is not None
    assert _decide(policy, _tried(ValueError(), count=3)) is None


def test_predicate_decides() -> None:
    policy = RetryPolicy.of(retry=tenacity.retry_if_exception_type(OSError), stop=None, wait=tenacity.wait_fixed(3))
    assert policy is not None
    assert _decide(policy, _tried(ConnectionError())) == 3
    assert _decide(policy, _tried(ValueError())) is None


def test_wait_grows_with_the_tries() -> None:
    policy = RetryPolicy.of(retry=None, stop=None, wait=tenacity.wait_exponential(multiplier=1))
    assert policy is not None
    waits = [_decide(policy, _tried(ValueError(), count=count)) for count in (1, 2, 3, 4)]
    assert waits == [1, 2, 4, 8]


def test_returned_value_is_not_tried_again_by_default() -> None:
    policy = RetryPolicy.of(retry=None, stop=tenacity.stop_after_attempt(3), wait=None)
    tries = Tries()
    tries.begin()
    tries.returned("value")
    assert policy is not None
    assert _decide(policy, tries) is None


@pytest.mark.parametrize("name", ["retry", "stop", "wait"])
def test_something_that_is_not_tenacitys_is_refused(name: str) -> None:
    given: dict[str, Any] = {"retry": None, "stop": None, "wait": None, name: 3}
    with pytest.raises(DefinitionError, match=f"{name}=3 is not a tenacity object: pass, for example"):
        RetryPolicy.of(**given)


@pytest.mark.parametrize("state", ["57P01", "57P02", "57P03", "53300", "25006", "25P03", "25P04", "08006", "08003"])
def test_outages_are_known_by_their_codes(state: str) -> None:
    assert is_outage(_error(state))


@pytest.mark.parametrize("state", ["23505", "23514", "22012", "42P01", "42501", "57014", "55P03"])
def test_other_errors_of_the_database_are_not_transient(state: str) -> None:
    assert not is_transient(_error(state))


def test_errors_without_a_code() -> None:
    assert is_outage(_error(None, lost=True))
    assert is_outage(OperationalError("SELECT", None, psycopg.OperationalError("server closed the connection")))
    assert not is_outage(IntegrityError("INSERT", None, psycopg.IntegrityError("x")))
    assert not is_outage(ValueError("x"))
    assert is_transient(PoolTimeoutError("QueuePool limit"))
    assert not is_conflict(ValueError("40001"))


@pytest.mark.parametrize("state", ["28000", "28P01", "3D000", "08001", "57P03"])
def test_database_that_does_not_let_us_in_is_unreachable(state: str) -> None:
    assert is_unreachable(_error(state))
    assert not is_unreachable(_error("42501"))
    assert is_unreachable(ConnectionRefusedError())
