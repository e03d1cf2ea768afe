"""The checks of the server: its settings, who is connected, and who keeps vacuum from removing dead rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Row

from sqla_durable.definitions.texts import duration_text
from sqla_durable.store import catalogue
from sqla_durable.store.statements import connection_of
from sqla_durable.tools.doctor.findings import (
    Code,
    Examined,
    Finding,
    Severity,
    error,
    note,
    warning,
)

MANY_TRANSACTIONS = 1_000_000
"""How many transactions behind a replica or a slot may be before that is a finding; it has no time of its own."""

MUCH_WAL = 1 << 30
"""How many bytes of WAL an inactive slot may keep."""

FULL = 0.8
"""Which share of the connections may be open."""

NOTED, LARGE = timedelta(seconds=1), timedelta(seconds=30)
"""From which difference between the clocks on there is a note, and a warning."""

_HOLDS = "vacuum removes no row that died since, and claims become slower with each of them"


@dataclass(frozen=True, slots=True)
class _Rule:
    """What a parameter must not be.

    Attributes:
        parameter: its name.
        code, severity: of the finding.
        is_bad: whether a value of it is a finding, as `pg_settings` has it: durations in milliseconds.
        means: what follows from it.
        todo: what to do.
    """

    parameter: str
    code: Code
    severity: Severity
    is_bad: Callable[[str], bool]
    means: str
    todo: str


def _is_off(value: str) -> bool:
    return value == "off"


def _shorter(milliseconds: int) -> Callable[[str], bool]:
    """Make the condition that there is a limit, and that it is shorter than this."""
    return lambda value: 0 < int(value) < milliseconds


_OF_ROLE = "ALTER ROLE ... SET, or connect_args={'options': '-c %s'} of the engine"
_RULES = (
    _Rule(
        "fsync",
        Code.FSYNC_OFF,
        Severity.ERROR,
        _is_off,
        "a crash of the machine may leave the database unreadable",
        "ALTER SYSTEM SET fsync = on; SELECT pg_reload_conf()",
    ),
    _Rule(
        "full_page_writes",
        Code.FULL_PAGE_WRITES_OFF,
        Severity.WARNING,
        _is_off,
        "a crash of the machine may leave pages of which only a part was written",
        "ALTER SYSTEM SET full_page_writes = on; SELECT pg_reload_conf()",
    ),
    _Rule(
        "synchronous_commit",
        Code.SYNCHRONOUS_COMMIT_OFF,
        Severity.WARNING,
        _is_off,
        "a crash of the server loses the commits of the last moments: starts, and checkpoints of steps that are "
        "executed again although they took effect",
        "ALTER SYSTEM RESET synchronous_commit, or for this database or role, wherever it is set",
    ),
    _Rule(
        "autovacuum",
        Code.AUTOVACUUM_OFF,
        Severity.WARNING,
        _is_off,
        "dead rows stay, and claims become slower with each of them",
        "ALTER SYSTEM SET autovacuum = on; SELECT pg_reload_conf()",
    ),
    _Rule(
        "track_counts",
        Code.AUTOVACUUM_OFF,
        Severity.WARNING,
        _is_off,
        "autovacuum does not know what to do, so dead rows stay",
        "ALTER SYSTEM SET track_counts = on; SELECT pg_reload_conf()",
    ),
    _Rule(
        "default_transaction_read_only",
        Code.READ_ONLY,
        Severity.ERROR,
        lambda value: value == "on",
        "workers and starts of this role cannot write",
        "reset it where it is set: for the server, this database or this role",
    ),
    _Rule(
        "default_transaction_isolation",
        Code.ISOLATION_LEVEL,
        Severity.NOTE,
        lambda value: value != "read committed",
        "transactional steps and starts meet conflicts that READ COMMITTED has not, and are tried again",
        "create_engine(..., isolation_level='READ COMMITTED'), and isolation_level= of the steps that need another",
    ),
    _Rule(
        "statement_timeout",
        Code.STATEMENT_TIMEOUT,
        Severity.WARNING,
        _shorter(10_000),
        "statements of workers that find much to do, and of your steps, are ended and tried again",
        f"set 10s or more, or 0, for the role of the workers: {_OF_ROLE % 'statement_timeout=0'}",
    ),
    _Rule(
        "lock_timeout",
        Code.LOCK_TIMEOUT,
        Severity.WARNING,
        _shorter(1_000),
        "what waits for a moment for another transaction fails",
        f"set 1s or more, or 0, for the role of the workers: {_OF_ROLE % 'lock_timeout=0'}",
    ),
    _Rule(
        "idle_in_transaction_session_timeout",
        Code.IDLE_IN_TRANSACTION_TIMEOUT,
        Severity.WARNING,
        _shorter(10_000),
        "a transactional step that computes for longer between two statements loses its connection, and is tried again",
        f"set 10s or more for the role of the workers: {_OF_ROLE % 'idle_in_transaction_session_timeout=60s'}",
    ),
    _Rule(
        "idle_session_timeout",
        Code.IDLE_SESSION_TIMEOUT,
        Severity.WARNING,
        _shorter(60_000),
        "connections of pools and those that listen for hints are closed again and again",
        f"set 0 for the role of the workers: {_OF_ROLE % 'idle_session_timeout=0'}",
    ),
    _Rule(
        "transaction_timeout",
        Code.TRANSACTION_TIMEOUT,
        Severity.WARNING,
        _shorter(30_000),
        "a transactional step that takes longer is ended each time that it is tried",
        f"set more than the longest step takes, or 0: {_OF_ROLE % 'transaction_timeout=0'}",
    ),
    _Rule(
        "DateStyle",
        Code.DATE_STYLE,
        Severity.ERROR,
        lambda value: not value.startswith("ISO"),
        "psycopg reads no times in this style, so nothing of this package works",
        _OF_ROLE % "datestyle=ISO",
    ),
    _Rule(
        "IntervalStyle",
        Code.INTERVAL_STYLE,
        Severity.ERROR,
        lambda value: value != "postgres",
        "psycopg reads no durations in this style, so nothing of this package works",
        _OF_ROLE % "intervalstyle=postgres",
    ),
)
_LIMITS = "max_connections", "superuser_reserved_connections", "reserved_connections"


def check_settings(examined: Examined) -> Iterator[Finding]:
    """Find parameters of the server, the database or the role that will hurt."""
    yield from of_settings(catalogue.settings(examined.session, [each.parameter for each in _RULES]))


def of_settings(values: Mapping[str, str]) -> Iterator[Finding]:
    """Return what is wrong with parameters; those that this server does not know are left out."""
    for rule in _RULES:
        value = values.get(rule.parameter)
        if value is not None and rule.is_bad(value):
            shown = f"{value} ms" if rule.parameter.endswith("timeout") else repr(value)
            found = f"{rule.parameter} is {shown}: {rule.means}."
            parameter = {"parameter": rule.parameter, "value": value}
            yield Finding(rule.code, rule.severity, found, f"{rule.todo}.", parameter)


def check_server(examined: Examined) -> Iterator[Finding]:
    """Find a standby, a pooler in between, a clock that differs, and connections that become few."""
    before = datetime.now(UTC)
    server = catalogue.server(examined.session)
    after = datetime.now(UTC)
    limits = catalogue.settings(examined.session, _LIMITS)
    if server.is_standby:
        todo = "Connect to the primary: several hosts in the URL with target_session_attrs=read-write, for example."
        yield error(Code.STANDBY, "this server is a standby: nothing can be written here.", todo)
    yield from of_clock(server.read_at, before, after)
    yield from of_connections(server, {name: int(value) for name, value in limits.items()})
    yield from of_pooler(server.pid, _pid_of_protocol(examined))


def of_clock(theirs: datetime, before: datetime, after: datetime) -> Iterator[Finding]:
    """Return what follows from the server's clock, read between two moments of this machine's."""
    offset, uncertain = theirs - (before + (after - before) / 2), (after - before) / 2
    difference = abs(offset) - uncertain
    if difference > NOTED:
        ahead = "ahead of" if offset > timedelta(0) else "behind"
        make = warning if difference > LARGE else note
        yield make(
            Code.CLOCK,
            f"the server's clock is {abs(offset).total_seconds():.1f} s {ahead} this machine's. The engine uses the "
            "server's only; times that your code computes here and passes as a deadline or a start are off by that.",
            "Synchronise both by NTP.",
            seconds=offset.total_seconds(),
        )


def of_connections(server: Any, limits: Mapping[str, int]) -> Iterator[Finding]:
    """Return what follows from the number of connections, of the server and of this database."""
    reserved = sum(limits.get(each, 0) for each in _LIMITS[1:])
    most = limits["max_connections"] - reserved
    for used, limit, what in (
        (server.connections, most, "the server's max_connections, less what is reserved"),
        (server.connections_here, server.datconnlimit, f"the CONNECTION LIMIT of the database {server.datname!r}"),
    ):
        if limit >= 0 and used >= FULL * limit:
            yield warning(
                Code.CONNECTIONS,
                f"{used} of {limit} connections are open, by {what}; {server.connections_here} of them are to this "
                "database. Workers wait when there is none.",
                "Use fewer worker processes or a smaller pool_size, put PgBouncer in between, or raise the limit.",
                used=used,
                limit=limit,
            )


def of_pooler(server_pid: int, protocol_pid: int | None) -> Iterator[Finding]:
    """Return whether the process that answers is another one than the connection was opened to."""
    if protocol_pid is not None and protocol_pid != server_pid:
        yield note(
            Code.POOLER,
            "there is a pooler between this machine and the server. In transaction mode it loses prepared statements, "
            "and no hint arrives.",
            "In transaction mode, turn prepared statements off: connect_args={'prepare_threshold': None}; or connect "
            "the workers past it. See docs/databases.md.",
        )


def _pid_of_protocol(examined: Examined) -> int | None:
    """Return the process that the server, or a pooler, named when psycopg connected."""
    info = getattr(connection_of(examined.session).connection.driver_connection, "info", None)
    return getattr(info, "backend_pid", None)


def check_sessions(examined: Examined) -> Iterator[Finding]:
    """Find transactions of this database that have been open for a long time."""
    yield from of_sessions(catalogue.sessions(examined.session), examined.patience)


def of_sessions(rows: Iterable[Any], patience: timedelta) -> Iterator[Finding]:
    """Return what is wrong with the transactions of others."""
    hidden = 0
    for row in rows:
        values = {"pid": row.pid, "role": row.usename, "application": row.application_name, "xmin_age": row.xmin_age}
        who = f"the session {row.pid} of {row.usename!r} ({row.application_name or 'without an application_name'!r})"
        end = f"SELECT pg_terminate_backend({row.pid})"
        if row.is_hidden:
            hidden += 1
        elif (row.state or "").startswith("idle in transaction") and row.in_state_for >= patience:
            yield warning(
                Code.IDLE_IN_TRANSACTION,
                f"{who} has been idle in a transaction for {duration_text(row.in_state_for)}: its locks stay, "
                f"and {_HOLDS}.",
                f"{end}; and let the application commit, or set idle_in_transaction_session_timeout for its role.",
                **values,
            )
        elif row.xmin_age is not None and row.open_for >= patience:
            yield warning(
                Code.OLD_SNAPSHOT,
                f"{who} has a transaction that has been open for {duration_text(row.open_for)}, {row.xmin_age:,} "
                f"transactions behind: {_HOLDS}.",
                f"{end}; let reports and dumps read from a standby without hot_standby_feedback.",
                **values,
            )
    if hidden:
        yield note(
            Code.HIDDEN_SESSIONS,
            f"{hidden} sessions of other roles are hidden from this one: whether they hold dead rows is not known.",
            "GRANT pg_read_all_stats to the role of this command.",
            sessions=hidden,
        )


def check_prepared(examined: Examined) -> Iterator[Finding]:
    """Find prepared transactions that nobody has ended for long."""
    yield from of_prepared(catalogue.prepared(examined.session), examined.patience)


def of_prepared(rows: Sequence[Row[Any]], patience: timedelta) -> Iterator[Finding]:
    """Return those that were prepared long ago."""
    for row in rows:
        if row.open_for >= patience:
            yield warning(
                Code.PREPARED_TRANSACTION,
                f"the prepared transaction {row.gid!r} of {row.owner!r} has been open for "
                f"{duration_text(row.open_for)}: its locks stay through a restart, and {_HOLDS}.",
                f"ROLLBACK PREPARED {_literal(row.gid)}, or COMMIT PREPARED, as its coordinator says.",
                gid=row.gid,
                owner=row.owner,
            )


def check_replication(examined: Examined) -> Iterator[Finding]:
    """Find replication slots and standbys that hold dead rows or WAL."""
    yield from of_slots(catalogue.slots(examined.session))
    yield from of_replicas(catalogue.replicas(examined.session))


def of_slots(rows: Sequence[Row[Any]]) -> Iterator[Finding]:
    """Return slots that hold dead rows, and those that are inactive and keep WAL or have lost it."""
    for row in rows:
        drop = f"SELECT pg_drop_replication_slot({_literal(row.slot_name)}), if nothing will use it again."
        if row.xmin_age is not None and row.xmin_age > MANY_TRANSACTIONS:
            yield warning(
                Code.SLOT_HOLDS_ROWS,
                f"the replication slot {row.slot_name!r} is {row.xmin_age:,} transactions behind: {_HOLDS}.",
                f"End the long query of its standby; or {drop}",
                slot=row.slot_name,
                xmin_age=row.xmin_age,
            )
        is_lost = row.wal_status in ("unreserved", "lost")
        if not row.active and (is_lost or (row.retained or 0) > MUCH_WAL):
            kept = f"keeps {(row.retained or 0) / (1 << 30):.1f} GiB of WAL: the disk may become full"
            said = {
                "lost": "has lost WAL that it needs: what reads from it cannot go on",
                "unreserved": "loses WAL that it needs at the next checkpoint",
            }
            yield warning(
                Code.SLOT_HOLDS_WAL,
                f"the replication slot {row.slot_name!r} is inactive, and {said.get(row.wal_status, kept)}.",
                f"Start what reads from it; or {drop}",
                slot=row.slot_name,
                retained=row.retained,
                wal_status=row.wal_status,
            )


def of_replicas(rows: Sequence[Row[Any]]) -> Iterator[Finding]:
    """Return standbys whose queries hold dead rows here, by hot_standby_feedback."""
    for row in rows:
        if row.xmin_age > MANY_TRANSACTIONS:
            yield warning(
                Code.STANDBY_HOLDS_ROWS,
                f"the standby {row.application_name!r} needs rows of {row.xmin_age:,} transactions ago, by "
                f"hot_standby_feedback: {_HOLDS}.",
                "End the long query there, or turn hot_standby_feedback off on that standby.",
                standby=row.application_name,
                xmin_age=row.xmin_age,
            )


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
