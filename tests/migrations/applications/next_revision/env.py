"""The environment of an application whose own revisions call ours."""

import os

from alembic import context
from sqlalchemy import NullPool, create_engine

from sqla_durable import migrations
from tests.support.domain import Base


def run_offline() -> None:
    context.configure(
        dialect_name="postgresql",
        literal_binds=True,
        dialect_opts={"paramstyle": "named"},
        target_metadata=Base.metadata,
    )
    with context.begin_transaction():
        context.run_migrations()


def run_online() -> None:
    engine = create_engine(os.environ["DATABASE_URL"], poolclass=NullPool)
    with engine.connect() as connection:
        context.configure(connection=connection, target_metadata=Base.metadata)
        with context.begin_transaction():
            migrations.lock(connection)
            context.run_migrations()


if context.is_offline_mode():
    run_offline()
else:
    run_online()
