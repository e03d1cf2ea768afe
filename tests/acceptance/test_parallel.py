"""Branches of a workflow that run beside each other, as tasks or threads, with several steps each."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from datetime import timedelta
from functools import partial
from typing import Any, cast
from uuid import UUID

import pytest
import tenacity
from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import (
    AsyncExecutor,
    Durable,
    Executor,
    Step,
    Worker,
    Workflow,
    WorkflowStatus,
    cancel,
    current,
    parallel,
    run_step,
)
from sqla_durable.errors import ArgumentError, SyncAsyncError, UnfinishedStepError, UsageError, WorkflowCancelledError
from tests.acceptance.application import Application, Form, drive
from tests.acceptance.shells import POLL, Shell
from tests.store import races
from tests.support.domain import Entry

on_loop = pytest.mark.shells(["async-executor", "async-joined", "async-worker"])
in_threads = pytest.mark.shells(["executor", "joined", "worker"])
on_workers = pytest.mark.shells(["worker", "async-worker"])
Branch = Callable[[], Coroutine[Any, Any, Any]]


async def beside(app: Application, *branches: Branch) -> list[Any]:
    """Execute branches beside each other, in either form, all to their ends; then raise the first error."""
    if app.form is Form.ASYNC:
        found = await asyncio.gather(*(each() for each in branches), return_exceptions=True)
        for each in found:
            if isinstance(each, BaseException):
                raise each
        return found
    return list(parallel(*map(_driven, branches)))


def _driven(branch: Branch) -> Callable[[], Any]:
    def driven() -> Any:
        return drive(branch())

    driven.__qualname__ = branch.__qualname__
    return driven


def keys(shell: Shell, workflow_id: UUID) -> list[str]:
    return sorted(each.key for each in shell.one(workflow_id).steps)


def the_keys(shell: Shell) -> list[str]:
    with shell.sessionmaker() as session:
        return sorted(session.scalars(select(Step.key)))


# behaviour: S7
def test_branches_have_several_steps_each_and_may_call_the_same_ones(shell: Shell, app: Application) -> None:
    reserve = app.transactional(_reserve, name="reserve")
    charge = app.plain(_double, name="charge")

    async def checkout() -> list[int]:
        async def pay() -> int:
            return await charge(await reserve(1)) + await charge(10)

        async def refund() -> int:
            return await charge(await reserve(2))

        first = await reserve(100)
        return [first, *await beside(app, pay, refund, pay)]

    workflow = app.workflow(checkout)
    with shell.client() as client:
        workflow_id = client.start(workflow).id
        client.commit()
    assert shell.finish(workflow, workflow_id) == [100, 22, 4, 22]
    recorded = keys(shell, workflow_id)
    assert recorded == [
        "pay#2/charge",
        "pay#2/charge#2",
        "pay#2/reserve",
        "pay/charge",
        "pay/charge#2",
        "pay/reserve",
        "refund/charge",
        "refund/reserve",
        "reserve",
    ]
    shell.crashed(workflow_id)
    assert shell.finish(workflow, workflow_id) == [100, 22, 4, 22]
    with shell.sessionmaker() as session:
        assert session.scalar(select(func.sum(Entry.cents))) == 104


def _reserve(session: Session, cents: int) -> int:
    session.add(Entry(account="a", cents=cents))
    return cents


def test_error_of_a_branch_is_the_workflows_and_the_same_on_a_replay(shell: Shell, app: Application) -> None:
    charge = app.plain(_refuse_odd, name="charge")

    async def checkout() -> str:
        async def pay(number: int) -> int:
            return int(await charge(number) + await charge(2 * number))

        try:
            await beside(app, *(_named("pay", partial(pay, number)) for number in (2, 3, 4)))
        except ValueError as error:
            return str(error)
        return "paid"

    workflow = app.workflow(checkout)
    with shell.client() as client:
        workflow_id = client.start(workflow).id
        client.commit()
    assert shell.finish(workflow, workflow_id) == "3 is odd"
    shell.crashed(workflow_id)
    assert shell.finish(workflow, workflow_id) == "3 is odd"


def _double(cents: int) -> int:
    return 2 * cents


def _same(cents: int) -> int:
    return cents


def _refuse_odd(number: int) -> int:
    if number % 2:
        raise ValueError(f"{number} is odd")
    return number


def _named(name: str, branch: Branch) -> Branch:
    async def called() -> Any:
        return await branch()

    called.__qualname__ = name
    return called


# --- tasks


@on_loop
def test_every_way_to_make_a_task_makes_a_branch(shell: Shell, app: Application) -> None:
    charge = app.plain(_same, name="charge")

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
def test_wait_for_in_a_branch_is_the_branch(shell: Shell, app: Application) -> None:
    charge = app.plain(_same, name="charge")

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
    assert the_keys(shell) == ["charge#2"]


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

    charge = app.plain(_same, name="charge")

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
    assert the_keys(shell) == ["charge", "pay/charge"]
    with shell.sessionmaker() as session:
        assert session.scalars(select(Entry)).all() == []


@on_loop
def test_cancelled_branch_executes_nothing_anew_on_a_replay(shell: Shell, app: Application) -> None:
    """What cancelled it is recorded and comes at once: before the step that it was cancelled in begins again."""
    executed: list[str] = []

    @app.durable.step
    async def hang() -> None:
        executed.append("hang")
        await asyncio.Event().wait()

    fail = app.plain(_refuse_odd, name="fail")
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


@pytest.mark.parametrize("stays", [False, True], ids=["ends", "stays"])
async def test_cancelled_sync_step_is_waited_for_until_it_has_committed(
    session_factory: sessionmaker[Session], async_session_factory: async_sessionmaker[AsyncSession], stays: bool
) -> None:
    durable = Durable()
    in_step, cancelled, go_on = threading.Event(), asyncio.Event(), threading.Event()

    @durable.step
    def write(session: Session) -> int:
        session.add(Entry(account="a", cents=1))
        in_step.set()
        assert go_on.wait(30)
        return 1

    @durable.step
    async def tell() -> None:
        cancelled.set()

    @durable.workflow
    async def checkout() -> list[str]:
        async def pay() -> None:
            await write.aio()

        paying = asyncio.create_task(pay())
        await asyncio.to_thread(in_step.wait, 30)
        paying.cancel()
        await tell()
        if not stays:
            return ["left"]
        with pytest.raises(asyncio.CancelledError):
            await paying
        return ["waited"]

    async with async_session_factory() as session:
        workflow = await checkout.start(session)
        workflow_id = workflow.id
        await session.commit()
    async with Worker(
        durable, sessionmaker=session_factory, async_sessionmaker=async_session_factory, poll_interval=POLL
    ):
        await cancelled.wait()
        go_on.set()
        found = await checkout.handle(async_session_factory, workflow_id).result(timeout=timedelta(seconds=30))
    assert found == ["waited" if stays else "left"]
    with session_factory() as check:
        assert sorted(check.scalars(select(Step.key))) == ["pay/write", "tell"]
        assert check.scalar(select(func.count()).select_from(Entry)) == 1


@on_loop
def test_workflow_that_leaves_a_branch_running_is_refused(shell: Shell, app: Application) -> None:
    hold = asyncio.Event()

    async def lingers() -> None:
        await hold.wait()

    async def checkout(lets_go: bool) -> str:
        task = asyncio.create_task(lingers())
        if lets_go:
            task.cancel()
        return "done"

    workflow = app.workflow(checkout)
    assert shell.run(workflow, True) == "done"
    with pytest.raises(UnfinishedStepError, match="'checkout' returned while 'lingers' was still running") as caught:
        shell.run(workflow, False)
    assert caught.value.steps == ["lingers"]


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
    charge = durable.step(_refuse_odd, name="charge")

    async def pay() -> int:
        return await charge.aio(2)

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


# --- threads


@in_threads
def test_results_come_in_the_order_given_whichever_ended_first(shell: Shell, app: Application) -> None:
    second_ended = threading.Event()

    @app.durable.step
    def slow() -> int:
        assert second_ended.wait(30)
        return 1

    @app.durable.step
    def fast() -> str:
        second_ended.set()
        return "2"

    async def checkout() -> list[Any]:
        first, second = parallel(lambda: slow(), lambda: fast())
        return [first, second]

    assert shell.run(app.workflow(checkout)) == [1, "2"]
    assert the_keys(shell) == ["lambda#2/fast", "lambda/slow"]


@in_threads
def test_first_error_in_the_order_given_is_raised_when_all_have_ended(shell: Shell, app: Application) -> None:
    last_failed = threading.Event()
    ended: list[str] = []

    @app.durable.step
    def fail(number: int) -> None:
        if number == 1:
            assert last_failed.wait(30)
        else:
            last_failed.set()
        raise LookupError(f"order {number}")

    @app.durable.step
    def work() -> None:
        ended.append("work")

    def failing(number: int) -> None:
        try:
            fail(number)
        finally:
            last_failed.wait(30)

    def working() -> None:
        assert last_failed.wait(30)
        work()
        work()

    async def checkout() -> str:
        try:
            parallel(partial(failing, 1), working, partial(failing, 2))
        except LookupError as error:
            return f"{error} {len(ended)}"
        return "paid"

    assert shell.run(app.workflow(checkout)) == "order 1 2"


@in_threads
def test_branches_wait_for_a_thread_of_theirs(shell: Shell, app: Application) -> None:
    threads: set[str] = set()

    @app.durable.step
    def charge(number: int) -> int:
        threads.add(threading.current_thread().name)
        return number

    def pay(number: int) -> int:
        return charge(number) + sum(parallel(partial(charge, 1), partial(charge, 2), max_workers=1))

    async def checkout() -> list[int]:
        return list(parallel(*(partial(pay, number) for number in range(5)), max_workers=2))

    assert shell.run(app.workflow(checkout)) == [3, 4, 5, 6, 7]
    names = ["pay", "pay#2", "pay#3", "pay#4", "pay#5"]
    inner = ["charge", "charge/charge", "charge#2/charge"]
    assert the_keys(shell) == sorted(f"{name}/{each}" for name in names for each in inner)


@in_threads
def test_thread_that_is_no_branch_is_refused(shell: Shell, app: Application) -> None:
    import contextvars

    charge = app.plain(lambda: 1, name="charge")

    async def checkout() -> str:
        context = contextvars.copy_context()
        found: list[str] = []

        def call() -> None:
            try:
                charge.step()
            except UsageError as error:
                found.append(str(error))

        thread = threading.Thread(target=partial(context.run, call))
        thread.start()
        thread.join()
        return found[0]

    assert "in a function given to parallel()" in shell.run(app.workflow(checkout))


@in_threads
def test_wrong_use_of_parallel_is_explained(shell: Shell, app: Application) -> None:
    async def coroutine() -> None: ...

    async def checkout() -> list[str]:
        said: list[str] = []
        for functions, kind in [((7,), ArgumentError), ((coroutine,), SyncAsyncError)]:
            with pytest.raises(kind) as caught:
                parallel(*cast("Any", functions))
            said.append(str(caught.value))
        with pytest.raises(ArgumentError) as caught:
            parallel(lambda: 1, max_workers=0)
        assert parallel() == ()
        return [*said, str(caught.value)]

    first, second, third = shell.run(app.workflow(checkout))
    assert "takes functions and calls them, got 7: pass functools.partial(pay, 7)" in first
    assert "it is async def: make it a def, or the workflow async def with asyncio.gather" in second
    assert "max_workers=0 of parallel() is less than 1" in third


@on_loop
def test_parallel_in_an_async_workflow_names_gather(shell: Shell, app: Application) -> None:
    async def checkout() -> None:
        parallel(lambda: 1)

    with pytest.raises(SyncAsyncError, match=r"which is async def: await asyncio.gather\(...\)"):
        shell.run(app.workflow(checkout))


def test_outside_a_workflow_and_inside_a_step_parallel_calls_in_threads(shell: Shell, app: Application) -> None:
    together = threading.Barrier(2, timeout=30)

    def wait() -> int:
        return together.wait()

    def waits() -> list[int]:
        return sorted(parallel(wait, wait))

    assert waits() == [0, 1]
    step = app.plain(waits)

    async def checkout() -> list[int]:
        return await step()

    assert shell.run(app.workflow(checkout)) == [0, 1]
    assert the_keys(shell) == ["waits"]


async def test_parallel_on_the_inside_of_an_async_session_is_refused(
    async_session_factory: async_sessionmaker[AsyncSession],
) -> None:
    durable = Durable()

    @durable.workflow
    def checkout() -> None:
        parallel(lambda: 1)

    async with async_session_factory() as session:
        with pytest.raises(SyncAsyncError, match="the inside of an AsyncSession, which threads cannot use"):
            await session.run_sync(lambda inside: Executor(inside).run(checkout))


def test_a_refused_checkpoint_of_a_branch_fails_the_workflow_whatever_it_catches(
    session_factory: sessionmaker[Session],
) -> None:
    """A workflow must not succeed with a hole in its history."""
    durable = Durable()
    too_long = secrets.token_hex(3_000)  # random, so that compression does not bring it under the limit of an index row

    def pay() -> None:
        run_step(too_long, int)

    @durable.workflow
    def checkout() -> str:
        try:
            parallel(pay, int)
        except Exception:
            return "hole"
        return "paid"

    with session_factory.begin() as session:
        workflow_id = checkout.start(session).id
    with Worker(durable, sessionmaker=session_factory, poll_interval=POLL), pytest.raises(Exception, match="refuses"):
        checkout.handle(session_factory, workflow_id).result(timeout=timedelta(seconds=30))


# --- cancelling, and waiting as a row


@on_workers
def test_cancelled_workflow_ends_in_all_its_branches(shell: Shell, app: Application) -> None:
    in_step, ended = threading.Semaphore(0), threading.Semaphore(0)
    go_on = threading.Event()

    def wait() -> None:
        in_step.release()
        assert go_on.wait(30)

    async def await_() -> None:
        in_step.release()
        await asyncio.to_thread(go_on.wait, 30)

    step: Any = app.durable.step(await_ if app.form is Form.ASYNC else wait, name="wait")

    async def checkout() -> None:
        async def branch() -> None:
            try:
                for _ in range(2):
                    outcome = step()
                    if isinstance(outcome, Awaitable):
                        await outcome
            finally:
                ended.release()

        await beside(app, branch, branch)

    workflow = app.workflow(checkout)
    with shell.background():
        with shell.sessionmaker.begin() as session:
            workflow_id = workflow.start(session).id
        assert in_step.acquire(timeout=30)
        assert in_step.acquire(timeout=30)
        with shell.sessionmaker.begin() as session:
            cancel(session, workflow_id)
        go_on.set()
        assert ended.acquire(timeout=30)
        assert ended.acquire(timeout=30)
        with pytest.raises(WorkflowCancelledError):
            shell.result(workflow, workflow_id)
    assert keys(shell, workflow_id) == []


@on_workers
def test_branches_that_all_wait_are_parked_at_once(shell: Shell, app: Application) -> None:
    """Nothing awaits anything else than a step, so nobody has to wait until the workflow has been quiet for long."""
    failures: list[int] = []

    def fail_first() -> int:
        failures.append(1)
        if len(failures) <= 2:
            raise ConnectionError
        return 7

    step = app.plain(fail_first, wait=tenacity.wait_fixed(3600))
    other = app.plain(lambda: 1, name="other")

    async def checkout() -> list[Any]:
        async def pay() -> int:
            await other()
            return await step()

        async def both() -> list[int]:
            return [*await beside(app, pay, pay), await other()]

        return await beside(app, both, other.__call__)

    workflow = app.workflow(checkout)
    with shell.background():
        with shell.sessionmaker.begin() as session:
            workflow_id = workflow.start(session).id
        began = time.monotonic()
        races.wait_until(lambda: shell.one(workflow_id).status is WorkflowStatus.SUSPENDED)
        assert time.monotonic() - began < 4.5
        assert len(failures) == 2
        with shell.sessionmaker.begin() as session:
            session.execute(update(Step).where(Step.wake_at.is_not(None)).values(wake_at=func.statement_timestamp()))
            session.execute(update(Workflow).values(wake_at=func.statement_timestamp()))
        assert shell.result(workflow, workflow_id) == [[7, 7, 1], 1]


@on_workers
def test_branch_that_does_something_else_keeps_the_workflow_in_memory(shell: Shell, app: Application) -> None:
    go_on, computing = threading.Event(), threading.Event()
    calls: list[str] = []

    def fail_first() -> int:
        calls.append("fail")
        if len(calls) == 1:
            raise ConnectionError
        return 7

    step = app.plain(fail_first, wait=tenacity.wait_fixed(3600))

    async def checkout() -> list[int]:
        async def pay() -> int:
            return await step()

        async def compute() -> int:
            computing.set()
            if app.form is Form.ASYNC:
                await asyncio.to_thread(go_on.wait, 30)
            else:
                assert go_on.wait(30)
            return 1

        return await beside(app, pay, compute)

    workflow = app.workflow(checkout)
    with shell.background():
        with shell.sessionmaker.begin() as session:
            workflow_id = workflow.start(session).id
        assert computing.wait(30)
        races.wait_until(lambda: len(shell.one(workflow_id).steps) == 1)
        for _ in range(30):  # looks of the step that waits come once a second; none of them parks
            assert shell.one(workflow_id).status is WorkflowStatus.RUNNING
            threading.Event().wait(0.05)
        go_on.set()
        races.wait_until(lambda: shell.one(workflow_id).status is WorkflowStatus.SUSPENDED)
    assert calls == ["fail"]
