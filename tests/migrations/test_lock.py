"""Two upgrades of one fresh database at the same time both end well."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import Connection, Engine, inspect, text

from sqla_durable import migrations
from sqla_durable.errors import UsageError
from sqla_durable.models import REVISION
from tests.migrations.application import Application
from tests.support.catalogue import Catalogue, catalogue
from tests.support.processes import Started

ROOT = Path(__file__).parents[2]

routes = pytest.mark.parametrize("application", ["own_revision", "branch"], indirect=True)


# behaviour: X1
@routes
def test_two_processes_upgrade_a_fresh_database_at_once(
    application: Application, empty_engine: Engine, expected: Catalogue
) -> None:
    processes = [alembic(application, "upgrade", "heads") for _ in range(3)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    with empty_engine.begin() as connection:
        assert catalogue(connection, "durable") == expected


IN_ONE_TRANSACTION = """\
        with context.begin_transaction():
            migrations.lock(connection)
            context.run_migrations()
"""
GUARDED = """\
        with engine.begin() as guard:
            migrations.lock(guard)
            context.run_migrations()
"""


@pytest.mark.parametrize("application", ["own_revision"], indirect=True)
def test_guard_connection_holds_the_lock_over_several_transactions(
    application: Application, empty_engine: Engine, expected: Catalogue
) -> None:
    one_for_each = ("target_metadata=Base.metadata)", "target_metadata=Base.metadata, transaction_per_migration=True)")
    application.edit_environment(one_for_each)
    with pytest.raises(UsageError, match="or with transaction_per_migration on a connection of its own"):
        application.upgrade()
    application.edit_environment((IN_ONE_TRANSACTION, GUARDED))
    processes = [alembic(application, "upgrade", "heads") for _ in range(3)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    with empty_engine.begin() as connection:
        assert catalogue(connection, "durable") == expected


# behaviour: X1
def test_second_upgrade_waits_for_the_first_and_finds_its_work_done(empty_engine: Engine) -> None:
    created, waited = threading.Event(), threading.Event()

    def first() -> None:
        with empty_engine.begin() as connection:
            migrate_once(connection)
            created.set()
            assert waited.wait(30)

    def second() -> None:
        assert created.wait(30)
        with empty_engine.begin() as connection:
            migrate_once(connection)

    with ThreadPoolExecutor() as pool:
        futures = [pool.submit(first), pool.submit(second)]
        with empty_engine.connect().execution_options(isolation_level="AUTOCOMMIT") as observer:
            wait_for(lambda: somebody_waits(observer))
        waited.set()
        for future in futures:
            future.result(30)


def test_lock_outside_a_transaction_is_refused(engine: Engine) -> None:
    with (
        engine.connect() as connection,
        pytest.raises(UsageError, match=r"outside a transaction.*call it inside.*With --sql"),
    ):
        migrations.lock(connection)


def test_lock_is_free_again_after_the_transaction(engine: Engine) -> None:
    with engine.connect() as first, engine.connect() as second:
        with first.begin():
            migrations.lock(first)
            assert not second.scalar(text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": migrations.LOCK})
        assert second.scalar(text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": migrations.LOCK})


def alembic(application: Application, *arguments: str) -> Started:
    ini = str(application.directory / "alembic.ini")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return Started("-m", "alembic", "-c", ini, *arguments, directory=application.directory, environment=environment)


def migrate_once(connection: Connection) -> None:
    """Do what Alembic does: read where the database stands, then bring it forward."""
    migrations.lock(connection)
    if not inspect(connection).has_table("workflow", schema="durable"):
        with Operations.context(MigrationContext.configure(connection)):
            migrations.upgrade(REVISION)


def somebody_waits(connection: Connection) -> bool:
    query = "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND database = :database)"
    oid = connection.scalar(text("SELECT oid FROM pg_database WHERE datname = current_database()"))
    return bool(connection.scalar(text(query), {"database": oid}))


def wait_for(condition: Callable[[], bool]) -> None:
    """Look until it is so; the test's time limit ends it."""
    while not condition():
        pass
