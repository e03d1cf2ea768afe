"""When to try again: a step's own policy, in tenacity's words, and the database errors that call for another try.

Decides and computes; nothing here waits. `operations` waits through its runtime.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeAlias, TypeGuard, cast

import tenacity
from sqlalchemy.exc import DataError, DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from tenacity import RetryCallState

from sqla_durable.definitions.checks import LONGEST
from sqla_durable.definitions.redaction import brief, message_of
from sqla_durable.errors import DefinitionError, KeyNotVisibleError, RetryPolicyError

RetryPredicate: TypeAlias = Callable[[RetryCallState], bool | Awaitable[bool]]
StopPredicate: TypeAlias = Callable[[RetryCallState], bool]
WaitFunction: TypeAlias = Callable[[RetryCallState], float]

# invalid_sql_statement_name, duplicate_prepared_statement: a pooler has given the connection another server process,
# which does not know the statements that the driver has prepared, or knows others under their names.
_MIXED_UP = frozenset({"26000", "42P05"})
# serialization_failure, deadlock_detected: the transaction was right, its timing was not.
_CONFLICTS = frozenset({"40001", "40P01"}) | _MIXED_UP
# connection_exception, operator_intervention but for query_canceled, too_many_connections, read_only_sql_transaction
# (a primary that was replaced), idle_in_transaction_session_timeout, transaction_timeout.
# Source: PostgreSQL manual, appendix A.
_READ_ONLY = "25006"
_OUTAGES = ("08", "57P", "53300", _READ_ONLY, "25P03", "25P04")
# insufficient_resources, object_not_in_prerequisite_state (a lock_timeout), operator_intervention (query_canceled, a
# statement_timeout), system_error, insufficient_privilege, undefined_table, invalid_schema_name: about the server and
# its settings, and not about the values that a statement of ours carries.
# invalid_authorization_specification, invalid_catalog_name: while somebody changes roles or databases.
_OBSTACLES = ("53", "55", "57", "58", "42501", "42P01", "3F000", "28", "3D")
# data_exception, integrity_constraint_violation, program_limit_exceeded, and what PL/pgSQL raises.
_DATA = ("22", "23", "54", "P0")

_UNTRANSLATABLE = ("22P05", "22021")  # untranslatable_character, character_not_in_repertoire

_CANCELLED = "57014"  # query_canceled

_DRIVERS = ("psycopg", "asyncpg", "pg8000", "sqlalchemy.dialects.postgresql")
_EXAMPLES = {
    "retry": "tenacity.retry_if_exception_type(ConnectionError)",
    "stop": "tenacity.stop_after_attempt(5)",
    "wait": "tenacity.wait_fixed(5)",
}
_POOLER = (
    "a pooler such as PgBouncer in transaction mode is in between, and the driver prepares statements: turn that off, "
    'with connect_args={"prepare_threshold": None} for psycopg; for asyncpg see the page on connections'
)
_LONGEST_WAIT = LONGEST.total_seconds()
LONGEST_BACKOFF = 2.0
"""How many seconds at most the engine waits before it tries a transaction again."""

_NOTHING = object()  # where a try has not returned
_backoff = tenacity.wait_random_exponential(multiplier=0.02, max=LONGEST_BACKOFF)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How a step's function is tried again after an error.

    Args:
        retry: which outcomes call for another try; by default any `Exception`.
        stop: when to give up; by default never, as in tenacity, unless nothing at all is given: then after one try.
        wait: seconds before the next try; by default exponential from 0.1 s to 60 s with full jitter.
    """

    retry: RetryPredicate = field(default_factory=tenacity.retry_if_exception_type)
    stop: StopPredicate = tenacity.stop_never
    wait: WaitFunction = field(default_factory=lambda: tenacity.wait_random_exponential(multiplier=0.1, max=60))

    @classmethod
    def of(
        cls, *, retry: RetryPredicate | None, stop: StopPredicate | None, wait: WaitFunction | None
    ) -> RetryPolicy | None:
        """Build a policy of what was given; None means one try.

        Raises:
            DefinitionError: something given is not a tenacity object.
        """
        given = {"retry": retry, "stop": stop, "wait": wait}
        for name, value in given.items():
            if value is not None and (not callable(value) or isinstance(value, type)):
                raise DefinitionError(
                    f"{name}={value!r} is not a tenacity object: pass, for example, {name}={_EXAMPLES[name]}."
                )
        chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return cls(**chosen) if chosen else None

    async def wait_before_next(self, tries: Tries) -> float | None:
        """Give the seconds to wait before the next try, or None when the last outcome stands.

        Raises:
            RetryPolicyError: one of the three raised, or `wait` gave no number of seconds.
        """
        state = tries.state()
        with _refusing(state):
            return await self._ask(tries, state)

    def stops(self, tries: Tries, *, upcoming: float) -> bool:
        """Return whether there is to be no other try, whatever the last outcome was, after a wait of so many seconds.

        Raises:
            RetryPolicyError: `stop` raised.
        """
        state = tries.state()
        state.upcoming_sleep = upcoming
        with _refusing(state):
            return self.stop(state)

    async def _ask(self, tries: Tries, state: RetryCallState) -> float | None:
        if not tries.asked_again:
            verdict = self.retry(state)
            if inspect.isawaitable(verdict):
                verdict = await verdict
            if not verdict:
                return None
        # In tenacity's order: `stop_before_delay` looks at the wait that is to come.
        state.upcoming_sleep = _seconds(self.wait(state))
        return None if self.stop(state) else state.upcoming_sleep


