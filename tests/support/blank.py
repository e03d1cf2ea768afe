"""Making a database that a test has used as blank as its template, which costs a tenth of making another one.

Rows are deleted and sequences begin anew. A database in which anything but rows has changed is not blank any more.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import psycopg
from psycopg import sql

Connection: TypeAlias = "psycopg.Connection[Any]"

MANY_ROWS = 200
"""How many dead rows a database may keep: more of them would show in plans and in buffers."""

_CATALOGUES = (
    "pg_attrdef",
    "pg_attribute",
    "pg_class",
    "pg_constraint",
    "pg_default_acl",
    "pg_description",
    "pg_event_trigger",
    "pg_extension",
    "pg_index",
    "pg_largeobject_metadata",
    "pg_namespace WHERE nspname !~ '^pg_(toast_)?temp_'",
    "pg_policy",
    "pg_proc",
    "pg_publication",
    "pg_rewrite",
    "pg_statistic_ext",
    "pg_trigger",
    "pg_type",
    "pg_db_role_setting WHERE setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database())",
)
# What changes a row of a catalogue gives it another xmin; VACUUM and ANALYZE write theirs in place.
_COUNTED = " UNION ALL ".join(
    f"SELECT '{each.split()[0]}', count(*), coalesce(sum(xmin::text::bigint), 0)::bigint FROM {each}"
    for each in _CATALOGUES
)
_LIMITS = (
    "SELECT 'limits', datconnlimit::bigint, coalesce(hashtext(datacl::text), 0)::bigint "
    "FROM pg_database WHERE datname = current_database()"
)
_TABLES = (
    "SELECT schemaname, tablename FROM pg_tables WHERE schemaname <> ALL ('{pg_catalog,information_schema}') "
    "AND schemaname !~ '^pg_temp_' ORDER BY 1, 2"
)
_RESTART = "SELECT setval(seqrelid, seqstart, false) FROM pg_sequence"

Structure: TypeAlias = list[tuple[str, int, int]]
"""What a database has besides rows, as counts and sums that change with it."""


def structure_of(connection: Connection) -> Structure:
    """Tell everything that is not a row of a table, to be compared."""
    return connection.execute(f"{_COUNTED} UNION ALL {_LIMITS} ORDER BY 1").fetchall()


def require_empty(connection: Connection) -> None:
    """Prove that a template has no rows: they would be deleted after the first test that uses a copy."""
    found = [name for name in _tables(connection) if connection.execute(_select(name)).fetchone()]
    assert found == [], f"{found} have rows in the template: let `make_blank` spare them"


def make_blank(connection: Connection, structure: Structure) -> bool:
    """Delete all rows; tell whether the database is like its template now."""
    if structure_of(connection) != structure:
        return False
    with connection.transaction():
        connection.execute("SET LOCAL session_replication_role = 'replica'")  # in whatever order the tables come
        dead = sum(connection.execute(_delete(each)).rowcount for each in _tables(connection))
        connection.execute(_RESTART)
    return dead <= MANY_ROWS


def _tables(connection: Connection) -> list[tuple[str, str]]:
    return connection.execute(_TABLES).fetchall()


def _select(table: tuple[str, str]) -> sql.Composed:
    return sql.SQL("SELECT FROM {} LIMIT 1").format(sql.Identifier(*table))


def _delete(table: tuple[str, str]) -> sql.Composed:
    return sql.SQL("DELETE FROM {}").format(sql.Identifier(*table))
