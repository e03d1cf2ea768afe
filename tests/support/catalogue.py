"""What PostgreSQL's catalogue says about the tables of a schema, to compare two ways of making them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, text

_COLUMNS = """
SELECT c.relname, a.attnum, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity,
       a.attgenerated, a.attstorage, pg_get_expr(d.adbin, d.adrelid), col_description(c.oid, a.attnum)
FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
WHERE c.relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = :schema) AND c.relkind = 'r'
ORDER BY c.relname, a.attnum
"""
_CONSTRAINTS = """
SELECT t.relname, c.conname, c.contype, c.condeferrable, c.convalidated, pg_get_constraintdef(c.oid)
FROM pg_constraint c JOIN pg_class t ON t.oid = c.conrelid
WHERE c.connamespace = (SELECT oid FROM pg_namespace WHERE nspname = :schema) ORDER BY t.relname, c.conname
"""
_INDEXES = """
SELECT tablename, indexname, replace(indexdef, ' ON ' || quote_ident(:schema) || '.', ' ON ')
FROM pg_indexes WHERE schemaname = :schema ORDER BY tablename, indexname
"""
_RELATIONS = """
SELECT c.relname, c.relkind, c.reloptions, obj_description(c.oid, 'pg_class')
FROM pg_class c WHERE c.relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = :schema) ORDER BY c.relname
"""
_TRIGGERS = """
SELECT c.relname, t.tgname, t.tgenabled, pg_get_triggerdef(t.oid, true)
FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
WHERE c.relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = :schema) AND NOT t.tgisinternal
ORDER BY c.relname, t.tgname
"""
_FUNCTIONS = """
SELECT p.proname, pg_get_function_arguments(p.oid), pg_get_function_result(p.oid), p.prolang, p.prosecdef,
       p.provolatile, p.proconfig, p.prosrc
FROM pg_proc p WHERE p.pronamespace = (SELECT oid FROM pg_namespace WHERE nspname = :schema) ORDER BY p.proname
"""
_VIEWS = """
SELECT c.relname, pg_get_viewdef(c.oid) FROM pg_class c
WHERE c.relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = :schema) AND c.relkind = 'v' ORDER BY c.relname
"""
_QUERIES = {
    "columns": _COLUMNS,
    "constraints": _CONSTRAINTS,
    "indexes": _INDEXES,
    "relations": _RELATIONS,
    "triggers": _TRIGGERS,
    "views": _VIEWS,
    "functions": _FUNCTIONS,
}

Catalogue = dict[str, Sequence[Row[Any]]]


def catalogue(connection: Connection, schema: str) -> Catalogue:
    """Read what there is in a schema, without its name in it."""
    connection.execute(text("SELECT set_config('search_path', quote_ident(:schema), true)"), {"schema": schema})
    found = {name: connection.execute(text(query), {"schema": schema}).all() for name, query in _QUERIES.items()}
    connection.execute(text("SET LOCAL search_path TO DEFAULT"))
    return found


def schemas(connection: Connection) -> set[str]:
    """Return the names of all schemas but those of the system."""
    query = "SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'"
    return set(connection.scalars(text(query)))
