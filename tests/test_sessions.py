"""Sessions as applications make them: what callers and executors take, and what they refuse."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import contextmanager
from typing import Any, Literal
from uuid import UUID

import pytest
from sqlalchemy import Engine, create_engine, event, func, make_url, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from sqla_durable import (
    AsyncExecutor,
    Durable,
    Executor,
    Workflow,
    complete_callback,
    fail_callback,
    heartbeat_callback,
    models,
    signal,
    start_many,
    start_with_signal,
    start_with_update,
    update,
)
from sqla_durable.errors import SessionError
from tests.support.domain import Entry

durable = Durable()


@durable.step
def book(session: Session, cents: int) -> int:
    session.add(Entry(account="book", cents=cents, note=None))
    return cents


@durable.workflow
def pay(cents: int) -> int:
    return book(cents)


@durable.step
async def abook(session: AsyncSession, cents: int) -> int:
    session.add(Entry(account="book", cents=cents, note=None))
    return cents


@durable.workflow
async def apay(cents: int) -> int:
    return await abook(cents)


@contextmanager
def statements_of(engine: Engine) -> Generator[list[str]]:
    """Note the statements that are executed on an engine."""
    executed: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_more: Any) -> None:
        executed.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    yield executed
    event.remove(engine, "before_cursor_execute", note)


# AUTOCOMMIT

TOKEN = f"{UUID(int=7).hex}.{'0' * 48}"

WRITES: dict[str, Callable[[Any, UUID], Any]] = {
    "start": lambda session, _: pay.start(session, 1),
    "start with a key": lambda session, _: pay.options(key="k").start(session, 1),
    "start_many": lambda session, _: start_many(session, [pay.bind(1)]),
    "signal": lambda session, there: signal(session, there, "go"),
    "start_with_signal": lambda session, _: start_with_signal(session, pay.options(key="k").bind(1), "go"),
    "update": lambda session, there: update(session, there, "change"),
    "start_with_update": lambda session, _: start_with_update(
        session, pay.options(key="k").bind(1), "change", reply=int
    ),
    "complete_callback": lambda session, _: complete_callback(session, TOKEN),
    "fail_callback": lambda session, _: fail_callback(session, TOKEN, "no"),
    "heartbeat_callback": lambda session, _: heartbeat_callback(session, TOKEN),
}


def there(engine: Engine) -> UUID:
    """Start a workflow, and let the engine know the schema."""
    with Session(engine) as session:
        workflow_id = pay.start(session, 7).id
        session.commit()
    return workflow_id


def nothing_was_written(engine: Engine) -> bool:
    with Session(engine) as session:
        counts = [session.scalar(select(func.count()).select_from(each)) for each in (Workflow, models.Signal, Entry)]
    return counts == [1, 0, 0]


@pytest.fixture(params=["engine", "options", "transaction"])
def careless(request: pytest.FixtureRequest, engine: Engine) -> Generator[Session]:
    """A session in AUTOCOMMIT, in one of the ways to get there."""
    way: Literal["engine", "options", "transaction"] = request.param
    other = create_engine(engine.url, isolation_level="AUTOCOMMIT")
    options = engine.execution_options(isolation_level="AUTOCOMMIT")
    with Session({"engine": other, "options": options, "transaction": engine}[way]) as session:
        if way == "transaction":
            session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        yield session
    other.dispose()


@pytest.mark.parametrize("write", WRITES)
def test_a_session_in_autocommit_is_refused_before_anything_is_written(
    engine: Engine, careless: Session, write: str
) -> None:
    workflow_id = there(engine)
    pay.handle(careless, workflow_id)  # which only reads
    with pytest.raises(SessionError, match="is in AUTOCOMMIT"):
        WRITES[write](careless, workflow_id)
    careless.rollback()
    assert nothing_was_written(engine)


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("joined", [False, True])
def test_an_executor_refuses_a_session_in_autocommit(
    engine: Engine, careless: Session, joined: bool, existing: bool
) -> None:
    workflow_id = there(engine)
    executor = Executor.joined(careless) if joined else Executor(careless)
    with pytest.raises(SessionError, match="is in AUTOCOMMIT"):
        executor.execute(pay, workflow_id) if existing else executor.run(pay, 1)
    assert nothing_was_written(engine)


@pytest.fixture
async def async_careless(engine: Engine, async_driver: str) -> AsyncGenerator[AsyncSession]:
    url = make_url(engine.url).set(drivername=f"postgresql+{async_driver}")
    other: AsyncEngine = create_async_engine(url, isolation_level="AUTOCOMMIT")
    async with AsyncSession(other) as session:
        yield session
    await other.dispose()


@pytest.mark.parametrize("async_driver", ["psycopg", "asyncpg"], indirect=True)
async def test_an_async_session_in_autocommit_is_refused(engine: Engine, async_careless: AsyncSession) -> None:
    workflow_id = there(engine)
    for write in WRITES.values():
        with pytest.raises(SessionError, match="is in AUTOCOMMIT"):
            await write(async_careless, workflow_id)
    for executor in (AsyncExecutor(async_careless), AsyncExecutor.joined(async_careless)):
        with pytest.raises(SessionError, match="is in AUTOCOMMIT"):
            await executor.run(apay, 1)
    assert nothing_was_written(engine)
