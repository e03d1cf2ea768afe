"""The worker as a process: it executes, stops on a signal, and releases what it cannot finish."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Generator
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from inspect import signature
from uuid import UUID

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

import sqla_durable
from sqla_durable import Durable, Step, Workflow, WorkflowStatus
from sqla_durable.models import Worker
from sqla_durable.tools.cli.worker import worker
from tests.cli.conftest import Application
from tests.support.domain import Entry
from tests.support.processes import Started

durable = Durable()
WAIT = timedelta(seconds=30)


@durable.workflow
def pay(account: str) -> str:
    """Stand for the workflow of this name in the application, to start it and to wait for it."""
    return account


@durable.workflow
async def pay_later(account: str) -> str:
    return account


def test_defaults_of_the_command_are_those_of_the_class() -> None:
    command, made = (signature(each).parameters for each in (worker, sqla_durable.Worker))
    shared = (command.keys() & made.keys()) - {"durable"}
    assert shared > {"concurrency", "lease", "grace", "max_attempts"}
    for name in shared:
        default = made[name].default
        assert command[name].default == default, name


@contextmanager
def stopped(process: subprocess.Popen[str] | Started) -> Generator[None]:
    """End the process whatever the test does."""
    try:
        yield
    finally:
        process.kill()
        process.communicate()


def started(session_factory: sessionmaker[Session], account: str) -> UUID:
    with session_factory.begin() as session:
        return pay.start(session, account).id


def accepted(calls: socket.socket) -> socket.socket:
    """Wait until a worker executes the step `hold`."""
    connection, _ = calls.accept()
    assert connection.recv(100) == b"ada"
    return connection


def interrupted(worker: Started) -> int:
    """Press Ctrl-C until the process ends: two that come too close are one."""
    while True:
        worker.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            return worker.wait(0.2)


def running_on(session_factory: sessionmaker[Session], workflow_id: UUID) -> tuple[WorkflowStatus, list[str]]:
    with session_factory() as session:
        found = session.get_one(Workflow, workflow_id)
        assert session.scalars(select(Worker)).all() == []
        return found.status, [step.key for step in found.steps]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_the_step_finish_and_releases_the_workflow(
    application: Application,
    calls: socket.socket,
    database_url: str,
    session_factory: sessionmaker[Session],
    number: signal.Signals,
) -> None:
    workflow = started(session_factory, "ada")
    worker = application.start("worker", "ledger:durable", environment={"DATABASE_URL": database_url})
    with stopped(worker):
        with closing(accepted(calls)) as step:
            worker.send_signal(number)
            assert worker.stderr is not None
            assert any("stopping" in line for line in worker.stderr)
            step.sendall(b"x")
        assert worker.wait(30) == 0
    assert running_on(session_factory, workflow) == (WorkflowStatus.PENDING, ["enter", "hold"])


def test_step_that_outlasts_the_grace_does_not_keep_the_process(
    application: Application, calls: socket.socket, database_url: str, session_factory: sessionmaker[Session]
) -> None:
    workflow = started(session_factory, "ada")
    worker = application.start("worker", "ledger:durable", "--grace", "100ms", "--url", database_url)
    with stopped(worker), closing(accepted(calls)):
        worker.terminate()
        assert worker.wait(30) == 0
    assert running_on(session_factory, workflow) == (WorkflowStatus.PENDING, ["enter"])


def test_another_worker_finishes_what_was_released(
    application: Application, calls: socket.socket, database_url: str, session_factory: sessionmaker[Session]
) -> None:
    # behaviour: R1, E2
    workflow = started(session_factory, "ada")
    for attempt in range(2):
        worker = application.start("worker", "ledger:durable", "--grace", "100ms", "--url", database_url)
        with stopped(worker), closing(accepted(calls)) as step:
            if attempt:
                step.sendall(b"x")
                assert pay.handle(session_factory, workflow).result(timeout=WAIT) == "ada"
            worker.terminate()
            assert worker.wait(30) == 0
    with session_factory() as session:
        assert session.scalars(select(Entry.account)).all() == ["ada", "ada"]
        assert session.scalars(select(Step.key).order_by(Step.position)).all() == ["enter", "hold", "enter#2"]


def test_second_signal_ends_the_process_at_once(
    application: Application, calls: socket.socket, database_url: str, session_factory: sessionmaker[Session]
) -> None:
    started(session_factory, "ada")
    worker = application.start("worker", "ledger:durable", "--url", database_url)
    with stopped(worker), closing(accepted(calls)):
        worker.send_signal(signal.SIGINT)
        assert worker.stderr is not None
        assert any("stopping" in line for line in worker.stderr)
        assert interrupted(worker) == 130, worker.stderr.read()


def test_sync_and_async_workflows_run_on_a_url(
    application: Application, database_url: str, session_factory: sessionmaker[Session]
) -> None:
    with session_factory.begin() as session:
        workflow = pay_later.start(session, "bob").id
    plain = database_url.replace("postgresql+psycopg", "postgres")
    options = ("--name", "mine", "--log-finished")
    worker = application.start_fresh("worker", "ledger:durable", *options, environment={"DATABASE_URL": plain})
    with stopped(worker):
        assert pay_later.handle(session_factory, workflow).result(timeout=WAIT) == "bob"
        with session_factory() as session:
            assert session.scalars(select(Worker.name)).all() == ["mine"]
        worker.terminate()
        assert worker.wait(30) == 0
        assert worker.stderr is not None
        lines = worker.stderr.readlines()
    assert [line for line in lines if " mine " not in line] == []
    assert any(f"INFO    mine workflow pay_later {workflow} succeeded in attempt 1" in line for line in lines)


def test_only_the_queues_that_were_named_are_served(
    application: Application, database_url: str, session_factory: sessionmaker[Session]
) -> None:
    with session_factory.begin() as session:
        left = pay_later.options(queue="slow", priority=-1).start(session, "ada").id
        done = pay_later.options(queue="fast").start(session, "bob").id
    worker = application.start("worker", "ledger:durable", "--queue=fast", "--queue=faster", "--url", database_url)
    with stopped(worker):
        assert pay_later.handle(session_factory, done).result(timeout=WAIT) == "bob"
        worker.terminate()
        assert worker.wait(30) == 0
    with session_factory() as session:
        assert session.get_one(Workflow, left).status is WorkflowStatus.PENDING


def test_signal_before_the_worker_listens_ends_it_in_good_order(application: Application, calls: socket.socket) -> None:
    application.write(
        "slow.py",
        "import os, socket\nsocket.create_connection(('127.0.0.1', int(os.environ['TEST_PORT']))).recv(1)\n",
    )
    worker = application.start("worker", "slow:durable")
    with stopped(worker):
        connection, _ = calls.accept()
        with closing(connection):
            worker.terminate()
            assert worker.wait(30) == 0


def test_console_script_is_the_same_program() -> None:
    script = subprocess.run(
        [sys.executable, "-c", "from sqla_durable.tools.cli import main; main()", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert script.stdout.startswith("sqla-durable ")


# behaviour: X6
def test_only_the_versions_that_were_named_are_claimed(
    application: Application, session_factory: sessionmaker[Session], database_url: str
) -> None:
    with session_factory.begin() as session:
        left, done = (pay_later.options(priority=place).start(session, "ada") for place in (-1, 0))
        session.flush()
        left.version, done.version = "1", "2"
        ids = left.id, done.id
    worker = application.start("worker", "ledger:durable", "--version=2", "--version=3", "--url", database_url)
    with stopped(worker):
        pay_later.handle(session_factory, ids[1]).result(timeout=WAIT)
        with session_factory() as session:
            assert session.get_one(Workflow, ids[0]).status is WorkflowStatus.PENDING
