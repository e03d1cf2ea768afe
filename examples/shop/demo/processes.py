"""The processes of the demo: the payment service, and workers that are started, killed and stopped.

Each is in a session of its own, so that Ctrl-C reaches the demo alone, which then ends them all.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from shop.demo.errors import DemoError

EXAMPLES = Path(__file__).parents[2]
WORKER = ["-m", "sqla_durable", "worker", "shop:durable", "--lease", "2s", "--poll-interval", "100ms"]
_PATIENCE = 30


class Processes:
    """Everything that the demo starts; nothing of it is left when the block ends."""

    def __init__(self, database_url: str, logs: Path, *, seed: int) -> None:
        self._logs = logs
        self._random = random.Random(seed)
        self._environment = {**os.environ, "DATABASE_URL": database_url}
        self._service: subprocess.Popen[str] | None = None
        self._workers: dict[str, subprocess.Popen[str]] = {}
        self._started = 0
        self.kills = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        running = [each for each in (*self._workers.values(), self._service) if each is not None]
        for each in running:
            each.terminate()
        for each in running:
            _await_end(each)

    def migrate(self) -> None:
        """Bring the database to the shop's newest revision, as a deployment does."""
        command = [sys.executable, "-m", "alembic", "-c", "shop/alembic.ini", "upgrade", "head"]
        done = subprocess.run(command, cwd=EXAMPLES, env=self._environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise DemoError(f"`{' '.join(command[1:])}` failed:\n{done.stderr}")

    def start_payment_service(self, *, seed: int) -> str:
        """Start it and give its address, which workers started later know."""
        self._service = self._start(["-m", "shop.payment_service", "--port", "0", "--seed", str(seed)], "payments")
        assert self._service.stdout is not None
        address = self._service.stdout.readline().strip()
        if not address:
            raise DemoError(f"the payment service did not start:\n{self._tail('payments')}")
        self._environment["PAYMENTS_URL"] = address
        return address

    def start_worker(self) -> None:
        """Start one more worker."""
        self._started += 1
        name = f"worker {self._started}"
        self._workers[name] = self._start([*WORKER, "--name", name], name)

    def kill_one_of(self, names: list[str]) -> bool:
        """Kill one of these workers with SIGKILL, which it cannot notice, and start another; False: none is alive."""
        alive = [name for name in names if name in self._workers]
        if not alive:
            return False
        victim = self._workers.pop(self._random.choice(alive))
        victim.kill()
        victim.wait()
        _close(victim)
        self.kills += 1
        self.start_worker()
        return True

    def require_alive(self) -> None:
        """Refuse to wait for a worker that has ended by itself.

        Raises:
            DemoError: one has.
        """
        for worker in self._workers.values():
            if worker.poll() is not None:
                raise DemoError(f"a worker ended with exit code {worker.returncode}:\n{self.tails()}")

    def stop_workers(self) -> None:
        """Stop all workers in good order.

        Raises:
            DemoError: one did not leave with exit code 0.
        """
        workers, self._workers = list(self._workers.values()), {}
        for each in workers:
            each.send_signal(signal.SIGTERM)
        for each in workers:
            _await_end(each)
        # One that was still starting has nothing to hand back, and ends by the signal itself.
        if any(each.returncode not in (0, -signal.SIGTERM) for each in workers):
            raise DemoError(f"a worker did not stop in good order:\n{self.tails()}")

    def tails(self) -> str:
        """Give the last lines of each log."""
        return "\n".join(self._tail(path.stem) for path in sorted(self._logs.glob("*.log")))

    def _start(self, command: list[str], name: str) -> subprocess.Popen[str]:
        with (self._logs / f"{name}.log").open("w") as log:
            return subprocess.Popen(
                [sys.executable, *command],
                cwd=EXAMPLES,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def _tail(self, name: str) -> str:
        lines = (self._logs / f"{name}.log").read_text().splitlines()[-10:]
        return "\n".join([f"--- {name}", *lines])


def _await_end(process: subprocess.Popen[str]) -> None:
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _close(process)


def _close(process: subprocess.Popen[str]) -> None:
    if process.stdout is not None:
        process.stdout.close()
