"""The pytest plugin of sqla-durable: databases, workers and the clock as fixtures. See docs/testing.md.

Imports the rest of the package only when a test asks for a fixture: pytest starts no slower.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Generator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
    from sqlalchemy.orm import Session, sessionmaker

    from sqla_durable import Durable, Worker
    from sqla_durable.testing import CrashReport
    from sqla_durable.testing.databases import Databases

_DIRECTORY = "sqla_durable_directory"
"""The key under which the controller of xdist passes its workers the directory of the server that they share."""


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Choose one server for all processes of xdist; the first that needs it starts it."""
    config: Any = node.config
    if not hasattr(config, _DIRECTORY):
        setattr(config, _DIRECTORY, str(Path(tempfile.gettempdir()) / f"sqla-durable-{uuid4().hex}"))
    node.workerinput[_DIRECTORY] = getattr(config, _DIRECTORY)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the directory of the shared server, which the last process has stopped."""
    if (directory := getattr(config, _DIRECTORY, None)) is not None:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def sqla_durable_server_url(request: pytest.FixtureRequest) -> Generator[str]:
    """The URL of a server on which the tests may create databases; override it to use one of your own.

    By default an embedded server, which all processes of xdist share.
    """
    from sqla_durable import embedded
    from sqla_durable.errors import UsageError

    given: dict[str, Any] = getattr(request.config, "workerinput", {})
    directory = Path(given[_DIRECTORY]) if _DIRECTORY in given else None
    settings = {"fsync": "off", "full_page_writes": "off", "max_connections": "300"}
    try:
        started = embedded.server(directory, settings=settings)
    except UsageError as error:
        error.add_note("Or override the fixture sqla_durable_server_url with the URL of a server of your own.")
        raise
    with started as server:
        yield server.url


@pytest.fixture(scope="session")
def sqla_durable_migrate() -> Callable[[Connection], None]:
    """The function that creates the tables of a new database; override it to create your own tables too."""
    from sqla_durable.testing.databases import migrate

    return migrate


@pytest.fixture(scope="session")
def _sqla_durable_databases(
    sqla_durable_server_url: str, sqla_durable_migrate: Callable[[Connection], None]
) -> Generator[Databases]:
    from sqla_durable.testing.databases import Databases

    with Databases(sqla_durable_server_url, sqla_durable_migrate) as databases:
        yield databases


@pytest.fixture
def sqla_durable_url(_sqla_durable_databases: Databases) -> Generator[str]:
    """The URL of a migrated database, of this test alone."""
    with _sqla_durable_databases.copied() as url:
        yield url


@pytest.fixture
def sqla_durable_engine(sqla_durable_url: str) -> Generator[Engine]:
    """An engine on the test's database."""
    from sqlalchemy import create_engine

    engine = create_engine(sqla_durable_url)
    yield engine
    engine.dispose()


@pytest.fixture
def sqla_durable_sessionmaker(sqla_durable_engine: Engine) -> sessionmaker[Session]:
    """A sessionmaker on the test's database."""
    from sqlalchemy.orm import sessionmaker

    return sessionmaker(sqla_durable_engine)


@pytest.fixture
def sqla_durable_session(sqla_durable_sessionmaker: sessionmaker[Session]) -> Generator[Session]:
    """A session on the test's database, which is rolled back at the end of the test."""
    with sqla_durable_sessionmaker() as session:
        yield session


@pytest.fixture
def sqla_durable_async_engine(sqla_durable_url: str) -> AsyncEngine:
    """An async engine on the test's database; without a pool, so that any event loop may use it."""
    from sqlalchemy import NullPool
    from sqlalchemy.ext.asyncio import create_async_engine

    return create_async_engine(sqla_durable_url, poolclass=NullPool)


@pytest.fixture
def sqla_durable_async_sessionmaker(sqla_durable_async_engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    """A sessionmaker of async sessions on the test's database, whose records stay readable after a commit."""
    from sqlalchemy.ext.asyncio import async_sessionmaker

    return async_sessionmaker(sqla_durable_async_engine, expire_on_commit=False)


@pytest.fixture
def sqla_durable_worker(
    sqla_durable_sessionmaker: sessionmaker[Session],
    sqla_durable_async_sessionmaker: async_sessionmaker[AsyncSession],
) -> Generator[Callable[..., Worker]]:
    """A function that starts a worker of a `Durable` object on the test's database; it stops when the test ends."""
    from sqla_durable import Worker

    with ExitStack() as workers:

        def start(durable: Durable, **options: Any) -> Worker:
            given: dict[str, Any] = {
                "sessionmaker": sqla_durable_sessionmaker,
                "async_sessionmaker": sqla_durable_async_sessionmaker,
                "poll_interval": timedelta(seconds=0.1),
                "concurrency": 10,
            }
            return workers.enter_context(Worker(durable, **given | options))

        yield start


@pytest.fixture
def sqla_durable_advance(sqla_durable_sessionmaker: sessionmaker[Session]) -> Callable[[timedelta], int]:
    """A function that moves the time forward for what waits in the test's database, and commits."""
    from sqla_durable.testing import advance

    def advance_and_commit(duration: timedelta) -> int:
        with sqla_durable_sessionmaker.begin() as session:
            return advance(session, duration)

    return advance_and_commit


@pytest.fixture
def sqla_durable_crash_everywhere(sqla_durable_url: str) -> Callable[..., CrashReport]:
    """`crash_everywhere` on the test's database: takes `make_worker`, and the rest by name."""
    from sqla_durable.testing import crash_everywhere

    def crash(make_worker: Callable[[str], Worker], **options: Any) -> CrashReport:
        return crash_everywhere(make_worker, sqla_durable_url, **options)

    return crash
