"""Isolation levels of transactional steps, and engines whose default is another one."""

from __future__ import annotations

import pytest
from sqlalchemy import create_engine, func, select, text
from sqlalchemy.orm import Session

from sqla_durable import Durable, Executor, Workflow, WorkflowStatus, start_many
from sqla_durable.definitions.registry import ISOLATION_LEVELS
from sqla_durable.errors import DefinitionError, SessionError
from tests.acceptance.application import Application
from tests.acceptance.shells import Shell
from tests.support.domain import Entry

OWN_TRANSACTIONS = ("executor", "worker", "async-executor", "async-worker", "asyncpg-worker")
WORKERS = ("worker", "async-worker", "asyncpg-worker", "mixed-worker")


def _level(session: Session) -> str:
    return str(session.execute(text("SHOW transaction_isolation")).scalar_one()).upper()


@pytest.mark.shells(OWN_TRANSACTIONS)
def test_each_step_has_the_isolation_level_that_it_asks_for(shell: Shell, app: Application) -> None:
    steps = [
        app.transactional(_level, name=f"level {level}", isolation_level=level) for level in (*ISOLATION_LEVELS, None)
    ]

    async def read_levels() -> list[str]:
        return [await step() for step in steps]

    assert shell.run(app.workflow(read_levels)) == [*ISOLATION_LEVELS, "READ COMMITTED"]


@pytest.mark.shells(WORKERS)
def test_write_skew_is_tried_again_until_it_is_right(shell: Shell, app: Application) -> None:
    """Each of 20 workflows books one less than is there; without SERIALIZABLE two of them see the same sum."""

    def book(session: Session) -> int:
        there = session.scalar(select(func.count()).select_from(Entry).where(Entry.account == "skew")) or 0
        session.add(Entry(account="skew", cents=there))
        return there

    step = app.transactional(book, isolation_level="SERIALIZABLE")

    async def booking() -> int:
        return await step()

    workflow = app.workflow(booking)
    with shell.sessionmaker.begin() as session:
        ids = start_many(session, [workflow.bind() for _ in range(20)])
    with shell.background():
        assert sorted(shell.result(workflow, each) for each in ids) == list(range(20))
    with shell.sessionmaker() as session:
        assert session.scalars(select(Entry.cents).order_by(Entry.cents)).all() == list(range(20))


@pytest.mark.shells(("joined", "async-joined"))
def test_a_joined_step_refuses_a_callers_transaction_that_is_weaker(shell: Shell, app: Application) -> None:
    step = app.transactional(_level, isolation_level="SERIALIZABLE")

    async def read_levels() -> str:
        return await step()

    with pytest.raises(SessionError, match=r"asks for SERIALIZABLE and .* already in a READ COMMITTED transaction"):
        shell.run(app.workflow(read_levels))


def test_a_joined_step_takes_a_callers_transaction_that_is_strong_enough(database_url: str) -> None:
    durable = Durable()
    level = durable.step(_level, name="level", isolation_level="REPEATABLE READ")

    @durable.workflow
    def read_levels() -> str:
        return level()

    engine = create_engine(database_url, isolation_level="SERIALIZABLE")
    with Session(engine) as session:
        assert Executor.joined(session).run(read_levels) == "SERIALIZABLE"
    engine.dispose()


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.shells(OWN_TRANSACTIONS)
def test_an_engine_with_another_default_works(shell: Shell, app: Application, level: str) -> None:
    def book(session: Session, number: int) -> str:
        session.add(Entry(account="engine", cents=number))
        return _level(session)

    step = app.transactional(book)
    plain = app.plain(lambda: 1, name="plain")

    async def booking() -> list[str]:
        levels = [await step(number) for number in range(3)]
        await plain()
        return levels

    shell.set_isolation(level)
    assert shell.run(app.workflow(booking)) == [level] * 3
    with shell.sessionmaker() as session:
        assert session.scalars(select(Entry.cents).order_by(Entry.cents)).all() == [0, 1, 2]
        assert session.scalars(select(Workflow.status)).all() == [WorkflowStatus.SUCCEEDED]


def test_an_isolation_level_that_cannot_be_had_is_refused_where_it_is_written() -> None:
    durable = Durable()
    with pytest.raises(DefinitionError, match="'SNAPSHOT': it can have 'READ COMMITTED'"):
        durable.step(_level, name="one", isolation_level="SNAPSHOT")  # type: ignore[call-overload]  # pyright: ignore
    with pytest.raises(DefinitionError, match="takes no session"):
        durable.step(lambda: 1, name="two", isolation_level="SERIALIZABLE")
