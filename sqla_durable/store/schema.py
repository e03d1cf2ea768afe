"""Where a session finds our tables, and whether they fit this package; what depends on the driver.

The name of the migration is the comment of the workflow table, because that travels on every route: our own
migrations, an application's autogenerate, and `metadata.create_all`.
"""

from __future__ import annotations

import re
from typing import Any
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.orm import Session
from sqlalchemy.pool import Pool

from sqla_durable.errors import SchemaError, SessionError
from sqla_durable.models import REVISION, SCHEMA
from sqla_durable.store.statements import (
    Connectable,
    bind_arguments,
    connection_of,
    execute,
    limit_idle_time,
    pg,
)

_MIGRATE = (
    f"Run `alembic upgrade heads` with a revision that calls sqla_durable.migrations.upgrade({REVISION!r}), or without "
    "Alembic `sqla-durable migrate`"
)
_fitting: WeakKeyDictionary[Pool, set[str]] = WeakKeyDictionary()


def require(session: Session) -> None:
    """Raise if a session cannot be used for durable workflows.

    Executes one statement in the session's transaction the first time for each engine and schema, then none.

    Raises:
        SessionError: it has no engine, or one that is not PostgreSQL; or its driver cannot read times in this style.
        SchemaError: the tables are missing, or older or newer than this package.
    """
    engine = engine_of(session)
    schema = schema_of(session)
    fitting = _fitting.setdefault(engine.pool, set())
    if schema not in fitting:
        found = _inspect(session, schema)
        _require_styles(found, engine)
        _require_revision(found.comment, schema, engine)
        fitting.add(schema)


def revision_of(connection: sa.Connection) -> str | None:
    """Return the migration at which our tables are in a connection's schema; None if they are not there.

    Raises:
        SchemaError: it is an unknown one, or one that is newer than this package.
    """
    names: dict[str, str] = connection.get_execution_options().get("schema_translate_map") or {}
    schema = names.get(SCHEMA) or SCHEMA
    comment: str | None = _inspect(connection, schema).comment
    if comment is None:
        return None
    found = re.findall(r"durable_\d+", comment)
    if found and found[-1] <= REVISION:
        return str(found[-1])
    raise SchemaError(
        f"the durable tables in {_where(connection.engine, schema)} are at {comment or 'an unknown revision'!r}, and "
        f"this package knows {REVISION!r} and those before: upgrade sqla-durable in this process."
    )


def require_transaction(session: Session) -> None:
    """Raise if a session's statements commit by themselves. Begins its transaction; executes nothing.

    Raises:
        SessionError: its connection is in AUTOCOMMIT, by its engine, its options or its driver.
    """
    if getattr(connection_of(session).connection.dbapi_connection, "autocommit", False):
        raise SessionError(
            f"the connection of {session!r} is in AUTOCOMMIT, which commits each statement by itself: what is written "
            "would stand after a rollback, without what belongs to it, and what is locked would be free at once. Give "
            "it an engine with transactions, engine.execution_options(isolation_level='READ COMMITTED') for example."
        )


def engine_of(session: Session) -> sa.Engine:
    """Return the engine on which a session finds our tables.

    Raises:
        SessionError: there is none, or it is not PostgreSQL.
    """
    try:
        bind: sa.Engine | sa.Connection = session.get_bind(**bind_arguments())
    except UnboundExecutionError as error:
        raise SessionError(
            f"{session!r} has no engine for the durable tables: bind the sessionmaker to an engine, or add "
            "sqla_durable.models.Base to its binds."
        ) from error
    if bind.dialect.name != "postgresql":
        raise SessionError(
            f"{session!r} is bound to {bind.dialect.name}: durable workflows need PostgreSQL, in the same database "
            "as the application's tables."
        )
    names = bind.get_execution_options().get("schema_translate_map")
    return bind.engine.execution_options(schema_translate_map=names) if names else bind.engine


