"""Long steps: how far they are is recorded, shown, and passed to the next try."""

from __future__ import annotations

from typing import Any

import pytest
import tenacity
from sqlalchemy import select
from sqlalchemy.orm import Session

import sqla_durable.asyncio as aio
from sqla_durable import Durable, Step, StepStatus, current, heartbeat
from sqla_durable.errors import EncodingError, UsageError
from tests.acceptance import either
from tests.acceptance.application import Application
from tests.acceptance.shells import Shell

pytestmark = pytest.mark.few_shells


def _step(shell: Shell) -> Step:
    with shell.sessionmaker() as session:
        step = session.scalars(select(Step)).one()
        session.expunge_all()
        return step


def _details() -> Any:
    execution = current()
    assert execution is not None
    return execution.details


def test_the_last_details_are_kept_and_the_next_try_finds_them(shell: Shell, app: Application) -> None:
    found: list[Any] = []

    async def load() -> str:
        found.append(_details())
        for line in (1, 2, 3):
            await either.heartbeat({"line": line + 3 * len(found)})
        await either.heartbeat()
        if len(found) == 1:
            raise ConnectionError("try again")
        return "loaded"

    loading = app.publishing(load, wait=tenacity.wait_none())

    async def agent() -> str:
        return await loading()

    assert shell.run(app.workflow(agent)) == "loaded"
    assert found == [None, {"line": 6}]
    step = _step(shell)
    assert (step.status, step.details, step.tries) == (StepStatus.SUCCEEDED, {"line": 9}, 2)


@pytest.mark.shells(("executor", "worker", "async-executor", "async-worker", "asyncpg-worker", "mixed-worker"))
def test_a_running_step_shows_how_far_it_is(shell: Shell, app: Application) -> None:
    seen: list[tuple[StepStatus, Any, int]] = []

    async def load() -> None:
        await either.heartbeat(["half"])
        step = _step(shell)
        seen.append((step.status, step.details, step.tries))

    loading = app.publishing(load)

    async def agent() -> None:
        await loading()

    shell.run(app.workflow(agent))
    assert seen == [(StepStatus.RUNNING, ["half"], 1)]
    assert _step(shell).status is StepStatus.SUCCEEDED


# behaviour: C6
def test_details_that_cannot_be_stored_fail_the_call(shell: Shell, app: Application) -> None:
    async def load() -> None:
        await either.heartbeat(object())

    loading = app.publishing(load)

    async def agent() -> None:
        await loading()

    with pytest.raises(EncodingError, match="details of step 'load' cannot be stored"):
        shell.run(app.workflow(agent))


def test_only_a_plain_step_has_a_heartbeat(shell: Shell, app: Application) -> None:
    def book(_session: Session) -> None:
        heartbeat(1)

    booking = app.transactional(book)

    async def between() -> None:
        await either.heartbeat(1)

    async def within() -> None:
        await booking()

    for workflow, said in ((app.workflow(between), "between steps"), (app.workflow(within), "transactional")):
        with pytest.raises(UsageError, match=said):
            shell.run(workflow)


async def test_outside_a_workflow_nothing_happens() -> None:
    durable = Durable()

    @durable.step
    def loaded() -> str:
        heartbeat(1)
        return "loaded"

    assert loaded() == "loaded"
    await aio.heartbeat(2)
