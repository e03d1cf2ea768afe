"""What a SQLAlchemy `Table` has no place for: storage parameters, the check of new rows, and the views."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import DDL, Connection, Dialect, MetaData, Table, event, func
from sqlalchemy.schema import CreateSchema

from sqla_durable.errors import SessionError
from sqla_durable.models.base import SCHEMA, metadata
from sqla_durable.models.tables import Workflow
from sqla_durable.models.views import create_views, drop_views

# Workflows change several times in their short lives, and every claim walks over the index entries of rows that no
# longer qualify until vacuum has removed them. So vacuum comes after a fixed number of changes instead of a share of a
# growing table, and does not pause. Pages keep room for updates beside the row. Checkpoints are inserted,
# and updated only while a step is tried again.
STORAGE: dict[str, dict[str, float]] = {
    "workflow": {
        "fillfactor": 70,
        "autovacuum_vacuum_scale_factor": 0.01,
        "autovacuum_vacuum_threshold": 1000,
        "autovacuum_vacuum_cost_delay": 0,
        "autovacuum_analyze_scale_factor": 0.02,
        "autovacuum_analyze_threshold": 1000,
    },
    "queue": {"fillfactor": 50, "autovacuum_vacuum_scale_factor": 0, "autovacuum_vacuum_threshold": 100},
    "retention": {"fillfactor": 50, "autovacuum_vacuum_scale_factor": 0, "autovacuum_vacuum_threshold": 100},
    "worker": {"fillfactor": 50, "autovacuum_vacuum_scale_factor": 0, "autovacuum_vacuum_threshold": 100},
}
"""The storage parameters of our tables, for which SQLAlchemy 2.0 has no place in a `Table`."""

# Documents are compressed already, or sealed; trying it takes longer than writing them.
_UNCOMPRESSED = "ALTER TABLE {schema}.blob_chunk ALTER COLUMN data SET STORAGE EXTERNAL"

# A CHECK does not know whether a row is new. With the CHECKs of the table these two columns say it: a workflow that is
# running has a token, and one that is finished has a time. Each condition more costs every INSERT, and calls of
# functions cost most; so nothing is called for a row that passes.
_CHECK_OF_NEW_ROWS = (
    """CREATE OR REPLACE FUNCTION {schema}.check_new_workflow() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION USING
        ERRCODE = 'check_violation', SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME, CONSTRAINT = TG_NAME,
        MESSAGE = 'a new workflow is pending, or suspended until wake_at: insert it without token and finished_at, '
            || 'got status ' || pg_catalog.quote_nullable(NEW.status),
        HINT = 'To load rows from elsewhere, the owner of the table disables this trigger meanwhile.';
END $$""",
    """CREATE TRIGGER workflow_new_check BEFORE INSERT ON {schema}.workflow FOR EACH ROW
WHEN (NEW.token IS NOT NULL OR NEW.finished_at IS NOT NULL) EXECUTE FUNCTION {schema}.check_new_workflow()""",
)


def statements(schema: str = SCHEMA) -> list[str]:
    """Return the statements that complete our tables, for a migration that autogenerate wrote.

    They set the storage parameters, and how chunks of blobs are stored; they make the views, and the trigger that
    refuses new workflows which run or have an outcome.
    """
    quoted = _quoted(schema)
    parameters = [
        f"ALTER TABLE {quoted}.{table} SET ({', '.join(f'{name} = {value}' for name, value in settings.items())})"
        for table, settings in STORAGE.items()
    ]
    checks = [each.format(schema=quoted) for each in _CHECK_OF_NEW_ROWS]
    return [*parameters, _UNCOMPRESSED.format(schema=quoted), *checks, *create_views(quoted)]


def drop_statements(schema: str = SCHEMA) -> list[str]:
    """Return the statements that drop the views and the trigger, to be executed before the tables are dropped."""
    quoted = _quoted(schema)
    return [
        *drop_views(quoted),
        f"DROP TRIGGER IF EXISTS workflow_new_check ON {quoted}.workflow",
        f"DROP FUNCTION IF EXISTS {quoted}.check_new_workflow()",
    ]


@event.listens_for(metadata, "before_create")
def _create_schema(_target: MetaData, connection: Connection, **_: object) -> None:
    """Create the schema under its translated name, so that `metadata.create_all` works in an empty database."""
    require_postgresql(connection.dialect)
    name = _translated(connection)
    # Asked first: IF NOT EXISTS needs the right to create schemas even where there is nothing to create.
    found = func.pg_catalog.to_regnamespace(func.pg_catalog.quote_ident(name))
    if connection.scalar(found) is None:
        connection.execute(CreateSchema(name, if_not_exists=True))


@event.listens_for(metadata, "after_create")
def _complete(_target: MetaData, connection: Connection, *, tables: Sequence[Table], **_: object) -> None:
    if Workflow.__table__ in tables:
        for statement in statements(_translated(connection)):
            _execute(connection, statement)


@event.listens_for(metadata, "before_drop")
def _drop(_target: MetaData, connection: Connection, *, tables: Sequence[Table], **_: object) -> None:
    if Workflow.__table__ in tables:
        for statement in drop_statements(_translated(connection)):
            _execute(connection, statement)


def _execute(connection: Connection, statement: str) -> None:
    escaped = statement.replace("%", "%%")  # of the schema's name
    connection.execute(DDL(escaped))  # type: ignore[no-untyped-call]  # SQLAlchemy has left it without types


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def require_postgresql(dialect: Dialect) -> None:
    """Raise if the database is not PostgreSQL.

    Raises:
        SessionError: it is not PostgreSQL.
    """
    if dialect.name != "postgresql":
        raise SessionError(
            f"the tables of sqla-durable cannot be made in {dialect.name}: durable workflows need PostgreSQL, such as "
            "postgresql+psycopg://user@host/name, in the same database as the application's tables."
        )


def _translated(connection: Connection) -> str:
    names: dict[str, str] = connection.get_execution_options().get("schema_translate_map") or {}
    return names.get(SCHEMA) or SCHEMA
