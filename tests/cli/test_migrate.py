"""The command that brings the tables to the newest revision."""

from __future__ import annotations

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine, NullPool, create_engine, text

from sqla_durable import migrations
from sqla_durable.migrations import LOCK
from sqla_durable.models import REVISION
from tests.cli.invoking import CommandLine
from tests.store import races
from tests.support.catalogue import catalogue, schemas
from tests.support.databases import Databases


def test_tables_are_made_and_upgraded_once(databases: Databases) -> None:
    with databases.empty() as url:
        run, engine = CommandLine(url), create_engine(url, poolclass=NullPool)
        with engine.begin() as connection, Operations.context(MigrationContext.configure(connection)):
            migrations.upgrade("durable_0001")
        assert run("migrate", "--sql").out.startswith(f"-- the durable tables, from durable_0001 to {REVISION}\nBEGIN;")
        upgraded = run("migrate")
        assert (upgraded.code, f"were brought from 'durable_0001' to {REVISION!r}." in upgraded.out) == (0, True)
        assert f"are at {REVISION!r} already" in run("migrate").out
        assert run("start", "checkout").code == 0
        assert run("migrate", "--schema", "tenant_7", "--json").rows == [
            {"from": None, "to": REVISION, "schema": "tenant_7"}
        ]
        assert run("start", "checkout", "--schema", "tenant_7").code == 0
        with engine.begin() as connection:
            connection.execute(text("COMMENT ON TABLE durable.workflow IS 'sqla-durable durable_9999'"))
        newer = run("migrate")
        assert (newer.code, "upgrade sqla-durable in this process" in newer.err) == (1, True)


def test_script_makes_the_same_tables(databases: Databases) -> None:
    with databases.empty() as url:
        run, engine = CommandLine(url), create_engine(url, poolclass=NullPool)
        script = run("migrate", "--sql").out
        assert run("migrate", "--quiet").out == f"{REVISION}\n"
        assert run("migrate", "--sql").out == f"-- the durable tables are at {REVISION} already\n"
        made = _made(engine)
    with databases.empty() as url:
        engine = create_engine(url, poolclass=NullPool)
        with engine.connect() as connection:
            connection.connection.cursor().execute(script)
        assert _made(engine) == made


def test_two_at_once_take_turns(empty_database_url: str) -> None:
    engine = create_engine(empty_database_url, poolclass=NullPool)
    with engine.connect() as first:
        first.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK})
        second = races.Concurrent(lambda: CommandLine(empty_database_url)("migrate"))
        with engine.connect() as connection:
            races.wait_until(
                lambda: connection.execute(text("SELECT count(*) FROM pg_locks WHERE NOT granted")).scalar_one()
            )
            assert "durable" not in schemas(connection)
        first.rollback()
    assert second.result().code == 0


def _made(engine: Engine) -> object:
    with engine.connect() as connection:
        return catalogue(connection, "durable")
