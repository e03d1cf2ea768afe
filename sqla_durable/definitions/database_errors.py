"""What an error of the database means: a conflict, an outage, another obstacle for the engine, or a fault in the data.

Decided by PostgreSQL's error codes, from the exceptions of any driver. When to try again is decided in `retry` and in
`operations.transaction_retries`.
"""

from __future__ import annotations

from typing import Any, TypeGuard, cast

from sqlalchemy.exc import DataError, DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from sqla_durable.definitions.redaction import brief, message_of
from sqla_durable.errors import KeyNotVisibleError

# invalid_sql_statement_name, duplicate_prepared_statement: a pooler has switched the connection to another server
# process, which does not have the statements that the driver prepared, or has others under their names.
_POOLER_MIXUPS = frozenset({"26000", "42P05"})
# serialization_failure, deadlock_detected: the same transaction may succeed when it is executed again.
_CONFLICTS = frozenset({"40001", "40P01"}) | _POOLER_MIXUPS
# connection_exception, operator_intervention but for query_canceled, too_many_connections, read_only_sql_transaction
# (after a failover), idle_in_transaction_session_timeout, transaction_timeout.
# Source: PostgreSQL manual, appendix A.
_READ_ONLY = "25006"
_OUTAGES = ("08", "57P", "53300", _READ_ONLY, "25P03", "25P04")
# insufficient_resources, object_not_in_prerequisite_state (a lock_timeout), operator_intervention (query_canceled, a
# statement_timeout), system_error, insufficient_privilege, undefined_table, invalid_schema_name: caused by the server
# and its settings, and not by the values in a statement.
# invalid_authorization_specification, invalid_catalog_name: while roles or databases are being changed.
_OBSTACLES = ("53", "55", "57", "58", "42501", "42P01", "3F000", "28", "3D")
# data_exception, integrity_constraint_violation, program_limit_exceeded, and errors that PL/pgSQL code raises.
_DATA = ("22", "23", "54", "P0")

_UNTRANSLATABLE = ("22P05", "22021")  # untranslatable_character, character_not_in_repertoire

_CANCELLED = "57014"  # query_canceled

_DRIVERS = ("psycopg", "asyncpg", "pg8000", "sqlalchemy.dialects.postgresql")
_POOLER = (
    "a pooler such as PgBouncer in transaction mode is used, and the driver prepares statements: turn that off, "
    'with connect_args={"prepare_threshold": None} for psycopg; for asyncpg see the page on connections'
)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, without values, and what to do about it where that is known."""
    line = next(iter(message_of(error).splitlines()), "") or brief(error)
    return f"{line} ({_POOLER})" if is_pooler_mixup(error) else line


def is_transient(error: BaseException) -> bool:
    """Return whether to try the whole transaction again: conflict, lost connection, failover, exhausted pool."""
    return isinstance(error, PoolTimeoutError) or is_conflict(error) or is_outage(error)


def is_conflict(error: BaseException) -> bool:
    """Return whether PostgreSQL aborted the transaction in favour of another, or a pooler or a changed table did."""
    if isinstance(error, KeyNotVisibleError):
        return error.is_newer
    return isinstance(error, DBAPIError) and (sqlstate(error) in _CONFLICTS or is_stale_plan(error))


def is_outage(error: BaseException) -> TypeGuard[DBAPIError]:
    """Return whether the server cannot be reached or used for now."""
    if not isinstance(error, DBAPIError):
        return False
    state = sqlstate(error)
    if error.connection_invalidated or state is None:
        return error.connection_invalidated or _is_no_answer(error) or _finds_no_primary(error)
    return state.startswith(_OUTAGES)


def _is_no_answer(error: DBAPIError) -> bool:
    """Return whether a PostgreSQL driver got no answer; drivers of other databases use this class for any error."""
    of_postgresql = type(error.orig).__module__.startswith(_DRIVERS) or isinstance(error.orig, OSError)
    return isinstance(error, OperationalError) and of_postgresql


def _finds_no_primary(error: DBAPIError) -> bool:
    """Return whether asyncpg found no server with the `target_session_attrs` of the URL, as during a failover."""
    return type(getattr(error.orig, "__cause__", None)).__name__ == "TargetServerAttributeNotMatched"


def spoils_connection(error: BaseException) -> bool:
    """Return whether the connection works but must not be used again.

    Its server has become a standby, or its driver and the server disagree about prepared statements.
    """
    return is_read_only(error) or is_pooler_mixup(error) or is_stale_plan(error)


def is_untranslatable(error: BaseException) -> bool:
    """Return whether a text has characters that the encoding of the database, or of the client, does not have."""
    return isinstance(error, UnicodeEncodeError) or (
        isinstance(error, DBAPIError) and sqlstate(error) in _UNTRANSLATABLE
    )


def is_read_only(error: BaseException) -> bool:
    """Return whether the server accepts no writes: it is a standby, or its transactions are read-only by a setting."""
    return isinstance(error, DBAPIError) and sqlstate(error) == _READ_ONLY


def is_pooler_mixup(error: BaseException) -> bool:
    """Return whether a pooler in transaction mode has mixed up prepared statements."""
    return isinstance(error, DBAPIError) and sqlstate(error) in _POOLER_MIXUPS


def is_stale_plan(error: BaseException) -> bool:
    """Return whether a prepared statement was not executed because the type of a column has changed since.

    The server's code for this, 0A000, has many other meanings; its text depends on the server's language.
    """
    if not isinstance(error, DBAPIError):
        return False
    function = getattr(getattr(error.orig, "diag", None), "source_function", None)  # of psycopg
    return function == "RevalidateCachedQuery" or type(error.orig).__name__ == "InvalidCachedStatementError"


def is_obstacle(error: BaseException) -> bool:
    """Return whether to try a statement of the engine's own again, because its values did not cause the error.

    Wider than `is_transient`, which does not include a cancelled statement: of the user's, that is the user's error. An
    `OSError` is raised by asyncpg when it cannot connect; SQLAlchemy does not wrap it.
    """
    if is_transient(error) or isinstance(error, OSError):
        return True
    # SQLAlchemy 2.0 does not wrap what asyncpg raises while it connects.
    state = sqlstate(error) if isinstance(error, DBAPIError) else getattr(error, "sqlstate", None)
    return str(state or "").startswith((*_OBSTACLES, *_OUTAGES))


def is_out_of_time(error: BaseException) -> bool:
    """Return whether a statement took too long for the worker's limit or the server's `statement_timeout`."""
    return isinstance(error, TimeoutError) or (isinstance(error, DBAPIError) and sqlstate(error) == _CANCELLED)


def is_about_data(error: BaseException) -> bool:
    """Return whether a value in a row made a statement fail: the server refuses it, or the driver cannot read it.

    This includes a constraint or a trigger of the application that refuses a row.
    """
    if not isinstance(error, DBAPIError):
        return isinstance(error, (ValueError, ArithmeticError, RecursionError))
    state = sqlstate(error)
    return isinstance(error, DataError) if state is None else state.startswith(_DATA)


def is_unreachable(error: BaseException) -> bool:
    """Return whether no connection could be made: no server, or one that refuses the login (codes 28 and 3D)."""
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
    """Mark an error as raised by a statement of the engine's own, which may be executed in a step's function."""
    error._sqla_durable = True  # type: ignore[attr-defined]  # pyright: ignore


def is_engine_error(error: BaseException) -> bool:
    """Return whether an error was marked as raised by a statement of the engine's own."""
    return getattr(error, "_sqla_durable", False)
