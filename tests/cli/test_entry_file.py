"""An application in one file: `__main__` where it is executed, and `shop` where it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Durable, Workflow, WorkflowStatus, send_signal
from tests.cli.test_worker import stopped
from tests.store import races
from tests.support.processes import Started

SHOP = """
import os
import sys
from datetime import timedelta
from uuid import UUID

from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

from sqla_durable import Durable, Worker, wait_signal

durable = Durable()
engine = create_engine(os.environ["DATABASE_URL"])
SessionLocal = sessionmaker(engine)


class OutOfStock(Exception):
    def __init__(self, order_id, product):
        super().__init__(order_id, product)
        self.product = product


@durable.step
def reserve(order_id: int) -> None:
    raise OutOfStock(order_id, "cup")


@durable.step
def notify(product: str) -> str:
    return product


@durable.workflow
def checkout(order_id: int) -> None:
    try:
        reserve(order_id)
    except OutOfStock as error:
        notify(error.product)
        wait_signal("go")
        raise


def work():
    Worker(durable, sessionmaker=SessionLocal).run()


def call(workflow_id):
    try:
        checkout.handle(SessionLocal, UUID(workflow_id)).result(timeout=timedelta(seconds=30))
    except OutOfStock as error:
        print("caught", error.product)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
"""
ENTRY = ["shop.py"]
IMPORTED = ["-c", "import shop, sys; getattr(shop, sys.argv[1])(*sys.argv[2:])"]
COMMAND = ["-m", "sqla_durable", "worker", "shop:durable"]

durable = Durable()


@durable.workflow
def checkout(order_id: int) -> None:
    """Stand for the workflow of this name in the application, to start it."""


def process(directory: Path, url: str, *arguments: str) -> subprocess.Popen[str] | Started:
    environment = {**os.environ, "DATABASE_URL": url, "PYTHONPATH": str(Path(__file__).parents[2])}
    if arguments[0] != ENTRY[0]:
        return Started(*arguments, directory=directory, environment=environment)
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=directory, env=environment, stdout=subprocess.PIPE, text=True
    )


@contextmanager
def worker(directory: Path, url: str, *arguments: str) -> Generator[None]:
    """Start a worker, and stop it in good order, so that it holds nothing."""
    started = process(directory, url, *arguments)
    with stopped(started):
        yield
        started.terminate()
        assert started.wait(30) == 0


def wait_for(session_factory: sessionmaker[Session], workflow_id: UUID, status: WorkflowStatus) -> None:
    def has_come() -> bool:
        with session_factory() as session:
            return session.get_one(Workflow, workflow_id).status is status

    races.wait_until(has_come, what=status, seconds=60)  # until a process has started


# behaviour: V4
@pytest.mark.parametrize(
    ("first", "second", "caller"),
    [([*ENTRY, "work"], COMMAND, ENTRY), (COMMAND, [*ENTRY, "work"], IMPORTED)],
    ids=["entry-file-first", "imported-first"],
)
def test_error_of_the_entry_file_is_the_same_class_in_every_process(
    tmp_path: Path,
    database_url: str,
    session_factory: sessionmaker[Session],
    first: list[str],
    second: list[str],
    caller: list[str],
) -> None:
    """On a replay in another process, and for who waits for the result in a third."""
    (tmp_path / "shop.py").write_text(SHOP)
    with session_factory.begin() as session:
        workflow_id = checkout.start(session, 7).id
    with worker(tmp_path, database_url, *first):
        wait_for(session_factory, workflow_id, WorkflowStatus.SUSPENDED)
    with worker(tmp_path, database_url, *second):
        with session_factory.begin() as session:
            send_signal(session, workflow_id, "go")
        wait_for(session_factory, workflow_id, WorkflowStatus.FAILED)
    calling = process(tmp_path, database_url, *caller, "call", str(workflow_id))
    assert calling.communicate(timeout=30)[0].split() == ["caught", "cup"]
