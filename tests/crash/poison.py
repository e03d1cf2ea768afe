"""Workflows that kill their workers, and a supervisor that starts a new worker whenever one has died."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Durable, Worker, current
from tests.crash.application import die
from tests.support.domain import Entry
from tests.support.processes import forked

LEASE = timedelta(seconds=0.6)
POLL = timedelta(seconds=0.02)
STAGES = 6

durable = Durable()


@durable.step
def note(session: Session, account: str) -> None:
    session.add(Entry(account=account, cents=1))


@durable.workflow
def poison(cure: str) -> str:
    """Kills its worker at once, until there is a cure."""
    if not Path(cure).exists():
        die()
    note("cured")
    return "cured"


@durable.workflow
async def poison_async(cure: str) -> str:
    """The same on the event loop."""
    if not Path(cure).exists():
        die()
    return "cured"


@durable.workflow
def good(account: str) -> str:
    """Does something harmless that takes its time."""
    threading.Event().wait(0.05)
    note(account)
    return account


@durable.workflow
def long(account: str) -> int:
    """Loses its worker after each of its steps."""
    for stage in range(STAGES):
        note(f"{account}/{stage}")
        execution = current()
        assert execution is not None
        if execution.attempt == stage + 1 < STAGES:
            die()
    return STAGES


class Supervisor(threading.Thread):
    """Keeps one worker process alive."""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.deaths = 0
        self._arguments = url, options
        self._stopping = threading.Event()
        self._process = self._launched()
        self.start()

    def run(self) -> None:
        while True:
            self._process.join()
            if self._stopping.is_set():
                return
            self.deaths += 1
            self._process.close()
            self._process = self._launched()

    def leave(self) -> None:
        """End the worker, and start no other."""
        self._stopping.set()
        while self.is_alive():
            self._process.kill()  # again, where another one has just been started
            self.join(0.05)
        self._process.close()

    def _launched(self) -> BaseProcess:
        process = forked.Process(target=_work, args=self._arguments, daemon=True)
        process.start()
        return process


@contextmanager
def supervised(url: str, **options: Any) -> Generator[Supervisor]:
    """Keep a worker alive for a while."""
    supervisor = Supervisor(url, options)
    try:
        yield supervisor
    finally:
        supervisor.leave()


def _work(url: str, options: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"lease": LEASE, "poll_interval": POLL, **options}
    Worker(durable, sessionmaker=sessionmaker(create_engine(url)), **settings).run()
