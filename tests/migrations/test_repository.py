"""`alembic` in this repository's own directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from sqlalchemy import Engine

from tests.migrations.application import run_script
from tests.support.catalogue import Catalogue, catalogue, schemas
from tests.support.processes import run_python
from tests.support.sampling import thorough_cases

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "scheme", ["postgres", "postgresql+asyncpg", *thorough_cases(["postgresql", "postgresql+psycopg"])]
)
def test_upgrade_check_and_downgrade_work_with_every_form_of_url(
    empty_database_url: str, empty_engine: Engine, expected: Catalogue, scheme: str
) -> None:
    url = empty_database_url.replace("postgresql+psycopg", scheme, 1)
    run("upgrade", "head", url=url)
    with empty_engine.begin() as connection:
        assert catalogue(connection, "durable") == expected
    assert "No new upgrade operations detected" in run("check", url=url)
    run("downgrade", "base", url=url)
    with empty_engine.begin() as connection:
        assert schemas(connection) == {"public"}


def test_schema_can_be_chosen(empty_database_url: str, empty_engine: Engine, expected: Catalogue) -> None:
    run("-x", "schema=tenant_7", "upgrade", "head", url=empty_database_url)
    with empty_engine.begin() as connection:
        assert catalogue(connection, "tenant_7") == expected
        assert schemas(connection) == {"public", "tenant_7"}


def test_printing_needs_no_url(empty_database_url: str, empty_engine: Engine, expected: Catalogue) -> None:
    run_script(empty_database_url, run("upgrade", "head", "--sql", url=None))
    with empty_engine.begin() as connection:
        assert catalogue(connection, "durable") == expected


@pytest.mark.parametrize(
    ("url", "message"),
    [(None, "DATABASE_URL is not set: DATABASE_URL=postgresql://"), ("sqlite://", "not a PostgreSQL URL")],
)
def test_missing_or_foreign_url_is_a_clear_error(url: str | None, message: str) -> None:
    output = run("upgrade", "head", url=url, status=255)
    assert output.startswith("FAILED: ")
    assert message in output


def run(*arguments: str, url: str | None, status: int = 0) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    if url is not None:
        environment["DATABASE_URL"] = url
    process = run_python("-m", "alembic", *arguments, directory=ROOT, environment=environment)
    assert process.returncode == status, process.stderr
    return process.stdout
