"""What an examination finds: the findings with their codes and severities, and what the checks examine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy.orm import Session


class Severity(StrEnum):
    """How bad a finding is: something is broken or stands still; it will hurt, or may not be meant; worth knowing."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


class Code(StrEnum):
    """The names of the findings, which programs may rely on; docs/doctor.md describes each of them."""

    SCHEMA_MISSING = "schema_missing"
    SCHEMA_OLDER = "schema_older"
    SCHEMA_NEWER = "schema_newer"
    ALEMBIC_DIFFERS = "alembic_differs"
    MISSING_TABLE = "missing_table"
    TABLE_UNLOGGED = "table_unlogged"
    MISSING_COLUMN = "missing_column"
    COLUMN_DIFFERS = "column_differs"
    COLUMN_REQUIRED = "column_required"
    MISSING_CONSTRAINT = "missing_constraint"
    CONSTRAINT_UNCHECKED = "constraint_unchecked"
    MISSING_INDEX = "missing_index"
    INDEX_DIFFERS = "index_differs"
    INVALID_INDEX = "invalid_index"
    MISSING_TRIGGER = "missing_trigger"
    TRIGGER_DISABLED = "trigger_disabled"
    MISSING_VIEW = "missing_view"
    VIEW_OF_OWNER = "view_of_owner"
    MISSING_RIGHTS = "missing_rights"
    MISSING_STORAGE = "missing_storage"
    AUTOVACUUM_OFF = "autovacuum_off"
    DEAD_ROWS = "dead_rows"
    OLD_SNAPSHOT = "old_snapshot"
    IDLE_IN_TRANSACTION = "idle_in_transaction"
    PREPARED_TRANSACTION = "prepared_transaction"
    SLOT_HOLDS_ROWS = "slot_holds_rows"
    SLOT_HOLDS_WAL = "slot_holds_wal"
    STANDBY_HOLDS_ROWS = "standby_holds_rows"
    HIDDEN_SESSIONS = "hidden_sessions"
    STANDBY = "standby"
    READ_ONLY = "read_only"
    CONNECTIONS = "connections"
    CLOCK = "clock"
    POOLER = "pooler"
    FSYNC_OFF = "fsync_off"
    FULL_PAGE_WRITES_OFF = "full_page_writes_off"
    SYNCHRONOUS_COMMIT_OFF = "synchronous_commit_off"
    ISOLATION_LEVEL = "isolation_level"
    STATEMENT_TIMEOUT = "statement_timeout"
    LOCK_TIMEOUT = "lock_timeout"
    IDLE_IN_TRANSACTION_TIMEOUT = "idle_in_transaction_timeout"
    IDLE_SESSION_TIMEOUT = "idle_session_timeout"
    TRANSACTION_TIMEOUT = "transaction_timeout"
    DATE_STYLE = "date_style"
    INTERVAL_STYLE = "interval_style"
    DEAD_WORKER = "dead_worker"
    UNRECLAIMED = "unreclaimed"
    UNKNOWN_WORKER = "unknown_worker"
    NO_WORKER = "no_worker"
    QUEUE_UNCLAIMED = "queue_unclaimed"
    NAME_UNCLAIMED = "name_unclaimed"
    VERSION_UNCLAIMED = "version_unclaimed"
    BACKLOG = "backlog"
    TIMERS_OVERDUE = "timers_overdue"
    DEADLINES_OVERDUE = "deadlines_overdue"
    UNDELIVERED = "undelivered"
    WAIT_OVER = "wait_over"
    QUEUE_PAUSED = "queue_paused"
    KEY_PAUSED = "key_paused"
    KEY_BLOCKED = "key_blocked"
    SCHEDULE_OVERDUE = "schedule_overdue"
    SCHEDULE_UNDECLARED = "schedule_undeclared"
    NOT_CHECKED = "not_checked"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong or will hurt.

    Attributes:
        code: which kind of finding it is.
        severity: how bad it is.
        found: what was found, in a sentence with its values.
        todo: what to do: a statement, a command or a sentence.
        values: the values for a program.
    """

    code: Code
    severity: Severity
    found: str
    todo: str
    values: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class Examined:
    """What a check examines.

    Attributes:
        session: a session that may only read, in a transaction of the check's own.
        schema: the schema of our tables.
        patience: from how long on something that waits is a finding.
    """

    session: Session
    schema: str
    patience: timedelta


def error(code: Code, found: str, todo: str, **values: Any) -> Finding:
    """Return a finding of something that is broken or stands still."""
    return Finding(code, Severity.ERROR, found, todo, values)


def warning(code: Code, found: str, todo: str, **values: Any) -> Finding:
    """Return a finding of something that will hurt, or may not be meant."""
    return Finding(code, Severity.WARNING, found, todo, values)


def note(code: Code, found: str, todo: str, **values: Any) -> Finding:
    """Return a finding that is worth knowing."""
    return Finding(code, Severity.NOTE, found, todo, values)


def are(number: int, most: int, noun: str = "workflow") -> str:
    """Return the beginning of a sentence on a number of things, of which at most so many were read."""
    return f"1 {noun} is" if number == 1 else f"{number:,}{' or more' if number >= most else ''} {noun}s are"