@contextmanager
def _refusing(state: RetryCallState) -> Generator[None]:
    try:
        yield
    except Exception as error:
        outcome = state.outcome.exception() if state.outcome is not None else None
        asked = "" if outcome is None else f", asked about {brief(outcome)}"
        raise RetryPolicyError(f"the step's retry policy failed with {brief(error)}{asked}.") from error


def until_true(policy: RetryPolicy | None, *, wait: WaitFunction | None, timeout: timedelta | None) -> RetryPolicy:
    """Give the policy of a step that is tried until its result is true; errors are the business of its own policy.

    Raises:
        DefinitionError: `wait` is not a tenacity object.
    """
    given = RetryPolicy.of(retry=None, stop=None, wait=wait) or policy or RetryPolicy()
    too_late = tenacity.stop_never if timeout is None else tenacity.stop_after_delay(timeout.total_seconds())

    async def again(state: RetryCallState) -> bool:
        if state.outcome is None or not state.outcome.failed:
            return state.outcome is None or not state.outcome.result()
        verdict = False if policy is None else policy.retry(state)
        return bool(await verdict if inspect.isawaitable(verdict) else verdict)

    def stop(state: RetryCallState) -> bool:
        failed = state.outcome is not None and state.outcome.failed
        return too_late(state) or (failed and policy is not None and policy.stop(state))

    return RetryPolicy(retry=again, stop=stop, wait=given.wait)


def _seconds(given: object) -> float:
    if not isinstance(given, (int, float)) or not given <= _LONGEST_WAIT:
        raise ValueError(f"wait gave {given!r}: give seconds, {_LONGEST_WAIT:.0f} at most")
    return max(0.0, float(given))


class Tries:
    """Counts the tries of one step and shows the last outcome to tenacity."""

    def __init__(self) -> None:
        self.count = 0
        self._began = self._try_began = time.monotonic()
        self._error: BaseException | None = None
        self._value: object = _NOTHING

    @property
    def age(self) -> float:
        """How many seconds ago the first try began."""
        return time.monotonic() - self._began

    @property
    def age_of_try(self) -> float:
        """How many seconds ago the last try began."""
        return time.monotonic() - self._try_began

    @property
    def asked_again(self) -> bool:
        """Whether the last try raised `tenacity.TryAgain`, which asks for another whatever the predicate says."""
        return isinstance(self._error, tenacity.TryAgain)

    def resume(self, *, count: int, age: float) -> None:
        """Go on counting where an earlier attempt was: `count` tries, the first of which began `age` seconds ago."""
        self.count = count
        self._began = time.monotonic() - age

    def begin(self) -> None:
        """Count another try."""
        self.count += 1
        self._try_began = time.monotonic()

    def forget(self) -> None:
        """Count the last try out again: the database undid it, and it was not the step's doing."""
        self.count -= 1

    def failed(self, error: BaseException) -> None:
        """Note that the last try raised."""
        self._error, self._value = error, _NOTHING

    def returned(self, value: object) -> None:
        """Note that the last try returned."""
        self._error, self._value = None, value

    def state(self) -> RetryCallState:
        """Give the state that tenacity's predicates read."""
        state = RetryCallState(tenacity.Retrying(), None, (), {})
        state.start_time = self._began
        state.attempt_number = self.count
        state.outcome = self._outcome()
        state.outcome_timestamp = time.monotonic()
        return state

    def _outcome(self) -> tenacity.Future | None:
        """Build what tenacity reads: a future with a lock in it, for those only that ask."""
        outcome = tenacity.Future(self.count)
        if self._error is not None:
            outcome.set_exception(self._error)
        elif self._value is not _NOTHING:
            outcome.set_result(self._value)
        else:
            return None
        return outcome


class ObstacleRetry:
    """Decides how a statement of the engine's own is tried again: for as long as the obstacle is there."""

    def __init__(self) -> None:
        self._tries = Tries()

    def wait_before_next(self, error: BaseException) -> float | None:
        """Give the seconds to wait, or None when the error is to stand."""
        if not is_obstacle(error):
            return None
        self._tries.begin()
        return backoff(self._tries)


