"""Timers of asyncio that cut no call off: what fired before an outcome came fires before it on every replay."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest

from sqla_durable.asyncio import wait_signal
from tests.acceptance.application import Application
from tests.acceptance.shells import Shell
from tests.acceptance.test_cancelled_calls import agreed, history
from tests.store import races

SHORT, LONG = 0.1, 0.6
Record = Callable[[str], Awaitable[str]]


async def paid() -> str:
    return await wait_signal("paid", str)


async def by_wait(record: Record) -> str:
    task = asyncio.create_task(paid())
    while not (await asyncio.wait([task], timeout=LONG))[0]:
        await record("reminder")
    return await record(task.result())


async def by_wait_for_an_event(record: Record) -> str:
    came = asyncio.Event()

    async def watch() -> None:
        await paid()
        came.set()

    task = asyncio.create_task(watch())
    while not came.is_set():
        with suppress(TimeoutError):
            await asyncio.wait_for(came.wait(), LONG)
        await record("reminder")
    await task
    return await record("receipt")


async def by_polling(record: Record) -> str:
    task = asyncio.create_task(paid())
    while not task.done():
        await asyncio.sleep(LONG)
        await record("reminder")
    return await record("receipt")


async def by_shield(record: Record) -> str:
    task = asyncio.create_task(paid())
    try:
        return await record(await asyncio.wait_for(asyncio.shield(task), LONG))
    except TimeoutError:
        await record("late")
        return await record(await task)


# behaviour: A3
@pytest.mark.shells(["async-worker"])
@pytest.mark.parametrize("pay", [by_wait, by_wait_for_an_event, by_polling, by_shield])
def test_a_timer_that_fired_while_a_call_was_open_fires_before_its_outcome_on_a_replay(
    shell: Shell, app: Application, pay: Callable[[Record], Awaitable[str]]
) -> None:
    effects: list[str] = []

    async def note(what: str) -> str:
        effects.append(what)
        return what

    step = app.durable.step(note)

    async def order() -> str:
        return await pay(step)

    workflow = app.workflow(order)
    workflow_id = shell.begin(workflow)
    with shell.background():
        races.wait_until(lambda: bool(effects), what="a timer that fires")
        shell.crashed(workflow_id)  # in the middle: the call is still open
        with shell.client() as client:
            client.signal(workflow_id, "paid", "receipt")
            client.commit()
        assert shell.result(workflow, workflow_id) == "receipt"
        before = history(shell, workflow_id)
        shell.crashed(workflow_id)
        assert shell.result(workflow, workflow_id) == "receipt"
    assert history(shell, workflow_id) == before
    # In what is recorded, and not in `effects`: the attempt that lost the workflow may go on to a plain step.
    assert [output for _, output, _ in before.values()].count("receipt") == 2, "the signal, and the step"


# behaviour: A3
@pytest.mark.shells(["async-worker", "async-executor", "async-joined"])
def test_of_a_timer_and_a_step_the_first_is_first_on_a_replay(shell: Shell, app: Application) -> None:
    async def slow() -> str:
        await asyncio.sleep(LONG)
        return "done"

    step = app.durable.step(slow)

    async def race() -> str:
        task = asyncio.create_task(step())
        done, _ = await asyncio.wait([task], timeout=SHORT)
        return f"{len(done)} done, then {await task}"

    assert agreed(shell, app.workflow(race)) == "0 done, then done"
