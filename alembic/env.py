"""Alembic's environment of this repository: `DATABASE_URL=postgresql://... alembic upgrade head`.

With `-x schema=tenant_7` the tables go to that schema. An application has an environment of its own and uses
`sqla_durable.migrations` there; see docs/migrations.md.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from alembic import context
from alembic.util import CommandError
from sqlalchemy import URL, NullPool, create_engine, make_url

from sqla_durable import migrations, models

SCHEMA = context.get_x_argument(as_dictionary=True).get("schema", models.SCHEMA)


def database_url() -> URL:
    """Read DATABASE_URL, in whatever form a host writes it, for the driver psycopg."""
    given = os.environ.get("DATABASE_URL")
    if not given:
        raise CommandError("DATABASE_URL is not set: DATABASE_URL=postgresql://user@host/database alembic ...")
    url = make_url(given)
    if url.get_backend_name() not in ("postgres", "postgresql"):
        raise CommandError(f"DATABASE_URL is {url!r}, not a PostgreSQL URL: postgresql://user@host/database")
    return url.set(drivername="postgresql+psycopg")


def include_name(name: str | None, kind: str, _parents: Mapping[str, str | None]) -> bool:
    """Let autogenerate look at our schema only."""
    return kind != "schema" or name == models.SCHEMA


OPTIONS: dict[str, Any] = {
    "target_metadata": models.metadata,
    "durable_schema": SCHEMA,
    "include_schemas": True,
    "include_name": include_name,
}


def run_offline() -> None:
    """Print the statements; no server is needed."""
    context.configure(dialect_name="postgresql", literal_binds=True, dialect_opts={"paramstyle": "named"}, **OPTIONS)
    with context.begin_transaction():
        context.run_migrations()


def run_online() -> None:
    """Execute the statements in one transaction, while others wait."""
    engine = create_engine(database_url(), poolclass=NullPool)
    with engine.connect() as connection:
        context.configure(connection=connection, **OPTIONS)
        with context.begin_transaction():
            migrations.lock(connection)
            context.run_migrations()


if context.is_offline_mode():
    run_offline()
else:
    run_online()
