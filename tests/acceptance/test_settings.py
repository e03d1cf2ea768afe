"""Settings of servers, roles and databases as they are found."""

from __future__ import annotations

import inspect
from collections.abc import Generator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import tenacity
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Durable, Worker, Workflow
from sqla_durable.asyncio import AsyncExecutor, send_signal
from sqla_durable.errors import SessionError
from tests.acceptance import either
from tests.acceptance.application import AnyWorkflow, Application
from tests.acceptance.shells import PATIENCE, POLL, SHELLS, Shell

AT = datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC)


@pytest.fixture(params=[("SQL, DMY", "sql_standard"), ("German", "postgres_verbose"), ("ISO", "iso_8601")])
def styled_url(request: pytest.FixtureRequest, database_url: str) -> Generator[str]:
    """A database whose connections write dates and intervals in another style."""
    name = make_url(database_url).database
    engine = create_engine(database_url)
    with engine.begin() as connection:
        for setting, value in zip(("DateStyle", "IntervalStyle"), request.param, strict=True):
            connection.execute(text(f"ALTER DATABASE {name} SET {setting} = '{value}'"))
    yield database_url
    with engine.begin() as connection:
        connection.execute(text(f"ALTER DATABASE {name} RESET ALL"))
    engine.dispose()


async def awaited(outcome: Any) -> Any:
    return await outcome if inspect.isawaitable(outcome) else outcome


def timed_workflow(app: Application) -> AnyWorkflow[[datetime], datetime]:
    """Make a workflow whose waits and tries are rows with times in them."""
    tries: list[int] = []

    def flaky(at: datetime) -> datetime:
        tries.append(1)
        if len(tries) == 1:
            raise ConnectionError("once")
        return at

    policy = {"stop": tenacity.stop_after_attempt(3), "wait": tenacity.wait_none()}
    step = app.plain(flaky, total_timeout=timedelta(minutes=5), **policy)

    async def live(at: datetime) -> datetime:
        await awaited(either.sleep(timedelta(seconds=0.01)))
        await awaited(either.wait_signal("go", timeout=timedelta(days=1)))
        return await step(at)

    return app.workflow(live).options(timeout=timedelta(days=40), deadline=timedelta(days=400))


def run_through(shell: Shell, workflow: AnyWorkflow[[datetime], datetime]) -> None:
    """Execute the workflow to its end, and compare its times."""
    workflow_id = shell.begin(workflow, AT)
    with shell.client() as client:
        client.signal(workflow_id, "go")
        client.commit()
    assert shell.finish(workflow, workflow_id) == AT
    assert shell.one(workflow_id).timeout == timedelta(days=40)


@pytest.mark.parametrize("name", ["executor", "async-worker"])
def test_times_are_read_in_the_style_that_the_engine_asks_for(styled_url: str, name: str) -> None:
    url = make_url(styled_url).update_query_dict({"options": "-c datestyle=ISO -c intervalstyle=postgres"})
    shell = SHELLS[name](url.render_as_string(hide_password=False), "durable")
    run_through(shell, timed_workflow(shell.app))
    shell.close()


@pytest.mark.parametrize("async_driver", ["psycopg"], indirect=True)
async def test_a_style_that_psycopg_cannot_read_is_refused_before_anything_is_written(
    styled_url: str, async_engine: AsyncEngine
) -> None:
    durable = Durable()
    plain, asynchronous = durable.workflow(lambda: 1, name="plain"), durable.workflow(_one)
    engine = create_engine(styled_url)
    refused = pytest.raises(SessionError, match=r"psycopg reads no times in the style .*datestyle=ISO -c intervalstyle")
    with Session(engine) as session, refused:
        plain.start(session)
    async with AsyncSession(async_engine) as async_session:
        with refused:
            await asynchronous.start(async_session)
        with refused:
            await AsyncExecutor(async_session).run(asynchronous)
    with refused:
        await Worker(durable, sessionmaker=sessionmaker(engine)).serve()
    engine.dispose()


async def _one() -> int:
    return 1


@pytest.mark.parametrize("async_driver", ["asyncpg"], indirect=True)
async def test_asyncpg_reads_times_in_any_style(styled_url: str, async_engine: AsyncEngine) -> None:
    durable = Durable()

    @durable.workflow
    async def live(at: datetime) -> datetime:
        await either.sleep(timedelta(seconds=0.01))
        await either.wait_signal("go", timeout=timedelta(days=1))
        return at

    maker = async_sessionmaker(async_engine)
    async with maker.begin() as session:
        options = live.options(key="k", delay=timedelta(seconds=0.01), timeout=timedelta(days=40))
        workflow_id = (await options.start(session, AT)).id
        await send_signal(session, workflow_id, "go")
    async with Worker(durable, async_sessionmaker=maker, poll_interval=POLL):
        assert await live.handle(maker, workflow_id).result(timeout=PATIENCE) == AT
    async with maker() as session:
        assert (await session.get_one(Workflow, workflow_id)).timeout == timedelta(days=40)
        assert styled_url


@pytest.mark.parametrize("durable_schema", ["50%_off"], indirect=True)
@pytest.mark.parametrize("name", ["worker", "asyncpg-worker"])
def test_a_schema_may_have_a_percent_sign_in_its_name(database_url: str, durable_schema: str, name: str) -> None:
    shell = SHELLS[name](database_url, durable_schema)
    run_through(shell, timed_workflow(shell.app))
    shell.close()
