"""The demo end to end, on some of the invoices: workers are killed, and every invoice comes out as the file says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from uuid import uuid4

import pytest
import tenacity
from sqlalchemy import NullPool, create_engine, func, make_url, select, text
from sqlalchemy.exc import DBAPIError

from sqla_durable import Workflow
from tests.examples.conftest import EXAMPLES
from tests.support.processes import run_python

DEMO = [sys.executable, "-m", "shop.demo"]


@pytest.fixture
def database(server_url: str) -> Generator[str]:
    """The name of a database that the demo makes, dropped afterwards."""
    name = f"shop_demo_{uuid4().hex}"
    yield name
    engine = create_engine(server_url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        connection.execute(text(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))


@pytest.fixture
def environment(server_url: str, database: str) -> dict[str, str]:
    return {**os.environ, "DATABASE_URL": server_url, "SHOP_TEST": database}


def still_running(mark: str) -> list[str]:
    """Return the commands of processes that were started with the mark in their environment."""
    found: list[str] = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text())
        except OSError:
            continue  # it has ended, or is somebody else's
    return found


def test_killed_workers_leave_every_invoice_exactly_once(
    database: str, environment: dict[str, str], thorough: bool
) -> None:
    # behaviour: R1, T1, E2
    kills = 2 if thorough else 1
    done = subprocess.run(
        [*DEMO, "--invoices", "36", "--kills", f"{kills}", "--database", database],
        cwd=EXAMPLES,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    numbers = dict(line.rsplit(maxsplit=1) for line in done.stdout.splitlines() if line.startswith(" "))
    assert numbers["invoices".rjust(9)] == "36"
    assert 1 <= int(numbers[" workers killed"]) <= kills  # on a busy machine the work may be done before the last
    undone = [numbers[f" cancelled: {fate}"] for fate in ("sold out", "no carrier")]
    assert (numbers[" orders that go wrong"], undone) == ("3", ["1", "1"])
    assert int(numbers[" workflows reclaimed"]) > 0
    assert still_running(database) == []


def test_interrupted_demo_leaves_nothing_running(server_url: str, database: str, environment: dict[str, str]) -> None:
    demo = subprocess.Popen(
        [*DEMO, "--invoices", "30", "--workers", "1", "--database", database],
        cwd=EXAMPLES,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    await_running_workflow(make_url(server_url).set(database=database).render_as_string(hide_password=False))
    demo.send_signal(signal.SIGINT)
    _, said = demo.communicate(timeout=60)
    assert demo.returncode == 130
    assert "Traceback" not in said
    assert still_running(database) == []


@tenacity.retry(
    retry=tenacity.retry_if_exception_type((AssertionError, DBAPIError)),
    wait=tenacity.wait_fixed(0.1),
    stop=tenacity.stop_after_delay(60),
    reraise=True,
)
def await_running_workflow(url: str) -> None:
    with create_engine(url, poolclass=NullPool).connect() as connection:
        assert connection.scalar(select(func.count(Workflow.started_at))) != 0


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense", "DATABASE_URL cannot be read"),
        ("postgresql://ada:hunter2@127.0.0.1:1/postgres", "ada:***@127.0.0.1:1/postgres cannot be reached"),
    ],
)
def test_wrong_server_is_explained(environment: dict[str, str], url: str, said: str) -> None:
    done = run_python(*DEMO[1:], directory=EXAMPLES, environment={**environment, "DATABASE_URL": url})
    assert said in done.stderr
    assert "hunter2" not in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 1


def test_role_that_may_not_create_databases_is_refused_with_the_reason(
    server_url: str, environment: dict[str, str]
) -> None:
    role = f"visitor_{uuid4().hex}"
    engine = create_engine(server_url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        connection.execute(text(f"CREATE ROLE {role} LOGIN PASSWORD 'hunter2'"))
    try:
        url = make_url(server_url).set(username=role, password="hunter2").render_as_string(hide_password=False)
        done = run_python(*DEMO[1:], directory=EXAMPLES, environment={**environment, "DATABASE_URL": url})
    finally:
        with engine.connect() as connection:
            connection.execute(text(f"DROP ROLE {role}"))
    assert "permission denied to create database" in done.stderr
    assert "The demo needs a role that may create databases" in done.stderr
    assert "hunter2" not in done.stderr
    assert done.returncode == 1
