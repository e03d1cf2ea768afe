"""The environment of an application that follows our labelled branch; `-x schema=tenant_7` chooses the schema."""

import os

from alembic import context
from sqlalchemy import NullPool, create_engine

from sqla_durable import migrations
from tests.support.domain import Base

SCHEMA = context.get_x_argument(as_dictionary=True).get("schema", "durable")


def run_offline() -> None:
    context.configure(
        dialect_name="postgresql",
        literal_binds=True,
        dialect_opts={"paramstyle": "named"},
        target_metadata=Base.metadata,
        durable_schema=SCHEMA,
    )
    with context.begin_transaction():
        context.run_migrations()


def run_online() -> None:
    engine = create_engine(os.environ["DATABASE_URL"], poolclass=NullPool)
    with engine.connect() as connection:
        context.configure(connection=connection, target_metadata=Base.metadata, durable_schema=SCHEMA)
        with context.begin_transaction():
            migrations.lock(connection)
            context.run_migrations()


if context.is_offline_mode():
    run_offline()
else:
    run_online()
