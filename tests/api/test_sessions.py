"""Sessions as applications make them: what callers and executors take, and what they refuse."""

# The sessions here are of classes of the application, which the types of sessionmakers do not let through.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal
from uuid import UUID

import pytest
from sqlalchemy import Delete, Engine, Insert, Update, create_engine, func, make_url, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Mapper, Session, sessionmaker

import sqla_durable
import sqla_durable.asyncio as aio
from sqla_durable import (
    Durable,
    Executor,
    Worker,
    Workflow,
    manage,
    models,
    running_steps,
    send_signal,
    send_update,
    start_many,
    start_with_signal,
)
from sqla_durable.definitions.database_errors import sqlstate
from sqla_durable.errors import DatabaseUnavailableError, KeyNotVisibleError, SessionError
from tests.acceptance.shells import PATIENCE, POLL
from tests.api.paying import apay, durable, entries, pay
from tests.store import races
from tests.support.domain import Entry

without_async = Durable()


@without_async.workflow
def greet(number: int) -> int:
    return number


# AUTOCOMMIT

TOKEN = f"{UUID(int=7).hex}.{'0' * 48}"


def writes(namespace: Any) -> dict[str, Callable[[Any, UUID], Any]]:
    """Return what writes in the caller's transaction, as one of the namespaces has it."""
    bound = pay.options(key="k").bind(1)
    return {
        "start": lambda session, _: pay.start(session, 1),
        "start with a key": lambda session, _: pay.options(key="k").start(session, 1),
        "start_many": lambda session, _: namespace.start_many(session, [pay.bind(1)]),
        "send_signal": lambda session, there: namespace.send_signal(session, there, "go"),
        "start_with_signal": lambda session, _: namespace.start_with_signal(session, bound, "go"),
        "send_update": lambda session, there: namespace.send_update(session, there, "change"),
        "start_with_update": lambda session, _: namespace.start_with_update(session, bound, "change", reply=int),
        "complete_callback": lambda session, _: namespace.complete_callback(session, TOKEN),
        "fail_callback": lambda session, _: namespace.fail_callback(session, TOKEN, "no"),
        "heartbeat_callback": lambda session, _: namespace.heartbeat_callback(session, TOKEN),
    }


WRITES, ASYNC_WRITES = writes(sqla_durable), writes(aio)


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


def test_what_only_reads_takes_a_session_in_autocommit(engine: Engine, careless: Session) -> None:
    assert running_steps(careless, there(engine)) == []


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
    for write in ASYNC_WRITES.values():
        with pytest.raises(SessionError, match="is in AUTOCOMMIT"):
            await write(async_careless, workflow_id)
    for executor in (aio.AsyncExecutor(async_careless), aio.AsyncExecutor.joined(async_careless)):
        with pytest.raises(SessionError, match="is in AUTOCOMMIT"):
            await executor.run(apay, 1)
    assert await aio.running_steps(async_careless, workflow_id) == []
    assert nothing_was_written(engine)


# Sessions that begin nothing by themselves


@pytest.mark.parametrize("async_driver", ["psycopg", "asyncpg"], indirect=True)
async def test_sessions_without_autobegin_serve_workers_executors_and_callers(
    engine: Engine, async_engine: AsyncEngine
) -> None:
    maker, async_maker = sessionmaker(engine, autobegin=False), async_sessionmaker(async_engine, autobegin=False)
    with maker.begin() as session:
        first = pay.start(session, 1).id
    async with async_maker.begin() as async_session:
        second = (await apay.options(key="k").start(async_session, 2)).id
    async with Worker(durable, sessionmaker=maker, async_sessionmaker=async_maker, poll_interval=POLL):
        assert await pay.handle(async_maker, first).result(timeout=PATIENCE) == 1
        assert await apay.handle(async_maker, second).result(timeout=PATIENCE) == 2
    async with async_maker() as async_session:
        assert await aio.AsyncExecutor(async_session).run(apay, 3) == 3
    with Session(engine) as session:
        assert sorted(session.scalars(select(Entry.cents))) == [1, 2, 3]


def test_a_session_without_autobegin_serves_sync_code(engine: Engine) -> None:
    maker = sessionmaker(engine, autobegin=False)
    with maker.begin() as session:
        first = greet.start(session, 1).id
    with Worker(without_async, sessionmaker=maker, poll_interval=POLL):
        assert greet.handle(maker, first).result(timeout=PATIENCE) == 1
    with maker() as session:
        assert Executor(session).run(pay, 2) == 2
    with maker.begin() as session:
        assert Executor.joined(session).run(pay, 3) == 3


# Sessions that choose an engine for each statement


class Choosing(Session):
    """Sends reads elsewhere, as SQLAlchemy's own documentation shows it: there, nobody can connect."""

    primary: Engine
    elsewhere = create_engine("postgresql+psycopg://nobody@/nowhere?host=/nonexistent")

    def get_bind(self, mapper: Any = None, clause: Any = None) -> Engine:  # type: ignore[override]
        assert mapper is None or isinstance(mapper, Mapper)
        if mapper is not None and issubclass(mapper.class_, (models.Base, Entry)):
            return self.primary if self._flushing or isinstance(clause, (Update, Delete, Insert)) else self.elsewhere
        raise AssertionError(f"no engine is given for {clause}")


