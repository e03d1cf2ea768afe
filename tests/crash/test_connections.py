"""Connections that are lost in the middle, with or without their commit: the worker goes on, nothing comes twice."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import Engine, create_engine, event, make_url, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

import sqla_durable.asyncio as aio
from sqla_durable import Durable, Worker, Workflow, WorkflowStatus, run_step
from tests.crash import child, ledger
from tests.crash.application import durable
from tests.store import races
from tests.support.domain import Entry
from tests.support.proxy import Proxy
from tests.support.sampling import thorough_cases

pytestmark = [
    pytest.mark.usefixtures("crash_url"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@contextmanager
def working(url: str, driver: str, **options: Any) -> Generator[tuple[Engine, AsyncEngine]]:
    """A worker in this process, on engines of its own that a test may spoil."""
    engine = create_engine(url)
    on_loop = create_async_engine(make_url(url).set(drivername=f"postgresql+{driver}"))
    worker = Worker(
        durable,
        sessionmaker=sessionmaker(engine),
        async_sessionmaker=async_sessionmaker(on_loop),
        poll_interval=child.POLL,
        **options,
    )
    began, ended = threading.Event(), threading.Event()
    serving = races.Concurrent(lambda: asyncio.run(_serve(worker, on_loop, began, ended)))
    try:
        assert began.wait(races.PATIENCE), "the worker did not begin"
        yield engine, on_loop
    finally:
        ended.set()
        serving.result()
        engine.dispose()
        gc.collect()  # what the server has ended is not closed by anybody; let it be noticed here


async def _serve(worker: Worker, on_loop: AsyncEngine, began: threading.Event, ended: threading.Event) -> None:
    async with worker:
        began.set()
        await asyncio.to_thread(ended.wait)
    await on_loop.dispose()


def terminate_others(engine: Engine) -> int:
    """End every other connection to this database; give how many."""
    statement = text(
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
    )
    with engine.connect() as connection:
        return int(connection.execute(statement).scalar_one())


@pytest.mark.parametrize("driver", ["psycopg", *thorough_cases(["asyncpg"])])
def test_terminated_backends_lose_nothing_and_repeat_nothing(database_url: str, engine: Engine, driver: str) -> None:
    # behaviour: T4 E8
    chance = random.Random(7)
    ledger.start(engine, ["sync", "async"] * 20)
    terminated = 0
    with working(database_url, driver, concurrency=10, lease=timedelta(seconds=2)):
        for _ in range(10):
            threading.Event().wait(chance.uniform(0.01, 0.08))
            terminated += terminate_others(engine)
            ledger.start(engine, ["sync", "async"])
        ledger.wait_until_finished(engine)
    assert terminated > 10
    ledger.check_transfers(engine)


@pytest.mark.parametrize("executed", [True, False], ids=["committed", "not_committed"])
def test_a_commit_whose_answer_is_lost_is_settled_by_looking(database_url: str, engine: Engine, executed: bool) -> None:
    """Each third commit ends with a lost connection: after the server executed it, or before it arrived."""
    # behaviour: E8
    ledger.start(engine, ["sync", "async"] * 15)
    lost: list[int] = []
    with working(database_url, "psycopg", concurrency=10, max_attempts=1) as engines:
        for each in (engines[0], engines[1].sync_engine):
            _lose_commits(each, random.Random(3), lost, executed=executed)
        ledger.wait_until_finished(engine, seconds=60)
    assert len(lost) > 20
    workflows = ledger.check_transfers(engine)
    assert {each.attempt for each in workflows} == {1}


def _lose_commits(engine: Engine, chance: random.Random, lost: list[int], *, executed: bool) -> None:
    commit = engine.dialect.do_commit

    def do_commit(connection: Any) -> None:
        unlucky = chance.random() < 0.33
        if executed or not unlucky:
            commit(connection)
        if unlucky:
            lost.append(1)
            getattr(connection, "driver_connection", connection).pgconn.finish()
            raise psycopg.OperationalError("server closed the connection unexpectedly")

    engine.dialect.do_commit = do_commit  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize("driver", ["asyncpg", *thorough_cases(["psycopg"])])
def test_connections_that_the_server_ends_when_they_are_idle_are_replaced(
    database_url: str, engine: Engine, driver: str
) -> None:
    event.listen(engine, "connect", _never_idle_for_too_long)
    with engine.begin() as connection:
        name = make_url(database_url).database
        connection.execute(text(f'ALTER DATABASE "{name}" SET idle_session_timeout = 60'))
    engine.dispose()
    with working(database_url, driver):
        for _ in range(5):
            threading.Event().wait(0.15)
            ledger.start(engine, ["sync", "async"])
            ledger.wait_until_finished(engine)
    ledger.check_transfers(engine)


def _never_idle_for_too_long(connection: Any, _record: Any) -> None:
    """The test's own connections are not the subject, and wait on a busy machine."""
    connection.execute("SET idle_session_timeout = 0")
    connection.commit()


