"""Waiting for the outcome of a workflow."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from sqlalchemy import Engine, create_engine, event, select
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

import sqla_durable.asyncio as aio
from sqla_durable import Durable, Executor, Workflow, get_event
from sqla_durable.errors import ResultTimeoutError

Sessions = sessionmaker[Session]
durable = Durable()


@durable.workflow
def double(number: int) -> int:
    return number * 2


def test_handle_waits_until_another_connection_commits_the_outcome(engine: Engine, session_factory: Sessions) -> None:
    polled = threading.Event()

    @event.listens_for(engine, "after_cursor_execute")
    def _polled(*_: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            polled.set()

    with session_factory.begin() as session:
        workflow_id = double.start(session, 21).id
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(double.handle(session_factory, workflow_id).result)
        assert polled.wait(30)
        assert not waiting.done()
        with session_factory() as session:
            Executor(session).execute(double, workflow_id)
        assert waiting.result(timeout=30) == 42


def test_handle_does_not_use_the_session_that_it_is_made_of(session_factory: Sessions) -> None:
    with session_factory() as session:
        record = double.start(session, 21)
        session.commit()
        handle = double.handle(session, record.id)
        session.rollback()
        with pytest.raises(ResultTimeoutError):
            handle.result(timeout=timedelta(0))
        assert not session.in_transaction()


def test_handle_holds_no_connection_between_polls(engine: Engine, session_factory: Sessions) -> None:
    with session_factory.begin() as session:
        workflow_id = double.start(session, 21).id
    with pytest.raises(ResultTimeoutError):
        double.handle(session_factory, workflow_id).result(timeout=timedelta(milliseconds=50))
    assert engine.pool.status().find("Current Checked out connections: 0") >= 0


async def test_async_handle_times_out_and_gives_the_result_later(
    async_session_factory: async_sessionmaker[AsyncSession], session_factory: Sessions
) -> None:
    async with async_session_factory.begin() as session:
        workflow_id = (await double.start(session, 21)).id
    handle = double.handle(async_session_factory, workflow_id)
    with pytest.raises(ResultTimeoutError) as caught:
        await handle.result(timeout=timedelta(milliseconds=10))
    assert caught.value.workflow_id == workflow_id
    async with async_session_factory() as session:
        await session.run_sync(lambda inner: Executor(inner).execute(double, workflow_id))
    assert await handle.result() == await handle == 42


def test_handle_shows_what_it_waits_for(session_factory: Sessions) -> None:
    with session_factory.begin() as session:
        record = double.start(session, 1)
        session.flush()
        assert repr(double.handle(session, record)) == f"<Handle of workflow 'double' {record.id}>"
        assert session.scalars(select(Workflow.id)).all() == [record.id]


async def test_pool_that_is_used_up_is_explained(engine: Engine) -> None:
    small = create_engine(engine.url, pool_size=1, max_overflow=0, pool_timeout=0.01)
    with Session(small) as session:
        workflow_id = double.start(session, 1).id
        session.commit()
        session.connection()
        for poll in (double.handle(session, workflow_id).result, lambda: get_event(session, workflow_id, "progress")):
            with pytest.raises(PoolTimeoutError) as caught:
                await asyncio.to_thread(poll)
            assert "close the session before, or raise pool_size" in caught.value.__notes__[0]
    small.dispose()
    async_small = create_async_engine(engine.url, pool_size=1, max_overflow=0, pool_timeout=0.01)
    async with AsyncSession(async_small) as async_session:
        await async_session.connection()
        for wait in (
            double.handle(async_session, workflow_id).result(),
            aio.get_event(async_session, workflow_id, "progress"),
        ):
            with pytest.raises(PoolTimeoutError) as caught:
                await wait
            assert "close the session before, or raise pool_size" in caught.value.__notes__[0]
    await async_small.dispose()