@pytest.fixture
def choosing(engine: Engine) -> type[Choosing]:
    return type("Chosen", (Choosing,), {"primary": engine})


def test_each_statement_of_the_engine_is_known_as_a_write(engine: Engine, choosing: type[Choosing]) -> None:
    workflow_id = there(engine)
    with Session(engine) as other:
        assert manage.cancel(other, workflow_id)
        other.commit()
    maker: Any = sessionmaker(class_=choosing)
    verbs: list[Callable[[Session], object]] = [
        lambda session: manage.resume(session, workflow_id),
        lambda session: send_signal(session, workflow_id, "go", key="k"),
        lambda session: send_update(session, workflow_id, "change", key="k"),
        lambda session: start_many(session, [pay.options(key="m").bind(1), pay.bind(2)]),
        lambda session: start_with_signal(session, pay.options(key="s").bind(3), "go"),
        lambda session: pay.options(key="k").start(session, 4),
        lambda session: pay.start(session, 5),
        lambda session: Executor.joined(session).run(pay, 6),
        lambda session: manage.fork(session, workflow_id, key="f"),
        lambda session: manage.cancel(session, workflow_id),
        lambda session: manage.delete(session, workflow_id),
    ]
    for verb in verbs:
        with maker() as session:
            verb(session)
            session.commit()
    with maker() as session:
        assert Executor(session).run(pay, 7) == 7
        assert Executor(session).run_until_waiting(pay, 7).output == 7
        assert manage.retry(session, []) == []
        session.rollback()
    with Worker(without_async, sessionmaker=maker, poll_interval=POLL), maker.begin() as session:
        started = greet.start(session, 8)
        session.flush()
        session.commit()
        assert greet.handle(maker, started).result(timeout=PATIENCE) == 8


# Servers that take no writes


async def test_writing_on_a_standby_is_a_clear_error(engine: Engine, async_engine: AsyncEngine) -> None:
    workflow_id = there(engine)
    replica = create_engine(engine.url, connect_args={"options": "-c default_transaction_read_only=on"})
    async_replica = async_engine.execution_options(postgresql_readonly=True)
    for name, write in WRITES.items():
        if name in ("start", "complete_callback", "fail_callback", "heartbeat_callback"):
            continue  # inserted with the caller's own flush; no such token
        with (
            Session(replica) as session,
            pytest.raises(DatabaseUnavailableError, match="its server is a standby"),
        ):
            write(session, workflow_id)
        async with AsyncSession(async_replica) as async_session:
            with pytest.raises(DatabaseUnavailableError, match="its server is a standby"):
                await ASYNC_WRITES[name](async_session, workflow_id)
    for verb in (manage.cancel, manage.resume, manage.retry, manage.delete):
        with Session(replica) as session, pytest.raises(DatabaseUnavailableError, match="its server is a standby"):
            verb(session, workflow_id)
    assert nothing_was_written(engine)
    replica.dispose()


# Drivers of callers


@pytest.mark.parametrize("driver", ["psycopg2", "pg8000"])
def test_callers_may_have_another_driver_than_workers(engine: Engine, driver: str) -> None:
    pytest.importorskip(driver)
    socket = make_url(engine.url).query["host"]
    port = engine.url.port or 5432
    url = make_url(engine.url).set(drivername=f"postgresql+{driver}")
    connect: dict[str, Any] = {}
    if driver == "pg8000":
        url, connect = url.set(query={}), {"unix_sock": f"{socket}/.s.PGSQL.{port}"}
    other = create_engine(url, connect_args=connect)
    with Session(other) as session:
        workflow = pay.options(key="k").start(session, 1)
        assert pay.options(key="k").start(session, 2) is workflow
        send_signal(session, workflow, "go")
        send_update(session, workflow, "change")
        started = start_many(session, [pay.bind(2)])
        session.commit()
        assert manage.cancel(session, started) == started
        session.commit()
        with pytest.raises(DBAPIError) as caught:
            session.execute(text("SELECT 1 / 0"))
        assert sqlstate(caught.value) == "22012"
        session.rollback()
        assert Executor(session).run(pay, 3) == 3
    assert [each.cents for each in entries(engine)] == [3]
    other.dispose()


# Two starts under one key in transactions that keep their snapshot


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_the_second_of_two_starts_under_a_key_fails_and_succeeds_in_a_new_transaction(
    engine: Engine, level: Any
) -> None:
    stricter = engine.execution_options(isolation_level=level)
    with Session(stricter) as first, Session(stricter) as second, ThreadPoolExecutor(1) as thread:
        second.add(Entry(account="second", cents=1, note=None))
        second.flush()
        pid = second.scalars(select(func.pg_backend_pid())).one()
        mine = pay.options(key="k").start(first, 1)
        waiting = thread.submit(lambda: pay.options(key="k").start(second, 2))
        races.wait_until_blocked(engine, pid)
        first.commit()
        with pytest.raises(KeyNotVisibleError) as caught:
            waiting.result(timeout=30)
        assert caught.value.is_newer
        assert second.scalars(select(Entry.cents)).all() == [1]  # the transaction is usable
        second.rollback()
        assert pay.options(key="k").start(second, 2).id == mine.id
