"""Steps that fall silent: they have failed, their policy decides, and the next try finds the last details."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from typing import Any

import pytest
import tenacity
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sqla_durable import Durable, Step, StepStatus, current, errors, heartbeat
from sqla_durable.asyncio import to_thread
from tests.acceptance import either
from tests.acceptance.application import Application, Form
from tests.acceptance.shells import Shell

pytestmark = pytest.mark.few_shells

SHORT = timedelta(seconds=0.25)


def _step(shell: Shell) -> Step:
    with shell.sessionmaker() as session:
        return session.scalars(select(Step)).one()


async def _silence(app: Application) -> None:
    """Report nothing: for ever in async code, and for too long where nothing ends it."""
    if app.form is Form.SYNC:
        time.sleep(SHORT.total_seconds() + 0.01)
    else:
        await asyncio.Event().wait()


# behaviour: S1 S3
def test_a_step_that_falls_silent_is_tried_again_and_finds_its_last_details(shell: Shell, app: Application) -> None:
    found: list[Any] = []

    async def load() -> str:
        execution = current()
        assert execution is not None
        found.append(execution.details)
        if len(found) == 1:
            await either.heartbeat({"line": 1})
            await either.heartbeat({"line": 2})
            await _silence(app)
        return "loaded"

    loading = app.publishing(load, heartbeat_timeout=SHORT, wait=tenacity.wait_none())

    async def agent() -> str:
        return await loading()

    assert shell.run(app.workflow(agent)) == "loaded"
    assert found == [None, {"line": 2}]
    step = _step(shell)
    assert (step.status, step.details, step.tries) == (StepStatus.SUCCEEDED, {"line": 2}, 2)


def test_a_step_without_any_heartbeat_is_silent_from_its_beginning(shell: Shell, app: Application) -> None:
    async def load() -> None:
        await _silence(app)

    loading = app.publishing(load, heartbeat_timeout=SHORT)

    async def agent() -> None:
        await loading()

    words = r"'load' sent no heartbeat within 0:00:00\.25\d*, its heartbeat timeout\."
    with pytest.raises(errors.HeartbeatTimeoutError, match=words) as raised:
        shell.run(app.workflow(agent))
    assert (raised.value.step, raised.value.seconds) == ("load", 0.25)
    assert isinstance(raised.value, errors.StepTimeoutError)


@pytest.mark.shells(("async-executor",))
def test_heartbeats_keep_a_step_alive(shell: Shell, app: Application) -> None:
    async def load() -> str:
        for _ in range(40):
            await asyncio.sleep(0.03)
            await either.heartbeat()
        return "loaded"

    loading = app.publishing(load, heartbeat_timeout=timedelta(seconds=1))

    async def agent() -> str:
        return await loading()

    assert shell.run(app.workflow(agent)) == "loaded"


@pytest.mark.shells(("executor", "worker", "async-executor", "async-worker"))
def test_a_def_step_ends_at_its_next_heartbeat_and_has_failed_also_if_it_catches_that(
    shell: Shell, app: Application
) -> None:
    caught: list[BaseException] = []

    @app.durable.step(heartbeat_timeout=SHORT)
    def load() -> str:
        heartbeat(1)
        time.sleep(SHORT.total_seconds() + 0.01)
        try:
            heartbeat(2)
        except errors.HeartbeatTimeoutError as error:
            caught.append(error)
        return "loaded"

    async def agent() -> str:
        return load() if app.form is Form.SYNC else await to_thread(load)

    with pytest.raises(errors.HeartbeatTimeoutError):
        shell.run(app.workflow(agent))
    assert len(caught) == 1
    step = _step(shell)
    assert (step.status, step.details) == (StepStatus.FAILED, 1)


def test_a_transactional_step_has_no_heartbeat_timeout() -> None:
    def book(_session: Session) -> None: ...

    async def abook(_session: AsyncSession) -> None: ...

    for fn in (book, abook):
        with pytest.raises(errors.DefinitionError, match=r"takes a session: only a plain step sends heartbeats"):
            Durable().step(fn, heartbeat_timeout=SHORT)
