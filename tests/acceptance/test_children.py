"""Children: each in one commit with its parent's checkpoint; a parent that waits is a row."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy.orm import Session

from sqla_durable import Workflow, WorkflowFunction, WorkflowStatus, errors, manage, start_child
from sqla_durable.asyncio import AsyncWorkflowFunction
from sqla_durable.testing import advance
from tests.acceptance import either
from tests.acceptance.application import Application
from tests.acceptance.children import COMMITTING, WORKERS, all_of, awaited, doubling, finish, result_of, run, waiting
from tests.acceptance.shells import Shell
from tests.store import races
from tests.support.domain import Entry

pytestmark = pytest.mark.few_shells
WEEK = timedelta(days=7)


@COMMITTING
def test_parent_takes_the_results_of_its_children(shell: Shell, app: Application) -> None:
    # behaviour: C7
    child = doubling(app)

    async def both(one: int, other: int) -> list[int]:
        children = [await awaited(either.start_child(child, each)) for each in (one, other)]
        return [await result_of(each) for each in children]

    parent = app.workflow(both)
    assert run(shell, parent, 1, 2) == [2, 4]
    (record,) = all_of(shell, "both")
    assert [(each.parent_id, each.parent_key) for each in all_of(shell, "double")] == [
        (record.id, "start:double"),
        (record.id, "start:double#2"),
    ]
    assert [each.key for each in shell.one(record.id).steps] == [
        "start:double",
        "start:double#2",
        "result:double",
        "result:double#2",
    ]


@pytest.mark.shells(("executor", "async-executor"))
def test_parent_in_an_executor_waits_inline(shell: Shell, app: Application) -> None:
    child = doubling(app)

    async def one() -> Any:
        return await result_of(await awaited(either.start_child(child, 21)))

    parent = app.workflow(one, queue="inline")
    with shell.background(queues=["default"]):
        assert shell.run(parent) == 42


@COMMITTING
def test_error_of_a_child_is_raised_as_its_own_and_can_be_caught(shell: Shell, app: Application) -> None:
    child = doubling(app)

    async def careful() -> str:
        started = await awaited(either.start_child(child, -1))
        try:
            await result_of(started)
        except ValueError as error:
            return str(error)
        return "nothing"

    assert run(shell, app.workflow(careful)) == "-1 is negative"


@WORKERS
def test_child_is_started_once_whatever_dies(shell: Shell, app: Application) -> None:
    # behaviour: E8
    child = waiting(app)

    async def parent() -> Any:
        return await result_of(await awaited(either.start_child(child)))

    workflow = app.workflow(parent)
    workflow_id = shell.begin(workflow)
    with shell.background():
        races.wait_until(lambda: [each.awaits for each in all_of(shell) if each.awaits] and len(_suspended(shell)) == 2)
    shell.crashed(workflow_id)
    (started,) = all_of(shell, "wait")
    with shell.client() as client:
        client.signal(started.id, "go", "gone")
        client.commit()
    assert finish(shell, workflow, workflow_id) == "gone"
    assert len(all_of(shell, "wait")) == 1


@WORKERS
def test_parent_is_a_row_while_its_child_waits(shell: Shell, app: Application) -> None:
    # behaviour: C7
    child = waiting(app)

    async def parent() -> Any:
        return await result_of(await awaited(either.start_child(child)))

    workflow_id = shell.begin(app.workflow(parent))
    with shell.background():
        races.wait_until(lambda: len(_suspended(shell)) == 2, what="the suspension of both")
    record = shell.one(workflow_id)
    assert (record.worker_id, record.awaits) == (None, [{"children": [str(all_of(shell, "wait")[0].id)], "open": 0}])


@WORKERS
def test_child_with_a_known_key_is_the_workflow_that_has_it(shell: Shell, app: Application) -> None:
    child = doubling(app)
    known = shell.begin(child.options(key="once"), 1)

    async def parent() -> Any:
        return await result_of(await awaited(either.start_child(child.options(key="once"), 100)))

    assert run(shell, app.workflow(parent)) == 2
    assert [each.id for each in all_of(shell, "double")] == [known]


def test_workflow_that_would_wait_for_itself_is_refused(shell: Shell, app: Application) -> None:
    found: list[Any] = []

    async def again() -> Any:
        return await awaited(either.start_child(found[0].options(key="once")))

    workflow = app.workflow(again)
    found.append(workflow)
    with pytest.raises(errors.UsageError, match="starts itself as its child"):
        shell.run(workflow.options(key="once"))


@WORKERS
def test_child_of_a_transactional_step_commits_with_it(shell: Shell, app: Application) -> None:
    # behaviour: T1
    child = doubling(app)
    tries: list[int] = []

    def order(session: Session, number: int) -> UUID:
        tries.append(number)
        session.add(Entry(account="order", cents=number, note=None))
        started = child.start(session, number)
        session.flush()
        if len(tries) == 1:
            raise LookupError
        return started.id

    step = app.transactional(order)

    async def parent() -> UUID:
        with suppress(LookupError):
            await step(1)
        return await step(2)

    workflow = app.workflow(parent)
    child_id = run(shell, workflow)
    (record,) = all_of(shell, "parent")
    (found,) = all_of(shell, "double")
    assert (found.id, found.parent_id, found.parent_key, found.input) == (
        child_id,
        record.id,
        "order#2",
        {"number": 2},
    )


@WORKERS
def test_outcome_that_does_not_come_in_time_is_an_error_and_the_child_goes_on(shell: Shell, app: Application) -> None:
    child = waiting(app)

    async def parent() -> str:
        started = await awaited(either.start_child(child))
        try:
            await result_of(started, timeout=WEEK)
        except errors.WaitTimeoutError:
            return "late"
        return "in time"

    workflow = app.workflow(parent)
    workflow_id = shell.begin(workflow)
    with shell.background():
        races.wait_until(lambda: len(_suspended(shell)) == 2, what="the suspension of both")
        with shell.sessionmaker.begin() as session:
            advance(session, WEEK)
        assert shell.result(workflow, workflow_id) == "late"
    assert [each.status for each in all_of(shell, "wait")] == [WorkflowStatus.SUSPENDED]


@WORKERS
def test_cancel_of_a_child_is_raised_in_its_parent(shell: Shell, app: Application) -> None:
    child = waiting(app)

    async def parent() -> str:
        started = await awaited(either.start_child(child))
        try:
            return str(await result_of(started))
        except errors.WorkflowCancelledError:
            return "cancelled"

    workflow = app.workflow(parent)
    workflow_id = shell.begin(workflow)
    with shell.background():
        races.wait_until(lambda: len(_suspended(shell)) == 2, what="the suspension of both")
        with shell.sessionmaker.begin() as session:
            assert len(manage.cancel(session, all_of(shell, "wait")[0].id)) == 1
        assert shell.result(workflow, workflow_id) == "cancelled"


@WORKERS
def test_tree_is_cancelled_with_its_root_but_for_what_is_detached(shell: Shell, app: Application) -> None:
    # behaviour: M1
    leaf = waiting(app)

    async def middle() -> Any:
        return await result_of(await awaited(either.start_child(leaf)))

    branch = app.workflow(middle)

    async def root() -> Any:
        await awaited(either.start_child(leaf.options(detached=True)))
        return await result_of(await awaited(either.start_child(branch)))

    workflow_id = shell.begin(app.workflow(root))
    with shell.background():
        races.wait_until(lambda: len(_suspended(shell)) == 4, what="the suspension of all")
        with shell.sessionmaker.begin() as session:
            assert len(manage.cancel(session, workflow_id)) == 3
    assert [(each.name, each.status) for each in all_of(shell) if not each.status.finished] == [
        ("wait", WorkflowStatus.SUSPENDED)
    ]


@WORKERS
def test_child_fails_at_its_parents_deadline(shell: Shell, app: Application) -> None:
    # behaviour: R7
    leaf = waiting(app)

    async def parent() -> Any:
        return await result_of(await awaited(either.start_child(leaf)))

    workflow = app.workflow(parent).options(deadline=WEEK)
    workflow_id = shell.begin(workflow)
    with shell.background():
        races.wait_until(lambda: len(_suspended(shell)) == 2, what="the suspension of both")
        with shell.sessionmaker.begin() as session:
            advance(session, WEEK)
        with pytest.raises(errors.WorkflowTimeoutError):
            shell.result(workflow, workflow_id)
        races.wait_until(lambda: _finished(shell, all_of(shell, "wait")[0].id), what="the end of the child")
    assert [each.status for each in all_of(shell)] == [WorkflowStatus.FAILED, WorkflowStatus.FAILED]


@WORKERS
def test_children_come_as_they_are_completed(shell: Shell, app: Application) -> None:
    child = waiting(app)

    async def parent() -> list[str]:
        children = [await awaited(either.start_child(child)) for _ in range(3)]
        results = [await result_of(await awaited(either.wait_first(children)))]
        left = [each for each in children if each.workflow_id != all_of(shell, "wait")[2].id]
        if app.form == "def":
            results += [await result_of(each) for each in either.as_completed(left)]
        else:
            results += [await result_of(each) async for each in either.as_completed(left)]
        return results

    workflow = app.workflow(parent)
    workflow_id = shell.begin(workflow)
    with shell.background():
        races.wait_until(lambda: len(_suspended(shell)) == 4, what="the suspension of all")
        for number in (2, 1, 0):
            ids = [each.id for each in all_of(shell, "wait")]
            with shell.client() as client:
                client.signal(ids[number], "go", number)
                client.commit()
            races.wait_until(partial(_finished, shell, ids[number]), what="the end of a child")
        assert shell.result(workflow, workflow_id) == ["2", "1", "0"]


def test_first_of_no_children_is_refused(shell: Shell, app: Application) -> None:
    async def parent() -> Any:
        return await awaited(either.wait_first([]))

    with pytest.raises(errors.ArgumentError, match="was given no workflows"):
        shell.run(app.workflow(parent))


def test_child_outside_a_workflow_is_refused(shell: Shell, app: Application) -> None:
    child = doubling(app)
    assert isinstance(child, (WorkflowFunction, AsyncWorkflowFunction))
    with pytest.raises(errors.UsageError, match="is for the code of a workflow"):
        start_child(child, 1)


def _suspended(shell: Shell) -> list[Workflow]:
    return [each for each in all_of(shell) if each.status is WorkflowStatus.SUSPENDED and each.awaits]


def _finished(shell: Shell, workflow_id: UUID) -> bool:
    return shell.one(workflow_id).finished_at is not None