def backoff(tries: Tries) -> float:
    """Return the seconds after which the engine tries a transaction again: at random, and more after each try."""
    return float(_backoff(tries.state()))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, without values, and what to do about it where that is known."""
    line = next(iter(message_of(error).splitlines()), "") or brief(error)
    return f"{line} ({_POOLER})" if is_mixed_up(error) else line


def is_transient(error: BaseException) -> bool:
    """Tell whether the whole transaction may be tried again: conflict, lost connection, failover, exhausted pool."""
    return isinstance(error, PoolTimeoutError) or is_conflict(error) or is_outage(error)


def is_conflict(error: BaseException) -> bool:
    """Tell whether PostgreSQL chose this transaction to lose against another, or a pooler has spoilt it."""
    if isinstance(error, KeyNotVisibleError):
        return error.is_newer
    return isinstance(error, DBAPIError) and sqlstate(error) in _CONFLICTS


def is_outage(error: BaseException) -> TypeGuard[DBAPIError]:
    """Tell whether the server or the way to it is lost for now."""
    if not isinstance(error, DBAPIError):
        return False
    state = sqlstate(error)
    if error.connection_invalidated or state is None:
        return error.connection_invalidated or _is_no_answer(error) or _finds_no_primary(error)
    return state.startswith(_OUTAGES)


def _is_no_answer(error: DBAPIError) -> bool:
    """Tell whether a PostgreSQL driver got no answer; other databases' drivers call everything operational."""
    of_postgresql = type(error.orig).__module__.startswith(_DRIVERS) or isinstance(error.orig, OSError)
    return isinstance(error, OperationalError) and of_postgresql


def _finds_no_primary(error: DBAPIError) -> bool:
    """Tell whether asyncpg found no server with the `target_session_attrs` of the URL: in a failover there is none."""
    return type(getattr(error.orig, "__cause__", None)).__name__ == "TargetServerAttributeNotMatched"


def spoils_connection(error: BaseException) -> bool:
    """Tell whether the connection is sound and yet not to be used again.

    Its server has become a standby, or its driver and the server no longer agree on what is prepared.
    """
    return is_read_only(error) or is_mixed_up(error)


def is_untranslatable(error: BaseException) -> bool:
    """Return whether a text holds characters that the encoding of the database does not have."""
    return isinstance(error, DBAPIError) and sqlstate(error) in _UNTRANSLATABLE


def is_read_only(error: BaseException) -> bool:
    """Return whether the server takes no writes: it is a standby, or its transactions are read only by a setting."""
    return isinstance(error, DBAPIError) and sqlstate(error) == _READ_ONLY


def is_mixed_up(error: BaseException) -> bool:
    """Tell whether a pooler in transaction mode has mixed up prepared statements."""
    return isinstance(error, DBAPIError) and sqlstate(error) in _MIXED_UP


def is_obstacle(error: BaseException) -> bool:
    """Tell whether a statement of the engine's own is to be tried again, because its values are not the reason.

    Wider than `is_transient`, for which a user's statement that was cancelled is the user's error. An `OSError` is an
    async driver that cannot connect: SQLAlchemy hands asyncpg's on as it is.
    """
    if is_transient(error) or isinstance(error, OSError):
        return True
    # SQLAlchemy 2.0 hands what asyncpg raises while it connects on as it is.
    state = sqlstate(error) if isinstance(error, DBAPIError) else getattr(error, "sqlstate", None)
    return str(state or "").startswith((*_OBSTACLES, *_OUTAGES))


def is_out_of_time(error: BaseException) -> bool:
    """Return whether the time limit of a statement is over: the worker's own, or the server's `statement_timeout`."""
    return isinstance(error, TimeoutError) or (isinstance(error, DBAPIError) and sqlstate(error) == _CANCELLED)


def is_about_data(error: BaseException) -> bool:
    """Return whether a value in a row made a statement fail: the server refuses it, or the driver cannot read it.

    A constraint or a trigger of the application that refuses a row is about that row, too.
    """
    if not isinstance(error, DBAPIError):
        return isinstance(error, (ValueError, ArithmeticError, RecursionError))
    state = sqlstate(error)
    return isinstance(error, DataError) if state is None else state.startswith(_DATA)


def is_unreachable(error: BaseException) -> bool:
    """Tell whether no connection could be made: no server, or one that does not let us in (codes 28 and 3D)."""
    if not isinstance(error, DBAPIError):
        return isinstance(error, OSError)
    return is_outage(error) or isinstance(error, OperationalError) or (sqlstate(error) or "").startswith(("28", "3D"))


def sqlstate(error: DBAPIError) -> str | None:
    """Return the five characters of PostgreSQL's error code, from the exception of any driver."""
    found = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)  # the latter of psycopg2
    first: Any = next(iter(getattr(error.orig, "args", ())), None)
    if found is None and isinstance(first, dict):  # of pg8000: the server's fields
        found = cast("dict[str, str]", first).get("C")
    return found


def mark_engine_error(error: Exception) -> None:
    """Mark what a statement of the engine's own met, wherever it was executed: in a step's function too."""
    error._sqla_durable = True  # type: ignore[attr-defined]  # pyright: ignore


def is_engine_error(error: BaseException) -> bool:
    """Return whether a statement of the engine's own met this."""
    return getattr(error, "_sqla_durable", False)
