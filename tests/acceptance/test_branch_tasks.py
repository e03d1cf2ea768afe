"""Branches of an `async def` workflow: every way to make a task, to cancel one, and to leave one behind."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

import tests.acceptance.branches as branches
from sqla_durable import Durable, Step, current
from sqla_durable.asyncio import AsyncExecutor, to_thread
from sqla_durable.errors import UsageError
from tests.acceptance.application import Application
from tests.acceptance.branches import on_loop, the_keys
from tests.acceptance.shells import Shell
from tests.support.domain import Entry


@on_loop
def test_every_way_to_make_a_task_makes_a_branch(shell: Shell, app: Application) -> None:
    charge = app.plain(branches.same, name="charge")

    async def pay(cents: int) -> int:
        await charge(0)
        return await charge(cents)

    async def checkout() -> list[int]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(pay(1)), asyncio.create_task(pay(2)), asyncio.ensure_future(pay(3))]
        found = [await each for each in tasks]
        found += [await asyncio.shield(pay(4)), await asyncio.wait_for(pay(5), 60)]
        async with asyncio.timeout(60):
            found.append(await pay(6))
        found += [await each for each in asyncio.as_completed([pay(7)])]
        done, _ = await asyncio.wait([asyncio.create_task(pay(8))])
        return [*found, *(each.result() for each in done)]

    assert shell.run(app.workflow(checkout)) == [1, 2, 3, 4, 5, 6, 7, 8]
    # wait_for() is the caller's own line of code, and so is a timeout, on every version of Python.
    roots = ["charge", *(f"charge#{occurrence}" for occurrence in (2, 3, 4))]
    names = ["pay", *(f"pay#{occurrence}" for occurrence in range(2, 7))]
    assert the_keys(shell) == sorted([*roots, *(f"{name}/charge{each}" for name in names for each in ("", "#2"))])


@on_loop
def test_branch_of_a_task_group_of_anyio_has_the_name_of_its_function(shell: Shell, app: Application) -> None:
    charge = app.plain(branches.same, name="charge")

    async def pay(cents: int) -> None:
        await charge(cents)

    async def checkout() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(pay, 1)
            group.start_soon(pay, 2)

    shell.run(app.workflow(checkout))
    assert the_keys(shell) == ["pay#2/charge", "pay/charge"]


@on_loop
def test_wait_for_in_a_branch_is_the_branch(shell: Shell, app: Application) -> None:
    charge = app.plain(branches.same, name="charge")

    async def pay(cents: int) -> int:
        return await asyncio.wait_for(asyncio.wait_for(charge(cents), 60), 60)

    async def checkout() -> list[int]:
        return list(await asyncio.gather(pay(1), pay(2), asyncio.wait_for(pay(3), 60)))

    assert shell.run(app.workflow(checkout)) == [1, 2, 3]
    assert the_keys(shell) == ["pay#2/charge", "pay/charge", "wait_for/charge"]


@on_loop
def test_branch_that_a_timeout_ends_may_be_called_again(shell: Shell, app: Application) -> None:
    hangs = [True]

    async def checkout() -> list[int]:
        found: list[int] = []
        begun = asyncio.Event()

        @app.durable.step
        async def charge() -> int:
            if hangs:
                begun.set()
                await asyncio.Event().wait()
            return 7

        for _ in range(2):
            try:
                async with asyncio.timeout(None) as limit:
                    charging = asyncio.ensure_future(charge())
                    if hangs:  # not after a time: in the middle of a statement, the caller's transaction would be lost
                        await begun.wait()
                        limit.reschedule(0)
                    found.append(await charging)
            except TimeoutError:
                hangs.clear()
        return found

    assert shell.run(app.workflow(checkout)) == [7]
    assert the_keys(shell) == ["charge", "charge#2"]


@on_loop
def test_failing_task_group_leaves_no_half_done_step(shell: Shell, app: Application) -> None:
    """The cancelled one has rolled back, or has committed before the workflow goes on: its writes and its record."""
    in_step = asyncio.Event()

    @app.durable.step
    async def write(session: AsyncSession) -> None:
        session.add(Entry(account="a", cents=1))
        await session.flush()
        in_step.set()
        await asyncio.Event().wait()

    charge = app.plain(branches.same, name="charge")

    async def checkout() -> str:
        async def pay() -> None:
            await charge(1)
            await write()

        async def fails() -> None:
            await in_step.wait()
            raise LookupError("no such order")

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(pay())
                group.create_task(fails())
        except ExceptionGroup as errors:
            return f"{errors.exceptions} {await charge(2)}"
        return "paid"

    assert shell.run(app.workflow(checkout)) == "(LookupError('no such order'),) 2"
    assert the_keys(shell) == ["charge", "pay/charge", "pay/write"]
    with shell.sessionmaker() as session:
        assert session.scalars(select(Entry)).all() == []


@on_loop
def test_cancelled_branch_executes_nothing_again_on_a_replay(shell: Shell, app: Application) -> None:
    """What cancelled it is recorded and comes at once: before the step that it was cancelled in begins again."""
    executed: list[str] = []

    @app.durable.step
    async def hang() -> None:
        executed.append("hang")
        await asyncio.Event().wait()

    fail = app.plain(branches.refuse_odd, name="fail")
    charge = app.plain(lambda: executed.append("charge"), name="charge")

    async def checkout() -> str:
        async def inner() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(pay())

        async def pay() -> None:
            await charge()
            await hang()

        async def fails() -> None:
            while len(executed) < 2:
                await asyncio.sleep(0)
            await fail(1)

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(inner())
                group.create_task(fails())
        except ExceptionGroup as errors:
            return str(errors.exceptions)
        return "paid"

    workflow = app.workflow(checkout)
    with shell.client() as client:
        workflow_id = client.start(workflow).id
        client.commit()
    first = shell.finish(workflow, workflow_id)
    shell.crashed(workflow_id)
    assert shell.finish(workflow, workflow_id) == first == "(ValueError('1 is odd'),)"
    assert executed == ["charge", "hang"]


@on_loop
def test_workflow_that_leaves_a_branch_running_is_refused(shell: Shell, app: Application) -> None:
    hold = asyncio.Event()

    async def lingers() -> None:
        await hold.wait()

    async def checkout(cancels: bool) -> str:
        task = asyncio.create_task(lingers())
        if cancels:
            task.cancel()
        return "done"

    workflow = app.workflow(checkout)
    assert shell.run(workflow, True) == "done"
    with pytest.raises(UsageError, match=r"'checkout' returned with branches still running: 'lingers'. Await"):
        shell.run(workflow, False)


@on_loop
def test_step_whose_task_is_cancelled_before_it_begins_is_not_left_behind(shell: Shell, app: Application) -> None:
    charge = app.plain(lambda: 1, name="charge")

    async def checkout() -> int:
        call: Any = charge.step()
        task: asyncio.Task[int] = asyncio.ensure_future(call)
        task.cancel()
        await asyncio.wait([task])
        return await charge()

    assert shell.run(app.workflow(checkout)) == 1
    assert the_keys(shell) == ["charge#2"]


@on_loop
def test_step_in_a_task_that_nobody_saw_is_refused(shell: Shell, app: Application) -> None:
    charge = app.plain(lambda: 1, name="charge")

    async def unseen() -> int:
        return await asyncio.Task(charge())  # not made by the event loop's factory

    async def in_thread() -> Any:
        return await asyncio.to_thread(charge.step)

    async def in_callback() -> Any:
        loop = asyncio.get_running_loop()
        made: asyncio.Future[asyncio.Task[int]] = loop.create_future()
        loop.call_soon(lambda: made.set_result(asyncio.ensure_future(charge())))
        return await (await made)

    for each in (unseen, in_thread, in_callback):
        workflow = app.workflow(each)
        with pytest.raises(UsageError, match="step 'charge' was called in a task or thread that is no branch"):
            shell.run(workflow)


@on_loop
def test_task_outside_the_context_of_the_workflow_is_outside_of_it(shell: Shell, app: Application) -> None:
    import contextvars

    async def outside() -> bool:
        return current() is None

    async def checkout() -> bool:
        return await asyncio.create_task(outside(), context=contextvars.Context())

    assert shell.run(app.workflow(checkout))


async def test_task_factory_of_the_application_is_kept(
    async_session_factory: async_sessionmaker[AsyncSession],
) -> None:
    loop = asyncio.get_running_loop()
    made: list[str] = []

    def factory(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        made.append(coroutine.__qualname__)
        return asyncio.Task(coroutine, loop=loop, **options)

    durable = Durable()
    charge = durable.step(branches.refuse_odd, name="charge")

    async def pay() -> int:
        return await to_thread(charge, 2)

    @durable.workflow
    async def checkout() -> list[int]:
        return list(await asyncio.gather(pay(), pay()))

    loop.set_task_factory(factory)
    try:
        async with async_session_factory() as session:
            assert await AsyncExecutor(session).run(checkout) == [2, 2]
            assert loop.get_task_factory() is factory
            assert sorted(await session.scalars(select(Step.key))) == ["pay#2/charge", "pay/charge"]
    finally:
        loop.set_task_factory(None)
    assert len([each for each in made if each.endswith("pay")]) == 2
