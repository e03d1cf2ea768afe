"""The environment of an application that compares our models with the database by itself."""

import os

from alembic import context
from sqlalchemy import NullPool, create_engine

import sqla_durable
from sqla_durable import migrations
from tests.support.domain import Base

# Ours first: tables are created in this order, and the application's refer to ours.
METADATA = [sqla_durable.metadata, Base.metadata]


def run_offline() -> None:
    context.configure(
        dialect_name="postgresql",
        literal_binds=True,
        dialect_opts={"paramstyle": "named"},
        target_metadata=METADATA,
    )
    with context.begin_transaction():
        context.run_migrations()


def run_online() -> None:
    engine = create_engine(os.environ["DATABASE_URL"], poolclass=NullPool)
    with engine.connect() as connection:
        context.configure(connection=connection, target_metadata=METADATA, include_schemas=True)
        with context.begin_transaction():
            migrations.lock(connection)
            context.run_migrations()


if context.is_offline_mode():
    run_offline()
else:
    run_online()
