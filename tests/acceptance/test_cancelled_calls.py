"""Calls that the workflow's own code cancels: what the code sees is what is recorded, on every replay."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from datetime import timedelta
from typing import Any, TypeVar
from uuid import UUID

import anyio
import pytest
from sqlalchemy import event, func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

import sqla_durable.asyncio as aio
import sqla_durable.runtime.runtimes
from sqla_durable import Event, Step, StepStatus, WorkflowStatus, set_event
from sqla_durable.asyncio import AsyncExecutor, to_thread
from sqla_durable.operations.history import FIRED
from tests.acceptance import either
from tests.acceptance.application import AnyWorkflow, Application
from tests.acceptance.branches import on_loop
from tests.acceptance.shells import AsyncShell, AsyncWorkerShell, Shell
from tests.support.domain import Entry

R = TypeVar("R")
on_worker = pytest.mark.shells(["async-worker"])
Way = Callable[[Callable[[], Awaitable[R]]], Awaitable[R]]


def agreed(shell: Shell, workflow: AnyWorkflow[[], R]) -> R:
    """Execute a workflow, replay it as after a crash, and return what both came to; its history has not changed."""
    workflow_id = shell.begin(workflow)
    first = finish(shell, workflow, workflow_id)
    before = history(shell, workflow_id)
    shell.crashed(workflow_id)
    assert finish(shell, workflow, workflow_id) == first
    assert history(shell, workflow_id) == before
    return first


def finish(shell: Shell, workflow: AnyWorkflow[[], R], workflow_id: UUID) -> R:
    """Bring it to its end; on a worker, with sync sessions too."""
    if not isinstance(shell, AsyncWorkerShell):
        return shell.finish(workflow, workflow_id)
    with shell.background():
        return shell.result(workflow, workflow_id)


def history(shell: Shell, workflow_id: UUID) -> dict[str, tuple[Any, ...]]:
    with shell.sessionmaker() as session:
        found = session.scalars(select(Step).where(Step.workflow_id == workflow_id))
        calls = (each for each in found if each.name != FIRED)
        return {each.key: (each.status, each.output, each.error) for each in calls}


def entries(shell: Shell) -> list[str]:
    with shell.sessionmaker() as session:
        return sorted(session.scalars(select(Entry.account)))


async def with_one_timeout(work: Callable[[], Awaitable[R]]) -> R:
    async with asyncio.timeout(0.05):
        return await work()


async def with_nested_timeouts(work: Callable[[], Awaitable[R]]) -> R:
    async with asyncio.timeout(0.06), asyncio.timeout(0.05):
        return await work()


async def with_two_cancels(work: Callable[[], Awaitable[R]]) -> R:
    async def branch() -> R:
        return await work()

    task = asyncio.create_task(branch())
    for _ in range(2):
        await asyncio.sleep(0.03)
        task.cancel()
    try:
        return await task
    except asyncio.CancelledError:
        raise TimeoutError from None


async def with_a_scope_of_anyio(work: Callable[[], Awaitable[R]]) -> R:
    with anyio.fail_after(0.05):
        return await work()


async def with_wait_for(work: Callable[[], Awaitable[R]]) -> R:
    return await asyncio.wait_for(work(), 0.05)


WAYS = [with_one_timeout, with_nested_timeouts, with_two_cancels, with_a_scope_of_anyio, with_wait_for]


# behaviour: A1 A2
@on_worker
@pytest.mark.parametrize("way", WAYS)
def test_a_sync_step_whose_call_was_cancelled_never_commits(shell: Shell, app: Application, way: Way[str]) -> None:
    called_off, tried = threading.Event(), threading.Event()

    @app.durable.step
    def ship(session: Session) -> str:
        session.add(Entry(account="shipped", cents=1))
        session.flush()
        assert called_off.wait(30)
        event.listen(session, "after_transaction_end", lambda *_: tried.set())
        return "shipped"

    @app.durable.step
    async def call_off(session: AsyncSession) -> str:
        session.add(Entry(account="called off", cents=1))
        return "called off"

    async def checkout() -> str:
        try:
            return await way(lambda: to_thread(ship))
        except TimeoutError:
            outcome = await call_off()
            called_off.set()
            assert await asyncio.to_thread(tried.wait, 30)  # its transaction has ended
            return outcome

    assert agreed(shell, app.workflow(checkout)) == "called off"
    assert entries(shell) == ["called off"]
    found = history(shell, shell.only)
    assert [key for key, (status, *_) in found.items() if status is StepStatus.FAILED] == [
        "branch/ship" if way is with_two_cancels else "ship"
    ]


# behaviour: A1 A2
@pytest.mark.shells(["async-executor", "async-worker"])  # joined: cut off in a statement, the transaction is lost
@pytest.mark.parametrize("way", [with_nested_timeouts, with_a_scope_of_anyio])
def test_an_async_step_whose_call_was_cancelled_is_rolled_back_and_recorded(
    shell: Shell, app: Application, way: Way[str]
) -> None:
    executed: list[str] = []

    @app.durable.step
    async def ship(session: AsyncSession) -> str:
        executed.append("ship")
        session.add(Entry(account="shipped", cents=1))
        await session.flush()
        await asyncio.Event().wait()
        return "shipped"

    @app.durable.step
    async def call_off(session: AsyncSession) -> str:
        session.add(Entry(account="called off", cents=1))
        return "called off"

    async def checkout() -> str:
        try:
            return await way(ship)
        except TimeoutError:
            return await call_off()

    assert agreed(shell, app.workflow(checkout)) == "called off"
    assert (executed, entries(shell)) == (["ship"], ["called off"])


# behaviour: A1
@on_worker
def test_a_cancel_that_comes_after_the_commit_of_a_sync_step_is_too_late(shell: Shell, app: Application) -> None:
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []
    cancel_sent = threading.Event()

    @app.durable.step
    def ship(session: Session) -> str:
        loop, task = running[-1]

        def cancel(_: Session) -> None:
            loop.call_soon_threadsafe(task.cancel)
            loop.call_soon_threadsafe(lambda: loop.call_soon(cancel_sent.set))
            assert cancel_sent.wait(30)

        event.listen(session, "after_commit", cancel)
        session.add(Entry(account="shipped", cents=1))
        return "shipped"

    @app.durable.step
    async def call_off() -> str:
        return "called off"

    async def checkout() -> list[str]:
        async def pay() -> list[str]:
            outcomes = [await to_thread(ship)]
            try:
                outcomes.append(await call_off())
            except asyncio.CancelledError:  # what came too late for one operation is for the next
                outcomes.append("cancelled")
            return outcomes

        task = asyncio.create_task(pay())
        running.append((asyncio.get_running_loop(), task))
        if len(running) > 1:  # a replay executes nothing that could cancel it
            await asyncio.sleep(0.1)
            task.cancel()
        return await task

    assert agreed(shell, app.workflow(checkout)) == ["shipped", "cancelled"]
    assert entries(shell) == ["shipped"]
    statuses = {key: status for key, (status, *_) in history(shell, shell.only).items()}
    assert statuses == {"pay/ship": StepStatus.SUCCEEDED, "pay/call_off": StepStatus.FAILED}


# behaviour: A1
@pytest.mark.shells(["async-executor", "async-worker", "asyncpg-worker"])
def test_a_cancel_in_the_middle_of_a_commit_is_settled_by_the_database(shell: Shell, app: Application) -> None:
    @app.durable.step
    async def ship(session: AsyncSession) -> str:
        task = asyncio.current_task()
        assert task is not None
        cancel: Callable[[Session], bool] = lambda _: task.cancel()  # noqa: E731
        event.listen(session.sync_session, "before_commit", cancel)
        session.add(Entry(account="shipped", cents=1))
        return "shipped"

    async def checkout() -> str:
        async def pay() -> str:
            return await ship()

        task = asyncio.create_task(pay())
        try:
            return await task
        except asyncio.CancelledError:
            return "cancelled"

    workflow = app.workflow(checkout)
    outcome = shell.run(workflow)
    (recorded,) = history(shell, shell.only).values()
    assert (outcome, entries(shell), recorded[0]) in [
        ("shipped", ["shipped"], StepStatus.SUCCEEDED),
        ("cancelled", [], StepStatus.FAILED),
    ]


# behaviour: A1
@on_loop
def test_a_cancel_that_a_step_swallows_reaches_the_next_operation(shell: Shell, app: Application) -> None:
    @app.durable.step
    async def stubborn() -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "stays"
        return "never"

    never = app.plain(lambda: "never", name="never")

    async def checkout() -> list[str]:
        outcomes: list[str] = []
        try:
            async with asyncio.timeout(0.05):
                outcomes.append(await stubborn())
                outcomes.append(await never())
        except TimeoutError:
            outcomes.append("timeout")
        return outcomes

    assert agreed(shell, app.workflow(checkout)) == ["stays", "timeout"]


# behaviour: A4
@on_loop
@pytest.mark.parametrize("begun", [False, True])
def test_calls_that_are_cancelled_and_left_do_not_fail_the_workflow(
    shell: Shell, app: Application, begun: bool
) -> None:
    @app.durable.step
    async def hang() -> None:
        await asyncio.Event().wait()

    call: Any = aio.sleep

    async def checkout() -> str:
        tasks: list[asyncio.Task[Any]] = [
            asyncio.create_task(hang()),
            asyncio.create_task(call(timedelta(days=1))),
        ]
        if begun:
            await asyncio.sleep(0.05)
        for each in tasks:
            each.cancel()
        return "done"

    assert agreed(shell, app.workflow(checkout)) == "done"
    assert len(history(shell, shell.only)) == (2 if begun else 0)


# behaviour: A4
@on_worker
def test_losers_of_a_race_that_the_code_cancels_do_not_fail_the_workflow(shell: Shell, app: Application) -> None:
    charge = app.plain(lambda: "charged", name="charge")

    @app.durable.step
    async def hang() -> None:
        await asyncio.Event().wait()

    async def checkout() -> str:
        calls: list[Any] = [hang(), either.wait_signal("go"), charge()]
        done, pending = await asyncio.wait(map(asyncio.ensure_future, calls), return_when=asyncio.FIRST_COMPLETED)
        for each in pending:
            each.cancel()
        (first,) = done
        return str(first.result())

    assert agreed(shell, app.workflow(checkout)) == "charged"
    statuses = {key: status for key, (status, *_) in history(shell, shell.only).items()}
    assert statuses == {
        "Called.__call__/charge": StepStatus.SUCCEEDED,
        "hang": StepStatus.FAILED,
        "signal:go": StepStatus.FAILED,
    }


@on_loop
def test_what_is_cancelled_after_an_operation_has_begun_on_a_replay_too(shell: Shell, app: Application) -> None:
    """The replay of an operation takes no time: the outcome of another call stands all the same."""
    charge = app.plain(lambda: "charged", name="charge")

    @app.durable.step
    async def reserve() -> None:
        await asyncio.sleep(0.05)

    async def checkout() -> str:
        async def pay() -> str:
            return await charge()

        task = asyncio.create_task(pay())
        await reserve()
        task.cancel()
        return await task

    assert agreed(shell, app.workflow(checkout)) == "charged"


@on_worker
def test_a_step_in_a_thread_publishes_nothing_after_its_call_was_cancelled(shell: Shell, app: Application) -> None:
    called_off, refused = threading.Event(), threading.Event()

    @app.durable.step
    def report() -> None:
        assert called_off.wait(30)
        try:
            set_event("status", "reported")
        except BaseException:
            refused.set()
            raise

    async def checkout() -> bool:
        try:
            async with asyncio.timeout(0.05):
                await to_thread(report)
        except TimeoutError:
            called_off.set()
        return await asyncio.to_thread(refused.wait, 30)

    assert shell.run(app.workflow(checkout))
    with shell.sessionmaker() as session:
        assert session.scalar(select(func.count()).select_from(Event)) == 0


def hanging_once(begun: asyncio.Event | threading.Event) -> Callable[[], Coroutine[Any, Any, str]]:
    """Return a step whose first execution says that it has begun, and does not end."""

    async def charge() -> str:
        if not begun.is_set():
            begun.set()
            await asyncio.Event().wait()
        return "charged"

    return charge


@pytest.mark.shells(["async-executor"])
def test_an_executor_that_is_cancelled_from_outside_records_no_cancelled_call(shell: Shell, app: Application) -> None:
    begun = asyncio.Event()
    charge = app.durable.step(hanging_once(begun))

    async def checkout() -> str:
        return await charge()

    workflow: Any = app.workflow(checkout)
    workflow_id = shell.begin(workflow)
    assert isinstance(shell, AsyncShell)

    async def execute() -> None:
        async with shell.async_sessionmaker() as session:
            executing = asyncio.create_task(AsyncExecutor(session).execute(workflow, workflow_id))
            await begun.wait()
            executing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await executing

    shell.runner.run(execute())
    assert history(shell, workflow_id) == {}
    assert shell.one(workflow_id).status is WorkflowStatus.PENDING
    assert shell.finish(workflow, workflow_id) == "charged"


@on_worker
def test_a_worker_that_stops_records_no_cancelled_call(shell: Shell, app: Application) -> None:
    begun = threading.Event()
    charge = app.durable.step(hanging_once(begun))

    async def checkout() -> str:
        async with asyncio.timeout(3600):
            return await charge()

    workflow = app.workflow(checkout)
    workflow_id = shell.begin(workflow)
    with shell.background(grace=timedelta(0)):
        assert begun.wait(30)
    assert history(shell, workflow_id) == {}
    assert shell.finish(workflow, workflow_id) == "charged"


@on_worker
def test_a_call_that_todays_code_does_not_cancel_any_more_ends_all_the_same(
    shell: Shell, app: Application, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sqla_durable.runtime.runtimes, "_QUIET", 0.1)
    monkeypatch.setattr(sqla_durable.runtime.runtimes, "_CHECK_EVERY", 0.02)
    cancels = [True]

    @app.durable.step
    async def hang() -> None:
        await asyncio.Event().wait()

    async def checkout() -> str:
        task = asyncio.create_task(hang())
        await asyncio.sleep(0.05)
        if cancels:
            task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            return "cancelled"
        return "never"

    workflow = app.workflow(checkout)
    workflow_id = shell.begin(workflow)
    assert shell.finish(workflow, workflow_id) == "cancelled"
    cancels.clear()
    shell.crashed(workflow_id)
    assert shell.finish(workflow, workflow_id) == "cancelled"
    assert "an earlier attempt cancelled the call 'hang', and today's code does not" in caplog.text
