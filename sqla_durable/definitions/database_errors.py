"""What an error of the database means: a conflict, an outage, an obstacle for the engine, or the fault of some data.

Decided by PostgreSQL's error codes, from the exceptions of any driver. When to try again is decided in `retry` and in
`operations.transaction_retries`.
"""

from __future__ import annotations

from typing import Any, TypeGuard, cast

from sqlalchemy.exc import DataError, DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from sqla_durable.definitions.redaction import brief, message_of
from sqla_durable.errors import KeyNotVisibleError

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
_POOLER = (
    "a pooler such as PgBouncer in transaction mode is in between, and the driver prepares statements: turn that off, "
    'with connect_args={"prepare_threshold": None} for psycopg; for asyncpg see the page on connections'
)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, without values, and what to do about it where that is known."""
    line = next(iter(message_of(error).splitlines()), "") or brief(error)
    return f"{line} ({_POOLER})" if is_pooler_mixup(error) else line


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
    return is_read_only(error) or is_pooler_mixup(error)


def is_untranslatable(error: BaseException) -> bool:
    """Return whether a text holds characters that the encoding of the database does not have."""
    return isinstance(error, DBAPIError) and sqlstate(error) in _UNTRANSLATABLE


def is_read_only(error: BaseException) -> bool:
    """Return whether the server takes no writes: it is a standby, or its transactions are read only by a setting."""
    return isinstance(error, DBAPIError) and sqlstate(error) == _READ_ONLY


def is_pooler_mixup(error: BaseException) -> bool:
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
