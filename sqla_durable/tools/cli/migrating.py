"""The command `migrate`: brings our tables to the newest revision, where the application has no Alembic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from sqla_durable.tools.cli.database import App, Schema, Url, engine_of
from sqla_durable.tools.cli.output import AsJson, Quiet, print_json

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine


def migrate(
    *,
    sql: Annotated[bool, typer.Option("--sql", help="Print the statements and execute nothing.")] = False,
    url: Url = None,
    app: App = None,
    schema: Schema = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Create the tables, or bring them to the newest revision, in one transaction; two at once take turns.

    For applications that do not use Alembic. One whose own migrations make these tables goes on with those.
    """
    from sqla_durable.models import REVISION

    engine = engine_of(url, app, schema)
    try:
        with engine.begin() as connection:
            if sql:
                _print_statements(connection, engine)
                return
            before = _upgrade(connection)
    finally:
        engine.dispose()
    where = f"{engine.url.render_as_string(hide_password=True)}, schema {_schema_of(engine)!r}"
    if as_json:
        print_json([{"from": before, "to": REVISION, "schema": _schema_of(engine)}])
    elif quiet:
        print(REVISION)
    elif before == REVISION:
        print(f"The durable tables in {where} are at {REVISION!r} already.")
    else:
        since = "from nothing" if before is None else f"from {before!r}"
        print(f"The durable tables in {where} were brought {since} to {REVISION!r}.")


def _upgrade(connection: Connection) -> str | None:
    """Execute the migrations that are missing, alone; return the revision before."""
    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext

    from sqla_durable import migrations
    from sqla_durable.models import REVISION
    from sqla_durable.store.schema import revision_of

    migrations.lock(connection)
    before = revision_of(connection)
    if before != REVISION:
        with Operations.context(MigrationContext.configure(connection)):
            migrations.upgrade(REVISION, since=before)
    return before


def _print_statements(connection: Connection, engine: Engine) -> None:
    """Print as a script what `_upgrade` would execute."""
    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext

    from sqla_durable import migrations
    from sqla_durable.models import REVISION
    from sqla_durable.store.schema import revision_of

    before = revision_of(connection)
    if before == REVISION:
        print(f"-- the durable tables are at {REVISION} already")
        return
    options = {"as_sql": True, "literal_binds": True}
    context = MigrationContext.configure(dialect_name="postgresql", dialect_opts={"paramstyle": "named"}, opts=options)
    print(f"-- the durable tables, from {before or 'nothing'} to {REVISION}\nBEGIN;\n")
    print(f"SELECT pg_catalog.pg_advisory_xact_lock({migrations.LOCK});\n")
    with Operations.context(context):
        migrations.upgrade(REVISION, since=before, schema=_schema_of(engine))
    print("COMMIT;")


def _schema_of(engine: Engine) -> str:
    from sqla_durable.models import SCHEMA

    names: dict[str, str] = engine.get_execution_options().get("schema_translate_map") or {}
    return names.get(SCHEMA) or SCHEMA
