"""Which start is the one, in workflows: children and steps whose starts have a rule for their key; and executed."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Durable, Executor, errors, manage
from sqla_durable.testing import advance
from tests.acceptance import either
from tests.acceptance.application import Application
from tests.acceptance.children import COMMITTING, WORKERS, all_of, awaited, doubling, finish, result_of, run, waiting
from tests.acceptance.shells import Shell
from tests.store import races

pytestmark = pytest.mark.few_shells
MINUTE, HOUR, WEEK = timedelta(minutes=1), timedelta(hours=1), timedelta(days=7)
ONE: dict[str, Any] = {"key": "k", "unique": "unfinished"}


# Children


@COMMITTING
def test_a_parents_key_blocks_no_child(shell: Shell, app: Application) -> None:
    """A key is one of a name, and no child inherits it; one of the same name may take the key of what has started."""
    # behaviour: Q6
    child = doubling(app)

    async def parent(depth: int) -> list[Any]:
        other = await awaited(either.start_child(child.options(**ONE), depth))
        plain = await awaited(either.start_child(child, depth))
        found = [await result_of(other), await result_of(plain)]
        if depth:
            same = await awaited(either.start_child(itself.options(key="k", unique="unstarted"), depth - 1))
            found.append(await result_of(same))
        return found

    itself = app.workflow(parent)
    assert run(shell, itself.options(**ONE), 1) == [2, 2, [0, 0]]
    assert [(each.key, each.former_key) for each in all_of(shell, "parent")] == [(None, "k"), ("k", None)]


@COMMITTING
@pytest.mark.parametrize("options", [ONE, {"key": "k", "on_conflict": "cancel_running"}])
def test_a_workflow_that_would_wait_for_or_cancel_itself_is_refused(
    shell: Shell, app: Application, options: dict[str, Any]
) -> None:
    async def parent() -> str:
        try:
            await awaited(either.start_child(itself.options(**options)))
        except errors.UsageError as error:
            return str(error)
        return "started"

    itself = app.workflow(parent)
    reason = run(shell, itself.options(**options))
    assert "starts itself" in reason or "would cancel it" in reason
    assert [(str(each.status), each.key) for each in all_of(shell)] == [("succeeded", "k")]


@COMMITTING
def test_a_refused_child_is_the_recorded_failure_of_its_step(shell: Shell, app: Application) -> None:
    child = waiting(app)
    seen: list[bool] = []

    async def parent() -> Any:
        first = await awaited(either.start_child(child.options(**ONE)))
        try:
            await awaited(either.start_child(child.options(on_conflict="refuse", **ONE)))
        except errors.KeyTakenError as error:
            seen.append((error.name, error.key, error.workflow_id) == ("wait", "k", first.workflow_id))
        return await result_of(first)

    workflow = app.workflow(parent)
    workflow_id = shell.begin(workflow)
    with shell.background():
        races.wait_until(lambda: [each for each in all_of(shell, "wait") if each.awaits])
        with shell.client() as client:
            client.signal(all_of(shell, "wait")[0].id, "go", "gone")
            client.commit()
    assert finish(shell, workflow, workflow_id) == "gone"
    assert set(seen) == {True}
    assert [(each.key, str(each.status)) for each in shell.one(workflow_id).steps][:2] == [
        ("start:wait", "succeeded"),
        ("start:wait#2", "failed"),
    ]
    assert len(all_of(shell, "wait")) == 1


@WORKERS
def test_parents_that_debounce_one_child_get_the_outcome_of_the_last_input(shell: Shell, app: Application) -> None:
    # behaviour: D6
    child = doubling(app)

    async def parent(number: int) -> Any:
        debounced = child.options(key="k", debounce=WEEK, longest_wait=10 * WEEK)
        return await result_of(await awaited(either.start_child(debounced, number)))

    workflow = app.workflow(parent)
    first = shell.begin(workflow, 1)
    with shell.background():
        races.wait_until(lambda: all_of(shell, "double"))
        second = shell.begin(workflow, 2)
        races.wait_until(lambda: all_of(shell, "double")[0].input == {"number": 2})
        (started,) = all_of(shell, "double")
        assert started.parent_id == first
        shell.crashed(first)  # its replay finds the child that it has started, and replaces nothing
        races.wait_until(lambda: shell.one(first).status == "suspended")
        with shell.sessionmaker.begin() as session:
            assert manage.change(session, started.id, delay=timedelta(0)) == [started.id]
        assert [shell.result(workflow, each) for each in (first, second)] == [4, 4]


@WORKERS
def test_a_child_that_cancels_the_older_one_ends_that_with_its_tree(shell: Shell, app: Application) -> None:
    child = waiting(app)

    async def middle() -> Any:
        return await result_of(await awaited(either.start_child(child)))

    between = app.workflow(middle)

    async def parent() -> str:
        newer = await awaited(either.start_child(between.options(key="k", on_conflict="cancel_running")))
        try:
            return str(await result_of(newer))
        except errors.WorkflowCancelledError:
            return "cancelled"

    workflow = app.workflow(parent)
    first = shell.begin(workflow)
    with shell.background():
        races.wait_until(lambda: [each for each in all_of(shell, "wait") if each.awaits])
        second = shell.begin(workflow)
        assert shell.result(workflow, first) == "cancelled"
        races.wait_until(lambda: len([each for each in all_of(shell, "wait") if each.awaits]) == 1)
        with shell.client() as client:
            client.signal(all_of(shell, "wait")[1].id, "go", "gone")
            client.commit()
        assert shell.result(workflow, second) == "gone"
    assert [str(each.status) for each in all_of(shell, "middle")] == ["cancelled", "succeeded"]
    assert [str(each.status) for each in all_of(shell, "wait")] == ["cancelled", "succeeded"]


# Steps, and a workflow's own code


@COMMITTING
def test_a_step_debounces_in_its_commit(shell: Shell, app: Application) -> None:
    # behaviour: D6 T8
    child = doubling(app)
    tries: list[int] = []

    def announce(session: Session, number: int) -> UUID:
        debounced = child.options(key="k", debounce=WEEK, longest_wait=WEEK)
        started = debounced.start(session, number)
        tries.append(number)
        if number == 2 and tries.count(2) == 1:
            raise ValueError("not yet")
        return UUID(str(started.id))

    step = app.transactional(announce, retry=None)

    async def parent() -> bool:
        first = await awaited(step(1))
        try:
            await awaited(step(2))
        except ValueError:
            return bool(await awaited(step(3)) == first)
        return False

    assert run(shell, app.workflow(parent)) is True
    (started,) = all_of(shell, "double")
    assert (started.input, started.parent_key) == ({"number": 3}, "announce")


@COMMITTING
def test_a_step_of_a_workflow_that_would_cancel_that_workflow_is_refused(shell: Shell, app: Application) -> None:
    def again(session: Session) -> str:
        try:
            itself.options(key="k", on_conflict="cancel_running").start(session)
        except errors.UsageError as error:
            return str(error)
        return "started"

    step = app.transactional(again)

    async def parent() -> str:
        return str(await awaited(step()))

    itself = app.workflow(parent)
    assert "would cancel it" in run(shell, itself.options(key="k"))
    assert [(str(each.status), each.key) for each in all_of(shell)] == [("succeeded", "k")]


def test_a_workflows_own_code_starts_nothing_with_a_rule(session_factory: sessionmaker[Session]) -> None:
    """Each replay would replace what has the key, or start another."""
    durable, session = Durable(), session_factory()

    @durable.workflow
    def ship() -> None: ...

    @durable.workflow
    def parent() -> str:
        for each in (ship.options(key="k"), ship.options(key="k", throttle=HOUR)):
            try:
                each.start(session)
            except errors.UsageError as error:
                return str(error)
        return "started"

    with session:
        assert "leave out what its options say" in Executor.joined(session).run(parent)


# Executed


@WORKERS
def test_a_debounced_workflow_is_executed_once_when_its_time_has_come(shell: Shell, app: Application) -> None:
    """Also when no worker was there for longer than the longest wait."""
    # behaviour: D6 Q7
    workflow = doubling(app).options(key="k", debounce=HOUR, longest_wait=HOUR)
    ids = {shell.begin(workflow, number) for number in range(5)}
    assert len(ids) == 1
    (found,) = ids
    with shell.background():
        with shell.sessionmaker.begin() as session:
            advance(session, WEEK)
        assert shell.result(workflow, found) == 8
    assert [(each.key, each.attempt) for each in all_of(shell)] == [("k", 1)]
    assert shell.begin(workflow, 9) != found


@WORKERS
def test_one_that_runs_is_cancelled_by_a_newer_one(shell: Shell, app: Application) -> None:
    workflow = waiting(app).options(key="k", on_conflict="cancel_running")
    with shell.background():
        ids: list[UUID] = []
        for _ in range(3):
            ids.append(shell.begin(workflow))
            races.wait_until(lambda: shell.one(ids[-1]).awaits)
        with shell.client() as client:
            client.signal(ids[-1], "go", "gone")
            client.commit()
        assert shell.result(workflow, ids[-1]) == "gone"
    assert [str(each.status) for each in all_of(shell)] == ["cancelled", "cancelled", "succeeded"]
    assert [each.former_key for each in all_of(shell)] == ["k", "k", None]
