"""Sessions and sessionmakers that are not the right ones, or lead to the wrong database."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import create_engine, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from uuid_utils.compat import uuid7

from sqla_durable import Durable, Executor, Worker, Workflow, WorkflowStatus, get_event, models
from sqla_durable.asyncio import AsyncExecutor
from sqla_durable.errors import ArgumentError, SessionError, UsageError
from tests.acceptance.bad_input import Sessions, bare, durable, ship
from tests.support.databases import Databases
from tests.support.domain import Base, Entry, Order

pytestmark = pytest.mark.few_shells


def test_unbound_session_is_refused() -> None:
    with pytest.raises(SessionError, match="has no engine for the durable tables: bind the sessionmaker"):
        ship.start(Session(), 1)
    with pytest.raises(SessionError, match="has no engine"):
        Executor(Session()).run(ship, 1)
    with pytest.raises(SessionError, match="has no engine"):
        ship.handle(sessionmaker(), uuid7())


def test_session_on_another_database_product_is_refused() -> None:
    engine = create_engine("sqlite://")
    with Session(engine) as session, pytest.raises(SessionError, match="is bound to sqlite: durable workflows need Po"):
        ship.start(session, 1)
    engine.dispose()


@pytest.mark.parametrize(
    ("given", "cure"),
    [
        (None, r"workflow.start\(session, 1\)"),
        ("session", r"workflow.start\(session, 1\)"),
        (7, r"workflow.start\(session, 1\)"),
        (sessionmaker(), r"open one by `with sessionmaker\(\)"),
        (scoped_session(sessionmaker()), r"write db.session\(\)"),
        (SimpleNamespace(session=scoped_session(sessionmaker())), r"write db.session\(\)"),
        (create_engine("sqlite://"), r"make one: Session\(engine\)"),
        (create_async_engine("postgresql+asyncpg://"), r"make one: AsyncSession\("),
    ],
)
def test_something_else_in_the_place_of_the_session_is_refused(given: Any, cure: str) -> None:
    with pytest.raises(SessionError, match=f"the caller's Session or AsyncSession comes first, got .*{cure}"):
        ship.start(given, 1)


def test_executor_refuses_the_other_kind_of_session() -> None:
    with pytest.raises(SessionError, match="Use AsyncExecutor for an AsyncSession"):
        Executor(AsyncSession())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(SessionError, match="Use Executor for a Session"):
        AsyncExecutor(Session())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_sessionmaker_in_place_of_a_session_is_refused_with_how_to_open_one() -> None:
    with pytest.raises(SessionError, match=r"open one by `with sessionmaker\(\)"):
        Executor(sessionmaker())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(SessionError, match=r"open one by `async with async_sessionmaker\(\)"):
        AsyncExecutor(async_sessionmaker())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_sessionmaker_of_the_other_kind_is_refused_with_the_argument_it_belongs_to() -> None:
    with pytest.raises(SessionError, match="pass it as async_sessionmaker="):
        Worker(Durable(), sessionmaker=async_sessionmaker())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(SessionError, match=r"such as sessionmaker\(db.engine\)"):
        Worker(Durable(), sessionmaker=scoped_session(sessionmaker()))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(SessionError, match="pass it as sessionmaker="):
        Worker(Durable(), async_sessionmaker=sessionmaker())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("given", [ship, "01a1ff9e-3ac3-73b6-a389-efb2572e1900", None, 7])
def test_something_else_in_the_place_of_a_workflow_is_refused(given: Any) -> None:
    with pytest.raises(ArgumentError, match="is no workflow: give a Workflow record, or its id as a UUID"):
        get_event(sessionmaker(create_engine("postgresql+psycopg://")), given, "status")


def test_step_over_two_databases_is_refused_and_writes_nothing(session_factory: Sessions, databases: Databases) -> None:
    two = Durable()

    @two.step
    def both(session: Session) -> None:
        session.add(Entry(account="here", cents=1, note=None))
        session.flush()
        session.connection(bind_arguments={"mapper": Workflow})

    @two.workflow
    def span() -> None:
        both()

    with databases.migrated("durable") as other_url:
        other = create_engine(other_url)
        first = session_factory.kw["bind"]
        split = sessionmaker(binds={models.Base: other, Base: first})
        with split() as session, pytest.raises(UsageError, match="uses two databases in one session"):
            Executor(session).run(span)
        with sessionmaker(other)() as session:
            assert session.scalars(select(Workflow.status)).all() == [WorkflowStatus.FAILED]
        other.dispose()
    with session_factory() as session:
        assert session.scalars(select(Entry)).all() == []


def test_durable_tables_found_through_binds(session_factory: Sessions) -> None:
    engine = session_factory.kw["bind"]
    with sessionmaker(binds={models.Base: engine, Base: engine}).begin() as session:
        order = Order(customer="Ada", total_cents=1)
        session.add(order)
        order.workflow = ship.start(session, 7)
    with session_factory() as session:
        assert session.scalars(select(Order)).one().workflow is not None


def test_two_sessionmakers_to_two_databases_are_refused(session_factory: Sessions, databases: Databases) -> None:
    with databases.migrated("durable") as other_url:

        async def serve() -> None:
            engine = create_async_engine(other_url)
            try:
                worker = Worker(bare, sessionmaker=session_factory, async_sessionmaker=async_sessionmaker(engine))
                with pytest.raises(SessionError, match="lead to different databases or schemas"):
                    await worker.serve()
            finally:
                await engine.dispose()

        asyncio.run(serve())


def test_worker_without_a_database_is_refused() -> None:
    with pytest.raises(SessionError, match="a worker needs a sessionmaker or an async_sessionmaker"):
        Worker(Durable())


def test_worker_without_the_sessions_that_its_steps_take_is_refused(database_url: str) -> None:
    engine = create_async_engine(database_url)
    with pytest.raises(SessionError, match="step 'book' takes a Session: give the worker a sessionmaker"):
        Worker(durable, async_sessionmaker=async_sessionmaker(engine))
