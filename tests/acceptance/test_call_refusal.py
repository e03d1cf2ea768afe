"""Calls by code that goes on after its attempt was to end, as in a `finally`, are refused with an explanation."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select

from sqla_durable import Step, WorkflowStatus, errors, manage, patched, unwinding
from tests.acceptance import either
from tests.acceptance.application import Application
from tests.acceptance.shells import Shell
from tests.acceptance.test_sagas import Block, Ledger, awaited, booked
from tests.store import races

pytestmark = pytest.mark.shells(("worker", "async-worker"))


def keys(shell: Shell) -> list[str]:
    with shell.sessionmaker() as session:
        return list(session.scalars(select(Step.key).order_by(Step.position)))


def until_suspended(shell: Shell) -> None:
    races.wait_until(lambda: shell.one(shell.only).status is WorkflowStatus.SUSPENDED)


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.message for each in caplog.records if each.name == "sqla_durable.workflow"]


def test_a_finally_is_refused_its_calls_while_the_workflow_is_suspended_and_executes_them_later(
    shell: Shell, app: Application, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[str] = []
    refused: list[str] = []
    step = app.plain(lambda: calls.append("cleaned"), name="clean")

    async def call(what: Any) -> None:
        try:
            await awaited(what())
        except unwinding.CallRefused as error:
            refused.append(error.call)
            raise

    async def wait() -> str:
        try:
            return str(await awaited(either.wait_signal("go")))
        finally:
            try:
                await call(step)
            finally:
                for what in (
                    lambda: either.set_event("status", "left"),
                    either.new_uuid,
                    lambda: either.sleep(timedelta(0)),
                ):
                    try:
                        await call(what)
                    except BaseException:
                        continue
                patched("new way")

    workflow = app.workflow(wait)
    with shell.background():
        workflow_id = shell.begin(workflow)
        until_suspended(shell)
        races.wait_until(lambda: len(refused) == 4)
        assert (calls, keys(shell)) == ([], ["signal:go"])
        with shell.client() as client:
            client.signal(workflow_id, "go", "gone")
            client.commit()
        assert shell.result(workflow, workflow_id) == "gone"
    assert refused == ["clean", "set_event(status)", "new_uuid", "sleep"]
    assert calls == ["cleaned"]
    assert keys(shell) == ["signal:go", "clean", "set_event(status)", "new_uuid", "sleep", "#patched/new way"]
    (words,) = logged(caplog)
    assert f"'clean' was called in workflow 'wait' {workflow_id} while its attempt 1 was ending" in words
    assert "because the workflow is suspended until what it waits for is there: it was not executed" in words


def test_code_that_catches_everything_around_a_wait_executes_nothing_while_suspended(
    shell: Shell, app: Application
) -> None:
    calls: list[int] = []
    step = app.plain(lambda: calls.append(1), name="effect")

    async def wait() -> int:
        caught = 0
        for what in (lambda: either.wait_signal("go"), step, step):
            try:
                await awaited(what())
            except BaseException:
                caught += 1
        if caught:
            raise LookupError("an error of its own")
        return len(calls)

    workflow = app.workflow(wait)
    with shell.background():
        workflow_id = shell.begin(workflow)
        until_suspended(shell)
        with shell.client() as client:
            client.signal(workflow_id, "go")
            client.commit()
        assert shell.result(workflow, workflow_id) == 2


@pytest.mark.parametrize("saga", [False, True])
def test_a_finally_of_a_cancelled_workflow_is_refused_its_calls_and_the_workflow_is_cancelled(
    shell: Shell, app: Application, caplog: pytest.LogCaptureFixture, saga: bool
) -> None:
    ledger = Ledger(app)

    async def work() -> None:
        try:
            await awaited(either.wait_signal("go"))
        finally:
            await ledger.do("finally")

    async def travel() -> None:
        if not saga:
            return await work()
        async with Block(app.form) as block:
            await ledger.do("hotel")
            block.add(ledger.undo.step, "hotel")
            await work()

    workflow = app.workflow(travel)
    with shell.background():
        workflow_id = shell.begin(workflow)
        until_suspended(shell)
        with shell.sessionmaker.begin() as session:
            assert manage.cancel(session, workflow_id) == [workflow_id]
        with pytest.raises(errors.WorkflowCancelledError):
            shell.result(workflow, workflow_id)
    assert booked(shell) == ([("hotel", 1), ("hotel", -1)] if saga else [])
    assert all("'do" in each and "suspended" in each for each in logged(caplog)[:1])
    assert [("was cancelled" in each) for each in logged(caplog)[1:]] == ([True] if saga else [])
