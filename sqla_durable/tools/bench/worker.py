"""A worker of the bench as a process of its own: `python -m sqla_durable.tools.bench.worker`.

It reads its settings from the first line of its standard input, answers `ready`, begins to claim at `go`, answers
`working`, and leaves at the next line or the end of its input, with what it used as JSON.
Its engines are as the docs recommend, and it is otherwise a worker with default settings.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from sqla_durable.execution.worker import Worker
from sqla_durable.tools.bench.application import durable
from sqla_durable.tools.bench.place import in_schema
from sqla_durable.tools.bench.processes import Settings, Usage

POOL: dict[str, Any] = {"pool_size": 20, "max_overflow": 0}


def main() -> None:
    """Work between the second and the third line of standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker = _worker(Settings(**json.loads(sys.stdin.readline())))
    _say("ready")
    if not sys.stdin.readline():
        return
    began = time.process_time()
    with worker:
        _say("working")
        sys.stdin.readline()
    _say(json.dumps(asdict(Usage(time.process_time() - began, _peak()))))


def _worker(settings: Settings) -> Worker:
    engine = in_schema(create_engine(settings.url, **POOL), settings.schema)
    async_engine = AsyncEngine(in_schema(create_async_engine(settings.url, **POOL).sync_engine, settings.schema))
    return Worker(
        durable,
        sessionmaker=sessionmaker(engine),
        async_sessionmaker=async_sessionmaker(async_engine),
        concurrency=settings.concurrency,
        name=settings.name,
    )


def _peak() -> int:
    """Give the most bytes that this process held.

    `getrusage` counts in what its parent held when it was started (execve(2) keeps ru_maxrss), Linux's own file not.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
