"""Session classes of the application, such as SQLModel's, and scoped sessions."""

# The sessions here are of classes of the application, which the types of sessionmakers do not let through.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import Session, scoped_session, sessionmaker

import sqla_durable.asyncio as aio
from sqla_durable import Durable, Executor, Worker, get_event, read_stream, start_many
from sqla_durable.errors import EventNotSetError, SessionError
from sqla_durable.tools.cli.target import connect
from tests.acceptance.shells import PATIENCE
from tests.api.paying import apay, entries, pay
from tests.support.domain import Entry

# Session classes


class RichSession(Session):
    """Like SQLModel's: with a method that SQLAlchemy's class does not have."""

    def exec(self, cents: int) -> None:
        self.add(Entry(account="rich", cents=cents, note=None))


class AsyncRichSession(AsyncSession):
    """The same for async code."""

    async def exec(self, cents: int) -> None:
        self.add(Entry(account="rich", cents=cents, note=None))


rich = Durable()
SessionDep = Annotated[RichSession, "what a web framework depends on"]


@rich.step
def book_richly(session: SessionDep, cents: int) -> int:
    session.exec(cents)
    return cents


@rich.workflow
def pay_richly(cents: int) -> int:
    booking: Any = book_richly  # type checkers know the methods of SQLAlchemy's classes only
    return int(booking(cents))


async_rich = Durable()


@async_rich.step
async def abook_richly(session: AsyncRichSession, cents: int) -> int:
    await session.exec(cents)
    return cents


@async_rich.workflow
async def apay_richly(cents: int) -> int:
    booking: Any = abook_richly
    return int(await booking(cents))


async def test_a_worker_has_sessions_of_the_class_that_its_steps_take(
    engine: Engine, async_engine: AsyncEngine
) -> None:
    with pytest.raises(SessionError, match=r"RichSession, and .* give it sessionmaker\(engine, class_=RichSession\)"):
        Worker(rich, sessionmaker=sessionmaker(engine))
    with pytest.raises(SessionError, match=r"give it async_sessionmaker\(engine, class_=AsyncRichSession\)"):
        Worker(async_rich, async_sessionmaker=async_sessionmaker(async_engine))
    maker: Any = sessionmaker(engine, class_=RichSession)
    async_maker: Any = async_sessionmaker(async_engine, class_=AsyncRichSession)
    with maker.begin() as session:
        ids = pay_richly.start(session, 1).id, apay_richly.start(session, 2).id
    async with Worker(rich, sessionmaker=maker), Worker(async_rich, async_sessionmaker=async_maker):
        assert await pay_richly.handle(async_maker, ids[0]).result(timeout=PATIENCE) == 1
        assert await apay_richly.handle(async_maker, ids[1]).result(timeout=PATIENCE) == 2


def test_an_executor_needs_a_session_of_the_class_that_its_steps_take(engine: Engine) -> None:
    for make in (Executor, Executor.joined):
        with Session(engine) as session, pytest.raises(SessionError, match=r"takes a .*RichSession, and its session"):
            make(session).run(pay_richly, 1)
        with RichSession(engine) as session:
            assert make(session).run(pay_richly, 1) == 1
            session.commit()
    assert [each.cents for each in entries(engine)] == [1, 1]


async def test_an_async_executor_needs_a_session_of_the_class_that_its_steps_take(
    engine: Engine, async_engine: AsyncEngine
) -> None:
    async with AsyncSession(async_engine) as async_session:
        with pytest.raises(SessionError, match=r"takes a .*AsyncRichSession, and its session"):
            await aio.AsyncExecutor(async_session).run(apay_richly, 1)
    async with AsyncRichSession(async_engine) as async_session:
        assert await aio.AsyncExecutor(async_session).run(apay_richly, 1) == 1
    assert [each.cents for each in entries(engine)] == [1]


def test_the_command_line_makes_sessions_of_the_class_that_steps_take(database_url: str) -> None:
    for durable_object, name in ((rich, "sync"), (async_rich, "asynchronous")):
        made = connect(durable_object, make_url(database_url))
        assert made.sync is not None
        assert issubclass(made.sync.class_, RichSession) is (name == "sync")
        assert made.asynchronous is not None
        assert issubclass(made.asynchronous.class_, AsyncRichSession) is (name == "asynchronous")
        Worker(durable_object, sessionmaker=made.sync, async_sessionmaker=made.asynchronous)


# Scoped sessions, as Flask-SQLAlchemy's `db.session`


def test_a_scoped_session_is_called_for_its_session(engine: Engine) -> None:
    db_session: Any = scoped_session(sessionmaker(engine))
    for refused in (lambda: pay.start(db_session, 1), lambda: Executor(db_session)):
        with pytest.raises(SessionError, match=r"write db.session\(\) for db.session"):
            refused()
    workflow = pay.start(db_session(), 1)
    db_session.commit()
    assert Executor(db_session()).execute(pay, workflow) == 1
    assert pay.handle(db_session, workflow).result() == 1
    with pytest.raises(EventNotSetError):
        get_event(db_session, workflow, "progress")
    db_session.remove()


async def test_an_async_scoped_session_is_called_for_its_session(async_engine: AsyncEngine) -> None:
    db_session: Any = async_scoped_session(async_sessionmaker(async_engine), scopefunc=lambda: 1)
    for refused in (lambda: start_many(db_session, []), lambda: aio.AsyncExecutor(db_session)):
        with pytest.raises(SessionError, match=r"write db.session\(\) for db.session"):
            refused()
    await apay.start(db_session(), 1)
    await db_session.commit()
    await db_session.remove()


@pytest.mark.parametrize("poll", [pay.handle, partial(get_event, key="progress"), partial(read_stream, name="lines")])
def test_what_leads_to_no_session_is_refused_by_what_polls(engine: Engine, poll: Callable[..., object]) -> None:
    for source in (engine, lambda: engine):
        with pytest.raises(SessionError, match="takes a Session, an AsyncSession or a sessionmaker first"):
            poll(source, UUID(int=7))
