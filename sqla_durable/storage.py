"""The storage parameters of our tables, and what `metadata.create_all` does besides."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, Dialect, MetaData, Table, event, func
from sqlalchemy.schema import CreateSchema

from sqla_durable.errors import SessionError
from sqla_durable.models import SCHEMA, Workflow, metadata

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
    "worker": {"fillfactor": 50, "autovacuum_vacuum_scale_factor": 0, "autovacuum_vacuum_threshold": 100},
}
"""The storage parameters of our tables, for which SQLAlchemy 2.0 has no place in a `Table`."""


def statements(schema: str = SCHEMA) -> list[str]:
    """Give the statements that set the storage parameters, for a migration that autogenerate wrote."""
    quoted = '"' + schema.replace('"', '""') + '"'
    return [
        f"ALTER TABLE {quoted}.{table} SET ({', '.join(f'{name} = {value}' for name, value in settings.items())})"
        for table, settings in STORAGE.items()
    ]


@event.listens_for(metadata, "before_create")
def _create_schema(_target: MetaData, connection: Connection, **_: object) -> None:
    """Let `metadata.create_all` work in an empty database, under the translated name of the schema."""
    require_postgresql(connection.dialect)
    name = _translated(connection)
    # Asked first: IF NOT EXISTS needs the right to create schemas even where there is nothing to create.
    found = func.pg_catalog.to_regnamespace(func.pg_catalog.quote_ident(name))
    if connection.scalar(found) is None:
        connection.execute(CreateSchema(name, if_not_exists=True))


@event.listens_for(metadata, "after_create")
def _set_storage(_target: MetaData, connection: Connection, *, tables: Sequence[Table], **_: object) -> None:
    if Workflow.__table__ in tables:
        for statement in statements(_translated(connection)):
            connection.exec_driver_sql(statement)


def require_postgresql(dialect: Dialect) -> None:
    """Refuse to make our tables in another database.

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
