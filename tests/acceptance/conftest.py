"""Every story that takes `shell` is run in each of the ways there are, and in two schemas."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tests.acceptance.application import Application
from tests.acceptance.shells import SHELLS, Shell

# Each way once; in the other schema those that differ most: the other driver, sync and async sessions in one worker.
IN_TENANT = ("mixed-worker", "asyncpg-worker")
IN_DURABLE = tuple(name for name in SHELLS if name not in ("mixed-worker", "asyncpg-worker"))
WAYS = [(name, "durable") for name in IN_DURABLE] + [(name, "tenant_7") for name in IN_TENANT]
# Stories whose statements are told by others in all ways, once for each kind of surroundings.
FEW = ("executor", "worker", "async-executor", "asyncpg-worker")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shell" in metafunc.fixturenames:
        only = [mark.args[0] for mark in metafunc.definition.iter_markers("shells")]
        few = list(metafunc.definition.iter_markers("few_shells"))
        wanted = only[0] if only else SHELLS
        chosen = [way for way in WAYS if way[0] in wanted]
        if few:
            chosen = [way for way in chosen if way[0] in FEW] or chosen
        ids = [name if schema == "durable" else f"{name}-{schema}" for name, schema in chosen]
        metafunc.parametrize(("shell", "durable_schema"), chosen, ids=ids, indirect=True)


@pytest.fixture
def shell(request: pytest.FixtureRequest, database_url: str, durable_schema: str) -> Generator[Shell]:
    """One way to run workflows."""
    shell = SHELLS[request.param](database_url, durable_schema)
    yield shell
    shell.close()


@pytest.fixture
def app(shell: Shell) -> Application:
    """The application of the story's shell."""
    return shell.app


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "shells(names): run a story in these ways only")
    config.addinivalue_line("markers", "few_shells: run a story once for each kind of surroundings")
