"""What attempts leave behind at their ends: asyncio has nothing to report of it."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

import sqla_durable.asyncio as aio
from sqla_durable import Durable, Worker, Workflow, WorkflowStatus
from sqla_durable.asyncio import manage
from tests.acceptance.shells import POLL
from tests.store import races

DAY = timedelta(days=1)
Call = Callable[[], Awaitable[Any]]


class Shop:
    """A workflow with branches of every make, each in an operation of another kind when the attempt ends."""

    def __init__(self, durable: Durable) -> None:
        self.begun = threading.Semaphore(0)
        self.threads_may_end = threading.Event()
        self.workflow = durable.workflow(self._checkout, name="checkout")
        self._in_thread = durable.step(self._wait_in_thread, name="in_thread")
        self._in_session = durable.step(self._wait_in_session, name="in_session")
        self._hang = durable.step(self._wait, name="hang")
        self._write = durable.step(self._wait_in_transaction, name="write")

    async def _wait(self) -> None:
        self.begun.release()
        await asyncio.Event().wait()

    async def _wait_in_transaction(self, session: AsyncSession) -> None:
        await session.connection()
        await self._wait()

    def _wait_in_thread(self) -> None:
        self.begun.release()
        self.threads_may_end.wait(30)

    def _wait_in_session(self, session: Session) -> None:
        session.connection()
        self._wait_in_thread()

    async def _checkout(self, way: str) -> str:
        waits: list[Call] = [lambda: aio.sleep(DAY), lambda: aio.wait_signal("go")]
        steps: list[Call] = [
            self._hang,
            self._write,
            partial(aio.to_thread, self._in_thread),
            partial(aio.to_thread, self._in_session),
        ]
        calls = waits if way == "suspended" else [*waits, *steps]
        if way == "returns":
            tasks = [asyncio.ensure_future(each()) for each in calls]
            await asyncio.to_thread(self.all_begun)
            for each in tasks:
                each.cancel()
            return "done"
        if way == "fails":
            tasks = [asyncio.ensure_future(each()) for each in calls]
            gathered = asyncio.gather(*(self._branch(each) for each in calls))
            await asyncio.to_thread(self.all_begun)
            raise LookupError(f"{len(tasks)} {gathered}")
        async with asyncio.TaskGroup() as group:
            shielded = way != "suspended"  # nobody can see what a shield waits for
            group.create_task(self._gathered(calls, shielded=shielded))
            group.create_task(self._branch(lambda: aio.sleep(DAY), shielded=shielded))
        return "never"

    async def _gathered(self, calls: list[Call], *, shielded: bool) -> None:
        branches = [self._branch(each, shielded=shielded) for each in calls]
        await asyncio.gather(*branches, *(each() for each in calls))

    async def _branch(self, call: Call, *, shielded: bool = True) -> None:
        await (asyncio.shield(asyncio.ensure_future(call())) if shielded else call())

    def all_begun(self) -> None:
        """Wait until every step is being executed."""
        for _ in range(4):
            assert self.begun.acquire(timeout=30)


# behaviour: A5
@pytest.mark.usefixtures("few_objects")
@pytest.mark.parametrize("way", ["suspended", "lost", "released", "fails", "returns"])
async def test_nothing_is_left_for_asyncio_to_report(
    session_factory: sessionmaker[Session], async_session_factory: async_sessionmaker[AsyncSession], way: str
) -> None:
    reports: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, report: reports.append(report))
    durable = Durable()
    shop = Shop(durable)
    async with async_session_factory.begin() as session:
        workflow_id = (await shop.workflow.start(session, way)).id
    worker = Worker(
        durable,
        sessionmaker=session_factory,
        async_sessionmaker=async_session_factory,
        poll_interval=POLL,
        concurrency=16,
        grace=timedelta(seconds=0.2),
    )

    def has_come_to(*statuses: WorkflowStatus) -> bool:
        with session_factory() as looking:
            return looking.get_one(Workflow, workflow_id).status in statuses

    def until(*statuses: WorkflowStatus) -> None:
        races.wait_until(lambda: has_come_to(*statuses))

    async with worker:
        match way:
            case "suspended":
                await asyncio.to_thread(until, WorkflowStatus.SUSPENDED)
            case "fails" | "returns":
                await asyncio.to_thread(until, WorkflowStatus.FAILED, WorkflowStatus.SUCCEEDED)
            case _:
                await asyncio.to_thread(shop.all_begun)
        if way == "lost":
            async with async_session_factory.begin() as session:
                await manage.cancel(session, workflow_id)
            await asyncio.sleep(0.3)
        if way != "released":
            shop.threads_may_end.set()
    shop.threads_may_end.set()
    await _ended_threads()
    assert [(each["message"], each.get("future")) for each in reports] == []


async def _ended_threads() -> None:
    for _ in range(3):
        await asyncio.sleep(0.05)
        gc.collect()
