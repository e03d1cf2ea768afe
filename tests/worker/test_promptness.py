"""A worker whose workflow is cancelled or reclaimed gets a hint: async code is cancelled at once, before a beat."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import NullPool, create_engine, event, func, make_url, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

import sqla_durable.asyncio as aio
from sqla_durable import Durable, Worker, Workflow, WorkflowStatus, manage
from sqla_durable.asyncio import Saga
from tests.support.databases import translated
from tests.support.domain import Entry
from tests.support.notifications import PATIENCE

Callers = sessionmaker[Session]
LONG = timedelta(hours=1)
"""Neither a heartbeat nor a poll comes within the time of a test."""


class Application:
    """Workflows that wait for ever in a step, and what becomes of them, by their names."""

    def __init__(self) -> None:
        self.durable = Durable()
        self.events: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

        @self.durable.step
        async def first() -> None: ...

        @self.durable.step
        async def for_ever(name: str) -> None:
            self.set(f"{name} entered")
            try:
                await asyncio.Event().wait()
            finally:
                self.set(f"{name} cleans")
                await self.wait_for("clean")
                self.set(f"{name} cleaned")

        @self.durable.step
        async def undo_first() -> None:
            self.set("undone")

        @self.durable.workflow
        async def wait(name: str) -> None:
            await first()
            await for_ever(name)

        @self.durable.workflow
        async def wait_in_saga(name: str) -> None:
            async with Saga() as saga:
                saga.add(undo_first)
                await for_ever(name)

        @self.durable.workflow
        async def run(name: str) -> None:
            self.set(name)

        self.wait, self.wait_in_saga, self.run = wait, wait_in_saga, run

    def set(self, what: str) -> None:
        self.events[what].set()

    async def wait_for(self, what: str) -> None:
        await asyncio.wait_for(self.events[what].wait(), PATIENCE)


@pytest.fixture
def callers(direct_url: str, durable_schema: str) -> Generator[Callers]:
    """What operators use: connections of their own."""
    engine = create_engine(direct_url)
    yield sessionmaker(translated(engine, durable_schema))
    engine.dispose()


@asynccontextmanager
async def working(
    app: Application, direct_url: str, driver: str = "psycopg", schema: str = "durable", **options: Any
) -> AsyncGenerator[list[str]]:
    """Let a worker work; yield the statements that it executes."""
    outer = create_async_engine(make_url(direct_url).set(drivername=f"postgresql+{driver}"), poolclass=NullPool)
    engine = translated(outer.sync_engine, schema)
    executed: list[str] = []

    @event.listens_for(outer.sync_engine, "before_cursor_execute")
    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        executed.append(statement)

    maker = async_sessionmaker(AsyncEngine(engine))
    options = {"lease": LONG, "poll_interval": LONG, "grace": timedelta(), **options}
    async with Worker(app.durable, async_sessionmaker=maker, **options):
        yield executed
    await outer.dispose()


async def begun(executed: list[str]) -> None:
    """Wait until a worker listens, and its maintenance has done what it does at first: dead workers come last."""
    async with asyncio.timeout(PATIENCE):
        while not all(any(each in statement for statement in executed) for each in ("LISTEN", "WITH dead")):
            await asyncio.sleep(0.01)


async def begin(callers: Callers, start: Callable[..., Workflow], name: str) -> UUID:
    def begin() -> UUID:
        with callers.begin() as session:
            return start(session, name).id

    return await asyncio.to_thread(begin)


async def do(callers: Callers, verb: Callable[..., list[UUID]], workflow_id: UUID, **options: Any) -> int:
    def do() -> int:
        with callers.begin() as session:
            return len(verb(session, workflow_id, **options))

    return await asyncio.to_thread(do)


def standing(callers: Callers, workflow_id: UUID) -> tuple[WorkflowStatus, list[str]]:
    with callers() as session:
        record = session.get_one(Workflow, workflow_id)
        return record.status, [each.key for each in record.steps]


# behaviour: S4 M1
@pytest.mark.parametrize(
    ("driver", "durable_schema"), [("psycopg", "durable"), ("asyncpg", "tenant_7")], indirect=["durable_schema"]
)
async def test_a_cancelled_async_step_ends_at_once_and_cleans_up_undisturbed(
    direct_url: str, durable_schema: str, callers: Callers, driver: str
) -> None:
    app = Application()
    async with working(app, direct_url, driver, durable_schema):
        ids: list[UUID] = []
        for name in ("a", "b"):  # when b is cancelled, a is still in its finally
            ids.append(await begin(callers, app.wait.start, name))
            await app.wait_for(f"{name} entered")
            assert await do(callers, manage.cancel, ids[-1]) == 1
            await app.wait_for(f"{name} cleans")
            assert await do(callers, manage.cancel, ids[-1]) == 0
        app.set("clean")
        await app.wait_for("a cleaned")
        await app.wait_for("b cleaned")
    assert [standing(callers, each) for each in ids] == [(WorkflowStatus.CANCELLED, ["first"])] * 2


async def test_a_step_that_swallows_its_cancellation_commits_nothing(direct_url: str, callers: Callers) -> None:
    app = Application()

    @app.durable.step
    async def stubborn(session: AsyncSession) -> None:
        session.add(Entry(account="stubborn", cents=1))
        app.set("entered")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            app.set("swallowed")

    @app.durable.workflow
    async def swallow(name: str) -> None:
        try:
            await stubborn()
        finally:
            app.set(name)

    async with working(app, direct_url):
        workflow_id = await begin(callers, swallow.start, "ended")
        await app.wait_for("entered")
        await do(callers, manage.cancel, workflow_id)
        await app.wait_for("swallowed")
        await app.wait_for("ended")
    assert standing(callers, workflow_id) == (WorkflowStatus.CANCELLED, [])
    with callers() as session:
        assert session.scalars(select(func.count()).select_from(Entry)).one() == 0


async def test_a_rewind_a_deadline_and_a_cancel_that_is_to_undo_something_come_as_soon(
    direct_url: str, callers: Callers
) -> None:
    app = Application()
    app.set("clean")
    deadlines: dict[str, Any] = {"poll_interval": timedelta(seconds=0.2)}  # they are found by polling
    async with (
        working(app, direct_url, **deadlines),
        working(app, direct_url, queues=["elsewhere"], **deadlines),
    ):
        rewound = await begin(callers, app.wait.start, "rewound")
        await app.wait_for("rewound entered")
        app.events["rewound entered"].clear()
        assert await do(callers, manage.rewind, rewound, to_step="first") == 1
        await app.wait_for("rewound cleaned")
        await app.wait_for("rewound entered")
        undone = await begin(callers, app.wait_in_saga.start, "undone")
        await app.wait_for("undone entered")
        await do(callers, manage.cancel, undone)
        await app.wait_for("undone cleaned")
        await app.wait_for("undone")
        await begin(callers, app.wait.options(deadline=timedelta(seconds=1)).start, "late")
        await app.wait_for("late entered")
        await app.wait_for("late cleaned")


async def test_a_cancel_costs_its_worker_two_statements_and_every_other_none(direct_url: str, callers: Callers) -> None:
    app = Application()
    app.set("clean")
    async with (
        working(app, direct_url, concurrency=1) as owner,
        working(app, direct_url, queues=["elsewhere"]) as bystander,
    ):
        workflow_id = await begin(callers, app.wait.start, "a")
        await app.wait_for("a entered")
        for executed in (owner, bystander):
            await begun(executed)
            executed.clear()
        await do(callers, manage.cancel, workflow_id)
        await app.wait_for("a cleaned")
        # What is hinted at after that is executed when the hint before it was heard, and the slot is free.
        await begin(callers, app.run.start, "slot")
        await begin(callers, app.run.options(queue="elsewhere").start, "heard")
        await app.wait_for("slot")
        await app.wait_for("heard")
        claims = ("claimable AS", "ending(", "next_due_in", "LISTEN")
        looked, finished = (each for each in owner if not any(claim in each for claim in claims))
        assert looked.startswith("SELECT durable.workflow.id, durable.workflow.token")
        assert "finished_at IS NOT NULL" in finished
        assert [each for each in bystander if not any(claim in each for claim in claims)] == []


async def test_a_child_s_end_wakes_its_suspended_parent_at_once(direct_url: str, callers: Callers) -> None:
    """By the worker that has committed it, which hears no hint of its own commits."""
    app = Application()

    @app.durable.step
    async def entered(name: str) -> None:
        app.set(name)
        await app.wait_for("go on")

    @app.durable.workflow
    async def child() -> None:
        await entered("child")

    @app.durable.workflow
    async def parent(name: str) -> None:
        await (await aio.start_child(child)).result()
        app.set(name)

    async with working(app, direct_url):
        workflow_id = await begin(callers, parent.start, "parent")
        await app.wait_for("child")
        async with asyncio.timeout(PATIENCE):
            while standing(callers, workflow_id)[0] is not WorkflowStatus.SUSPENDED:
                await asyncio.sleep(0.01)
        app.set("go on")
        await app.wait_for("parent")
