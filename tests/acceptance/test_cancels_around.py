"""What cancels around it leave alone: what a saga undoes, and steps and code that were cancelled before."""

from __future__ import annotations

import asyncio
import threading

import anyio
import pytest
from sqlalchemy.orm import Session

import sqla_durable.runtime.runtimes
from sqla_durable.asyncio import to_thread
from tests.acceptance import either
from tests.acceptance.application import Application
from tests.acceptance.branches import on_loop
from tests.acceptance.shells import Shell
from tests.acceptance.test_cancelled_calls import agreed, on_worker


@on_worker
def test_a_saga_that_the_codes_own_timeout_ends_undoes_what_was_done(shell: Shell, app: Application) -> None:
    done: list[int] = []

    @app.durable.step
    async def book(cents: int) -> None:
        done.append(cents)

    @app.durable.step
    async def hang() -> None:
        await asyncio.Event().wait()

    async def travel() -> str:
        try:
            async with asyncio.timeout(1), either.Saga() as saga:
                saga.add(book, -1)
                await book(1)
                await hang()
        except TimeoutError:
            return "too late"
        return "never"

    assert agreed(shell, app.workflow(travel)) == "too late"
    assert done == [1, -1]


@on_loop
def test_a_scope_that_cancels_again_and_again_does_not_cancel_what_a_saga_undoes(
    shell: Shell, app: Application
) -> None:
    scopes: list[anyio.CancelScope] = []
    done: list[int] = []

    @app.durable.step
    async def book(cents: int) -> None:
        await asyncio.sleep(0.01)
        done.append(cents)

    @app.durable.step
    async def hang() -> None:
        scopes[-1].cancel()
        await asyncio.Event().wait()

    async def travel() -> str:
        with anyio.CancelScope() as scope:
            scopes.append(scope)
            async with either.Saga() as saga:
                saga.add(book, -1)
                saga.add(book, -2)
                await hang()
        return "called off" if scope.cancelled_caught else "never"

    assert shell.run(app.workflow(travel)) == "called off"
    assert done == [-2, -1]


@on_worker
def test_a_timeout_that_comes_while_a_saga_undoes_is_for_what_follows(shell: Shell, app: Application) -> None:
    done: list[int] = []

    @app.durable.step
    async def book(cents: int) -> None:
        await asyncio.sleep(0.1)
        done.append(cents)

    @app.durable.step
    async def hang() -> None:
        await asyncio.Event().wait()

    async def travel() -> str:
        try:
            async with asyncio.timeout(1.02):
                try:
                    async with asyncio.timeout(1), either.Saga() as saga:
                        saga.add(book, -1)
                        await hang()
                except TimeoutError:
                    await book(2)
        except TimeoutError:
            return "too late"
        return "never"

    assert agreed(shell, app.workflow(travel)) == "too late"
    assert done == [-1]


@on_worker
def test_a_cancel_that_is_met_between_two_operations_is_met_once(shell: Shell, app: Application) -> None:
    @app.durable.step
    async def ship() -> str:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()  # thrown into it at its next await, which is the code's own
        return "shipped"

    clean = app.plain(lambda: "cleaned", name="clean")

    async def checkout() -> str:
        async def pay() -> str:
            try:
                await ship()
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                return await clean()
            return "never"

        return await asyncio.create_task(pay())

    assert shell.run(app.workflow(checkout)) == "cleaned"


# behaviour: A1
@on_worker
def test_a_sync_step_whose_call_was_cancelled_while_it_waited_for_a_place_is_not_called(
    shell: Shell, app: Application
) -> None:
    holds, called_off, shipped = threading.Event(), threading.Event(), threading.Event()

    @app.durable.step
    def hold(session: Session) -> None:
        holds.set()
        assert called_off.wait(30)

    @app.durable.step
    def ship(session: Session) -> None:
        shipped.set()

    async def checkout() -> str:
        holding = asyncio.create_task(to_thread(hold))
        assert await asyncio.to_thread(holds.wait, 30)
        try:
            async with asyncio.timeout(0.1):
                await to_thread(ship)
        except TimeoutError:
            called_off.set()
            await holding
            return "called off"
        return "never"

    workflow = app.workflow(checkout)
    workflow_id = shell.begin(workflow)
    with shell.background(transactions=1):
        assert shell.result(workflow, workflow_id) == "called off"
    assert not shipped.is_set()


@on_worker
def test_a_call_that_waits_for_long_to_be_cancelled_again_is_named_in_the_log(
    shell: Shell, app: Application, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sqla_durable.runtime.runtimes, "_CHECK_EVERY", 0.01)
    cancels = [True]

    @app.durable.step
    async def hang() -> None:
        await asyncio.Event().wait()

    async def checkout() -> str:
        async def tick() -> None:  # so that nobody can know that nothing will cancel the call
            while cancels or "waits to be cancelled" not in caplog.text:
                await asyncio.sleep(0.01)
            call.cancel()

        call, ticking = asyncio.create_task(hang()), asyncio.create_task(tick())
        await asyncio.sleep(0.05)
        if cancels:
            call.cancel()
            ticking.cancel()
        await asyncio.wait([call])
        return "cancelled"

    workflow = app.workflow(checkout)
    workflow_id = shell.begin(workflow)
    assert shell.finish(workflow, workflow_id) == "cancelled"
    cancels.clear()
    shell.crashed(workflow_id)
    assert shell.finish(workflow, workflow_id) == "cancelled"
    assert "the call 'hang' waits to be cancelled, as it was in an earlier attempt" in caplog.text
