"""The two namespaces: each refuses code and sessions of the other kind, and names the right one; and scopes of keys."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

import sqla_durable
import sqla_durable.asyncio as aio
from sqla_durable import (
    Durable,
    Executor,
    Signal,
    Step,
    Workflow,
    heartbeat,
    manage,
    new_uuid,
    run_step,
    send_signal,
    set_event,
    sleep,
    start_child,
    step_scope,
)
from sqla_durable.errors import SessionError, UsageError

durable = Durable()
MOMENT = timedelta(seconds=0.001)
NOWHERE = UUID(int=0)


@durable.workflow
def leaf() -> int:
    return 1


SYNC_CALLS: list[tuple[str, Callable[[], Any]]] = [
    ("sleep", lambda: sleep(MOMENT)),
    ("wait_signal", lambda: sqla_durable.wait_signal("go")),
    ("start_child", lambda: start_child(leaf)),
    ("map_children", lambda: sqla_durable.map_children(leaf, [leaf.bind()])),
    ("new_uuid", new_uuid),
    ("set_event", lambda: set_event("status", 1)),
    ("run_step", lambda: run_step("one", int)),
    ("create_callback", sqla_durable.create_callback),
    ("Saga", lambda: sqla_durable.Saga().__enter__()),
]


@pytest.mark.parametrize(("name", "call"), SYNC_CALLS, ids=[name for name, _ in SYNC_CALLS])
async def test_sync_function_in_an_async_workflow_names_its_twin(
    name: str, call: Callable[[], Any], async_session_factory: async_sessionmaker[AsyncSession]
) -> None:
    @Durable().workflow
    async def wrong() -> None:
        call()

    async with async_session_factory() as session:
        with pytest.raises(UsageError, match=rf"use sqla_durable.asyncio.{name}\("):
            await aio.AsyncExecutor(session).run(wrong)


@pytest.mark.parametrize(
    ("name", "call"),
    [("sleep", lambda: aio.sleep(MOMENT)), ("set_event", lambda: aio.set_event("status", 1))],
)
def test_async_function_in_a_sync_workflow_names_its_twin(
    name: str, call: Callable[[], Any], session_factory: sessionmaker[Session]
) -> None:
    @Durable().workflow
    def wrong() -> None:
        call()

    with session_factory() as session, pytest.raises(UsageError, match=rf"use sqla_durable.{name}\("):
        Executor(session).run(wrong)


async def test_steps_call_the_namespace_of_their_own_kind(
    async_session_factory: async_sessionmaker[AsyncSession],
) -> None:
    app = Durable()

    @app.step
    def sync_step() -> None:
        heartbeat(1)
        with pytest.raises(UsageError, match=r"use sqla_durable.heartbeat\("):
            _ = aio.heartbeat(1)

    @app.step
    async def async_step() -> None:
        await aio.heartbeat(1)
        await asyncio.to_thread(heartbeat, 2)
        with pytest.raises(UsageError, match=r"use sqla_durable.asyncio.heartbeat\("):
            heartbeat(3)

    @app.step
    async def transactional(session: AsyncSession) -> None:
        await aio.set_event("one", 1, session=session)
        await session.run_sync(lambda inner: set_event("two", 2, session=inner))
        with pytest.raises(UsageError, match="was given an AsyncSession"):
            set_event("three", 3, session=session)  # type: ignore[arg-type]

    @app.workflow
    async def steps() -> None:
        await aio.to_thread(sync_step)
        await async_step()
        await transactional()

    async with async_session_factory() as session:
        await aio.AsyncExecutor(session).run(steps)


def test_session_of_the_other_kind_names_the_other_namespace() -> None:
    given: Any = AsyncSession()
    with pytest.raises(SessionError, match=r"await sqla_durable.asyncio.send_signal"):
        send_signal(given, NOWHERE, "go")
    with pytest.raises(SessionError, match=r"await sqla_durable.asyncio.manage.cancel"):
        manage.cancel(given, NOWHERE)
    with pytest.raises(SessionError, match=r"await sqla_durable.asyncio.get_event"):
        sqla_durable.get_event(given, NOWHERE, "status")


async def test_sync_session_in_an_async_function_names_the_other_namespace() -> None:
    given: Any = Session()
    with pytest.raises(SessionError, match=r"call sqla_durable.send_signal"):
        await aio.send_signal(given, NOWHERE, "go")
    with pytest.raises(SessionError, match=r"call sqla_durable.manage.cancel"):
        await aio.manage.cancel(given, NOWHERE)
    with pytest.raises(SessionError, match=r"call sqla_durable.read_stream"):
        aio.read_stream(given, NOWHERE, "log")


async def test_sync_function_works_in_run_sync(async_session_factory: async_sessionmaker[AsyncSession]) -> None:
    async with async_session_factory() as session:
        session.add(record := Workflow(name="leaf"))
        await session.flush()
        await session.run_sync(lambda inner: send_signal(inner, record, "go", 7))
        assert (await session.scalars(select(Signal.payload))).all() == [7]
        await session.rollback()


def keys(session: Session) -> list[str]:
    return sorted(each.key for each in session.scalars(select(Step)))


def test_scope_numbers_its_steps_apart(session_factory: sessionmaker[Session]) -> None:
    def library() -> None:
        with step_scope("agent"):
            run_step("ask", int)
            run_step("ask", int)
            sleep(MOMENT, step_key="pause")

    @Durable().workflow
    def calling() -> None:
        run_step("ask", int)
        library()
        library()
        run_step("ask", int)

    scoped = ["agent#2/ask", "agent#2/ask#2", "agent#2/pause", "agent/ask", "agent/ask#2", "agent/pause"]
    with session_factory() as session:
        Executor(session).run(calling)
        assert keys(session) == [*scoped, "ask", "ask#2"]


def test_names_of_scopes_are_escaped(session_factory: sessionmaker[Session]) -> None:
    @Durable().workflow
    def calling() -> None:
        for name in ("agent#2", "agent", "agent", "a/b"):
            with step_scope(name):
                run_step("ask", int)
        with step_scope("a"), step_scope("b"):
            run_step("ask", int)

    with session_factory() as session:
        Executor(session).run(calling)
        assert keys(session) == ["a%2Fb/ask", "a/b/ask", "agent#2/ask", "agent%232/ask", "agent/ask"]


async def test_scope_in_a_task_has_nothing_of_the_name_of_the_task(
    async_session_factory: async_sessionmaker[AsyncSession], session_factory: sessionmaker[Session]
) -> None:
    async def call_tool(number: int) -> None:
        with step_scope(f"tool {number}"):
            await aio.run_step("ask", int)

    async def plain() -> None:
        await aio.run_step("ask", int)

    @Durable().workflow
    async def calling() -> None:
        with step_scope("agent"):
            await asyncio.gather(call_tool(7), call_tool(8), plain())

    async with async_session_factory() as session:
        await aio.AsyncExecutor(session).run(calling)
    with session_factory() as reader:
        assert keys(reader) == ["agent/plain/ask", "agent/tool 7/ask", "agent/tool 8/ask"]


async def test_two_tasks_cannot_use_one_scope(async_session_factory: async_sessionmaker[AsyncSession]) -> None:
    async def call_tool() -> None:
        with step_scope("tool"):
            await aio.run_step("ask", int)

    @Durable().workflow
    async def calling() -> None:
        with step_scope("agent"):
            await asyncio.gather(call_tool(), call_tool())

    async with async_session_factory() as session:
        with pytest.raises(UsageError, match="two tasks or threads use the scope 'tool' in scope 'agent'"):
            await aio.AsyncExecutor(session).run(calling)


def test_scope_outside_a_workflow_does_nothing() -> None:
    with step_scope("agent"):
        assert run_step("ask", int) == 0
