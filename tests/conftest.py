"""One PostgreSQL server for a test run, and a database of its own for every test.

`pytest` uses the embedded PostgreSQL 18; `pytest --pg=15` (or SQLA_DURABLE_TEST_PG=15) Debian's; and
SQLA_DURABLE_TEST_URL a server that runs already. The controller starts it, the workers of xdist share it.
With `--pgbouncer`, tests reach their databases through PgBouncer in transaction mode.

A run leaves out what is marked as `thorough`, and does less where a test asks for the fixture `thorough`
(tests/support/sampling.py); `pytest --all` leaves nothing out. `.ci/nightly` does that.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import Any, Protocol, cast

import pytest
from sqlalchemy import Engine, create_engine, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable.models import SCHEMA
from tests.support import compiled, memory, notifications, pgbouncer, postgres, sampling
from tests.support.databases import Databases, translated
from tests.support.durations import SECONDS

HERE = Path(__file__).parent
# Compile each module once, and not in each of the processes that tests start, whatever the environment says.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
memory.use()

SERVER = pytest.StashKey[postgres.Server]()
BOUNCER = pytest.StashKey[pgbouncer.Bouncer]()


class XdistNode(Protocol):
    """A worker of xdist, as the controller sees it."""

    config: pytest.Config
    workerinput: dict[str, Any]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--pg",
        metavar="VERSION",
        default=os.environ.get("SQLA_DURABLE_TEST_PG"),
        help="PostgreSQL to test on: 18 (embedded, the default) or a version of Debian's, such as 15",
    )
    parser.addoption("--all", action="store_true", help="everything that is sampled otherwise: what `thorough` marks")
    parser.addoption(
        "--pgbouncer",
        action="store_true",
        help="put PgBouncer in transaction mode between all engines and the server",
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Twice as many processes as processors for `-n auto`: many tests wait, for leases and servers."""
    return 2 * (os.cpu_count() or 1)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is thorough, and begin each process's share with tests that take long.

    At the end one process would be left alone with them.
    """
    sampling.deselect(config, items)
    if not (workers := getattr(config, "workerinput", {}).get("workercount")):
        return
    seconds = {each: SECONDS.get(each.path.relative_to(HERE).as_posix(), 0) for each in items}
    long = sorted((each for each in items if seconds[each]), key=lambda each: -seconds[each])
    short = [each for each in items if not seconds[each]]
    size = -(-len(short) // workers)
    shares = [long[number::workers] + short[number * size :][:size] for number in range(workers)]
    items[:] = [each for share in shares for each in share]


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput") and not config.option.collectonly:
        config.stash[SERVER] = server = postgres.start(config.getoption("--pg"))
        if config.getoption("--pgbouncer"):
            config.stash[BOUNCER] = _start_bouncer(server)
    if config.getoption("--pgbouncer"):
        pgbouncer.accept_transaction_pooling()


def pytest_collection_finish() -> None:
    """Keep the garbage collector from what is imported by now, and let it come seldom: there is memory enough."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def _start_bouncer(server: postgres.Server) -> pgbouncer.Bouncer:
    try:
        return pgbouncer.start(server.url)
    except pgbouncer.UnavailableError as error:
        server.stop()
        pytest.exit(f"--pgbouncer: {error}", returncode=0)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: XdistNode) -> None:
    node.workerinput["server_url"] = node.config.stash[SERVER].url
    bouncer = node.config.stash.get(BOUNCER, None)
    node.workerinput["bouncer_url"] = None if bouncer is None else bouncer.text


def pytest_unconfigure(config: pytest.Config) -> None:
    if BOUNCER in config.stash:
        config.stash[BOUNCER].stop()
    if SERVER in config.stash:
        config.stash[SERVER].stop()


@pytest.fixture(scope="session")
def server_url(request: pytest.FixtureRequest) -> str:
    """The URL of the server's database `postgres`, as superuser."""
    workerinput: dict[str, Any] | None = getattr(request.config, "workerinput", None)
    return str(workerinput["server_url"]) if workerinput else request.config.stash[SERVER].url


