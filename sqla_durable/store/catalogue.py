"""What PostgreSQL's catalogues and statistics say of our tables, of the server, and of who is connected.

Everything here only reads, takes no lock of a row, and costs the same however many workflows there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sqla_durable.store.statements import execute, pg, scalars

Rows = Sequence[sa.Row[Any]]


def limit_reading(session: Session, milliseconds: int) -> None:
    """Let the session's transaction only read, each statement for so long at most, and in styles that psycopg reads."""
    execute(session, _LIMIT_READING, {"statement": str(milliseconds), "lock": str(milliseconds // 5)})


def settings(session: Session, names: Sequence[str]) -> Mapping[str, str]:
    """Return the parameters of the server that a new session of this role has, in the units of `pg_settings`."""
    return {row.name: row.reset_val for row in execute(session, _SETTINGS, {"names": list(names)})}


def server(session: Session) -> sa.Row[Any]:
    """Return the time, whether this is a standby, this process, and how many connections there are."""
    return execute(session, _SERVER).one()


def sessions(session: Session) -> Rows:
    """Return the transactions that are open in this database, but for one's own, oldest first."""
    return execute(session, _SESSIONS).all()


def prepared(session: Session) -> Rows:
    """Return the prepared transactions of this database, oldest first."""
    return execute(session, _PREPARED).all()


def slots(session: Session) -> Rows:
    """Return the replication slots, with what each of them holds."""
    return execute(session, _SLOTS).all()


def replicas(session: Session) -> Rows:
    """Return the standbys that are connected and report what their queries still need."""
    return execute(session, _REPLICAS).all()


def relations(session: Session, schema: str) -> Rows:
    """Return the tables and views of a schema, with their storage parameters, comments and statistics."""
    return execute(session, _RELATIONS, {"schema": schema}).all()


def columns(session: Session, schema: str) -> Rows:
    """Return the columns of the tables of a schema."""
    return execute(session, _COLUMNS, {"schema": schema}).all()


def constraints(session: Session, schema: str) -> Rows:
    """Return the constraints of the tables of a schema."""
    return execute(session, _CONSTRAINTS, {"schema": schema}).all()


def indexes(session: Session, schema: str) -> Rows:
    """Return the indexes of the tables of a schema."""
    return execute(session, _INDEXES, {"schema": schema}).all()


def triggers(session: Session, schema: str) -> Rows:
    """Return the triggers of the tables of a schema."""
    return execute(session, _TRIGGERS, {"schema": schema}).all()


def rights(session: Session, schema: str) -> Rows:
    """Return what this role may do with each table of a schema."""
    return execute(session, _RIGHTS, {"schema": schema}).all()


def alembic_revisions(session: Session) -> set[str]:
    """Return the revisions of this package in all of Alembic's tables of versions that this role may read."""
    found: set[str] = set()
    for row in execute(session, _VERSION_TABLES):
        table = sa.table(row.relname, sa.column("version_num", sa.Text()), schema=row.nspname)
        version = sa.cast(table.c.version_num, sa.Text)
        ours = pg.starts_with(version, sa.cast(sa.literal("durable_", sa.Text()), sa.Text))
        found.update(scalars(session, sa.select(version).where(ours)))
    return found


def statistics_since(session: Session) -> datetime | None:
    """Return since when the server counts for this database; None if that was never reset."""
    found: datetime | None = execute(session, _STATISTICS_SINCE).scalar_one()
    return found


_LIMIT_READING = sa.text(
    """
SELECT pg_catalog.set_config('transaction_read_only', 'on', true),
  pg_catalog.set_config('statement_timeout', CAST(:statement AS text), true),
  pg_catalog.set_config('lock_timeout', CAST(:lock AS text), true),
  pg_catalog.set_config('datestyle', 'ISO', true), pg_catalog.set_config('intervalstyle', 'postgres', true)"""
)
_SETTINGS = sa.text("SELECT name, reset_val FROM pg_catalog.pg_settings WHERE name = ANY (CAST(:names AS text[]))")
_SERVER = sa.text(
    """
SELECT pg_catalog.statement_timestamp() AS read_at, pg_catalog.pg_is_in_recovery() AS is_standby,
  pg_catalog.pg_backend_pid() AS pid, d.datname, d.datconnlimit,
  (SELECT CAST(pg_catalog.sum(s.numbackends) AS integer) FROM pg_catalog.pg_stat_database AS s) AS connections,
  (SELECT s.numbackends FROM pg_catalog.pg_stat_database AS s WHERE s.datid = d.oid) AS connections_here
FROM pg_catalog.pg_database AS d WHERE d.datname = pg_catalog.current_database()"""
)
# The sessions of other roles are hidden from a role that is no member of pg_read_all_stats: they have no backend_type.
_SESSIONS = sa.text(
    """
SELECT a.pid, a.usename, a.application_name, a.state, a.backend_type IS NULL AS is_hidden,
  pg_catalog.statement_timestamp() - a.xact_start AS open_for,
  pg_catalog.statement_timestamp() - a.state_change AS in_state_for,
  pg_catalog.age(a.backend_xmin) AS xmin_age
FROM pg_catalog.pg_stat_activity AS a
WHERE a.datname = pg_catalog.current_database() AND a.pid <> pg_catalog.pg_backend_pid()
  AND (a.backend_type IS NULL OR (a.backend_type = 'client backend' AND a.xact_start IS NOT NULL))
  AND NOT EXISTS (SELECT FROM pg_catalog.pg_stat_progress_vacuum AS v WHERE v.pid = a.pid)
ORDER BY a.xact_start, a.pid"""
)
_PREPARED = sa.text(
    """
SELECT p.gid, p.owner, pg_catalog.statement_timestamp() - p.prepared AS open_for,
  pg_catalog.age(p.transaction) AS xmin_age
FROM pg_catalog.pg_prepared_xacts AS p WHERE p.database = pg_catalog.current_database() ORDER BY p.prepared"""
)
_SLOTS = sa.text(
    """
SELECT s.slot_name, s.slot_type, s.active, s.wal_status, pg_catalog.age(s.xmin) AS xmin_age,
  CAST(pg_catalog.pg_wal_lsn_diff(CASE WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_last_wal_replay_lsn()
    ELSE pg_catalog.pg_current_wal_lsn() END, s.restart_lsn) AS bigint) AS retained
FROM pg_catalog.pg_replication_slots AS s ORDER BY s.slot_name"""
)
_REPLICAS = sa.text(
    """
SELECT r.pid, r.application_name, pg_catalog.age(r.backend_xmin) AS xmin_age
FROM pg_catalog.pg_stat_replication AS r WHERE r.backend_xmin IS NOT NULL ORDER BY r.pid"""
)
_RELATIONS = sa.text(
    """
SELECT c.relname, CAST(c.relkind AS text) AS kind, CAST(c.relpersistence AS text) AS persistence,
  coalesce(c.reloptions, CAST('{}' AS text[])) AS options, pg_catalog.obj_description(c.oid, 'pg_class') AS comment,
  pg_catalog.pg_stat_get_live_tuples(c.oid) AS live, pg_catalog.pg_stat_get_dead_tuples(c.oid) AS dead,
  greatest(pg_catalog.pg_stat_get_last_autovacuum_time(c.oid), pg_catalog.pg_stat_get_last_vacuum_time(c.oid))
    AS vacuumed_at
FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.nspname = CAST(:schema AS text) AND c.relkind IN ('r', 'p', 'v') ORDER BY c.relname"""
)
_COLUMNS = sa.text(
    """
SELECT c.relname, a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod) AS type, a.attnotnull AS not_null,
  a.atthasdef OR a.attidentity <> '' AS has_default
FROM pg_catalog.pg_attribute AS a JOIN pg_catalog.pg_class AS c ON c.oid = a.attrelid
JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.nspname = CAST(:schema AS text) AND c.relkind IN ('r', 'p') AND a.attnum > 0 AND NOT a.attisdropped
ORDER BY c.relname, a.attnum"""
)
# conenforced is there from PostgreSQL 18 on.
_CONSTRAINTS = sa.text(
    """
SELECT c.relname, k.conname, k.convalidated AS is_validated,
  coalesce(pg_catalog.to_jsonb(k) ->> text 'conenforced', 'true') = 'true' AS is_enforced
FROM pg_catalog.pg_constraint AS k JOIN pg_catalog.pg_class AS c ON c.oid = k.conrelid
JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.nspname = CAST(:schema AS text) ORDER BY c.relname, k.conname"""
)
_INDEXES = sa.text(
    """
SELECT t.relname, i.relname AS name, x.indisvalid AS is_valid, x.indisunique AS is_unique,
  x.indpred IS NOT NULL AS is_partial, m.amname AS method,
  ARRAY(SELECT CAST(a.attname AS text) FROM pg_catalog.pg_attribute AS a
    WHERE a.attrelid = x.indexrelid AND a.attnum <= x.indnkeyatts ORDER BY a.attnum) AS keys,
  EXISTS (SELECT FROM pg_catalog.pg_stat_progress_create_index AS p WHERE p.index_relid = x.indexrelid) AS is_building
FROM pg_catalog.pg_index AS x JOIN pg_catalog.pg_class AS i ON i.oid = x.indexrelid
JOIN pg_catalog.pg_class AS t ON t.oid = x.indrelid JOIN pg_catalog.pg_namespace AS n ON n.oid = t.relnamespace
JOIN pg_catalog.pg_am AS m ON m.oid = i.relam
WHERE n.nspname = CAST(:schema AS text) ORDER BY t.relname, i.relname"""
)
_TRIGGERS = sa.text(
    """
SELECT c.relname, t.tgname, t.tgenabled <> 'D' AS is_enabled
FROM pg_catalog.pg_trigger AS t JOIN pg_catalog.pg_class AS c ON c.oid = t.tgrelid
JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.nspname = CAST(:schema AS text) AND NOT t.tgisinternal ORDER BY c.relname, t.tgname"""
)
_RIGHTS = sa.text(
    """
SELECT c.relname, CAST(CURRENT_USER AS text) AS role, pg_catalog.has_schema_privilege(n.oid, 'USAGE') AS usage,
  pg_catalog.has_table_privilege(c.oid, 'SELECT') AS select,
  pg_catalog.has_any_column_privilege(c.oid, 'INSERT') AS insert,
  pg_catalog.has_any_column_privilege(c.oid, 'UPDATE') AS update,
  pg_catalog.has_table_privilege(c.oid, 'DELETE') AS delete
FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.nspname = CAST(:schema AS text) AND c.relkind IN ('r', 'p') ORDER BY c.relname"""
)
_VERSION_TABLES = sa.text(
    """
SELECT n.nspname, c.relname FROM pg_catalog.pg_attribute AS a JOIN pg_catalog.pg_class AS c ON c.oid = a.attrelid
JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
WHERE a.attname = 'version_num' AND c.relkind = 'r' AND pg_catalog.has_schema_privilege(n.oid, 'USAGE')
  AND pg_catalog.has_table_privilege(c.oid, 'SELECT') ORDER BY n.nspname, c.relname"""
)
_STATISTICS_SINCE = sa.text(
    "SELECT stats_reset FROM pg_catalog.pg_stat_database WHERE datname = pg_catalog.current_database()"
)
