"""A schema with traps: functions and operators that fit calls better than PostgreSQL's own, as another role makes them.

A name that is looked up is looked up in every schema of the search_path, and what fits the types of the arguments
exactly is preferred, wherever it is; pg_catalog is searched first, so that only the same types there are safe.
"""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import Boolean, Connection, Double, Float, Interval, LargeBinary

SCHEMA = "hostile"
SPRUNG = "a trap was called"

_UNCAST = {Boolean: "bool", Float: "float8", Double: "float8", Interval: "interval", LargeBinary: "bytea"}
"""What SQLAlchemy adds no cast to with psycopg, which declares these types."""
_TYPES = (
    "text, varchar, name, bool, int2, int4, int8, numeric, float8, uuid, timestamptz, interval, json, jsonb, "
    "oid, regclass, text[], varchar[], uuid[]"
)
_OPERATORS = "= <> < <= > >= + - * / % & | # ~ ~~ !~~ || -> ->> #> #>> ? @> <@ && << >>"
_FUNCTIONS = (
    "concat(text, varchar)",
    "concat(varchar)",
    "concat(text)",
    "concat(text, timestamptz)",
    "convert_to(text, varchar)",
    "count()",
    "current_setting(varchar)",
    "hashtextextended(varchar, bigint)",
    "json_to_recordset(jsonb)",
    "jsonb_build_object(varchar, text)",
    "jsonb_build_object(text, text)",
    "make_interval(int, int, int, int, int, int, numeric)",
    "obj_description(regclass, text)",
    "octet_length(varchar)",
    "pg_notify(varchar, varchar)",
    "power(int, int)",
    "quote_ident(varchar)",
    "quote_nullable(varchar)",
    "set_config(text, text, int)",
    "split_part(text, varchar, int)",
    "statement_timestamp(int DEFAULT 1)",
    "strpos(text, varchar)",
    "unnest(uuid[], int DEFAULT 1)",
)
# What has the same types in pg_catalog is passed over: it is found there first.
_MAKE_OPERATORS = f"""
DO $$
DECLARE kind text[] := string_to_array('{_TYPES}', ', '); l text; r text; o text; comparing boolean;
BEGIN
    FOREACH l IN ARRAY kind LOOP FOREACH r IN ARRAY kind LOOP
        EXECUTE format('CREATE FUNCTION {SCHEMA}.compared(%s, %s) RETURNS bool LANGUAGE plpgsql AS %L',
            l, r, 'BEGIN RAISE EXCEPTION ''{SPRUNG}''; END');
        EXECUTE format('CREATE FUNCTION {SCHEMA}.made(%s, %s) RETURNS %1$s LANGUAGE plpgsql AS %3$L',
            l, r, 'BEGIN RAISE EXCEPTION ''{SPRUNG}''; END');
        FOR o IN SELECT unnest(string_to_array('{_OPERATORS}', ' ')) EXCEPT SELECT oprname FROM pg_operator
            WHERE oprleft = l::regtype AND oprright = r::regtype AND oprnamespace = 'pg_catalog'::regnamespace
        LOOP
            comparing := o ~ '[=<>~?]|&&' AND o !~ '->|#>|<<|>>';
            EXECUTE format('CREATE OPERATOR {SCHEMA}.%s (LEFTARG = %s, RIGHTARG = %s, FUNCTION = {SCHEMA}.%s)',
                o, l, r, CASE WHEN comparing THEN 'compared' ELSE 'made' END);
        END LOOP;
    END LOOP; END LOOP;
END $$
"""
_IN_STATEMENT = """
SELECT pg_describe_object(refclassid, refobjid, 0) FROM pg_depend
WHERE classid = 'pg_proc'::regclass AND objid = 'probe.statement'::regproc ORDER BY 1
"""
_TRAPS = f"""
    SELECT oid FROM pg_operator WHERE oprnamespace = '{SCHEMA}'::regnamespace
    UNION ALL SELECT oid FROM pg_proc WHERE pronamespace = '{SCHEMA}'::regnamespace
"""
_IN_TABLES = f"""
SELECT pg_describe_object(classid, objid, objsubid) FROM pg_depend
WHERE refobjid IN ({_TRAPS}) AND objid NOT IN ({_TRAPS}) ORDER BY 1
"""


def set_traps(connection: Connection) -> None:
    """Make the schema."""
    connection.exec_driver_sql(f"CREATE SCHEMA {SCHEMA}")
    connection.exec_driver_sql("CREATE SCHEMA probe")
    for each in _FUNCTIONS:
        connection.exec_driver_sql(
            f"CREATE FUNCTION {SCHEMA}.{each} RETURNS text LANGUAGE plpgsql AS "
            f"'BEGIN RAISE EXCEPTION ''{SPRUNG}''; END'"
        )
    connection.exec_driver_sql(_MAKE_OPERATORS.replace("%", "%%"))


def referring_to_traps(connection: Connection) -> list[str]:
    """Return what is in the database, such as defaults and constraints, and would call a trap."""
    return list(connection.exec_driver_sql(_IN_TABLES).scalars())


def traps_of(connection: Connection, compiled: Any, *, text: str | None = None) -> list[str]:
    """Return the traps that a statement would call, wherever in it, for a session whose path begins with them.

    PostgreSQL itself says it: the body of a function in standard SQL is parsed when it is created, and what it refers
    to is recorded in pg_depend.

    Args:
        text: the statement as the driver got it, where that is more than what was compiled.
    """
    statement, types = _numbered(compiled, text or str(compiled))
    connection.exec_driver_sql(f"SET LOCAL search_path = {SCHEMA}, public")
    with connection.begin_nested() as savepoint:
        driver: Any = connection.connection.driver_connection
        driver.execute(
            f"CREATE FUNCTION probe.statement({', '.join(types)}) RETURNS void "
            f"LANGUAGE sql BEGIN ATOMIC {statement}; END".encode()
        )
        connection.exec_driver_sql("SET LOCAL search_path = pg_catalog")
        found = [each for each in connection.exec_driver_sql(_IN_STATEMENT).scalars() if f" {SCHEMA}." in each]
        savepoint.rollback()
    return found


def _numbered(compiled: Any, text: str) -> tuple[str, list[str]]:
    """Return the statement with `$1` for the first parameter, and the types that the driver declares them to be."""
    names: list[str] = []

    def numbered(found: re.Match[str]) -> str:
        if found[0] == "%%":
            return "%"
        if found[1] not in names:
            names.append(found[1])
        return f"${names.index(found[1]) + 1}"

    statement = re.sub(r"%%|%\((\w+)\)s", numbered, text)
    if compiled.positiontup:
        statement, names = text, list(dict.fromkeys(compiled.positiontup))
    casts = dict(re.findall(r"\$(\d+)::([A-Z]+(?: WITH TIME ZONE)?(?:\[\])?)", statement))

    def type_of(number: int, name: str) -> str:
        # Only the members of an expanded tuple have a name of their own; they are texts.
        return casts.get(str(number)) or (
            _UNCAST[type(compiled.binds[name].type)] if name in compiled.binds else "text"
        )

    return statement, [type_of(number, name) for number, name in enumerate(names, 1)]