@pytest.fixture(scope="session")
def thorough(request: pytest.FixtureRequest) -> bool:
    """Whether a test does all that it can (`--all`), or a sample."""
    return bool(request.config.getoption("--all"))


@pytest.fixture(scope="session", autouse=True)
def compiled_statements() -> Generator[None]:
    """What engines of this process compile, they compile once."""
    with pytest.MonkeyPatch.context() as patch:
        compiled.share(patch)
        yield


@pytest.fixture(scope="session")
def bouncer_url(request: pytest.FixtureRequest) -> str | None:
    """The URL of PgBouncer's database `postgres`, with `--pgbouncer`."""
    workerinput: dict[str, Any] | None = getattr(request.config, "workerinput", None)
    if workerinput:
        return cast("str | None", workerinput["bouncer_url"])
    bouncer = request.config.stash.get(BOUNCER, None)
    return None if bouncer is None else bouncer.text


@pytest.fixture(scope="session")
def databases(server_url: str, bouncer_url: str | None, worker_id: str) -> Generator[Databases]:
    """The maker of databases, for a test that needs several."""
    databases = Databases(server_url, worker_id, through=bouncer_url)
    yield databases
    databases.close()


@pytest.fixture
def few_objects() -> Generator[None]:
    """Let `gc.collect()` look only at what the test makes: a look at all that a run has takes half a second."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def durable_schema(request: pytest.FixtureRequest) -> str:
    """The schema of our tables; `parametrize("durable_schema", ["durable", "tenant_7"], indirect=True)`."""
    return str(getattr(request, "param", SCHEMA))


@pytest.fixture
def async_driver(request: pytest.FixtureRequest) -> str:
    """The driver of `async_engine`; `parametrize("async_driver", ["psycopg", "asyncpg"], indirect=True)`."""
    return str(getattr(request, "param", "psycopg"))


@pytest.fixture
def database_url(request: pytest.FixtureRequest, databases: Databases, durable_schema: str) -> Generator[str]:
    """A blank database with our tables in `durable_schema` and those of `tests.support.domain`.

    It may have rows of earlier tests that are deleted and not vacuumed, except for `pytest.mark.new_database`.
    """
    used = request.node.get_closest_marker("new_database") is None
    with databases.migrated(durable_schema, used=used) as url:
        yield url


@pytest.fixture
def direct_url(database_url: str, server_url: str) -> str:
    """The same database past PgBouncer, if one is in between: for what listens."""
    return notifications.direct(database_url, server_url)


@pytest.fixture
def ear(direct_url: str, durable_schema: str) -> Generator[notifications.Ear]:
    """A connection that hears the hints about the tables of this test."""
    with notifications.ear(direct_url, schema=durable_schema) as ear:
        yield ear


@pytest.fixture
def empty_database_url(databases: Databases) -> Generator[str]:
    """A fresh database with nothing in it."""
    with databases.empty() as url:
        yield url


@pytest.fixture
def engine(database_url: str, durable_schema: str) -> Generator[Engine]:
    """A sync engine of `database_url`, translated to `durable_schema`."""
    engine = create_engine(database_url)
    yield translated(engine, durable_schema)
    _join_workers()
    engine.dispose()


def _join_workers() -> None:
    """Wait for threads that a stopped worker has left behind: they give their connections back to the pool."""
    for thread in threading.enumerate():
        if thread.name.startswith("sqla-durable"):
            thread.join(10)


@pytest.fixture
async def async_engine(database_url: str, durable_schema: str, async_driver: str) -> AsyncGenerator[AsyncEngine]:
    """An async engine of `database_url`, translated to `durable_schema`."""
    url = make_url(database_url).set(drivername=f"postgresql+{async_driver}")
    engine = create_async_engine(url)
    yield AsyncEngine(translated(engine.sync_engine, durable_schema))
    await engine.dispose()


@pytest.fixture
def session_factory(engine: Engine) -> sessionmaker[Session]:
    return sessionmaker(engine)


@pytest.fixture
def async_session_factory(async_engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    return async_sessionmaker(async_engine)
