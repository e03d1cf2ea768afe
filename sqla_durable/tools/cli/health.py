"""What a worker process answers to those who watch it: probes over HTTP, and systemd.

`/live` says that the process is not stuck, and `/ready` that it claims and executes; of a supervisor, that this is so
of all its processes. The server has a thread of its own, so that it can say that the event loop does not answer.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

from sqla_durable.tools.cli.errors import CommandError

_SHORTEST_WATCHDOG = 0.05  # seconds between two signs of life


@contextmanager
def watched(port: int | None, *, is_live: Callable[[], bool], is_ready: Callable[[], bool]) -> Generator[None]:
    """Answer probes on a port, if there is one, and keep systemd's watchdog, as long as the context is open.

    Raises:
        CommandError: the port is taken, or not allowed.
    """
    with watchdog(is_live), ExitStack() as stack:
        if port is not None:
            stack.enter_context(Probe(port, {"/live": is_live, "/ready": is_ready}))
        yield


class Probe:
    """A server that answers 200 where a condition holds, and 503 where it does not.

    Args:
        port: where it listens, on all addresses; 0 for any.
        conditions: by path, such as `/live`.

    Raises:
        CommandError: the port is taken, or not allowed.
    """

    def __init__(self, port: int, conditions: dict[str, Callable[[], bool]]) -> None:
        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                condition = conditions.get(self.path)
                holds = condition is not None and condition()
                answer = b"ok\n" if holds else b"no\n"
                self.send_response(404 if condition is None else 200 if holds else 503)
                self.send_header("Content-Type", "text/plain")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (its name there)
                """Log nothing: a probe comes every few seconds."""

        try:
            self._server = ThreadingHTTPServer(("", port), Handler)
        except OSError as error:
            raise CommandError(f"--health-port {port}: {error.strerror or error}: choose another one.") from error
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, name="sqla-durable health", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def announce(started: Future[None] | None = None) -> None:
    """Say to systemd that the workers serve; a start that has failed is none."""
    if started is None or started.exception() is None:
        notify_systemd("READY=1")


def notify_systemd(*states: str) -> None:
    """Send states such as `READY=1` to the service manager that has started this process, if there is one.

    Source: systemd, sd_notify(3).
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # an abstract one
        address = f"\0{address[1:]}"
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto("\n".join(states).encode(), address)


@contextmanager
def watchdog(is_live: Callable[[], bool]) -> Generator[None]:
    """Send a sign of life to systemd in half of the time that `WatchdogSec` gives, as long as the condition holds."""
    given = os.environ.get("WATCHDOG_USEC", "")
    if not given.isdigit() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        yield
        return
    pause, ended = max(int(given) / 2_000_000, _SHORTEST_WATCHDOG), threading.Event()

    def send() -> None:
        while not ended.wait(pause):
            if is_live():
                notify_systemd("WATCHDOG=1")

    threading.Thread(target=send, name="sqla-durable watchdog", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
