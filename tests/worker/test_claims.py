"""What a worker claims and cannot begin, or cannot end: it is counted, and does not keep the others."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, func, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Durable, Worker, Workflow, WorkflowStatus
from sqla_durable.execution.worker import attempts, settings
from tests.store import races

_MARKERS = text(
    "INSERT INTO durable.step (workflow_id, key, name, position, status, output, attempt, started_at) "
    "SELECT :id, '#patched/' || n, '#patched', n, 'succeeded', 'true', 1, statement_timestamp() "
    "FROM generate_series(1, 51) n"
)
"""A history that is too long to come with the claim, of markers that the code need not ask for."""


def _short(_lease: timedelta) -> float:
    return 0.3


# behaviour: O2 R4
def test_a_history_that_does_not_arrive_is_counted_and_lets_others_go_first(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The server takes longer for it than a claim may last, every time."""
    monkeypatch.setattr(settings, "time_limit", _short)
    durable = Durable()

    @durable.workflow
    def checkout() -> str:
        return "done"

    with Session(engine) as session:
        (long,) = races.enqueue(session, attempt=2, started_at=func.statement_timestamp())
        (other,) = races.enqueue(session)
        session.execute(_MARKERS, {"id": long})
        session.commit()
    slow = create_engine(engine.url)

    def delay(_connection: Any, cursor: Any, statement: str, parameters: Any, *_more: Any) -> None:
        if statement.startswith("SELECT durable.step.workflow_id") and str(long) in repr(parameters):
            cursor.execute("SELECT pg_sleep(3)")

    event.listen(slow, "before_cursor_execute", delay)
    poll = timedelta(seconds=0.02)
    with Worker(durable, sessionmaker=sessionmaker(slow), poll_interval=poll, concurrency=2, max_attempts=1):
        races.wait_until(lambda: races.status_of(engine, other) is WorkflowStatus.SUCCEEDED)
        races.wait_until(lambda: races.status_of(engine, long) is WorkflowStatus.FAILED)
    with Session(engine) as session:
        error = session.get_one(Workflow, long).error
    assert error is not None
    assert "its history could not be read: no answer from the database within 0.3 s" in error["message"]
    assert "its history cannot be read" in caplog.text
    slow.dispose()


# behaviour: O2 R4
def test_a_history_for_which_there_is_no_connection_is_not_counted(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A pool that is used up after each of the first two claims says nothing of the workflow."""
    monkeypatch.setattr(settings, "time_limit", _short)
    durable = Durable()

    @durable.workflow
    def checkout() -> str:
        return "done"

    with Session(engine) as session:
        (claimed,) = races.enqueue(session, attempt=2, started_at=func.statement_timestamp())
        session.execute(_MARKERS, {"id": claimed})
        session.commit()
    scarce = create_engine(engine.url, pool_size=9, max_overflow=0)  # too few to keep one for the claims
    used_up: list[threading.Timer] = []
    free = threading.Event()
    free.set()

    def use_up(_connection: Any, cursor: Any, statement: str, *_more: Any) -> None:
        if len(used_up) < 2 and statement.startswith("WITH claimable") and cursor.rowcount == 1:
            free.clear()
            used_up.append(threading.Timer(1.5, free.set))
            used_up[-1].start()

    event.listen(scarce, "after_cursor_execute", use_up)
    event.listen(scarce, "checkout", lambda *_: free.wait(races.PATIENCE))
    poll = timedelta(seconds=0.02)
    with Worker(durable, sessionmaker=sessionmaker(scarce), poll_interval=poll, concurrency=1, max_attempts=1):
        races.wait_until(lambda: races.status_of(engine, claimed).finished)
    assert races.status_of(engine, claimed) is WorkflowStatus.SUCCEEDED
    assert caplog.text.count("claim: no connection to the database within 0.3 s") >= 2
    scarce.dispose()


class Odd(BaseException):
    """What ends an attempt without an outcome."""


# behaviour: O4 R4
def test_an_attempt_that_ended_itself_is_counted_however_long_somebody_holds_its_row(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Given up, it would be released by a heartbeat, as unknown, and executed again and again at that pace."""
    monkeypatch.setattr(attempts, "ROW_PAUSES", (0.01, 0.01))
    durable = Durable()
    holders: list[races.Transaction] = []

    @durable.workflow
    def checkout() -> None:
        holders.append(races.Transaction(engine))
        races.lock(holders[-1].session, workflow_id)
        raise Odd

    with Session(engine) as session:
        (workflow_id,) = races.enqueue(session)
    poll, lease = timedelta(seconds=0.02), timedelta(seconds=0.3)
    with Worker(
        durable, sessionmaker=sessionmaker(engine), poll_interval=poll, lease=lease, listen=False, max_attempts=1
    ):
        races.wait_until(lambda: "waits for a transaction that holds its row" in caplog.text)
        assert races.status_of(engine, workflow_id) is WorkflowStatus.RUNNING
        holders[0].session.close()
        races.wait_until(lambda: races.status_of(engine, workflow_id) is WorkflowStatus.FAILED)
    assert len(holders) == 1


def test_the_next_workflow_is_executed_while_the_outcome_of_the_last_one_waits_for_its_row(
    engine: Engine, async_session_factory: async_sessionmaker[AsyncSession]
) -> None:
    """What only waits for its commit executes nothing, and needs no slot."""
    durable = Durable()
    holder = races.Transaction(engine)

    @durable.workflow
    async def checkout(number: int) -> int:
        if number == 1:
            races.lock(holder.session, first)
        return number

    with Session(engine) as session:
        (first,) = races.enqueue(session, input={"number": 1})
        (second,) = races.enqueue(session, input={"number": 2})
    with Worker(durable, async_sessionmaker=async_session_factory, concurrency=1):
        races.wait_until(lambda: races.status_of(engine, second) is WorkflowStatus.SUCCEEDED)
        assert races.status_of(engine, first) is WorkflowStatus.RUNNING
        holder.session.close()
        races.wait_until(lambda: races.status_of(engine, first) is WorkflowStatus.SUCCEEDED)


def test_no_more_outcomes_wait_to_be_committed_than_there_are_slots(engine: Engine) -> None:
    """Else all that waits in the queues would be executed before any of it is durable, and again after a crash."""
    durable, executed, polls = Durable(), list[int](), threading.Semaphore(0)

    @durable.workflow
    def checkout(number: int) -> int:
        executed.append(number)
        return number

    def note(_connection: object, _cursor: object, statement: str, *_more: object) -> None:
        if "next_due_in" in statement:
            polls.release()

    with Session(engine) as session:
        ids = [races.enqueue(session, input={"number": number})[0] for number in range(20)]
    watched = create_engine(engine.url)
    event.listen(watched, "after_cursor_execute", note)
    poll = timedelta(seconds=0.02)
    with races.transaction(engine) as other:
        other.session.execute(text("LOCK TABLE durable.step IN SHARE MODE"))  # as CREATE INDEX does
        with Worker(durable, sessionmaker=sessionmaker(watched), concurrency=2, poll_interval=poll):
            races.wait_until(lambda: len(executed) >= 4)
            for _ in range(10):
                assert polls.acquire(timeout=60)
            assert len(executed) == 4
            other.session.rollback()
            races.wait_until(lambda: {races.status_of(engine, each) for each in ids} == {WorkflowStatus.SUCCEEDED})
    assert sorted(executed) == list(range(20))
    watched.dispose()
