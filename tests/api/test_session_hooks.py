"""Hooks of the application that raise after a commit: they undo nothing, and whose commit it was gets the error."""

# The sessions here are of classes of the application, which the types of sessionmakers do not let through.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
from sqlalchemy import Engine, event, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

import sqla_durable.asyncio as aio
from sqla_durable import Executor, Worker, Workflow
from tests.acceptance.shells import PATIENCE, POLL
from tests.api.paying import apay, durable, pay
from tests.support.domain import Entry


class HookError(Exception):
    """Raised by the application's hook."""


@pytest.fixture
def after_commit() -> Generator[list[bool]]:
    """Let a listener of the application's raise after each commit; note whether it was called."""
    called: list[bool] = []

    def raise_(_session: Session) -> None:
        called.append(True)
        raise HookError("the mail server is away")

    event.listen(Hooking, "after_commit", raise_)
    yield called
    event.remove(Hooking, "after_commit", raise_)


class Hooking(Session):
    """The session class of an application with hooks."""


def outcome_of(engine: Engine) -> tuple[str, int, list[int]]:
    with Session(engine) as session:
        record = session.scalars(select(Workflow)).one()
        return record.status.value, record.attempt, list(session.scalars(select(Entry.cents)))


DONE = ("succeeded", 1, [5])


@pytest.mark.parametrize("joined", [False, True])
def test_a_hook_that_raises_after_the_commit_undoes_nothing(
    engine: Engine, after_commit: list[bool], joined: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with Hooking(engine) as session:
        executor = Executor.joined(session) if joined else Executor(session)
        assert executor.run(pay.options(key="k"), 5) == 5
        assert executor.run(pay.options(key="k"), 5) == 5
        assert after_commit
        assert "a listener of after_commit raised HookError('the mail server is away')" in caplog.text
        if joined:
            with pytest.raises(HookError):  # the caller's own commit is the caller's
                session.commit()
            session.close()
    assert outcome_of(engine) == DONE


@pytest.mark.parametrize("async_driver", ["psycopg", "asyncpg"], indirect=True)
@pytest.mark.parametrize("joined", [False, True])
async def test_an_async_hook_that_raises_after_the_commit_undoes_nothing(
    engine: Engine, async_engine: AsyncEngine, after_commit: list[bool], joined: bool
) -> None:
    async with AsyncSession(async_engine, sync_session_class=Hooking) as session:
        executor = aio.AsyncExecutor.joined(session) if joined else aio.AsyncExecutor(session)
        assert await executor.run(apay.options(key="k"), 5) == 5
        assert after_commit
        if joined:
            with pytest.raises(HookError):
                await session.commit()
            await session.close()
    assert outcome_of(engine) == DONE


def test_a_hook_that_ends_the_process_leaves_a_session_that_can_be_used(engine: Engine) -> None:
    def stop(_session: Session) -> None:
        raise KeyboardInterrupt

    event.listen(Hooking, "after_commit", stop)
    with Hooking(engine) as session:
        with pytest.raises(KeyboardInterrupt):
            Executor(session).run(pay, 5)
        event.remove(Hooking, "after_commit", stop)
        assert session.scalars(select(Workflow.status)).one() == "running"


async def test_a_worker_whose_hooks_raise_after_the_commit_goes_on(
    engine: Engine, async_engine: AsyncEngine, after_commit: list[bool]
) -> None:
    makers: tuple[Any, Any] = (
        sessionmaker(engine, class_=Hooking),
        async_sessionmaker(async_engine, sync_session_class=Hooking),
    )
    with Session(engine) as session:
        ids = pay.start(session, 5).id, apay.start(session, 5).id
        session.commit()
    async with Worker(durable, sessionmaker=makers[0], async_sessionmaker=makers[1], poll_interval=POLL):
        assert await pay.handle(makers[1], ids[0]).result(timeout=PATIENCE) == 5
        assert await apay.handle(makers[1], ids[1]).result(timeout=PATIENCE) == 5
    with Session(engine) as session:
        assert session.scalars(select(Entry.cents)).all() == [5, 5]
    assert len(after_commit) == 2
