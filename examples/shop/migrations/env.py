"""The shop's Alembic environment: its own metadata; `alembic -c shop/alembic.ini upgrade head`."""

from alembic import context
from sqlalchemy import NullPool, create_engine

from shop.models import Base
from shop.settings import database_url
from sqla_durable import migrations


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
    engine = create_engine(database_url(), poolclass=NullPool)
    with engine.connect() as connection:
        context.configure(connection=connection, target_metadata=Base.metadata)
        with context.begin_transaction():
            migrations.lock(connection)
            context.run_migrations()


if context.is_offline_mode():
    run_offline()
else:
    run_online()
