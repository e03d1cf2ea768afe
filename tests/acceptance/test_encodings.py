"""Databases and clients that are not UTF-8."""

from __future__ import annotations

from collections.abc import Generator

import pytest
from sqlalchemy import Engine, NullPool, create_engine, make_url, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Durable, Executor, Worker, Workflow, WorkflowFunction, WorkflowStatus, models
from sqla_durable.asyncio import AsyncExecutor
from sqla_durable.errors import EncodingError
from tests.acceptance.shells import PATIENCE, POLL
from tests.support import domain
from tests.support.databases import migrate
from tests.support.domain import Entry

durable = Durable()


@durable.step
def fail(text: str) -> str:
    raise ValueError(f"no {text}")


@durable.step
def book(session: Session, text: str) -> str:
    session.add(Entry(account="book", cents=1, note=None))
    session.flush()
    raise LookupError(f"no {text}")


@durable.step
def echo(text: str) -> str:
    return text


@durable.workflow
def plain(text: str) -> str:
    return fail(text.replace("E", "\u20ac"))


@durable.workflow
def transactional(text: str) -> str:
    return book(text.replace("E", "\u20ac"))


@durable.workflow
def body(text: str) -> str:
    raise ValueError("no " + text.replace("E", "\u20ac"))


@durable.workflow
def echo_all(text: str) -> str:
    return echo(text)


@durable.workflow
def euro() -> str:
    return echo("\u20ac")


@pytest.fixture(scope="module", params=["LATIN1", "SQL_ASCII"])
def encoded_database(request: pytest.FixtureRequest, server_url: str, worker_id: str) -> Generator[Engine]:
    """A database in another encoding than UTF-8, and clients that ask for UTF-8."""
    name = f"encoded_{request.param.lower()}_{worker_id}"
    with create_engine(server_url, isolation_level="AUTOCOMMIT", poolclass=NullPool).connect() as server:
        server.execute(text(f"DROP DATABASE IF EXISTS {name}"))
        server.execute(text(f"CREATE DATABASE {name} ENCODING '{request.param}' LOCALE 'C' TEMPLATE template0"))
        url = make_url(server_url).set(database=name)
        engine = create_engine(url, connect_args={"client_encoding": "utf8"}, poolclass=NullPool)
        with engine.begin() as connection:
            migrate(connection, "durable")
            domain.Base.metadata.create_all(connection)
        yield engine
        server.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
def encoded(encoded_database: Engine) -> Generator[Engine]:
    """The same, empty."""
    yield encoded_database
    tables = {str(each) for base in (models.metadata, domain.Base.metadata) for each in base.sorted_tables}
    with encoded_database.begin() as connection:
        connection.execute(text(f"TRUNCATE {', '.join(sorted(tables))} RESTART IDENTITY CASCADE"))


# behaviour: V5
@pytest.mark.parametrize("way", ["worker", "executor", "joined"])
@pytest.mark.parametrize("workflow", [plain, transactional, body])
def test_an_error_whose_text_the_database_cannot_store_stays_visible(
    encoded: Engine, workflow: WorkflowFunction[[str], str], way: str
) -> None:
    maker = sessionmaker(encoded)
    with maker.begin() as session:
        workflow_id = workflow.options(key="k").start(session, "E").id
    shown: type[Exception] = LookupError if workflow is transactional else ValueError
    if way == "worker":
        with Worker(durable, sessionmaker=maker, poll_interval=POLL), pytest.raises(shown, match="no "):
            workflow.handle(maker, workflow_id).result(timeout=PATIENCE)
    else:
        with maker() as session:
            executor = Executor.joined(session) if way == "joined" else Executor(session)
            with pytest.raises(shown, match="no "):
                executor.execute(workflow, workflow_id)
            session.commit()
    with maker() as session:
        record = session.get_one(Workflow, workflow_id)
        errors = [record.error, *(step.error for step in record.steps)]
        assert record.status is WorkflowStatus.FAILED
        assert {error["message"] for error in errors if error is not None} <= {r"no \u20ac", "no \u20ac"}
        assert len(errors) == (1 if workflow is body else 2)


# behaviour: V5
@pytest.mark.parametrize("encoded_database", ["LATIN1"], indirect=True)
@pytest.mark.parametrize("workflow", [plain, transactional, body])
def test_an_error_that_psycopg_cannot_encode_for_its_client_stays_visible_too(
    encoded: Engine, workflow: WorkflowFunction[[str], str]
) -> None:
    """Without `client_encoding`, psycopg uses the encoding of the database, and never asks the server."""
    maker = sessionmaker(create_engine(encoded.url, poolclass=NullPool))
    with maker.begin() as session:
        workflow_id = workflow.start(session, "E").id
    shown: type[Exception] = LookupError if workflow is transactional else ValueError
    with Worker(durable, sessionmaker=maker, poll_interval=POLL), pytest.raises(shown, match=r"no \\u20ac"):
        workflow.handle(maker, workflow_id).result(timeout=PATIENCE)


# behaviour: V5
async def test_an_error_of_async_code_stays_visible_too(encoded: Engine) -> None:
    engine = create_async_engine(encoded.url, connect_args={"client_encoding": "utf8"}, poolclass=NullPool)
    asynchronous = Durable()

    @asynchronous.step
    async def afail(text: str) -> str:
        raise ValueError(f"no {text}")

    @asynchronous.workflow
    async def live() -> str:
        return await afail("\u20ac")

    maker = async_sessionmaker(engine)
    async with maker() as session:
        with pytest.raises(ValueError, match="no "):
            await AsyncExecutor(session).run(live)
        workflow_id = (await live.options(key="k").start(session)).id
        await session.commit()
    async with Worker(asynchronous, async_sessionmaker=maker, poll_interval=POLL):
        with pytest.raises(ValueError, match=r"no (\\u20ac|€)"):
            await live.handle(maker, workflow_id).result(timeout=PATIENCE)
    await engine.dispose()


# behaviour: V5
def test_a_value_that_the_database_cannot_store_fails_its_workflow(encoded: Engine) -> None:
    if "latin1" not in str(encoded.url.database):
        pytest.skip("SQL_ASCII takes all bytes")
    maker = sessionmaker(encoded)
    with maker.begin() as session:
        good, bad = echo_all.start(session, "\u00e9").id, euro.start(session).id
    with Worker(durable, sessionmaker=maker, poll_interval=POLL):
        assert echo_all.handle(maker, good).result(timeout=PATIENCE) == "\u00e9"
        with pytest.raises(EncodingError, match="the database refuses what the workflow records"):
            euro.handle(maker, bad).result(timeout=PATIENCE)


# behaviour: V5
@pytest.mark.parametrize("joined", [False, True])
def test_a_result_that_the_database_cannot_store_is_the_outcome_under_an_executor_too(
    encoded: Engine, joined: bool
) -> None:
    if "latin1" not in str(encoded.url.database):
        pytest.skip("SQL_ASCII takes all bytes")
    with sessionmaker(encoded)() as session:
        workflow_id = euro.start(session).id
        session.flush()
        executor = Executor.joined(session) if joined else Executor(session)
        with pytest.raises(EncodingError, match="the database refuses what the workflow records"):
            executor.execute(euro, workflow_id)
        record = session.get_one(Workflow, workflow_id)
        assert (record.status, record.output) == (WorkflowStatus.FAILED, None)
