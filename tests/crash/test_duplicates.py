"""SIGKILL on workers while callers start under one key: each gets a workflow that executes its input or a later one."""

from __future__ import annotations

import random
import threading
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from sqla_durable import Workflow
from tests.crash import application, child
from tests.crash.test_schedules import unfinished
from tests.store import races
from tests.support.domain import Entry

SEED = 16
RULES: dict[str, dict[str, Any]] = {
    "replace": {"on_conflict": "replace"},
    "debounce": {"debounce": timedelta(milliseconds=1), "longest_wait": timedelta(milliseconds=50)},
}


class Callers:
    """Threads that start the workflow `small` under one key, each time with the next number, until they are stopped."""

    def __init__(self, engine: Engine, rule: str) -> None:
        self.answers: list[tuple[int, UUID]] = []
        self._engine = engine
        self._workflow = application.small.options(key="k", **RULES[rule])
        self._stopped, self._order = threading.Event(), threading.Lock()
        # Replaced without a pause by several, it would be locked all the time: a longest wait ends that.
        count = 3 if rule == "debounce" else 1
        self._threads = [races.Concurrent(partial(self._call, number)) for number in range(count)]

    def _call(self, caller: int) -> None:
        number = caller
        while not self._stopped.is_set():
            number += 3
            with Session(self._engine) as session:
                found = self._workflow.start(session, str(number)).id
                with self._order:  # they come here one after the other, in the order of their commits
                    self.answers.append((number, found))
                    session.commit()

    def stop(self) -> None:
        self._stopped.set()
        for each in self._threads:
            each.result()


# behaviour: D6 E8
@pytest.mark.timeout(180)
@pytest.mark.parametrize("rule", RULES)
def test_no_start_is_lost_while_workers_are_killed(
    database_url: str, engine: Engine, thorough: bool, rule: str
) -> None:
    chance = random.Random(SEED)
    with ExitStack() as stack:
        stack.enter_context(child.worker(database_url))
        callers = Callers(engine, rule)
        for _ in range(20 if thorough else 6):
            child.kill_worker_after(chance.uniform(0.1, 0.5), database_url)
        callers.stop()
        races.wait_until(lambda: unfinished(engine) == 0, what="the ends", seconds=60)
    place = {number: position for position, (number, _) in enumerate(callers.answers)}
    with Session(engine) as session:
        executed = {each.id: place[int(each.input["account"])] for each in session.scalars(select(Workflow))}
        assert {str(each) for each in session.scalars(select(Workflow.status))} == {"succeeded"}
        for position, (_, found) in enumerate(callers.answers):
            assert executed[found] >= position
        assert executed[callers.answers[-1][1]] == len(callers.answers) - 1
        entries = session.execute(select(func.count()).where(Entry.note.is_(None))).scalar_one()
        assert len(callers.answers) > len(executed) > 3
        assert entries == 2 * len(executed)  # what a workflow writes, it has written once
