"""The pytest plugin, in a pytest of its own: the tests of docs/testing.md, and what it leaves behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import NullPool, create_engine, text

ROOT = Path(__file__).parents[2]
SHOWN = re.compile(r"<!-- shown, tested in tests/testing/test_plugin.py -->\n```python\n(.*?)```", re.S)
CRASHING = """
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker
from sqla_durable import Durable, Worker
from sqla_durable.testing import Moment

durable = Durable()

@durable.workflow
def nothing() -> int:
    return 7

def make_worker(url: str) -> Worker:
    return Worker(durable, sessionmaker=sessionmaker(create_engine(url)))

def test_crash(sqla_durable_crash_everywhere, sqla_durable_engine):
    report = sqla_durable_crash_everywhere(
        make_worker, start=nothing.start, end_state=lambda session, workflow: 1, moments=[Moment.BEFORE]
    )
    assert report.points
"""
APPLICATION = """
from collections.abc import Callable, Iterator

import pytest
from fastapi import FastAPI
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncEngine

from orders import Base, SessionLocal, app, engine
from sqla_durable.testing.databases import migrate

@pytest.fixture(scope="session")
def sqla_durable_migrate() -> Callable[[Connection], None]:
    def both(connection: Connection) -> None:
        migrate(connection)
        Base.metadata.create_all(connection)

    return both

"""
ORDERING = """
import asyncio
import httpx

def test_order(app_on_test_database):
    async def order() -> httpx.Response:
        transport = httpx.ASGITransport(app_on_test_database)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/orders", json={"cents": 1250})

    assert asyncio.run(order()).json()["id"] == 1
"""
LATE = """
import sys

def test_nothing_is_imported():
    assert not [name for name in ("sqlalchemy", "pydantic", "alembic", "psycopg") if name in sys.modules]
"""


def run(directory: Path, *options: str, url: str | None = None, **files: str) -> str:
    for name, content in files.items():
        (directory / f"{name}.py").write_text(content)
    # Whether the package is installed, and with what else, does not matter: no other plugin is loaded.
    arguments = ["-p", "sqla_durable.testing.plugin", "-W", "error", "-p", "no:cacheprovider", *options]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=directory,
        env={
            **{name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"},
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTHONPATH": str(ROOT),
            "TEST_SERVER_URL": url or "",
        },
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def databases_of(url: str) -> set[str]:
    with create_engine(url, poolclass=NullPool).connect() as connection:
        return set(connection.scalars(text("SELECT datname FROM pg_database WHERE datname LIKE 'sqla\\_durable\\_%'")))


def test_tests_of_the_page_pass_on_a_server_of_ones_own(tmp_path: Path, server_url: str) -> None:
    tests, conftest = SHOWN.findall((ROOT / "docs" / "testing.md").read_text())
    found = run(tmp_path, url=server_url, test_shown=tests, test_crash=CRASHING, conftest=conftest)
    assert "4 passed" in found
    pattern = re.compile(r"sqla_durable_[0-9a-f]{12}(_\d+)?$")
    assert [each for each in databases_of(server_url) if pattern.match(each)] == []


def test_application_whose_engine_is_made_at_import_uses_the_database_of_the_test(
    tmp_path: Path, server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "fastapi.md").read_text()
    (fixture,) = SHOWN.findall(page)
    orders = "\n".join(re.findall(r"\n\n```python\n(.*?)```", page.split("## Errors")[0], re.S))
    monkeypatch.setenv("DATABASE_URL", "postgresql+psycopg://nobody@nowhere.invalid/none")
    own_server = (
        f"@pytest.fixture(scope='session')\ndef sqla_durable_server_url() -> str:\n    return {server_url!r}\n\n"
    )
    conftest = APPLICATION + own_server + fixture
    assert "1 passed" in run(tmp_path, orders=orders, conftest=conftest, test_order=ORDERING)


def test_server_is_embedded_and_shared_by_the_processes_of_xdist(tmp_path: Path) -> None:
    tests = """
import pytest
from sqlalchemy import text

@pytest.mark.parametrize("number", [1, 2])
def test_server(number, sqla_durable_session, sqla_durable_server_url):
    sqla_durable_session.execute(text("SELECT FROM durable.workflow"))
    (Path(__file__).parent / f"url_{number}").write_text(sqla_durable_server_url)
"""
    run(tmp_path, "-p", "xdist.plugin", "-n", "2", test_server="from pathlib import Path\n" + tests)
    (url,) = {(tmp_path / f"url_{number}").read_text() for number in (1, 2)}
    directory = Path(re.findall(r"host=([^&]+)", url)[0].replace("%2F", "/"))
    assert not directory.exists()


def test_package_is_imported_when_a_test_asks_for_it(tmp_path: Path) -> None:
    assert "1 passed" in run(tmp_path, test_late=LATE)
