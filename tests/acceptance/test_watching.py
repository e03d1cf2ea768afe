"""A workflow that waits for what another one shows."""

from __future__ import annotations

import inspect
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from sqla_durable import errors
from sqla_durable.testing import advance
from tests.acceptance import either
from tests.acceptance.application import AnyWorkflow, Application
from tests.acceptance.shells import Shell
from tests.store import races

WORKERS = pytest.mark.shells(("worker", "async-worker", "asyncpg-worker", "mixed-worker"))


async def awaited(outcome: Any) -> Any:
    """Return the outcome of an operation, in either form."""
    return await outcome if inspect.isawaitable(outcome) else outcome


def watching(app: Application, **options: Any) -> AnyWorkflow[[UUID], int]:
    async def watch(other: UUID) -> int:
        found: int = await awaited(either.wait_event(other, "progress", int, **options))
        return found

    return app.workflow(watch)


def showing(app: Application) -> AnyWorkflow[[], None]:
    async def show() -> None:
        await awaited(either.wait_signal("go"))
        await awaited(either.set_event("progress", 7))

    return app.workflow(show)


@WORKERS
def test_event_that_is_set_later_is_waited_for(shell: Shell, app: Application) -> None:
    # behaviour: C4
    other, watch = shell.begin(showing(app)), watching(app)
    workflow_id = shell.begin(watch, other)
    with shell.background():
        races.wait_until(lambda: shell.one(workflow_id).wake_at, what="the suspension")
        with shell.client() as client:
            client.signal(other, "go")
            client.commit()
        races.wait_until(lambda: shell.one(other).finished_at, what="the event")
        with shell.sessionmaker.begin() as session:
            advance(session, timedelta(seconds=30))
        assert shell.result(watch, workflow_id) == 7
    assert [each.key for each in shell.one(workflow_id).steps] == ["wait_event(progress)"]


@WORKERS
def test_event_that_nobody_will_set_is_an_error(shell: Shell, app: Application) -> None:
    async def nothing() -> None: ...

    other, watch = shell.begin(app.workflow(nothing)), watching(app)
    with shell.background():
        races.wait_until(lambda: shell.one(other).finished_at, what="the end of the other")
    with pytest.raises(errors.EventNotSetError):
        shell.run(watch, other)
    with pytest.raises(errors.NotFoundError):
        shell.run(watch, uuid4())


@WORKERS
def test_event_that_is_not_set_in_time_is_an_error(shell: Shell, app: Application) -> None:
    other, watch = shell.begin(showing(app)), watching(app, timeout=timedelta(days=1))
    workflow_id = shell.begin(watch, other)
    with shell.background():
        races.wait_until(lambda: shell.one(workflow_id).wake_at, what="the suspension")
        with shell.sessionmaker.begin() as session:
            advance(session, timedelta(days=1))
        with pytest.raises(errors.WaitTimeoutError, match="event 'progress' was not set within 1 day"):
            shell.result(watch, workflow_id)


@WORKERS
def test_event_of_any_key_that_can_be_set_can_be_waited_for(shell: Shell, app: Application) -> None:
    keys = ["a", "a#2", "a/b"]

    async def show() -> None:
        for key in keys:
            await awaited(either.set_event(key, key))

    async def watch(other: UUID) -> list[str]:
        return [await awaited(either.wait_event(other, key, str)) for key in [*keys, "a"]]

    other = shell.begin(app.workflow(show))
    with shell.background():
        races.wait_until(lambda: shell.one(other).finished_at, what="the end of the other")
    assert shell.run(app.workflow(watch), other) == [*keys, "a"]
