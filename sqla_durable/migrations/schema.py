"""The schema that a revision works in: which one it is, how it comes and how it goes. Used by `versions` only."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager

from alembic import op
from sqlalchemy import Connection

from sqla_durable.errors import UsageError
from sqla_durable.models import SCHEMA

_OURS = "made by sqla-durable"
"""The comment of a schema that `create` made, and that `drop` may therefore drop."""


@contextmanager
def resolved(schema: str | None) -> Generator[str]:
    """Yield the real name of the schema, and keep the connection from translating it again meanwhile.

    Alembic translates the schema in `create_table` and leaves it in `add_column`: so it is done once, here.

    Args:
        schema: what the application asks for; None means the option `durable_schema` of its env.py, or `durable`.
    """
    context = op.get_context()
    if context.dialect.name != "postgresql":
        raise UsageError(
            f"these migrations are for PostgreSQL, and this database is {context.dialect.name}: durable workflows need "
            "PostgreSQL, in the same database as the application's tables."
        )
    wanted = schema or str(context.opts.get("durable_schema") or SCHEMA)
    with _untranslated(None if context.as_sql else context.connection) as names:
        name = names.get(wanted, wanted)
        if not name:
            raise UsageError(
                f"schema_translate_map gives {wanted!r} the name {name!r}: our tables need a schema with a name."
            )
        yield name


def create(name: str) -> None:
    """Create the schema if it is missing.

    PostgreSQL asks for the right to create one before it checks whether it exists (CREATE SCHEMA, IF NOT EXISTS). Here
    the check comes first, so that a role without that right can use a schema that was made for it; in one statement of
    the server, so that it works in a printed script too.
    """
    _do(
        f"IF NOT EXISTS (SELECT FROM pg_catalog.pg_namespace WHERE nspname = {_literal(name)}) THEN "
        f"CREATE SCHEMA {_quoted(name)}; COMMENT ON SCHEMA {_quoted(name)} IS {_literal(_OURS)}; END IF;"
    )


def drop(name: str) -> None:
    """Drop the schema if `create` made it, it is empty, and the role may; else leave it as it is."""
    _do(
        f"IF EXISTS (SELECT FROM pg_catalog.pg_namespace WHERE nspname = {_literal(name)} "
        f"AND pg_catalog.obj_description(oid, 'pg_namespace') = {_literal(_OURS)}) THEN "
        f"DROP SCHEMA {_quoted(name)}; END IF; "
        "EXCEPTION WHEN dependent_objects_still_exist OR insufficient_privilege THEN NULL;"
    )


def lock_tables(name: str, *tables: str) -> None:
    """Lock tables before any of them is changed, so that workers that execute statements meanwhile only wait.

    Their statements lock the same tables in an order of their own. One of them, or this, may be ended by a deadlock:
    they execute theirs again, and this is tried again too.
    """
    listed = ", ".join(f"{_quoted(name)}.{each}" for each in tables)
    _do(
        "FOR attempt IN 1..20 LOOP "
        f"BEGIN LOCK TABLE {listed} IN ACCESS EXCLUSIVE MODE; EXIT; "
        "EXCEPTION WHEN deadlock_detected THEN IF attempt = 20 THEN RAISE; END IF; END; "
        "END LOOP;"
    )


def set_storage(name: str, table: str, settings: Mapping[str, float]) -> None:
    """Set the storage parameters of a table, which SQLAlchemy 2.0 cannot give with CREATE TABLE."""
    listed = ", ".join(f"{setting} = {value}" for setting, value in settings.items())
    op.execute(f"ALTER TABLE {_quoted(name)}.{table} SET ({listed})".replace(":", r"\:"))


def execute(name: str, statement: str) -> None:
    """Execute a statement that has `{schema}` in the place of the schema's name."""
    op.execute(statement.format(schema=_quoted(name)).replace(":", r"\:"))


@contextmanager
def _untranslated(connection: Connection | None) -> Generator[Mapping[str | None, str | None]]:
    """Yield the connection's `schema_translate_map` and suspend it; offline there is none."""
    names = connection.get_execution_options().get("schema_translate_map") if connection else None
    if connection is None or not names:
        yield {}
        return
    connection.execution_options(schema_translate_map=None)
    try:
        yield names
    finally:
        connection.execution_options(schema_translate_map=names)


def _do(body: str) -> None:
    text = f"DO $sqla_durable$ BEGIN {body} END $sqla_durable$"
    op.execute(text.replace(":", r"\:"))  # a colon in a name is no bind parameter


def _quoted(name: str) -> str:
    escaped = name.replace('"', '""')
    return f'"{escaped}"'


def _literal(value: str) -> str:
    escaped = value.replace("'", "''")
    return f"'{escaped}'"
