"""Every story that takes `shell` is run in two of the ways there are; with `--all` in each of them."""

from __future__ import annotations

from collections.abc import Generator

import pytest
from sqlalchemy import Engine

from tests.acceptance.application import Application
from tests.acceptance.rights import World, make_world
from tests.acceptance.shells import SHELLS, Shell, SyncShell
from tests.support.roles import TASKS, Roles, roles
from tests.support.sampling import number_of

Way = tuple[str, str]
"""The name of a shell, and a schema."""

# Each way once; in the other schema those that differ most: the other driver, sync and async sessions in one worker.
IN_TENANT = ("mixed-worker", "asyncpg-worker")
IN_DURABLE = tuple(name for name in SHELLS if name not in ("mixed-worker", "asyncpg-worker"))
WAYS = [(name, "durable") for name in IN_DURABLE] + [(name, "tenant_7") for name in IN_TENANT]
# For stories whose statements other stories execute in all ways: one way for each kind of session and of caller.
FEW = ("executor", "worker", "async-executor", "asyncpg-worker")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shell" in metafunc.fixturenames:
        only = [mark.args[0] for mark in metafunc.definition.iter_markers("shells")]
        few = list(metafunc.definition.iter_markers("few_shells"))
        wanted = only[0] if only else SHELLS
        possible = [way for way in WAYS if way[0] in wanted]
        if few:
            possible = [way for way in possible if way[0] in FEW] or possible
        by_default = _covering(possible, number_of(metafunc.definition.nodeid))
        cases = [
            pytest.param(
                *way,
                id=way[0] if way[1] == "durable" else "-".join(way),
                marks=[] if way in by_default else pytest.mark.thorough,
            )
            for way in possible
        ]
        metafunc.parametrize(("shell", "durable_schema"), cases, indirect=True)


def _covering(possible: list[Way], number: int) -> list[Way]:
    """Choose a way with a `Session` and one with an `AsyncSession`, one of them a worker where there is a choice.

    Which of them is a matter of the story's number, so that every way is met by a quarter of the stories.
    """
    sync = [way for way in possible if issubclass(SHELLS[way[0]], SyncShell) or way[0] == "mixed-worker"]
    others = [way for way in possible if way not in sync]
    chosen = [sync[number % len(sync)]] if sync else []
    if others:
        working = bool(chosen) and "worker" in chosen[0][0]
        different = [way for way in others if ("worker" in way[0]) is not working] or others
        chosen.append(different[number // 7 % len(different)])
    return chosen


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
    config.addinivalue_line("markers", "few_shells: run a story once for each kind of session and of caller")


@pytest.fixture
def granted(engine: Engine, direct_url: str) -> Generator[Roles]:
    """A role for each set of rights."""
    with roles(engine, direct_url, *TASKS) as made:
        made.grant(*TASKS)
        yield made


@pytest.fixture
def world(engine: Engine) -> World:
    return make_world(engine)
