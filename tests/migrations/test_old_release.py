"""A release before a migration and this one, side by side on the new tables: nothing is lost, or done twice."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import Engine, create_engine, func, select, text
from sqlalchemy.orm import sessionmaker

from sqla_durable import Worker, Workflow, manage, migrations, start_many
from tests.acceptance.shells import POLL
from tests.store.races import wait_until

ROOT = Path(__file__).parents[2]
OLD = "fde161d"  # the last commit whose tables are those of durable_0001

APPLICATION = """
from datetime import timedelta

from sqlalchemy import text
from sqlalchemy.orm import Session

from sqla_durable import Durable, sleep

durable = Durable()


@durable.step
def note(session: Session, number: int, part: str) -> None:
    session.execute(text("INSERT INTO app_note VALUES (:number, :part)"), {"number": number, "part": part})


@durable.workflow
def work(number: int) -> int:
    note(number, "first")
    sleep(timedelta(seconds=1.5))
    note(number, "second")
    return number
"""

OLD_PROGRAM = """
import os, sys

from sqlalchemy import create_engine, text
from sqlalchemy.orm import sessionmaker

import sqla_durable
from application import durable, work
from sqla_durable import Worker, metadata, start_many

engine = create_engine(os.environ["DATABASE_URL"])
maker = sessionmaker(engine)
if sys.argv[1] == "make":
    metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE app_note (number int, part text, PRIMARY KEY (number, part))"))
    with maker.begin() as session:
        start_many(session, [work.bind(number) for number in range(20)])
    print(sqla_durable.models.REVISION)
elif sys.argv[1] == "start":
    with maker.begin() as session:
        start_many(session, [work.bind(number) for number in range(100, 120)])
else:
    Worker(durable, sessionmaker=maker, name="old").run()
"""


@pytest.fixture(scope="module")
def old_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as it was, and an application of it."""
    there = tmp_path_factory.mktemp("old")
    archive = subprocess.run(["git", "archive", OLD, "sqla_durable"], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        pytest.skip(f"this checkout has no commit {OLD}: {archive.stderr.decode().strip()}")
    subprocess.run(["tar", "-x"], cwd=there, input=archive.stdout, check=True)
    (there / "application.py").write_text(APPLICATION)
    (there / "program.py").write_text(OLD_PROGRAM)
    return there


def of_old(there: Path, url: str, what: str) -> dict[str, Any]:
    """Return how the program of the old release is executed."""
    environment = {**os.environ, "PYTHONPATH": str(there), "DATABASE_URL": url}
    return {"args": [sys.executable, str(there / "program.py"), what], "cwd": there, "env": environment}


def run_old(there: Path, url: str, what: str) -> str:
    done: subprocess.CompletedProcess[str] = subprocess.run(
        **of_old(there, url, what), check=True, stdout=subprocess.PIPE, text=True, timeout=60
    )
    return done.stdout


@contextmanager
def old_worker(there: Path, url: str) -> Generator[None]:
    process = subprocess.Popen(**of_old(there, url, "work"))
    try:
        yield
    finally:
        process.terminate()
        assert process.wait(60) == 0


def application(there: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("application_of_both", there / "application.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def upgrade(engine: Engine) -> None:
    with engine.begin() as connection, Operations.context(MigrationContext.configure(connection)):
        migrations.upgrade("durable_0002", since="durable_0001")


# behaviour: X1
def test_workflows_in_flight_and_both_workers_go_on(old_release: Path, empty_database_url: str) -> None:
    engine = create_engine(empty_database_url)
    maker = sessionmaker(engine)
    assert run_old(old_release, empty_database_url, "make").strip() == "durable_0001"
    new = application(old_release)
    with old_worker(old_release, empty_database_url):
        with engine.connect() as connection:
            noted = text("SELECT count(*) FROM app_note")
            wait_until(lambda: connection.execute(noted).scalar_one() >= 10)
        upgrade(engine)
        with Worker(new.durable, sessionmaker=maker, poll_interval=POLL, name="new"):
            with maker.begin() as session:
                manage.put_queue(session, "limited", concurrency=2, rate=None)
                limited = [new.work.options(queue="limited", by="a").bind(number) for number in range(200, 203)]
                start_many(session, [*limited, *(new.work.bind(number) for number in range(50, 70))])
            run_old(old_release, empty_database_url, "start")
            unfinished = select(func.count()).where(Workflow.finished_at.is_(None), Workflow.queue == "default")
            with maker() as session:
                wait_until(lambda: not session.scalar(unfinished))
    with maker() as session:
        done = select(Workflow.output).where(Workflow.queue == "default")
        outputs: list[Any] = [*session.scalars(done)]
        assert sorted(outputs) == [*range(20), *range(50, 70), *range(100, 120)]
        parts = text("SELECT count(*), count(*) FILTER (WHERE part = 'second') FROM app_note WHERE number < 200")
        assert tuple(session.execute(parts).one()) == (120, 60)
        assert set(session.scalars(select(Workflow.status).where(Workflow.queue == "limited"))) == {"pending"}
    with Worker(new.durable, sessionmaker=maker, poll_interval=POLL, queues="limited"), maker() as session:
        rest = select(func.count()).where(Workflow.finished_at.is_(None))
        wait_until(lambda: not session.scalar(rest))
    engine.dispose()
