"""`parallel`: branches of a `def` workflow, each in a thread."""

from __future__ import annotations

import threading
from datetime import timedelta
from functools import partial
from typing import Any, cast

import pytest
from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Durable, Executor, Worker, parallel, run_step
from sqla_durable.errors import ArgumentError, UsageError
from tests.acceptance.application import Application
from tests.acceptance.branches import in_threads, on_loop, the_keys
from tests.acceptance.shells import POLL, Shell
from tests.support import refusals


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
        for functions, kind in [((7,), ArgumentError), ((coroutine,), UsageError)]:
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

    with pytest.raises(UsageError, match=r"which is async def: await asyncio.gather\(...\)"):
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
        with pytest.raises(UsageError, match="the inside of an AsyncSession, which threads cannot use"):
            await session.run_sync(lambda inside: Executor(inside).run(checkout))


def test_a_refused_checkpoint_of_a_branch_fails_the_workflow_whatever_it_catches(
    session_factory: sessionmaker[Session], engine: Engine
) -> None:
    """A workflow must not succeed with a hole in its history."""
    durable = Durable()
    refusals.refuse(engine)

    def pay() -> None:
        run_step(refusals.UNSTORABLE, int)

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