def schema_of(session: Session) -> str:
    """Return the name under which the session's connection finds our schema."""
    translated = connection_of(session).get_execution_options()
    names: dict[str, str] = translated.get("schema_translate_map") or {}
    return names.get(SCHEMA) or SCHEMA


def limit_idle(connection: sa.Connection) -> None:
    """Limit how long this transaction may be idle; see `limit_idle_time`."""
    connection.execute(sa.select(limit_idle_time()))


def is_read_committed(connection: sa.Connection) -> bool:
    """Return whether transactions are READ COMMITTED by default, as nearly everywhere."""
    default: str = connection.execute(sa.select(pg.current_setting("default_transaction_isolation"))).scalar_one()
    return default == "read committed"


def autocommit(engine: sa.Engine) -> dict[str, Any]:
    """Return execution options with which each statement is a transaction of its own, in one round trip.

    For a few statements, give them to the connection: making an engine with options takes as long as a statement.

    But for asyncpg: it prepares a statement in one round trip and executes it in another, and a pooler in transaction
    mode may give the two to different server processes. Its statements are in transactions as usual.
    """
    return {} if engine.dialect.driver == "asyncpg" else {"isolation_level": "AUTOCOMMIT"}


def keeps_statements(connection: sa.Connection) -> bool:
    """Return whether the driver keeps prepared statements; executes nothing.

    They are turned off for a pooler in transaction mode, behind which no notification arrives.
    """
    match connection.dialect.driver:
        case "psycopg":
            return getattr(connection.connection.driver_connection, "prepare_threshold", 0) is not None
        case "asyncpg":
            # SQLAlchemy's own cache, which `prepared_statement_cache_size=0` turns off; it has no public name.
            return getattr(connection.connection.dbapi_connection, "_prepared_statement_cache", 0) is not None
        case _:
            return True


def _inspect(connectable: Connectable, schema: str) -> sa.Row[Any]:
    """Return the table's comment, '' where it has none and None where there is no table; and how times are written."""
    table = pg.to_regclass(pg.concat(pg.quote_ident(schema), ".workflow"))
    comment = sa.case((table.is_not(None), sa.func.coalesce(pg.obj_description(table, "pg_class"), "")))
    styles = [pg.current_setting(each).label(each) for each in ("DateStyle", "IntervalStyle")]
    return execute(connectable, sa.select(comment.label("comment"), *styles)).one()


def _require_styles(found: sa.Row[Any], engine: sa.Engine) -> None:
    """Raise if psycopg cannot read times; asyncpg reads the binary form, which has no style."""
    odd = not found.DateStyle.startswith("ISO") or found.IntervalStyle != "postgres"
    if odd and engine.dialect.driver == "psycopg":
        raise SessionError(
            f"psycopg reads no times in the style of this connection, DateStyle {found.DateStyle!r} and IntervalStyle "
            f"{found.IntervalStyle!r}, which the server, the database or the role has set: make the engine with "
            "connect_args={'options': '-c datestyle=ISO -c intervalstyle=postgres'}, or set them so for the role."
        )


def _require_revision(comment: str | None, schema: str, engine: sa.Engine) -> None:
    where = _where(engine, schema)
    if comment is None:
        raise SchemaError(
            f"the durable tables are not in {where}. {_MIGRATE}, or for a try sqla_durable.metadata.create_all(engine)."
        )
    found = re.findall(r"durable_\d+", comment)  # the oldest package that the tables are for, and where they are
    if not found or found[-1] < REVISION:
        raise SchemaError(
            f"the durable tables in {where} are at {comment or 'an unknown revision'!r}; this package needs "
            f"{REVISION!r}. {_MIGRATE}."
        )
    if found[0] > REVISION:
        raise SchemaError(
            f"the durable tables in {where} are at {found[-1]!r}, newer than this package, which knows {REVISION!r}. "
            "Upgrade sqla-durable in this process."
        )


def _where(engine: sa.Engine, schema: str) -> str:
    return f"{engine.url.render_as_string(hide_password=True)}, schema {schema!r}"