@pytest.mark.parametrize("driver", ["psycopg", *thorough_cases(["asyncpg"])])
def test_a_server_that_cannot_be_reached_for_a_while_ends_no_worker(
    database_url: str, engine: Engine, driver: str
) -> None:
    proxy = Proxy(database_url)
    ledger.start(engine, ["sync", "async"] * 20)
    with working(proxy.url, driver, concurrency=10, lease=timedelta(seconds=1)):
        for _ in range(3):
            threading.Event().wait(0.1)
            proxy.cut()
            threading.Event().wait(0.4)
            proxy.open()
            ledger.start(engine, ["sync", "async"] * 5)
        ledger.wait_until_finished(engine)
    proxy.cut()
    ledger.check_transfers(engine)


# Refused checkpoints


@pytest.fixture
def refusing(session_factory: sessionmaker[Session], async_session_factory: async_sessionmaker[AsyncSession]) -> Any:
    return {"sessionmaker": session_factory, "async_sessionmaker": async_session_factory}


@pytest.mark.parametrize("form", ["sync", "async"])
def test_a_step_whose_checkpoint_the_database_refuses_leaves_no_business_write(
    engine: Engine, refusing: dict[str, Any], form: str
) -> None:
    own = Durable()
    too_long = "".join(random.Random(1).choices("0123456789abcdefghijklmnopqrstuvwxyz", k=6_000))

    def write(session: Session) -> None:
        session.add(Entry(account="a", cents=1))

    async def write_async(session: AsyncSession) -> None:
        session.add(Entry(account="a", cents=1))

    @own.workflow(name="sync")
    def in_thread() -> None:
        run_step(too_long, write)

    @own.workflow(name="async")
    async def on_loop() -> None:
        await aio.run_step(too_long, write_async)

    (workflow_id,) = ledger.start(engine, [form])
    _without_input(engine)
    with Worker(own, poll_interval=child.POLL, **refusing):
        races.wait_until(lambda: races.status_of(engine, workflow_id).finished)
    assert _left_behind(engine, workflow_id) == (WorkflowStatus.FAILED, [], [])


@pytest.mark.parametrize("form", ["sync", "async"])
@pytest.mark.parametrize("event", ["cancel", "reclaim"])
def test_a_step_whose_workflow_was_lost_meanwhile_leaves_no_business_write(
    engine: Engine, refusing: dict[str, Any], form: str, event: str
) -> None:
    """The cancel, or the reclaim, commits while the step's function is being executed."""
    own = Durable()
    executions: list[int] = []

    def meanwhile() -> None:
        executions.append(1)
        if len(executions) > 1:
            return
        with Session(engine) as session:
            workflow_id = session.scalars(select(Workflow.id)).one()
            if event == "cancel":
                races.cancel(session, workflow_id)
            else:
                session.execute(text("UPDATE durable.workflow SET token = gen_random_uuid(), worker_id = token"))
            session.commit()

    def write(session: Session) -> None:
        session.add(Entry(account="a", cents=1))
        session.flush()
        meanwhile()

    async def write_async(session: AsyncSession) -> None:
        session.add(Entry(account="a", cents=1))
        await session.flush()
        meanwhile()

    @own.workflow(name="sync")
    def in_thread() -> None:
        run_step("write", write)

    @own.workflow(name="async")
    async def on_loop() -> None:
        await aio.run_step("write", write_async)

    (workflow_id,) = ledger.start(engine, [form])
    _without_input(engine)
    # What belongs to a worker that has no row is found at a tenth beat.
    with Worker(own, poll_interval=child.POLL, lease=timedelta(seconds=3), **refusing):
        expected = WorkflowStatus.CANCELLED if event == "cancel" else WorkflowStatus.SUCCEEDED
        races.wait_until(lambda: races.status_of(engine, workflow_id) is expected, seconds=40)
    accounts = [] if event == "cancel" else ["a"]
    assert _left_behind(engine, workflow_id) == (expected, ["write"][: len(accounts)], accounts)
    assert len(executions) == 1 + len(accounts)


def _without_input(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE durable.workflow SET input = '{}'"))


def _left_behind(engine: Engine, workflow_id: UUID) -> tuple[WorkflowStatus, list[str], list[str]]:
    with Session(engine) as session:
        record = session.get_one(Workflow, workflow_id)
        return record.status, [each.key for each in record.steps], list(session.scalars(select(Entry.account)))
