"""Making a database that a test has used as blank as its template, which costs a tenth of making another one.

Rows are deleted and sequences restarted. A database in which anything but rows has changed is not blank any more.
What has been written is read from the server's statistics first: comparing the catalogues costs as much as a test.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    "SELECT pg_class.oid::int8, nspname::text, relname::text FROM pg_class "
    "JOIN pg_namespace ON pg_namespace.oid = relnamespace WHERE relkind = 'r' AND relpersistence <> 't' "
    "AND relnamespace <> ALL ('{pg_catalog,information_schema}'::regnamespace[]) ORDER BY 1"
)
_RESTART = "SELECT setval(seqrelid, seqstart, false) FROM pg_sequence"

_LOCAL = ",".join(each.split()[0] for each in _CATALOGUES if not each.startswith("pg_db_role_setting"))
# A backend reports its share before it ends. The first column changes when a crash of the server loses them.
_STATISTICS = f"""
    SELECT
        (SELECT stats_reset::text FROM pg_stat_wal),
        (SELECT sum(pg_stat_get_tuples_inserted(each) + pg_stat_get_tuples_updated(each)
            + pg_stat_get_tuples_deleted(each))::int8 FROM unnest('{{{_LOCAL}}}'::regclass[]) AS each),
        (SELECT row(datconnlimit, datacl, oid)::text FROM pg_database WHERE datname = current_database()),
        ARRAY(SELECT row(setrole, setconfig)::text FROM pg_db_role_setting JOIN pg_database
            ON setdatabase = pg_database.oid WHERE datname = current_database() ORDER BY 1),
        ARRAY(SELECT pg_stat_get_tuples_inserted(each::oid) FROM unnest(%s::int8[]) AS each)
"""

Structure: TypeAlias = list[tuple[str, int, int]]
"""What a database has besides rows, as counts and sums that change with it."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table of the template; copies have the same oid."""

    oid: int
    name: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Written:
    """What had been written in a database when it was blank, as its statistics count it.

    Attributes:
        structure: what changes with the structure.
        rows: how many rows have ever been inserted, of each table.
    """

    structure: tuple[object, ...]
    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Blank:
    """What a database without rows is like."""

    structure: Structure
    tables: tuple[Table, ...]


def read(connection: Connection) -> Blank:
    """Return what a template is like.

    Raises:
        AssertionError: it has rows, which would be deleted after the first test that uses a copy.
    """
    tables = tuple(Table(oid, (schema, name)) for oid, schema, name in connection.execute(_TABLES).fetchall())
    found = [each.name for each in tables if connection.execute(_select(each)).fetchone()]
    assert found == [], f"{found} have rows in the template: let `make_blank` spare them"
    return Blank(structure_of(connection), tables)


def structure_of(connection: Connection) -> Structure:
    """Return everything that is not a row of a table, to be compared."""
    return connection.execute(f"{_COUNTED} UNION ALL {_LIMITS} ORDER BY 1").fetchall()


def make_blank(connection: Connection, blank: Blank, before: Written | None) -> Written | None:
    """Delete all rows; return what has been written so far, or None if the database is not like its template.

    Nobody else may be connected.

    Args:
        before: what had been written when this database was blank, if that is known.
    """
    written = _written(connection, blank)
    if before is None or before.structure != written.structure:
        before = None
        if structure_of(connection) != blank.structure:
            return None
    filled = [
        each
        for number, each in enumerate(blank.tables)
        if before is None or before.rows[number] != written.rows[number]
    ]
    return written if _delete(connection, filled) <= MANY_ROWS else None


def _written(connection: Connection, blank: Blank) -> Written:
    row = connection.execute(_STATISTICS, [[each.oid for each in blank.tables]]).fetchone()
    assert row is not None
    *structure, rows = row
    return Written((*structure[:-1], tuple(structure[-1])), tuple(rows))


def _delete(connection: Connection, tables: list[Table]) -> int:
    """Delete the rows of some tables; return how many there were."""
    with connection.transaction():
        connection.execute("SET LOCAL session_replication_role = 'replica'")  # in whatever order the tables come
        dead = sum(
            connection.execute(sql.SQL("DELETE FROM {}").format(sql.Identifier(*each.name))).rowcount for each in tables
        )
        connection.execute(_RESTART)
    return dead


def _select(table: Table) -> sql.Composed:
    return sql.SQL("SELECT FROM {} LIMIT 1").format(sql.Identifier(*table.name))
