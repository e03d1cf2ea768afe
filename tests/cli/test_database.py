"""Which database the command line uses, and what it says when it cannot."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine, make_url, text

from sqla_durable.tools.cli.database import normalised
from tests.cli.conftest import Application
from tests.support.roles import roles

SECRET = "hunter2"


@pytest.mark.parametrize(
    "url",
    [
        "postgres://ada:pw@host:5433/name?sslmode=require",
        "postgresql://ada:pw@host:5433/name?sslmode=require",
        "postgresql+psycopg2://ada:pw@host:5433/name?sslmode=require",
        "postgresql+asyncpg://ada:pw@host:5433/name?sslmode=require",
        "postgresql+psycopg://ada:pw@host:5433/name?sslmode=require",
    ],
)
def test_every_form_of_a_postgresql_url_is_understood(url: str) -> None:
    assert normalised(url) == make_url("postgresql+psycopg://ada:pw@host:5433/name?sslmode=require")


@pytest.mark.parametrize(
    ("url", "said", "code"),
    [
        (f"nonsense {SECRET}", "the database URL cannot be read", 2),
        (f"postgresql://ada:{SECRET}@host:port/name", "the database URL cannot be read", 2),
        (f"mysql://ada:{SECRET}@host/name", "begins with 'mysql': durable workflows need PostgreSQL", 2),
        (f"postgresql://ada:{SECRET}@127.0.0.1:1/name", "ada:***@127.0.0.1:1/name cannot be reached", 1),
    ],
)
def test_wrong_url_is_explained_without_its_password(application: Application, url: str, said: str, code: int) -> None:
    done = application.run("worker", "ledger:durable", "--start-timeout", "0", "--url", url)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert SECRET not in done.stderr
    assert done.returncode == code


def test_no_database_at_all_is_explained(application: Application) -> None:
    done = application.run("worker", "ledger:durable")
    assert "there is no database: give the Durable object a sessionmaker" in done.stderr
    assert done.returncode == 2


def test_unmigrated_database_is_explained(application: Application, empty_database_url: str) -> None:
    # behaviour: X2
    done = application.run("worker", "ledger:durable", environment={"DATABASE_URL": empty_database_url})
    assert "the durable tables are not in" in done.stderr
    assert "Run `alembic upgrade heads`" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 1


def test_missing_rights_are_explained(application: Application, engine: Engine, direct_url: str) -> None:
    with roles(engine, direct_url, "reader", sql="GRANT USAGE ON SCHEMA durable TO reader") as made:
        options = {"PGOPTIONS": made.options("reader")}
        done = application.run("worker", "ledger:durable", "--url", direct_url, environment=options)
    assert "the database refused: permission denied for table" in done.stderr
    assert "needs the rights of `worker`: see docs/security.md, Roles and tenants." in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("revision", "said"), [("durable_9999", "newer than this package"), ("", "needs 'durable_")])
def test_other_schema_version_is_explained(
    application: Application, database_url: str, engine: Engine, revision: str, said: str
) -> None:
    # behaviour: X2
    with engine.begin() as connection:
        connection.execute(text(f"COMMENT ON TABLE durable.workflow IS '{revision}'"))
    done = application.run("worker", "ledger:durable", "--url", database_url)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lease", "0"], "lease must be longer than zero, got 0 seconds"),
        (["--poll-interval", "-1"], "poll_interval must be longer than zero"),
        (["--queue", " "], "names no queue"),
        (["--lease", "1e300"], "too large"),
        (["--log-level", "loud"], "--log-level 'loud' is none of"),
        (["--concurrency", "0"], "Invalid value for '--concurrency'"),
    ],
)
def test_wrong_setting_is_explained(application: Application, arguments: list[str], said: str) -> None:
    done = application.run("worker", "ledger:durable", "--url", "postgresql://nobody@127.0.0.1:1/none", *arguments)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 2
