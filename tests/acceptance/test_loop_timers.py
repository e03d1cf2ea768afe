"""Timers of asyncio in a workflow's own code: they fire while it waits as a row, and on every replay as they did."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Any, cast
from uuid import UUID

import anyio
import pytest
import tenacity
from sqlalchemy import Engine, event, select

import sqla_durable.asyncio as aio
import sqla_durable.operations.shielding
import sqla_durable.runtime.tasks
from sqla_durable import Step, WorkflowStatus
from sqla_durable.testing import advance, export, replay
from tests.acceptance import either
from tests.acceptance.application import AnyWorkflow, Application
from tests.acceptance.branches import on_loop
from tests.acceptance.shells import Shell
from tests.acceptance.test_cancelled_calls import agreed, history
from tests.store import races

DAY = timedelta(days=1)
SECONDS = DAY.total_seconds()
on_worker = pytest.mark.shells(["async-worker"])
Call = Callable[[], Awaitable[Any]]


def until_suspended(shell: Shell, workflow_id: UUID, on: str = "") -> datetime:
    """Wait until it waits as a row, for what has this in its name, and return until when."""
    found: list[datetime | None] = []

    def is_suspended() -> bool:
        record = shell.one(workflow_id)
        found[:] = [record.wake_at]
        return record.status is WorkflowStatus.SUSPENDED and on in str(record.awaits)

    races.wait_until(is_suspended)
    (wake_at,) = found
    assert wake_at is not None
    return wake_at


def pass_by(shell: Shell, time: timedelta) -> None:
    with shell.sessionmaker.begin() as session:
        advance(session, time)


async def under_timeout(wait: Call) -> str:
    try:
        async with asyncio.timeout(SECONDS):
            return str(await wait())
    except TimeoutError:
        return "too late"


async def under_wait_for(wait: Call) -> str:
    try:
        return str(await asyncio.wait_for(wait(), SECONDS))
    except TimeoutError:
        return "too late"


async def under_fail_after(wait: Call) -> str:
    try:
        with anyio.fail_after(SECONDS):
            return str(await wait())
    except TimeoutError:
        return "too late"


async def both_waits() -> Any:
    return await asyncio.gather(aio.wait_signal("go"), aio.sleep(30 * DAY))


async def an_answer() -> Any:
    return await (await aio.create_callback())


WAITS: dict[str, Call] = {
    "signal": lambda: aio.wait_signal("go"),
    "signal in time": lambda: aio.wait_signal("go", timeout=2 * DAY),
    "sleep": lambda: aio.sleep(30 * DAY),
    "gather": both_waits,
    "callback": an_answer,
    "update": lambda: aio.wait_update("set"),
}


# behaviour: A3
@on_worker
@pytest.mark.parametrize(
    ("under", "wait"),
    [*((under_timeout, each) for each in WAITS), (under_wait_for, "signal"), (under_fail_after, "signal")],
)
def test_a_timeout_of_asyncio_around_a_durable_wait_fires_while_it_is_a_row(
    shell: Shell, app: Application, under: Callable[[Call], Awaitable[str]], wait: str
) -> None:
    async def approval() -> str:
        return await under(WAITS[wait])

    workflow = app.workflow(approval)
    workflow_id = shell.begin(workflow)
    with shell.background():
        due_at = until_suspended(shell, workflow_id)
        assert timedelta(0) <= due_at - shell.one(workflow_id).created_at - DAY < timedelta(minutes=1)
        pass_by(shell, DAY)
        assert shell.result(workflow, workflow_id) == "too late"
        before = history(shell, workflow_id)
        shell.crashed(workflow_id)
        assert shell.result(workflow, workflow_id) == "too late"
    assert history(shell, workflow_id) == before


# behaviour: A3
@on_worker
def test_a_timeout_of_asyncio_around_a_child_fires(shell: Shell, app: Application) -> None:
    async def child() -> None:
        await either.sleep(30 * DAY)

    inner = app.workflow(child)

    async def parent() -> str:
        started: Any = await either.start_child(cast("Any", inner))
        return await under_timeout(started.result)

    workflow = app.workflow(parent)
    workflow_id = shell.begin(workflow)
    with shell.background():
        until_suspended(shell, workflow_id, "children")
        pass_by(shell, DAY)
        assert shell.result(workflow, workflow_id) == "too late"


# behaviour: A3
@on_worker
def test_a_crash_does_not_extend_a_timeout_of_asyncio(shell: Shell, app: Application) -> None:
    async def approval() -> list[str]:
        async def both() -> list[str]:
            return [await either.wait_signal("first"), await either.wait_signal("second")]

        try:
            return await asyncio.wait_for(both(), SECONDS)
        except TimeoutError:
            return ["too late"]

    workflow = app.workflow(approval)
    workflow_id = shell.begin(workflow)
    with shell.background():
        until_suspended(shell, workflow_id)
        pass_by(shell, DAY / 2)
        due_at = until_suspended(shell, workflow_id)
        with shell.client() as client:
            client.signal(workflow_id, "first", "a")
            client.commit()
        until_suspended(shell, workflow_id, "second")
        shell.crashed(workflow_id)
        assert abs(until_suspended(shell, workflow_id) - due_at) < timedelta(seconds=2)
        pass_by(shell, DAY / 2)
        assert shell.result(workflow, workflow_id) == ["too late"]


# behaviour: A2 A3
@on_worker
def test_nested_timeouts_fire_on_a_replay_in_the_order_of_the_first_time(shell: Shell, app: Application) -> None:
    async def approval() -> list[str]:
        found: list[str] = []
        try:
            async with asyncio.timeout(2 * SECONDS):
                found.append(await under_timeout(lambda: either.wait_signal("go")))
                found.append(str(await either.wait_signal("again")))
        except TimeoutError:
            found.append("far too late")
        return found

    workflow = app.workflow(approval)
    workflow_id = shell.begin(workflow)
    with shell.background():
        until_suspended(shell, workflow_id)
        pass_by(shell, DAY)
        until_suspended(shell, workflow_id, "again")
        shell.crashed(workflow_id)  # on this replay only the first of the two has fired
        until_suspended(shell, workflow_id, "again")
        pass_by(shell, DAY)
        assert shell.result(workflow, workflow_id) == ["too late", "far too late"]
        shell.crashed(workflow_id)  # and on this one both are overdue from the beginning
        assert shell.result(workflow, workflow_id) == ["too late", "far too late"]
    with shell.sessionmaker() as session:
        (exported,) = export(session, workflow_id)
    report = replay(workflow, exported)
    assert report.fits, str(report)


# behaviour: A3
@on_worker
def test_what_comes_in_time_disarms_the_timeout(shell: Shell, app: Application) -> None:
    async def approval() -> list[str]:
        return [await under_fail_after(lambda: either.wait_signal("go")), await either.wait_signal("end")]

    workflow = app.workflow(approval)
    workflow_id = shell.begin(workflow)
    with shell.background():
        until_suspended(shell, workflow_id)
        with shell.client() as client:
            client.signal(workflow_id, "go", "yes")
            client.commit()
        races.wait_until(lambda: "end" in str(shell.one(workflow_id).awaits))
        assert shell.one(workflow_id).wake_at is None
        with shell.client() as client:
            client.signal(workflow_id, "end", "end")
            client.commit()
        assert shell.result(workflow, workflow_id) == ["yes", "end"]


@on_worker
def test_a_sleep_of_asyncio_beside_a_durable_wait_is_over_at_its_time(
    shell: Shell, app: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqla_durable.runtime.tasks, "QUIET", 0.0)

    async def approval() -> str:
        async def remind() -> str:
            await asyncio.sleep(SECONDS)
            return "reminded"

        calls: list[Any] = [remind(), either.wait_signal("go")]
        done, pending = await asyncio.wait(map(asyncio.ensure_future, calls), return_when=asyncio.FIRST_COMPLETED)
        for each in pending:
            each.cancel()
        return str(done.pop().result())

    workflow = app.workflow(approval)
    workflow_id = shell.begin(workflow)
    with shell.background():
        until_suspended(shell, workflow_id)
        pass_by(shell, DAY)
        assert shell.result(workflow, workflow_id) == "reminded"


# behaviour: A3
@on_loop
def test_short_timeouts_fire_in_memory(shell: Shell, app: Application) -> None:
    @app.durable.step(wait=tenacity.wait_fixed(60))
    async def fail() -> None:
        raise ConnectionError("down")

    async def approval() -> list[str]:
        found: list[str] = []
        waits: list[Call] = [lambda: either.sleep(timedelta(seconds=20)), fail]
        for wait in waits:
            try:
                with anyio.fail_after(0.1):
                    await wait()
            except TimeoutError:
                found.append("too late")
        return found

    assert agreed(shell, app.workflow(approval)) == ["too late"] * 2


# behaviour: A3
@on_worker
def test_a_timeout_around_tries_of_a_step_fires_although_their_row_cannot_keep_it(
    shell: Shell, app: Application
) -> None:
    @app.durable.step(wait=tenacity.wait_fixed(60))
    async def fail() -> None:
        raise ConnectionError("down")

    async def approval() -> str:
        try:
            async with asyncio.timeout(1.5):
                await fail()
        except TimeoutError:
            return "too late"
        return "never"

    assert shell.run(app.workflow(approval)) == "too late"


@on_loop
def test_a_timeout_that_fired_between_operations_fires_on_a_replay(shell: Shell, app: Application) -> None:
    charge = app.plain(lambda: 1, name="charge")

    async def approval() -> list[int]:
        found = [await charge()]
        try:
            async with asyncio.timeout(0.05):
                await asyncio.Event().wait()
        except TimeoutError:
            found.append(await charge())
        return found

    assert agreed(shell, app.workflow(approval)) == [1, 1]


@on_worker
def test_timers_of_steps_are_none_of_the_workflow(shell: Shell, app: Application) -> None:
    @app.durable.step
    async def nap() -> str:
        async with asyncio.timeout(60):
            await asyncio.sleep(0.01)
        return "rested"

    async def rest() -> str:
        return await nap()

    workflow: AnyWorkflow[[], str] = app.workflow(rest)
    assert shell.run(workflow) == "rested"
    with shell.sessionmaker() as session:
        assert session.scalars(select(Step.details)).all() == [None]


@on_worker
@pytest.mark.parametrize("grace", [60.0, 0.0], ids=["in time", "too late"])
@pytest.mark.parametrize("written", ["#timers", '"status": "suspended"'], ids=["timers", "suspended"])
def test_a_cancel_from_outside_does_not_leave_a_suspension_half_done(
    shell: Shell, app: Application, monkeypatch: pytest.MonkeyPatch, written: str, grace: float
) -> None:
    """By code that the workflow does not know, such as a callback of another library, while a row is being written."""
    monkeypatch.setattr(sqla_durable.operations.shielding, "CANCEL_GRACE", grace)
    waiting: list[asyncio.Task[str]] = []

    async def approval() -> str:
        task = asyncio.create_task(under_timeout(lambda: either.wait_signal("go")))
        waiting.append(task)
        try:
            return await task
        except asyncio.CancelledError:
            return f"cancelled, {await either.wait_signal('other')}"

    def cancel(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
        if len(waiting) == 1 and written in f"{statement} {parameters}":
            (task,) = waiting
            task.get_loop().call_soon_threadsafe(task.cancel)
            waiting.append(task)

    workflow = app.workflow(approval)
    event.listen(Engine, "before_cursor_execute", cancel)
    try:
        workflow_id = shell.begin(workflow)
        with shell.background():
            until_suspended(shell, workflow_id, "go")
            assert len(waiting) > 1
            with shell.client() as client:
                client.signal(workflow_id, "go", "yes")
                client.commit()
            assert shell.result(workflow, workflow_id) == "yes"
    finally:
        event.remove(Engine, "before_cursor_execute", cancel)
