"""An application of its own for each test, written to a directory, and the command line run in it as a process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import pytest

APPLICATION = '''
import os
import socket

from sqlalchemy.orm import Session

from sqla_durable import Durable
from sqla_durable.asyncio import to_thread
from tests.support.domain import Entry

durable = Durable()


@durable.workflow
def pay(account: str) -> str:
    enter(account)
    hold(account)
    enter(account)
    return account


@durable.workflow
async def pay_later(account: str) -> str:
    await to_thread(enter, account)
    return account


@durable.step
def enter(session: Session, account: str) -> None:
    session.add(Entry(account=account, cents=1))


@durable.step
def hold(account: str) -> str:
    """Call the test, and wait until it hangs up: the test knows that this step is being executed."""
    with socket.create_connection(("127.0.0.1", int(os.environ["TEST_PORT"]))) as connection:
        connection.sendall(account.encode())
        return connection.recv(1).decode()
'''

FORKING = """
import json, os, runpy, sys

from sqla_durable.tools.cli import main, worker

for number, arguments in enumerate(json.loads(sys.argv[1])):
    if (child := os.fork()) == 0:
        for stream, name in (1, "out"), (2, "err"):
            os.dup2(os.open(f"{number}.{name}", os.O_WRONLY | os.O_CREAT), stream)
        sys.argv[1:] = arguments
        runpy.run_module("sqla_durable", run_name="__main__", alter_sys=True)
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Application:
    """A directory with `ledger.py`, in which commands are run."""

    def __init__(self, directory: Path, port: int) -> None:
        self.directory = directory
        self._port = port
        (directory / "ledger.py").write_text(APPLICATION)

    def write(self, name: str, text: str) -> None:
        (self.directory / name).write_text(text)

    def run(self, *arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            [sys.executable, "-m", "sqla_durable", *arguments],
            cwd=self.directory,
            env=self._environment(environment),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def run_each(self, commands: Sequence[Sequence[str]]) -> list[subprocess.CompletedProcess[str]]:
        """Run commands to their ends, each in a process that has the package imported: that takes the most time."""
        done = subprocess.run(
            [sys.executable, "-c", FORKING, json.dumps(commands)],
            cwd=self.directory,
            env=self._environment(None),
            stdout=subprocess.PIPE,
            text=True,
            timeout=100,
            check=True,
        )
        statuses = [int(each) for each in done.stdout.split()]
        return [self._forked(number, each, statuses[number]) for number, each in enumerate(commands)]

    def _forked(self, number: int, command: Sequence[str], status: int) -> subprocess.CompletedProcess[str]:
        out, err = ((self.directory / f"{number}.{name}").read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess(command, status, out, err)

    def start(self, *arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start a command."""
        return subprocess.Popen(
            [sys.executable, "-m", "sqla_durable", *arguments],
            cwd=self.directory,
            env=self._environment(environment),
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=_accept_interrupts,
        )

    def _environment(self, given: Mapping[str, str] | None) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
        root = str(Path(__file__).parents[2])
        return {**inherited, "PYTHONPATH": root, "TEST_PORT": str(self._port), **(given or {})}


@pytest.fixture
def calls() -> Generator[socket.socket]:
    """Where the step `hold` calls."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        listening.settimeout(30)
        yield listening


@pytest.fixture
def application(tmp_path: Path, calls: socket.socket) -> Application:
    return Application(tmp_path, calls.getsockname()[1])


def _accept_interrupts() -> None:
    """Restore SIGINT, which a shell has ignored by what it executes in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
