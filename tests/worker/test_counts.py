"""What a workflow costs, in statements and commits: numbers that do not depend on the machine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, event, func, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

import sqla_durable.asyncio as aio
from sqla_durable import Durable, Executor, Worker, Workflow, WorkflowStatus, send_signal, start_many
from sqla_durable.execution.worker import settings
from tests.acceptance.shells import PATIENCE, POLL
from tests.store import races
from tests.support.domain import Entry

Sessions = sessionmaker[Session]
AsyncSessions = async_sessionmaker[AsyncSession]

durable = Durable()


@durable.step
def book(session: Session, cents: int) -> int:
    session.add(Entry(account="book", cents=cents, note=None))
    return cents


@durable.step
def notify(cents: int) -> int:
    return cents


@durable.workflow
def booking(cents: int) -> int:
    return book(cents)


@durable.workflow
def nothing() -> None: ...


asynchronous = Durable()


@asynchronous.step
async def anotify(cents: int) -> int:
    return cents


@asynchronous.workflow
async def notifying(cents: int, steps: int = 1) -> int:
    for _ in range(steps):
        await anotify(cents)
    return cents


@asynchronous.workflow
async def waiting_for_signal() -> None:
    await aio.wait_signal("go")
    await anotify(1)


_SUSPENDED = text(
    "INSERT INTO durable.workflow (name, status, awaits, wake_at) "
    "SELECT 'notifying', 'suspended', '[{\"signal\"\\: \"go\"}]', "
    "CASE n % 2 WHEN 0 THEN statement_timestamp() + interval '30 days' END FROM generate_series(1, :count) n"
)


class Counts:
    """What an engine did: checkouts of connections, statements, commits; thread-safe."""

    def __init__(self) -> None:
        self.statements: list[str] = []
        self.done: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def claims(self) -> int:
        return sum("claimable AS" in each for each in self.statements)

    def note(self, what: str, statement: str = "") -> None:
        if threading.current_thread().name == "durable-hints":
            return  # at most one statement in 10 ms, however much there is
        with self._lock:
            self.done[what] += 1
            if statement:
                self.statements.append(statement)


@contextmanager
def counting(engine: Engine) -> Generator[Counts]:
    counts = Counts()

    def commit(_connection: Any) -> None:
        counts.note("commit")

    def rollback(_connection: Any) -> None:
        counts.note("rollback")

    def execute(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        counts.note("statement", statement)

    def checkout(*_: Any) -> None:
        counts.note("checkout")

    listeners: list[tuple[Any, str, Any]] = [
        (engine, "commit", commit),
        (engine, "rollback", rollback),
        (engine, "after_cursor_execute", execute),
        (engine.pool, "checkout", checkout),
    ]
    for target, name, listener in listeners:
        event.listen(target, name, listener)
    yield counts
    for target, name, listener in listeners:
        event.remove(target, name, listener)


# behaviour: T10
def test_transactional_step_is_one_connection_two_statements_and_one_commit(
    engine: Engine, session_factory: Sessions
) -> None:
    with session_factory() as session:
        Executor(session).run(booking, 1)  # the schema is known, statements are compiled
        with counting(engine) as without:
            Executor(session).run(nothing)
        with counting(engine) as with_step:
            Executor(session).run(booking, 2)
    assert with_step.done["commit"] - without.done["commit"] == 1
    assert with_step.done["checkout"] - without.done["checkout"] == 1
    assert with_step.done["statement"] - without.done["statement"] == 2  # the user's INSERT and the checkpoint
    assert with_step.done["rollback"] == without.done["rollback"] == 0


def test_executor_costs_two_commits_a_workflow_and_one_a_step(engine: Engine, session_factory: Sessions) -> None:
    with session_factory() as session:
        Executor(session).run(booking, 1)
        with counting(engine) as counts:
            Executor(session).run(booking, 2)
    assert counts.done["commit"] == 3


def test_joined_executor_commits_nothing(engine: Engine, session_factory: Sessions) -> None:
    with session_factory() as session:
        with counting(engine) as counts:
            assert Executor.joined(session).run(booking, 2) == 2
        assert counts.done["commit"] == 0
        assert counts.done["checkout"] == 1
        session.rollback()


def test_start_in_a_known_database_is_one_insert(engine: Engine, session_factory: Sessions) -> None:
    with session_factory.begin() as session:
        booking.start(session, 1)
    for workflow in (booking, booking.options(key="k")):
        with counting(engine) as counts, session_factory.begin() as session:
            workflow.start(session, 2)
        assert len(counts.statements) == 1
        assert counts.statements[0].startswith("INSERT")
        assert counts.done["commit"] == 1


def test_start_of_a_known_key_is_an_insert_and_a_select(engine: Engine, session_factory: Sessions) -> None:
    with session_factory.begin() as session:
        booking.options(key="k").start(session, 1)
    with counting(engine) as counts, session_factory.begin() as session:
        booking.options(key="k").start(session, 2)
    assert len(counts.statements) == 2


def test_start_many_is_one_statement(engine: Engine, session_factory: Sessions) -> None:
    with session_factory.begin() as session:
        start_many(session, [booking.bind(0)])
    with counting(engine) as counts, session_factory.begin() as session:
        start_many(session, (booking.bind(number) for number in range(1_000)))
    assert len(counts.statements) == 1


@pytest.mark.parametrize("async_driver", ["psycopg", "asyncpg"], indirect=True)
@pytest.mark.parametrize("steps", [0, 1])
async def test_worker_carries_out_many_workflows_in_few_commits(
    async_engine: AsyncEngine, async_session_factory: AsyncSessions, steps: int
) -> None:
    count = 400
    async with async_session_factory.begin() as session:
        ids = await aio.start_many(session, (notifying.bind(number, steps) for number in range(count)))
    with counting(async_engine.sync_engine) as counts:
        worker = Worker(asynchronous, async_sessionmaker=async_session_factory, concurrency=100, poll_interval=POLL)
        async with worker:
            for each in ids:
                await notifying.handle(async_session_factory, each).result(timeout=PATIENCE)
    claims = [each for each in counts.statements if "claimable AS" in each]
    writes = [each for each in counts.statements if "ending(" in each]
    # 400 workflows by 100 slots: alone, each would take three commits, 1,200 of them.
    assert count / 200 <= len(writes) <= count / 10  # as many again may wait for their commit
    assert count / 100 <= len(claims) <= count / 10


@pytest.mark.parametrize("async_driver", ["psycopg", "asyncpg"], indirect=True)
async def test_a_worker_costs_the_server_a_tenth_of_a_statement_for_each_workflow(
    async_engine: AsyncEngine, async_session_factory: AsyncSessions, engine: Engine
) -> None:
    """Each statement is a transaction of its own, so that it is a tenth of a commit, too."""
    count = 2_000
    async with async_session_factory.begin() as session:
        await aio.start_many(session, (notifying.bind(number) for number in range(count)))
    with counting(async_engine.sync_engine) as counts:
        async with Worker(asynchronous, async_sessionmaker=async_session_factory, concurrency=100):
            await asyncio.to_thread(races.wait_until, lambda: _unfinished(engine) == 0, seconds=60)
    assert len(counts.statements) <= count / 10


def _unfinished(engine: Engine) -> int:
    with Session(engine) as session:
        return session.scalars(select(func.count()).where(Workflow.finished_at.is_(None))).one()


@pytest.mark.parametrize("async_driver", ["psycopg", "asyncpg"], indirect=True)
async def test_last_checkpoint_and_completion_share_one_commit(
    async_engine: AsyncEngine, async_session_factory: AsyncSessions
) -> None:
    async with async_session_factory.begin() as session:
        workflow_id = (await notifying.start(session, 1, 3)).id
    async with Worker(asynchronous, async_sessionmaker=async_session_factory, poll_interval=POLL):
        await notifying.handle(async_session_factory, workflow_id).result(timeout=PATIENCE)
    async with async_session_factory() as session:
        step_xids = (await session.scalars(text("SELECT xmin::text FROM durable.step ORDER BY position"))).all()
        finish = (await session.scalars(text("SELECT xmin::text FROM durable.workflow"))).one()
    assert step_xids[-1] == finish
    assert len(set(step_xids)) == 3


@pytest.mark.parametrize("suspended", [0, 20_000])
def test_idle_worker_costs_one_statement_a_poll(engine: Engine, session_factory: Sessions, suspended: int) -> None:
    """Whatever the number of its queues, and of workflows that wait."""
    with engine.begin() as connection:
        connection.execute(_SUSPENDED, {"count": suspended})
    polled = threading.Semaphore(0)

    def count_poll(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if "next_due_in" in statement:
            polled.release()

    queues = [f"queue {number}" for number in range(100)]
    worker = Worker(durable, sessionmaker=session_factory, poll_interval=POLL, queues=queues)
    event.listen(engine, "after_cursor_execute", count_poll)
    with counting(engine) as counts, worker:
        for _ in range(30):
            assert polled.acquire(timeout=30)
    event.remove(engine, "after_cursor_execute", count_poll)
    polls = [each for each in counts.statements if "next_due_in" in each]
    claims = [each for each in counts.statements if "claimable AS" in each]
    # The first claim and the three after it; the rest is the start, the end, and what is done once in a long while.
    assert 1 <= len(claims) <= 4
    assert len(counts.statements) <= len(polls) + len(claims) + 16


@pytest.mark.parametrize("async_driver", ["psycopg", "asyncpg"], indirect=True)
async def test_a_signal_is_claimed_and_taken_in_two_statements(
    async_engine: AsyncEngine, async_session_factory: AsyncSessions, engine: Engine
) -> None:
    """The third, from the send to the step after it, is the send itself."""

    def status() -> WorkflowStatus:
        return races.status_of(engine, workflow_id)

    def is_idle() -> bool:
        """Return whether it is suspended, and no claim has followed on the last one for long."""
        if counts.claims != claimed[-1][0]:
            claimed.append((counts.claims, time.monotonic()))
        is_over = time.monotonic() - claimed[-1][1] > 2 * settings.CLAIM_PAUSES[-1]
        return status() is WorkflowStatus.SUSPENDED and is_over and listens()

    def listens() -> bool:
        with engine.connect() as connection:
            query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN %'"
            return bool(connection.scalar(text(query)))

    claimed = [(0, time.monotonic())]
    async with async_session_factory.begin() as session:
        workflow_id = (await waiting_for_signal.start(session)).id
    worker = Worker(asynchronous, async_sessionmaker=async_session_factory, poll_interval=timedelta(hours=1))
    with counting(async_engine.sync_engine) as counts:
        async with worker:
            await asyncio.to_thread(races.wait_until, is_idle)
            del counts.statements[:]
            with Session(engine) as sender:
                send_signal(sender, workflow_id, "go")
                sender.commit()
            await asyncio.to_thread(races.wait_until, lambda: len(counts.statements) >= 3)
            kinds = [_kind(each) for each in counts.statements[:3]]
    assert kinds == ["claim", "take", "write"]
    assert status() is WorkflowStatus.SUCCEEDED


def _kind(statement: str) -> str:
    kinds = {"waiting AS": "claim", "oldest AS": "take", "ending(": "write"}
    return next((kind for part, kind in kinds.items() if part in statement), statement)


def test_a_transactional_step_in_a_worker_is_two_statements_and_the_group_commit_ends_its_workflow(
    engine: Engine, session_factory: Sessions
) -> None:
    """The user's INSERT and the checkpoint for each; what else there is belongs to all of them."""
    count = 20
    with session_factory.begin() as session:
        start_many(session, (booking.bind(number) for number in range(count)))
    with counting(engine) as counts, Worker(durable, sessionmaker=session_factory):
        races.wait_until(lambda: _unfinished(engine) == 0, seconds=60)
    inserts = Counter(each.split()[2] for each in counts.statements if each.startswith("INSERT INTO"))
    ends = [each for each in counts.statements if "ending(" in each]
    assert {table: inserts[table] for table in inserts if not table.endswith(".worker")} == {
        "entry": count,
        "durable.step": count,
    }
    assert 1 <= len(ends) <= count
