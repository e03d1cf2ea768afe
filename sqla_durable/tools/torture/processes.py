"""The worker processes: places that are always filled, each behind a proxy of its own.

Each process is in a session of its own, so that Ctrl-C reaches the driver alone, which then ends them all.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from sqlalchemy import URL

from sqla_durable.embedded import SUPERUSER
from sqla_durable.tools.torture.proxy import Proxies, Proxy
from sqla_durable.tools.torture.schedule import is_guarded

_PATIENCE = 30


class Place:
    """A place for one worker at a time. Whoever is killed or stopped is replaced, under another name.

    Attributes:
        proxy: the way of its workers to the server.
        name: the name of the present one, in the worker table and as `application_name`.
    """

    def __init__(self, number: int, *, proxy: Proxy, logs: Path) -> None:
        self.number = number
        self.proxy = proxy
        self.name = ""
        self._logs = logs
        self._generation = 0
        self._process: subprocess.Popen[bytes] | None = None

    def fill(self) -> None:
        """Start a worker here."""
        self._generation += 1
        self.name = f"worker-{self.number + 1}.{self._generation}"
        url = URL.create(
            "postgresql+psycopg",
            username=SUPERUSER,
            port=self.proxy.port,
            database="postgres",
            query={"host": str(self.proxy.directory)},
        )
        # -P: not what happens to be in the current directory.
        command = [sys.executable, "-P", "-m", "sqla_durable.tools.torture.worker", "--url", url.render_as_string()]
        command += ["--name", self.name, *(["--guarded"] if is_guarded(self.number) else [])]
        with (self._logs / f"{self.name}.log").open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 (our own module, no shell)
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process of the present worker."""
        assert self._process is not None  # noqa: S101 (places are filled before anybody has them)
        return self._process

    def kill(self) -> None:
        """Kill it with SIGKILL, which it cannot notice, and wait until it is gone."""
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        """Stop it with SIGSTOP, and wait until it stands."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)

    def thaw(self) -> None:
        """Let it go on."""
        self.process.send_signal(signal.SIGCONT)

    def ask_to_stop(self) -> None:
        """Ask it with SIGTERM to leave in good order."""
        self.process.send_signal(signal.SIGTERM)

    def wait_for_end(self) -> int | None:
        """Wait until it has left, and give its exit code; None if it does not leave."""
        try:
            return self.process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            return None

    def end(self) -> None:
        """End it, whatever it does."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class Places:
    """All places; no process of theirs is left when the block ends."""

    def __init__(self, count: int, *, proxies: Proxies, logs: Path) -> None:
        self._all = [Place(number, proxy=proxies.open(), logs=logs) for number in range(count)]

    def __enter__(self) -> Self:
        for each in self._all:
            each.fill()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in self._all:
            each.end()

    def __getitem__(self, number: int) -> Place:
        return self._all[number]

    def __iter__(self) -> Iterator[Place]:
        return iter(self._all)

    def deserters(self) -> list[str]:
        """Name the workers that have ended by themselves, with their exit codes."""
        found = [(each.name, each.process.poll()) for each in self._all]
        return [f"{name} ended with exit code {code}" for name, code in found if code is not None]

    def stop(self) -> list[str]:
        """Stop all workers in good order; name those that did not leave with exit code 0."""
        for each in self._all:
            each.ask_to_stop()
        codes = [(each.name, each.wait_for_end()) for each in self._all]
        return [f"{name} was stopped and left with exit code {code}" for name, code in codes if code != 0]
