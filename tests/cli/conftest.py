"""An application of its own for each test, written to a directory, and the command line run in it as a process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Generator, Mapping
from contextlib import closing
from pathlib import Path

import pytest

from tests.cli.commands import Commands
from tests.support.processes import Started, run_python

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
        return run_python(
            "-m", "sqla_durable", *arguments, directory=self.directory, environment=self._environment(environment)
        )

    def start(self, *arguments: str, environment: Mapping[str, str] | None = None) -> Started:
        """Start a command, in a process that has the package imported."""
        return Started(
            "-m", "sqla_durable", *arguments, directory=self.directory, environment=self._environment(environment)
        )

    def start_fresh(self, *arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start a command as a shell does."""
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
def command(database_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Commands:
    """The commands for operators, on the database of this test."""
    return Commands(database_url, monkeypatch, capsys)


@pytest.fixture
def application(tmp_path: Path, calls: socket.socket) -> Application:
    return Application(tmp_path, calls.getsockname()[1])


def _accept_interrupts() -> None:
    """Restore SIGINT, which a shell has ignored by what it executes in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
