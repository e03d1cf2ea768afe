"""Waits that stay in memory for a moment: what comes meanwhile costs no replay, and nothing depends on it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

import sqla_durable.asyncio as aio
from sqla_durable import Durable, Worker, Workflow, random_number, start_child
from sqla_durable.models.base import WorkflowStatus
from tests.acceptance.shells import POLL
from tests.store import races
from tests.worker.test_counts import Counts, counting

Sessions = sessionmaker[Session]
AsyncSessions = async_sessionmaker[AsyncSession]

LONG = 600
"""Operations of a history so long that a wait stays in memory for three seconds."""


class Program:
    """A workflow with a long history, and how often its function was called."""

    def __init__(self, body: Callable[[Program], Awaitable[None]], *, history: int = LONG) -> None:
        self.durable = Durable()
        self.executions = 0
        self.waits = asyncio.Event()

        @self.durable.workflow
        async def program() -> None:
            self.executions += 1
            for _ in range(history):
                await aio.random_number()
            self.waits.set()
            await body(self)

        @self.durable.workflow
        async def child() -> int:
            return 1

        self.workflow = program
        self.child = child

    async def start(self, maker: AsyncSessions) -> UUID:
        async with maker.begin() as session:
            return (await self.workflow.start(session)).id

    def worker(self, maker: AsyncSessions, **options: Any) -> Worker:
        return Worker(self.durable, async_sessionmaker=maker, poll_interval=POLL, **options)


async def ended(maker: AsyncSessions, workflow_id: UUID, *, as_: WorkflowStatus = WorkflowStatus.SUCCEEDED) -> None:
    async with asyncio.timeout(races.PATIENCE):
        while True:
            async with maker() as session:
                if (await session.get_one(Workflow, workflow_id)).status is as_:
                    return
            await asyncio.sleep(0.02)


# behaviour: G1
async def test_children_awaited_in_a_loop_replay_nothing(async_session_factory: AsyncSessions) -> None:
    async def body(program: Program) -> None:
        for _ in range(10):
            assert await (await aio.start_child(program.child)).result() == 1

    program = Program(body)
    async with program.worker(async_session_factory):
        await ended(async_session_factory, await program.start(async_session_factory))
    assert program.executions <= 2  # where the machine stands still for five seconds


async def test_a_signal_reaches_the_code_of_a_waiting_workflow_by_one_statement(
    async_engine: AsyncEngine, async_session_factory: AsyncSessions
) -> None:
    async def body(program: Program) -> None:
        for _ in range(10):
            program.waits.set()
            await aio.wait_signal("go")

    program = Program(body)
    async with program.worker(async_session_factory):
        workflow_id = await program.start(async_session_factory)
        with counting(async_engine.sync_engine) as counts:
            for _ in range(10):
                await program.waits.wait()
                program.waits.clear()
                async with async_session_factory.begin() as session:
                    await aio.send_signal(session, workflow_id, "go")
            await ended(async_session_factory, workflow_id)
    assert program.executions <= 2
    assert len(takes(counts)) <= 10 * 4  # before it waits, when it comes, and looks by itself on a slow machine


def takes(counts: Counts) -> list[str]:
    """The statements that take a signal."""
    return [each for each in counts.statements if "signal_name" in each and "oldest" in each]


async def test_a_wait_in_memory_that_ends_without_an_answer_costs_one_more_statement(
    async_engine: AsyncEngine, async_session_factory: AsyncSessions
) -> None:
    async def body(program: Program) -> None:
        await aio.wait_signal("go")

    program = Program(body, history=0)
    async with program.worker(async_session_factory):
        with counting(async_engine.sync_engine) as counts:
            workflow_id = await program.start(async_session_factory)
            await ended(async_session_factory, workflow_id, as_=WorkflowStatus.SUSPENDED)
    assert len(takes(counts)) <= 2


async def test_updates_and_callbacks_reach_what_waits_in_memory(async_session_factory: AsyncSessions) -> None:
    tokens: list[str] = []

    async def body(program: Program) -> None:
        request = await aio.wait_update("change", int)
        await request.reply(request.payload + 1)
        callback = await aio.create_callback(int)
        tokens.append(callback.token)
        program.waits.set()
        assert await callback.result() == 7

    program = Program(body)
    async with program.worker(async_session_factory):
        workflow_id = await program.start(async_session_factory)
        await program.waits.wait()
        program.waits.clear()
        async with async_session_factory.begin() as session:
            asked = await aio.send_update(session, workflow_id, "change", 1, reply=int)
        assert await asked.result() == 2
        await program.waits.wait()
        async with async_session_factory.begin() as session:
            await aio.complete_callback(session, tokens[0], 7)
        await ended(async_session_factory, workflow_id)
    assert program.executions <= 2


async def test_a_full_worker_suspends_what_waits_for_others(async_session_factory: AsyncSessions) -> None:
    """Its child needs the only slot; were that kept, the child would come after the moment."""

    async def body(program: Program) -> None:
        assert await (await aio.start_child(program.child)).result() == 1

    program = Program(body)
    async with program.worker(async_session_factory, concurrency=1):
        await ended(async_session_factory, await program.start(async_session_factory))
    assert program.executions == 2


async def test_what_has_no_hint_is_found(async_session_factory: AsyncSessions) -> None:
    async def body(program: Program) -> None:
        await aio.wait_signal("go")

    program = Program(body)
    async with program.worker(async_session_factory, listen=False):
        workflow_id = await program.start(async_session_factory)
        await program.waits.wait()
        async with async_session_factory.begin() as session:
            sent = text("INSERT INTO durable.signal (workflow_id, name) VALUES (:id, 'go')")
            await session.execute(sent, {"id": workflow_id})
        await ended(async_session_factory, workflow_id)


async def test_a_cancel_and_a_stop_end_a_wait_in_memory(async_session_factory: AsyncSessions) -> None:
    async def body(program: Program) -> None:
        await aio.wait_signal("go")

    program = Program(body)
    async with (worker := program.worker(async_session_factory)):
        cancelled, released = [await program.start(async_session_factory) for _ in range(2)]
        async with asyncio.timeout(races.PATIENCE):
            while program.executions < 2:
                await asyncio.sleep(0.01)
        async with async_session_factory.begin() as session:
            await aio.manage.cancel(session, cancelled)
    assert worker.left_behind == 0
    await ended(async_session_factory, cancelled, as_=WorkflowStatus.CANCELLED)
    async with async_session_factory() as session:
        assert not (await session.get_one(Workflow, released)).status.finished


def test_sync_code_waits_in_memory_too(session_factory: Sessions) -> None:
    durable, executions = Durable(), list[int]()

    @durable.workflow
    def child() -> int:
        return 1

    @durable.workflow
    def parent() -> None:
        executions.append(1)
        for _ in range(LONG):
            random_number()
        for _ in range(10):
            assert start_child(child).result() == 1

    with Worker(durable, sessionmaker=session_factory, poll_interval=POLL):
        with session_factory.begin() as session:
            record = parent.start(session)
            workflow_id = record.id
        parent.handle(session_factory, workflow_id).result(timeout=timedelta(seconds=30))
    assert len(executions) <= 2
