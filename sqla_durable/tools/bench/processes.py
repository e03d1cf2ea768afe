"""The worker processes of one measurement: both ends, the benchmark's and that of `python -m` this module.

Each is in a session of its own, so that Ctrl-C reaches the benchmark alone, which then ends them all; and each leaves
when its standard input ends, so that none outlives a benchmark that was killed.
A worker process reads its settings from the first line of its standard input, answers `ready`, begins to claim at `go`,
answers `working`, answers each `usage` with what it has used so far as JSON, and leaves at any other line or at the end
of its input, with the same.
Its engines are as the docs recommend, and it is otherwise a worker with default settings.
"""

from __future__ import annotations

import gc
import json
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from sqla_durable import (
    Worker,
)
from sqla_durable.tools.bench.application import durable
from sqla_durable.tools.bench.report import (
    BenchError,
)
from sqla_durable.tools.bench.schema import (
    in_schema,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """What a worker process reads when it starts."""

    url: str
    schema: str
    concurrency: int
    name: str
    queues: Sequence[str] = ("default",)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a worker process used: seconds of CPU since it began to claim, and the most bytes of memory it held."""

    cpu: float
    peak: int


class WorkerProcesses:
    """Worker processes that are ready when the block begins, and gone when it ends.

    Raises:
        BenchError: one of them does not start.
    """

    def __init__(
        self, url: str, schema: str, *, count: int, concurrency: int, queues: Sequence[str] = ("default",)
    ) -> None:
        self._all = [
            _WorkerProcess(
                WorkerSettings(
                    url=url, schema=schema, concurrency=concurrency, name=f"bench-{number + 1}", queues=tuple(queues)
                )
            )
            for number in range(count)
        ]

    def __enter__(self) -> Self:
        try:
            for each in self._all:
                each.start()
            for each in self._all:
                each.expect("ready")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def begin_claiming(self) -> None:
        """Let all of them claim; return when they have begun to."""
        for each in self._all:
            each.send("go")
        for each in self._all:
            each.expect("working")

    def require_alive(self) -> None:
        """Check that none of them has ended by itself.

        Raises:
            BenchError: one has; the message holds the end of its log.
        """
        for each in self._all:
            each.require_alive()

    def usages(self) -> list[Usage]:
        """Return what each of them has used so far."""
        return self._ask("usage")

    def stop(self) -> list[Usage]:
        """Stop all of them in good order, and return what each of them used."""
        return self._ask("stop")

    def _ask(self, word: str) -> list[Usage]:
        for each in self._all:
            each.send(word)
        return [Usage(**json.loads(each.receive())) for each in self._all]

    def _end(self) -> None:
        for each in self._all:
            each.end()


class _WorkerProcess:
    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[bytes] | None = None

    def start(self) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `end`)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "sqla_durable.tools.bench.processes"],  # not what is in the current directory
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        self.send(json.dumps(asdict(self._settings)))  # not as arguments, which all users of the machine see

    @property
    def process(self) -> subprocess.Popen[str]:
        assert self._process is not None  # noqa: S101 (set by `start`)
        return self._process

    def send(self, line: str) -> None:
        assert self.process.stdin is not None  # noqa: S101 (it is a pipe)
        try:
            print(line, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise self._ended() from None

    def receive(self) -> str:
        assert self.process.stdout is not None  # noqa: S101 (it is a pipe)
        line = self.process.stdout.readline()
        if not line:
            raise self._ended()
        return line

    def expect(self, word: str) -> None:
        if self.receive().strip() != word:
            raise self._ended()

    def require_alive(self) -> None:
        if self.process.poll() is not None:
            raise self._ended()

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        if self._log is not None:
            self._log.close()

    def _ended(self) -> BenchError:
        assert self._log is not None  # noqa: S101 (set by `start`)
        self._log.seek(0)
        printed = self._log.read().decode(errors="replace")
        return BenchError(f"a worker process of the benchmark has ended by itself: {without_frames(printed)[-2_000:]}")


def without_frames(printed: str) -> str:
    """Return what follows the frames of the last traceback: the error alone, in as many lines as it has."""
    lines = printed.splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith("  ")]
    return "\n".join(lines[frames[-1] + 1 if frames else 0 :])


POOL: dict[str, Any] = {"pool_size": 20, "max_overflow": 0}


def main() -> None:
    """Claim and execute from the second line of standard input on, until one that asks for something else."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker = _worker(WorkerSettings(**json.loads(sys.stdin.readline())))
    gc.collect()
    gc.freeze()  # as the command line does
    _answer("ready")
    if not sys.stdin.readline():
        return
    began = time.process_time()
    with worker:
        _answer("working")
        while sys.stdin.readline().strip() == "usage":
            _answer(_usage_since(began))
    _answer(_usage_since(began))


def _usage_since(began: float) -> str:
    return json.dumps(asdict(Usage(time.process_time() - began, _peak_memory())))


def _worker(settings: WorkerSettings) -> Worker:
    engine = in_schema(create_engine(settings.url, **POOL), settings.schema)
    async_engine = AsyncEngine(in_schema(create_async_engine(settings.url, **POOL).sync_engine, settings.schema))
    return Worker(
        durable,
        sessionmaker=sessionmaker(engine),
        async_sessionmaker=async_sessionmaker(async_engine),
        concurrency=settings.concurrency,
        name=settings.name,
        queues=settings.queues,
    )


def _peak_memory() -> int:
    """Return the most bytes of memory that this process held.

    `getrusage` includes what its parent held when it started this process (execve(2) keeps ru_maxrss); the file of
    Linux does not.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _answer(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
