"""An application whose workflow schedules start, and ways to wait for what its workers do with them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Durable, Worker, Workflow, current, run_step
from sqla_durable.definitions.schedules import Tick
from tests.acceptance.shells import POLL
from tests.store import races
from tests.support.schedules import row_of, started_by
from tests.support.statements import executed_on

Sessions = sessionmaker[Session]
SECONDS = 30.0


class Application:
    """A workflow `checkout` that notes its tick and its argument; it may be held."""

    def __init__(self) -> None:
        self.durable = Durable()
        self.ticks: list[Tick | None] = []
        self.given: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

        def checkout(cents: int = 0) -> None:
            execution = current()
            assert execution is not None
            self.ticks.append(execution.tick)
            self.given.append(cents)
            run_step("hold", lambda: self.gate.wait(races.PATIENCE))

        self.checkout = self.durable.workflow(checkout)

    @contextmanager
    def worker(self, maker: Sessions, **settings: Any) -> Generator[Worker]:
        """A worker that runs meanwhile; nothing stays held."""
        chosen: dict[str, Any] = {"poll_interval": POLL, **settings}
        with Worker(self.durable, sessionmaker=maker, **chosen) as worker:
            try:
                yield worker
            finally:
                self.gate.set()


def until(condition: Callable[[], object], what: str) -> None:
    races.wait_until(condition, what=what, seconds=SECONDS)


def until_started(engine: Engine, count: int, name: str = "ticking") -> list[Workflow]:
    until(lambda: len(started_by(engine, name)) >= count, f"{count} ticks")
    return started_by(engine, name)


def until_finished(engine: Engine, count: int, name: str = "ticking") -> None:
    until(lambda: len([1 for each in started_by(engine, name) if each.status.finished]) == count, f"{count} ends")


def has(ticks: list[Tick | None], count: int) -> bool:
    return len(ticks) == count


def until_planned(engine: Engine, name: str = "ticking") -> datetime:
    until(lambda: row_of(engine, name).next_at, "the plan")
    planned = row_of(engine, name).next_at
    assert planned is not None
    return planned


def until_polled(engine: Engine, count: int = 3) -> None:
    """Wait for polls of the workers: whatever they do by themselves, they have done it."""
    with executed_on(engine) as executed:
        until(lambda: len([1 for each in executed if "next_due_in" in each.statement]) > count, "the polls")
