"""Probes over HTTP, what systemd is sent, and a worker that starts again when a file changes."""

from __future__ import annotations

import socket
from concurrent.futures import Future
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import pytest

from sqla_durable.tools.cli import health
from sqla_durable.tools.cli.errors import CommandError
from tests.cli.conftest import Application
from tests.cli.test_worker import stopped
from tests.store import races


def status(port: int, path: str) -> int:
    """Ask a probe; 0 if nothing listens there yet."""
    with closing(HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        try:
            connection.request("GET", path)
        except ConnectionRefusedError:
            return 0
        return connection.getresponse().status


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    """The socket of a service manager, as systemd has one for each service."""
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.settimeout(30)
    receiver.bind(str(tmp_path / "notify"))
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    return receiver


def test_a_probe_answers_by_its_conditions() -> None:
    ready = False
    with health.Probe(0, {"/live": lambda: True, "/ready": lambda: ready}) as probe:
        assert [status(probe.port, path) for path in ("/live", "/ready", "/else")] == [200, 503, 404]
        ready = True
        assert status(probe.port, "/ready") == 200
        with pytest.raises(CommandError, match=rf"--health-port {probe.port}: Address already in use: choose another"):
            health.Probe(probe.port, {})
    assert status(probe.port, "/live") == 0


def test_signs_of_life_are_sent_while_a_condition_holds(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    with manager, health.watchdog(lambda: True):
        assert manager.recv(100) == b"WATCHDOG=1"
        assert manager.recv(100) == b"WATCHDOG=1"


def test_nothing_is_sent_for_a_start_that_has_failed(manager: socket.socket) -> None:
    failed, begun = Future[None](), Future[None]()
    failed.set_exception(ValueError())
    begun.set_result(None)
    with manager:
        health.announce(failed)
        manager.setblocking(False)
        with pytest.raises(BlockingIOError):
            manager.recv(100)
        health.announce(begun)
        assert manager.recv(100) == b"READY=1"


def test_a_worker_says_when_it_is_ready(application: Application, database_url: str, manager: socket.socket) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ("worker", "ledger:durable", "--health-port", str(port))
    with manager, stopped(application.start(*command, environment={"DATABASE_URL": database_url})):
        assert manager.recv(100) == b"READY=1"
        races.wait_until(lambda: status(port, "/ready") == 200)
        assert status(port, "/live") == 200


def test_it_starts_again_when_a_file_changes(
    application: Application, database_url: str, manager: socket.socket
) -> None:
    command = ("worker", "ledger:durable", "--reload", "--grace", "1s")
    process = application.start_fresh(*command, environment={"DATABASE_URL": database_url})
    with manager:
        try:
            assert manager.recv(100) == b"READY=1"
            application.write("other.py", "changed = True")
            assert manager.recv(100) == b"READY=1"
        finally:
            process.terminate()  # with its worker process
            process.communicate(timeout=60)
    assert process.returncode == 0
