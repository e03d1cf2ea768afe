"""A parent goes on whatever becomes of its children: deleted, retried, of an earlier history, taken away by SQL."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

import sqla_durable
from sqla_durable import Workflow, WorkflowStatus, errors, manage
from sqla_durable.asyncio import as_completed
from tests.acceptance import either
from tests.acceptance.application import Application
from tests.acceptance.children import all_of, awaited, result_of, waiting
from tests.acceptance.shells import Shell
from tests.store import races

# Who wakes a parent is the store's business: that its code sees the error is tested in both forms below.
pytestmark = pytest.mark.shells(("worker",))

WAYS = ["result", "first", "completed", "map"]


async def wait_for(app: Application, way: str, child: Any) -> Any:
    """Start two children, and wait for them in one of the ways that there are."""
    if way == "map":
        return await awaited(either.map_children(child, [child.bind() for _ in range(2)]))
    children = [await awaited(either.start_child(child)) for _ in range(2)]
    match way:
        case "result":
            return [await result_of(each) for each in children]
        case "first":
            return await result_of(await awaited(either.wait_first(children)))
        case _ if app.form == "def":
            return [await result_of(each) for each in sqla_durable.as_completed(children)]
        case _:
            return [await result_of(each) async for each in as_completed(children)]


def suspended(shell: Shell, count: int, *, until: Callable[[], bool] = lambda: True) -> list[Workflow]:
    """Let a worker bring all to where they wait, and stop it; return the children."""

    def waits() -> bool:
        return len([each for each in all_of(shell) if each.awaits]) == count and until()

    with shell.background():
        races.wait_until(waits, what=f"the wait of {count}")
    return all_of(shell, "wait")


def awaits(child: Workflow) -> list[dict[str, Any]]:
    return [{"children": [str(child.id)], "open": 0}]


def ends(shell: Shell, workflow: Any, workflow_id: UUID) -> Any:
    with shell.background():
        return shell.result(workflow, workflow_id, timeout=timedelta(seconds=30))


def go(shell: Shell, *children: Workflow) -> None:
    with shell.client() as client:
        for each in children:
            client.signal(each.id, "go", "went")
        client.commit()


def engine_s_own(shell: Shell) -> list[str]:
    with shell.sessionmaker() as session:
        return list(session.scalars(text("SELECT name FROM durable.signal WHERE name LIKE '#%'")))


@pytest.mark.shells(("worker", "async-worker"))
@pytest.mark.parametrize("way", WAYS)
def test_a_child_that_is_deleted_before_its_parent_has_looked_is_an_error(
    shell: Shell, app: Application, way: str
) -> None:
    # behaviour: C7 M1
    child = waiting(app)

    async def parent() -> Any:
        return await wait_for(app, way, child.options(detached=True))

    workflow = app.workflow(parent)
    workflow_id = shell.begin(workflow)
    first, second = suspended(shell, 3)
    with shell.sessionmaker.begin() as session:
        manage.cancel(session, first.id)
    with shell.sessionmaker.begin() as session:
        assert manage.delete(session, first.id) == [first.id]
    go(shell, second)
    error = errors.ChildrenFailedError if way == "map" else errors.NotFoundError
    with pytest.raises(error, match="deleted"):
        ends(shell, workflow, workflow_id)
    assert engine_s_own(shell) == []


@pytest.mark.parametrize("way", ["result", "map"])
def test_a_parent_that_is_resumed_after_its_children_were_deleted_fails(
    shell: Shell, app: Application, way: str
) -> None:
    # behaviour: M1
    child = waiting(app)

    async def parent() -> Any:
        return await wait_for(app, way, child)

    workflow = app.workflow(parent)
    workflow_id = shell.begin(workflow)
    children = suspended(shell, 3)
    with shell.sessionmaker.begin() as session:
        assert len(manage.cancel(session, workflow_id)) == 3
    with shell.sessionmaker.begin() as session:
        assert len(manage.delete(session, [each.id for each in children])) == 2
        assert manage.resume(session, workflow_id) == [workflow_id]
    error = errors.ChildrenFailedError if way == "map" else errors.NotFoundError
    with pytest.raises(error, match="deleted"):
        ends(shell, workflow, workflow_id)


def test_children_of_a_map_that_was_rewound_are_not_counted_when_they_are_retried(
    shell: Shell, app: Application
) -> None:
    # behaviour: M1
    broken = [True]

    async def wait() -> str:
        if broken:
            raise ValueError("broken")
        return str(await awaited(either.wait_signal("go")))

    child = app.workflow(wait)

    async def parent() -> list[str]:
        found = await awaited(either.map_children(child, [child.bind(), child.bind()], tolerate=2))
        return [str(each) for each in found]

    workflow = app.workflow(parent)
    workflow_id = shell.begin(workflow)
    assert ends(shell, workflow, workflow_id) == ["broken", "broken"]
    broken.clear()
    with shell.sessionmaker.begin() as session:
        old = [each.id for each in all_of(shell, "wait")]
        manage.rewind(session, workflow_id, to_step="start:wait")
        assert len(manage.retry(session, old)) == 2
    children = suspended(shell, 5)
    go(shell, *(each for each in children if each.id not in old))
    assert ends(shell, workflow, workflow_id) == ["went", "went"]
    assert [shell.one(each).status for each in old] == [WorkflowStatus.SUSPENDED] * 2


def test_a_tolerated_child_that_is_retried_in_the_middle_of_its_map_is_waited_for_again(
    shell: Shell, app: Application
) -> None:
    # behaviour: M1
    broken = [True]

    async def wait(number: int) -> str:
        if number == 0 and broken:
            raise ValueError("broken")
        return str(await awaited(either.wait_signal("go")))

    child = app.workflow(wait)

    async def parent() -> list[str]:
        found = await awaited(either.map_children(child, [0, 1], tolerate=2))
        return [str(each) for each in found]

    workflow = app.workflow(parent)
    workflow_id = shell.begin(workflow)
    first, second = suspended(shell, 2, until=lambda: shell.one(workflow_id).awaits == awaits(all_of(shell)[-1]))
    broken.clear()
    with shell.sessionmaker.begin() as session:
        assert manage.retry(session, first.id) == [first.id]
    go(shell, second)
    suspended(shell, 2, until=lambda: shell.one(workflow_id).awaits == awaits(first))
    go(shell, first)
    assert ends(shell, workflow, workflow_id) == ["went", "went"]


def test_deferred_children_go_on_when_a_child_is_deleted(shell: Shell, app: Application) -> None:
    child = waiting(app)

    async def parent() -> str:
        bound = [child.options(detached=True).bind() for _ in range(3)]
        try:
            await awaited(either.map_children(child, bound, max_concurrency=1))
        except errors.ChildrenFailedError as error:
            return f"{error.count} {await awaited(either.wait_signal('on'))}"
        raise AssertionError

    workflow = app.workflow(parent)
    workflow_id = shell.begin(workflow)
    first, *deferred = suspended(shell, 2)
    with shell.sessionmaker.begin() as session:
        manage.cancel(session, first.id)
    with shell.sessionmaker.begin() as session:
        manage.delete(session, first.id)
    assert [each.id for each in suspended(shell, 3)] == [each.id for each in deferred]
    with shell.client() as client:
        client.signal(workflow_id, "on", "and on")
        client.commit()
    assert ends(shell, workflow, workflow_id) == "1 and on"
    assert engine_s_own(shell) == []


def test_a_child_that_is_retried_after_its_outcome_was_taken_wakes_nobody(shell: Shell, app: Application) -> None:
    broken = [True]

    async def wait() -> None:
        if broken:
            raise ValueError("broken")

    child = app.workflow(wait)

    async def parent() -> str:
        try:
            await result_of(await awaited(either.start_child(child)))
        except ValueError:
            return str(await awaited(either.wait_signal("on")))
        raise AssertionError

    workflow = app.workflow(parent)
    workflow_id = shell.begin(workflow)
    (first,) = suspended(shell, 1, until=lambda: shell.one(workflow_id).awaits == [{"signal": "on"}])
    broken.clear()
    with shell.sessionmaker.begin() as session:
        manage.retry(session, first.id)
    with shell.background():
        races.wait_until(lambda: shell.one(first.id).finished_at and not engine_s_own(shell), what="its second end")
    assert shell.one(workflow_id).awaits == [{"signal": "on"}]


def test_children_of_an_earlier_round_are_none_of_todays(shell: Shell, app: Application) -> None:
    child = waiting(app)
    workflow: Any = None

    async def parent(again: int) -> Any:
        started = await awaited(either.start_child(child.options(detached=True)))
        if again:
            await awaited(workflow.continue_as_new(again - 1))
        return await result_of(started)

    workflow = app.workflow(parent)
    workflow_id = shell.begin(workflow, 1)
    old, today = suspended(shell, 3)
    go(shell, old)
    with shell.background():
        races.wait_until(
            lambda: shell.one(old.id).finished_at and not engine_s_own(shell), what="the end of the old one"
        )
    assert shell.one(workflow_id).awaits == awaits(today)
    go(shell, today)
    assert ends(shell, workflow, workflow_id) == "went"


def test_a_child_that_sql_deletes_is_missed_in_time(
    shell: Shell, app: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqla_durable.execution.worker.maintenance.RENOTIFY_EVERY", 0.0)
    child = waiting(app)

    async def parent() -> Any:
        return await result_of(await awaited(either.start_child(child)))

    workflow = app.workflow(parent)
    workflow_id = shell.begin(workflow)
    (gone,) = suspended(shell, 2)
    with shell.sessionmaker.begin() as session:
        session.execute(text("DELETE FROM durable.workflow WHERE id = :id"), {"id": gone.id})
    with pytest.raises(errors.NotFoundError, match="deleted"):
        ends(shell, workflow, workflow_id)


@pytest.mark.shells(("executor", "async-executor"))
def test_an_executor_goes_on_when_the_child_that_it_waits_for_is_deleted(shell: Shell, app: Application) -> None:
    child = waiting(app)

    async def parent() -> Any:
        return await result_of(await awaited(either.start_child(child.options(detached=True))))

    workflow = app.workflow(parent)
    workflow_id = shell.begin(workflow)
    finishing = races.Concurrent(lambda: shell.finish(workflow, workflow_id))
    (gone,) = races.wait_until(lambda: all_of(shell, "wait"), what="the start of the child")
    with shell.sessionmaker.begin() as session:
        manage.cancel(session, gone.id)
        manage.delete(session, gone.id)
    with pytest.raises(errors.NotFoundError, match="deleted"):
        finishing.result()


def test_a_child_that_somebody_cancels_is_among_those_that_a_map_names(shell: Shell, app: Application) -> None:
    child = waiting(app)

    async def parent() -> Any:
        return await awaited(either.map_children(child, [child.bind() for _ in range(4)]))

    workflow = app.workflow(parent)
    workflow_id = shell.begin(workflow)
    children = sorted(suspended(shell, 5), key=lambda each: each.id)
    with shell.sessionmaker.begin() as session:
        manage.cancel(session, children[1].id)
    with pytest.raises(
        errors.ChildrenFailedError, match=r"1 of 4 children .* failed.* The first was cancelled"
    ) as raised:
        ends(shell, workflow, workflow_id)
    assert (raised.value.count, raised.value.indices, raised.value.workflow_ids) == (1, [1], [children[1].id])
    assert isinstance(raised.value.errors[0], errors.WorkflowCancelledError)
