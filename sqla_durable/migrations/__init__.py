"""The history of our tables, and three ways to bring it into an application's own.

1. The application's revision calls `upgrade` and `downgrade` here: one history, one head.
2. Our branch, labelled `sqla_durable`, through `version_locations = sqla_durable:migrations/versions`.
3. The application autogenerates over `[sqla_durable.metadata, Base.metadata]`; then nothing here is needed.

The statements are in `versions`, one module for a revision, frozen once released.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sqlalchemy import Connection, func

from sqla_durable.errors import UsageError
from sqla_durable.migrations import history, versions
from sqla_durable.models import SCHEMA, metadata

__all__ = ["downgrade", "lock", "not_ours", "upgrade"]

LOCK = int.from_bytes(b"sqla-dur")
"""The key of the advisory lock that migrations of one database share."""


def upgrade(target: str, *, since: str | None = None, schema: str | None = None) -> None:
    """Bring our tables from one revision to a later one, inside an Alembic revision of the application.

    ```python
    from sqla_durable import migrations

    def upgrade() -> None:
        migrations.upgrade("durable_0002")

    def downgrade() -> None:
        migrations.downgrade("durable_0002")
    ```

    It runs in the transaction of that revision, and prints its statements in offline mode. The schema is created
    if it is missing; a role that may not create it can use one that was made for it.

    Args:
        target: the revision to arrive at. There is no "head": a migration does next year what it does today.
        since: the revision that an earlier migration of the application arrived at; None means no tables yet.
        schema: the schema of our tables; None means what `context.configure(durable_schema=...)` in env.py says,
            else `durable`. It is translated once by the connection's `schema_translate_map`, if it has one.

    Raises:
        UsageError: there is no such revision, or `target` is not later than `since`.
    """
    for revision in history.between(history.load(versions), target, since=since):
        revision.upgrade(schema)


def downgrade(target: str, *, since: str | None = None, schema: str | None = None) -> None:
    """Undo `upgrade` with the same arguments: from `target` back to `since`, to no tables without it.

    Their rows are lost. Foreign keys of the application to our tables must be dropped before. The schema is
    dropped if `upgrade` made it and nothing is left in it.

    Args:
        target: the revision to leave.
        since: the revision to arrive at; None means no tables.
        schema: as `upgrade`.

    Raises:
        UsageError: as `upgrade`.
    """
    for revision in reversed(history.between(history.load(versions), target, since=since)):
        revision.downgrade(schema)


def lock(connection: Connection) -> None:
    """Wait until no other migration of this database runs, and keep others waiting until the transaction ends.

    Call it in env.py before the heads are read; without it, of two upgrades at once on a fresh database one fails.

    ```python
    with context.begin_transaction():
        migrations.lock(connection)
        context.run_migrations()
    ```

    Args:
        connection: a connection in a transaction, at READ COMMITTED. With `transaction_per_migration` it must be
            another connection than that of the migrations: `with engine.begin() as guard: migrations.lock(guard)`.

    Raises:
        UsageError: the connection is in no transaction, so that the lock would not last.
    """
    if not connection.in_transaction():
        raise UsageError(
            "migrations.lock(connection) was called outside a transaction, where it would lock nothing: call it "
            "inside `with context.begin_transaction():`, or with transaction_per_migration on a connection of its own. "
            "With --sql there is no transaction: leave it out in context.is_offline_mode()."
        )
    connection.scalar(func.pg_catalog.pg_advisory_xact_lock(LOCK))


def not_ours(*schemas: str) -> Callable[[str | None, str, Mapping[str, str | None]], bool]:
    """Make an `include_name` for env.py that hides our tables from an autogenerate with `include_schemas=True`.

    `context.configure(..., include_schemas=True, include_name=migrations.not_ours())`: without it, Alembic proposes
    to drop what it finds in any schema and does not know. Without `include_schemas` it is not needed.

    Args:
        schemas: where our tables are; none means `durable`. Other tables in these schemas stay visible.
    """
    hidden = frozenset(schemas or (SCHEMA,))
    ours = frozenset(table.name for table in metadata.tables.values())

    def include_name(name: str | None, kind: str, parents: Mapping[str, str | None]) -> bool:
        return not (kind == "table" and name in ours and parents.get("schema_name") in hidden)

    return include_name
