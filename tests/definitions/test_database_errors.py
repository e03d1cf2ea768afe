"""What errors of the database mean."""

from __future__ import annotations

import psycopg
import pytest
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from sqla_durable.definitions.database_errors import is_conflict, is_outage, is_transient, is_unreachable


class Driver(Exception):
    """An exception of a driver, with PostgreSQL's code."""

    def __init__(self, sqlstate: str | None) -> None:
        super().__init__(sqlstate)
        self.sqlstate = sqlstate


def _error(state: str | None, *, lost: bool = False) -> DBAPIError:
    return DBAPIError("SELECT", None, Driver(state), connection_invalidated=lost)


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
