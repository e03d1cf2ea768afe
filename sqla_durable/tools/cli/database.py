"""The database of an operator's command: the options that name it, and a session of it."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from sqla_durable.tools.cli.errors import CommandError
from sqla_durable.tools.cli.urls import DATABASE_URL, normalised

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.orm import Session

Url = Annotated[str | None, typer.Option("--url", help="The database; by default that of --app, else DATABASE_URL.")]
App = Annotated[
    str | None, typer.Option("--app", metavar="MODULE:ATTRIBUTE", help="A Durable object whose database is meant.")
]
Schema = Annotated[str | None, typer.Option("--schema", help="The schema of the tables, where it is not 'durable'.")]


@contextmanager
def session_of(url: str | None, app: str | None, schema: str | None) -> Generator[Session]:
    """Yield a session of the database that the options mean, whose tables fit this package; its caller commits.

    Raises:
        CommandError: there is no database, the URL is not one of PostgreSQL, or the object cannot be imported.
        SchemaError: the tables are missing, or older or newer than this package.
    """
    from sqlalchemy.orm import Session

    import sqla_durable.store.schema as schemas

    engine = engine_of(url, app, schema)
    try:
        with Session(engine) as session:
            schemas.require(session)
            yield session
    finally:
        engine.dispose()


def engine_of(url: str | None, app: str | None, schema: str | None) -> Engine:
    """Return an engine of the database that the options mean, which keeps no connection. Connects to nothing.

    Raises:
        CommandError: there is no database, the URL is not one of PostgreSQL, or the object cannot be imported.
    """
    from sqlalchemy import NullPool, create_engine

    from sqla_durable.models import SCHEMA

    theirs = None if app is None else _engine_of_application(app)
    wanted = url or (theirs and theirs.url.render_as_string(hide_password=False)) or os.environ.get(DATABASE_URL)
    if not wanted:
        raise CommandError(
            f"there is no database: give this command --url or --app, or set {DATABASE_URL}, such as "
            "postgresql://user@host/name."
        )
    names = {SCHEMA: schema} if schema else theirs and theirs.get_execution_options().get("schema_translate_map")
    engine = create_engine(normalised(wanted), poolclass=NullPool)
    return engine.execution_options(schema_translate_map=names) if names else engine


def _engine_of_application(app: str) -> Engine | None:
    from sqla_durable.store.schema import engine_of
    from sqla_durable.tools.cli.target import load

    durable = load(app)
    if durable.sessionmaker is not None:
        return engine_of(durable.sessionmaker())
    return None if durable.async_sessionmaker is None else engine_of(durable.async_sessionmaker().sync_session)
