"""The worker processes of one measurement: made ready, told to go, told to stop, and gone whatever happens.

Each is in a session of its own, so that Ctrl-C reaches the bench alone, which then ends them all; and each leaves when
its standard input ends, so that none is left behind by a bench that was killed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import IO, Self

from sqla_durable.tools.bench.errors import BenchError

_PATIENCE = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a worker process is told when it starts."""

    url: str
    schema: str
    concurrency: int
    name: str


@dataclass(frozen=True, slots=True)
class Usage:
    """What a worker process used: seconds of CPU since it was told to go, and the most bytes of memory it held."""

    cpu: float
    peak: int


class Crew:
    """Worker processes that are ready when the block begins, and gone when it ends.

    Raises:
        BenchError: one of them does not start.
    """

    def __init__(self, url: str, schema: str, *, workers: int, concurrency: int) -> None:
        self._all = [
            _Member(Settings(url=url, schema=schema, concurrency=concurrency, name=f"bench-{number + 1}"))
            for number in range(workers)
        ]

    def __enter__(self) -> Self:
        try:
            for each in self._all:
                each.begin()
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

    def go(self) -> None:
        """Let them claim; returns when all of them do."""
        for each in self._all:
            each.tell("go")
        for each in self._all:
            each.expect("working")

    def require_all(self) -> None:
        """Refuse to go on when one of them has ended by itself.

        Raises:
            BenchError: it has; the message holds the end of its log.
        """
        for each in self._all:
            each.require()

    def stop(self) -> list[Usage]:
        """Let them leave in good order, and give what each of them used."""
        for each in self._all:
            each.tell("stop")
        return [Usage(**json.loads(each.answer())) for each in self._all]

    def _end(self) -> None:
        for each in self._all:
            each.end()


class _Member:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[bytes] | None = None

    def begin(self) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `end`)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "sqla_durable.tools.bench.worker"],  # not what is in the current directory
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        self.tell(json.dumps(asdict(self._settings)))  # not as arguments, which all users of the machine see

    @property
    def process(self) -> subprocess.Popen[str]:
        assert self._process is not None  # noqa: S101 (set by `begin`)
        return self._process

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None  # noqa: S101 (it is a pipe)
        try:
            print(line, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise self._ended() from None

    def answer(self) -> str:
        assert self.process.stdout is not None  # noqa: S101 (it is a pipe)
        line = self.process.stdout.readline()
        if not line:
            raise self._ended()
        return line

    def expect(self, word: str) -> None:
        if self.answer().strip() != word:
            raise self._ended()

    def require(self) -> None:
        if self.process.poll() is not None:
            raise self._ended()

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        if self._log is not None:
            self._log.close()

    def _ended(self) -> BenchError:
        assert self._log is not None  # noqa: S101 (set by `begin`)
        self._log.seek(0)
        printed = self._log.read().decode(errors="replace")
        return BenchError(f"a worker process of the bench has ended by itself: {without_frames(printed)[-2_000:]}")


def without_frames(printed: str) -> str:
    """Give what follows the frames of the last traceback: the error alone, in as many lines as it has."""
    lines = printed.splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith("  ")]
    return "\n".join(lines[frames[-1] + 1 if frames else 0 :])
