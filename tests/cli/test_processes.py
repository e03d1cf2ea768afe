"""`worker --processes`: real workers under a supervisor, which are killed, replaced and stopped."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from uuid import UUID

import pytest
from sqlalchemy import create_engine, func, make_url, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Workflow, WorkflowStatus
from sqla_durable.models import Worker
from sqla_durable.tools.cli.supervised import check_connections
from sqla_durable.tools.cli.target import Sessionmakers
from tests.cli.conftest import Application
from tests.cli.test_worker import WAIT, accepted, pay, running_on, started, stopped
from tests.support.domain import Entry

WIDE = """
import os
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker
from ledger import durable

durable.sessionmaker = sessionmaker(create_engine(os.environ["DATABASE_URL"], pool_size=100_000))
"""


def read_until(lines: Iterator[str], text: str, times: int = 1) -> list[str]:
    """Read the log until this text has come so many times; return what was read."""
    found: list[str] = []
    while sum(text in line for line in found) < times:
        line = next(lines, None)
        assert line is not None, f"the log has ended without {text!r}: {''.join(found)}"
        found.append(line)
    return found


def live(session_factory: sessionmaker[Session]) -> set[str]:
    """Return the names of the workers that have not left, or died."""
    with session_factory() as session:
        return {*session.scalars(select(Worker.name).where(Worker.lease_expires_at > func.statement_timestamp()))}


def pid_of_executor(session_factory: sessionmaker[Session], workflow: UUID) -> int:
    """Return the process of the worker that executes a workflow."""
    with session_factory() as session:
        executing = select(Worker.name).join(Workflow, Workflow.worker_id == Worker.id)
        return int(session.scalars(executing.where(Workflow.id == workflow)).one().rpartition(":")[2])


# behaviour: R1
def test_killed_worker_is_replaced_and_all_are_restarted_and_stopped(
    application: Application, calls: socket.socket, database_url: str, session_factory: sessionmaker[Session]
) -> None:
    workflow = started(session_factory, "ada")
    command = application.start_fresh("worker", "ledger:durable", "--processes=2", "--lease=1s", "--url", database_url)
    with stopped(command):
        assert command.stderr is not None
        lines = iter(command.stderr)
        with closing(accepted(calls)):
            read_until(lines, "serves", 2)
            killed = pid_of_executor(session_factory, workflow)
            os.kill(killed, signal.SIGKILL)
            read_until(lines, f"({killed}) was ended by SIGKILL: starting another one in 0.5 s")
        with closing(accepted(calls)) as step:  # the workflow was reclaimed
            step.sendall(b"x")
            assert pay.handle(session_factory, workflow).result(timeout=WAIT) == "ada"
        with session_factory() as session:
            assert session.scalars(select(Entry.account)).all() == ["ada", "ada"]
        read_until(lines, "serves")
        before = live(session_factory)
        command.send_signal(signal.SIGHUP)
        read_until(lines, "all worker processes have been replaced")
        after = live(session_factory)
        assert (len(before), len(after), before & after) == (2, 2, set())
        left = started(session_factory, "ada")
        with closing(accepted(calls)) as step:
            command.terminate()
            read_until(lines, "stopping, as the supervisor asks", 2)
            os.kill(pid_of_executor(session_factory, left), signal.SIGTERM)  # systemd sends it to all: not a second one
            read_until(lines, "stopping; steps")
            step.sendall(b"x")
        assert command.wait(30) == 0
        rest = list(lines)
    assert live(session_factory) == set()
    assert [line for line in rest if "WARNING" in line or "ERROR" in line] == []
    with session_factory() as session:
        assert session.get_one(Workflow, left).status is WorkflowStatus.PENDING


def test_workers_leave_in_good_order_when_their_supervisor_is_killed(
    application: Application, calls: socket.socket, database_url: str, session_factory: sessionmaker[Session]
) -> None:
    application.write("wide.py", WIDE)
    workflow = started(session_factory, "ada")
    options = ("--processes=2", "--name=shop")
    command = application.start_fresh("worker", "wide:durable", *options, environment={"DATABASE_URL": database_url})
    with stopped(command):
        assert command.stderr is not None
        lines = iter(command.stderr)
        with closing(accepted(calls)) as step:
            said = read_until(lines, "serves", 2)
            said += [] if any("max_connections" in line for line in said) else read_until(lines, "max_connections")
            assert live(session_factory) == {"shop-1", "shop-2"}
            command.kill()
            said += read_until(lines, "stopping, the supervisor has ended", 2)
            step.sendall(b"x")
        said += list(lines)  # until both have ended
    assert running_on(session_factory, workflow) == (WorkflowStatus.PENDING, ["enter", "hold"])
    (warning,) = [line for line in said if "max_connections" in line]  # by one of them
    assert "shop-1 2 worker processes may open 200022 connections, and the server accepts" in warning
    shown = Counter(line.split()[3] for line in said)
    assert shown.keys() == {"supervisor", "shop-1", "shop-2"}


def test_configuration_that_no_worker_can_use_is_reported_once(application: Application) -> None:
    done = application.run("worker", "ledger:durabel", "--processes", "3", "--log-level", "error")
    assert done.returncode == 2
    message, stopping = done.stderr.splitlines()
    assert message.startswith("sqla-durable: 'ledger:durabel': module 'ledger' has no attribute 'durabel'")
    assert "ended with exit code 2, and so would another one: stopping" in stopping


@pytest.mark.parametrize("wanted", ["0", "two"])
def test_wrong_number_of_processes_is_refused(application: Application, wanted: str) -> None:
    done = application.run("worker", "ledger:durable", "--processes", wanted)
    assert done.stderr == (f"sqla-durable: --processes must be a number from 1 to 1,000, or auto, got {wanted!r}.\n")
    assert done.returncode == 2


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("size", [5, 100_000])
async def test_warning_where_pools_are_larger_than_max_connections(
    direct_url: str, caplog: pytest.LogCaptureFixture, kind: str, size: int
) -> None:
    sync = sessionmaker[Session](create_engine(direct_url, pool_size=size))
    asynchronous = async_sessionmaker[AsyncSession](create_async_engine(direct_url, pool_size=size))
    opened = Sessionmakers(sync, None) if kind == "sync" else Sessionmakers(None, asynchronous)
    await check_connections(opened, 2)
    sync.kw["bind"].dispose()
    await asynchronous.kw["bind"].dispose()
    expected = ["2 worker processes may open 200022 connections"] if size > 5 else []
    assert [each.message.split(",")[0] for each in caplog.records if each.levelno == logging.WARNING] == expected


async def test_no_warning_behind_a_pooler_or_without_a_database(
    direct_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")
    pooled = create_engine(direct_url, pool_size=100_000, connect_args={"prepare_threshold": None})
    gone = create_engine(make_url(direct_url).set(host="127.0.0.1", port=1), pool_size=100_000)
    for each in pooled, gone:
        await check_connections(Sessionmakers(sessionmaker(each), None), 2)
        each.dispose()
    assert caplog.records == []
