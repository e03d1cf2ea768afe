"""Branches of a workflow that run beside each other, in either form: their keys, errors, waiting and cancelling."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable
from functools import partial
from typing import Any

import pytest
import tenacity
from sqlalchemy import func, select, update

import tests.acceptance.branches as branches
from sqla_durable import Step, Workflow, WorkflowStatus, manage
from sqla_durable.errors import WorkflowCancelledError
from tests.acceptance.application import Application, Form
from tests.acceptance.branches import beside, keys, on_workers
from tests.acceptance.shells import Shell
from tests.store import races
from tests.support.domain import Entry


# behaviour: S7
def test_branches_have_several_steps_each_and_may_call_the_same_ones(shell: Shell, app: Application) -> None:
    reserve = app.transactional(branches.reserve, name="reserve")
    charge = app.plain(branches.double, name="charge")

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


def test_error_of_a_branch_is_the_workflows_and_the_same_on_a_replay(shell: Shell, app: Application) -> None:
    charge = app.plain(branches.refuse_odd, name="charge")

    async def checkout() -> str:
        async def pay(number: int) -> int:
            return int(await charge(number) + await charge(2 * number))

        try:
            await beside(app, *(branches.named("pay", partial(pay, number)) for number in (2, 3, 4)))
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
            manage.cancel(session, workflow_id)
        go_on.set()
        assert ended.acquire(timeout=30)
        assert ended.acquire(timeout=30)
        with pytest.raises(WorkflowCancelledError):
            shell.result(workflow, workflow_id)
    assert keys(shell, workflow_id) == []


@on_workers
def test_workflow_whose_branches_all_wait_is_suspended_at_once(shell: Shell, app: Application) -> None:
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
        for _ in range(30):  # the step that waits checks once a second, and never suspends
            assert shell.one(workflow_id).status is WorkflowStatus.RUNNING
            threading.Event().wait(0.05)
        go_on.set()
        races.wait_until(lambda: shell.one(workflow_id).status is WorkflowStatus.SUSPENDED)
    assert calls == ["fail"]
