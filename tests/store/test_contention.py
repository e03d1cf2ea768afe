"""Statements for many rows at the same rows, from many threads: no deadlock, and nothing acknowledged is lost."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Callable
from functools import partial
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, Select, event, func, select, update
from sqlalchemy.orm import Session

from sqla_durable import manage
from sqla_durable.errors import EncodingError
from sqla_durable.execution.worker.database import ThreadDatabase
from sqla_durable.execution.worker.writer import Row
from sqla_durable.models import Step, Workflow
from sqla_durable.models.base import WorkflowStatus
from sqla_durable.runtime.waiting import Ticket
from sqla_durable.store import Fence, Suspend, timers, workers
from tests.store import races

ROWS = 30
ROUNDS = 20


class Crowd:
    """Workers, operators and time at the same workflows, each in transactions of its own."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.acknowledged: set[tuple[UUID, str]] = set()
        self.effects: dict[str, int] = {}
        self._lock = threading.Lock()

    def write(self) -> None:
        """Record for what runs now and for what ran the last time; suspend some, finish some, as the writer does."""
        before: list[Fence] = []
        for number in range(ROUNDS):
            now = self._in_transaction(lambda session: workers.attempts_of(session, races.WORKER))
            fences = list({each.workflow_id: each for each in (*now, *before)}.values())
            self._in_transaction(partial(self._record, fences=fences, number=number))
            before = now

    def _record(self, session: Session, fences: list[Fence], number: int) -> None:
        written = races.record(session, [races.checkpoint(each, str(each.token)) for each in fences])
        suspended = races.end(session, [Suspend(each, 3600) for each in fences[number % 3 :: 3]])
        finished = races.end(session, [races.success(each) for each in fences[number::ROUNDS]])
        session.commit()
        with self._lock:
            self.acknowledged |= written
        self._count("recorded", len(written))
        self._count("suspended", len(suspended))
        self._count("finished", len(finished))

    def reclaim(self) -> None:
        """Reclaim, a few rows at a time; the lease of the worker has run out all the while."""
        for _ in range(ROUNDS):
            found = self._in_transaction(lambda session: workers.reclaim(session, max_attempts=3, limit=7))
            claimed = self._in_transaction(lambda session: races.claim(session, 11))
            self._count("reclaimed", len(found))
            self._count("claimed", len(claimed))

    def wake(self) -> None:
        """Let all times come, in the reverse order of the ids' where the planner likes, and wake."""
        for _ in range(ROUNDS):
            due = select(Workflow.id).where(Workflow.wake_at.is_not(None)).with_for_update(skip_locked=True)
            moved = update(Workflow).where(Workflow.id.in_(due)).values(wake_at=func.statement_timestamp())
            self._in_transaction(partial(Session.execute, statement=moved))
            self._count("woken", self._in_transaction(lambda session: timers.wake_due(session, limit=100)))

    def cancel(self) -> None:
        """Cancel the last ones first."""
        for number in range(ROUNDS):
            last = select(Workflow).order_by(Workflow.id.desc()).limit(ROWS // 2).offset(number % 10)
            self._count("cancelled", len(self._in_transaction(partial(_cancelled, workflows=last))))

    def resume(self) -> None:
        """Resume whatever can be."""
        for _ in range(ROUNDS):
            self._count("resumed", len(self._in_transaction(lambda session: manage.resume(session, select(Workflow)))))

    def _in_transaction(self, work: Callable[[Session], Any]) -> Any:
        with Session(self.engine) as session, session.begin():
            return work(session)

    def _count(self, what: str, number: int) -> None:
        with self._lock:
            self.effects[what] = self.effects.get(what, 0) + number


def _cancelled(session: Session, workflows: Select[Any]) -> list[UUID]:
    return manage.cancel(session, workflows)


def test_everybody_at_the_same_rows_never_deadlocks_and_loses_nothing(engine: Engine) -> None:
    races.claimed_fences(engine, ROWS)
    races.expire_leases(engine)
    crowd = Crowd(engine)
    works = [crowd.write, crowd.reclaim, crowd.wake, crowd.cancel, crowd.resume, crowd.write, crowd.reclaim]
    for each in [races.Concurrent(work) for work in works]:
        each.result()  # a deadlock is an error: 40P01
    with Session(engine) as session:
        assert {(each.workflow_id, each.key) for each in session.scalars(select(Step))} == crowd.acknowledged
        assert len(session.scalars(select(Workflow)).all()) == ROWS
    assert all(
        crowd.effects[each] for each in ("recorded", "suspended", "reclaimed", "claimed", "cancelled", "resumed")
    )


@pytest.mark.parametrize("bad", ["checkpoint", "suspend"])
async def test_a_bad_row_fails_its_own_workflow_and_none_that_is_suspended_beside_it(engine: Engine, bad: str) -> None:
    fences = races.claimed_fences(engine, ROWS)
    database = ThreadDatabase(engine, limit=30)
    writer = races.writer(database)
    running = asyncio.create_task(writer.run())
    refused = fences[ROWS // 2]
    tickets: dict[Fence, list[Ticket]] = {}
    for number, fence in enumerate(fences):
        key = secrets.token_hex(3_000) if (fence, bad) == (refused, "checkpoint") else "charge"
        delay = float("inf") if (fence, bad) == (refused, "suspend") else 3600
        end: Row = Suspend(fence, delay) if number % 2 or fence == refused else races.success(fence)
        first = races.submit(writer, races.checkpoint(fence, key))
        tickets[fence] = [first, races.submit(writer, end, after=first)]
    outcomes = {
        each: await asyncio.gather(*map(races.settled, tickets[each]), return_exceptions=True) for each in fences
    }
    running.cancel()
    await asyncio.wait([running])
    await database.close()
    assert {each for each in fences if outcomes[each] != [None, None]} == {refused}
    assert isinstance(outcomes[refused][1], EncodingError)
    with Session(engine) as session:
        found = {each.id: each.status for each in session.scalars(select(Workflow))}
        recorded = {each.workflow_id for each in session.scalars(select(Step))}
    assert found.pop(refused.workflow_id) is WorkflowStatus.RUNNING
    assert set(found.values()) == {WorkflowStatus.SUSPENDED, WorkflowStatus.SUCCEEDED}
    assert recorded >= found.keys()


async def test_what_is_large_is_written_in_several_statements(engine: Engine) -> None:
    """A statement that the server cannot take in within the time limit would be tried again for ever."""
    fences = races.claimed_fences(engine, 12)
    database = ThreadDatabase(engine, limit=30)
    sizes: list[int] = []

    def measure(_connection: object, _cursor: object, _statement: str, parameters: Any, *_: object) -> None:
        sizes.append(len(parameters.get("batch_rows", "")))

    event.listen(engine, "before_cursor_execute", measure)
    writer = races.writer(database)
    output = f'"{"x" * 1_000_000}"'
    tickets = [races.submit(writer, races.checkpoint(each, output=output)) for each in fences]
    running = asyncio.create_task(writer.run())
    await asyncio.gather(*map(races.settled, tickets))
    running.cancel()
    await asyncio.wait([running])
    await database.close()
    assert max(sizes) < 5_000_000
    assert sum(sizes) < 13_000_000, "something was written twice"
