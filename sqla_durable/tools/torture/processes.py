"""The worker processes of the bank: both ends, the driver's and that of `python -m` this module.

Their connections are not checked before they are used (no `pool_pre_ping`): whatever becomes of a connection, the
worker meets it in the middle of its work.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from sqlalchemy import URL, create_engine
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from sqla_durable import Worker
from sqla_durable.embedded import SUPERUSER
from sqla_durable.tools.torture import bank
from sqla_durable.tools.torture.proxy import Proxies, Proxy
from sqla_durable.tools.torture.schedule import (
    CONCURRENCY,
    GRACE,
    LEASE,
    MAX_ATTEMPTS,
    OUTSIDE_POOL,
    POLL,
    POOL,
    is_guarded,
)

_STOP_TIMEOUT = 30


class WorkerProcess:
    """One of the workers of the bank: a process that is started again, under another name, when it has ended.

    Attributes:
        proxy: the proxy through which it reaches the server.
        name: its name, in the worker table and as `application_name`; a new one each time that it is started.
    """

    def __init__(self, number: int, *, proxy: Proxy, logs: Path) -> None:
        self.number = number
        self.proxy = proxy
        self.name = ""
        self._logs = logs
        self._generation = 0
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start a worker."""
        self._generation += 1
        self.name = f"worker-{self.number + 1}.{self._generation}"
        url = URL.create(
            "postgresql+psycopg",
            username=SUPERUSER,
            port=self.proxy.port,
            database="postgres",
            query={"host": str(self.proxy.directory)},
        )
        # -P: no module is imported from the current directory.
        command = [sys.executable, "-P", "-m", "sqla_durable.tools.torture.processes", "--url", url.render_as_string()]
        command += ["--name", self.name, *(["--guarded"] if is_guarded(self.number) else [])]
        with (self._logs / f"{self.name}.log").open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 (our own module, no shell)
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process that was started last."""
        assert self._process is not None  # noqa: S101 (`WorkerProcesses` starts it)
        return self._process

    def kill(self) -> None:
        """Kill it with SIGKILL, which it cannot notice, and wait until it is gone."""
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        """Stop it with SIGSTOP, and wait until it has stopped."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)

    def thaw(self) -> None:
        """Let it continue, with SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    def ask_to_stop(self) -> None:
        """Send it SIGTERM, upon which it should stop in good order."""
        self.process.send_signal(signal.SIGTERM)

    def wait_for_end(self) -> int | None:
        """Wait until it has ended and return its exit code; None if it does not end."""
        try:
            return self.process.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            return None

    def end(self) -> None:
        """Kill it if it is still running."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class WorkerProcesses:
    """All workers of the bank; none of their processes is left when the block ends."""

    def __init__(self, count: int, *, proxies: Proxies, logs: Path) -> None:
        self._all = [WorkerProcess(number, proxy=proxies.open(), logs=logs) for number in range(count)]

    def __enter__(self) -> Self:
        for each in self._all:
            each.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in self._all:
            each.end()

    def __getitem__(self, number: int) -> WorkerProcess:
        return self._all[number]

    def __iter__(self) -> Iterator[WorkerProcess]:
        return iter(self._all)

    def ended_by_themselves(self) -> list[str]:
        """Return a line for each worker that has ended by itself, with its exit code."""
        found = [(each.name, each.process.poll()) for each in self._all]
        return [f"{name} ended with exit code {code}" for name, code in found if code is not None]

    def stop(self) -> list[str]:
        """Stop all workers in good order; return a line for each that did not end with exit code 0."""
        for each in self._all:
            each.ask_to_stop()
        codes = [(each.name, each.wait_for_end()) for each in self._all]
        return [f"{name} was stopped and ended with exit code {code}" for name, code in codes if code != 0]


def main() -> None:
    """Run one worker until SIGTERM."""
    given = _arguments()
    signal.signal(signal.SIGTERM, _exit)  # until the worker handles it itself
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s %(threadName)s %(message)s")
    bank.set_worker_name(given.name)
    connect: dict[str, Any] = {"application_name": given.name, "connect_timeout": 5}
    if given.guarded:
        connect["options"] = f"-c idle_in_transaction_session_timeout={LEASE * 1000:.0f}"
    settings: dict[str, Any] = {"max_overflow": 0, "connect_args": connect, "pool_timeout": 300}
    engine = create_engine(given.url, pool_size=POOL, **settings)
    async_engine = create_async_engine(given.url, pool_size=POOL, **settings)
    outside = create_engine(given.url, pool_size=OUTSIDE_POOL, isolation_level="AUTOCOMMIT", **settings)
    async_outside: AsyncEngine = create_async_engine(
        given.url, pool_size=OUTSIDE_POOL, isolation_level="AUTOCOMMIT", **settings
    )
    bank.outside.configure(bind=outside)
    bank.async_outside.configure(bind=async_outside)
    Worker(
        bank.durable,
        sessionmaker=sessionmaker(engine),
        async_sessionmaker=async_sessionmaker(async_engine),
        concurrency=CONCURRENCY,
        lease=timedelta(seconds=LEASE),
        poll_interval=timedelta(seconds=POLL),
        grace=timedelta(seconds=GRACE),
        max_attempts=MAX_ATTEMPTS,
        name=given.name,
    ).run()


def _exit(_number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sqla_durable.tools.torture.processes", description=__doc__)
    parser.add_argument("--url", required=True, help="the database, through this worker's own proxy")
    parser.add_argument("--name", required=True, help="its name, in the worker table and as application_name")
    parser.add_argument(
        "--guarded", action="store_true", help="let the server end transactions that are idle for a lease"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
