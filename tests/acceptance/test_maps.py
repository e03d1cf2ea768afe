"""Maps: a child for each item, so many at once as the workflow allows, and what becomes of the rest."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import func, select, text

from sqla_durable import Workflow, WorkflowStatus, errors, manage
from sqla_durable.testing import advance
from tests.acceptance import either
from tests.acceptance.application import Application
from tests.acceptance.children import COMMITTING, WORKERS, all_of, awaited, doubling, finish, run, waiting
from tests.acceptance.shells import Shell
from tests.store import races

pytestmark = pytest.mark.few_shells


@COMMITTING
@pytest.mark.parametrize("max_concurrency", [None, 3])
def test_map_gives_results_in_the_order_of_its_items(
    shell: Shell, app: Application, max_concurrency: int | None
) -> None:
    child = doubling(app)

    async def parent(numbers: list[int]) -> list[int]:
        found: list[int] = await awaited(either.map_children(child, numbers, max_concurrency=max_concurrency))
        return found

    numbers = [*range(20, 0, -1)]
    assert run(shell, app.workflow(parent), numbers) == [2 * each for each in numbers]
    assert len(all_of(shell, "double")) == 20


@WORKERS
def test_map_has_no_more_children_at_once_than_it_may(shell: Shell, app: Application) -> None:
    child = waiting(app)

    async def parent() -> list[str]:
        found: list[str] = await awaited(
            either.map_children(child, [child.bind() for _ in range(5)], max_concurrency=2)
        )
        return found

    workflow = app.workflow(parent)
    workflow_id = shell.begin(workflow)
    gone: set[UUID] = set()
    with shell.background():
        for number in range(5):
            expected = min(2, 5 - number)
            ready = races.wait_until(partial(_ready, shell, gone, expected), what=f"{expected} children that wait")
            assert len(ready) == expected
            gone.add(ready[0])
            with shell.client() as client:
                client.signal(ready[0], "go", number)
                client.commit()
        assert sorted(shell.result(workflow, workflow_id)) == ["0", "1", "2", "3", "4"]


@WORKERS
def test_map_gives_up_when_more_fail_than_it_tolerates(shell: Shell, app: Application) -> None:
    child = doubling(app)

    async def parent(tolerate: int) -> list[str]:
        found = await awaited(either.map_children(child, [1, -1, 2, -2], tolerate=tolerate))
        return [str(each) for each in found]

    workflow = app.workflow(parent)
    assert run(shell, workflow, 2) == ["2", "-1 is negative", "4", "-2 is negative"]
    with pytest.raises(errors.ChildrenFailedError, match="of 4 children 'double' failed, 1 are tolerated") as raised:
        run(shell, workflow, 1)
    failed = raised.value  # as it was recorded, twice: for the map, and for the workflow
    assert (failed.count, failed.indices) == (2, [1, 3])
    assert [repr(each) for each in failed.errors] == [f"ValueError('{each} is negative')" for each in (-1, -2)]
    assert {each.status for each in map(shell.one, failed.workflow_ids)} == {WorkflowStatus.FAILED}


@WORKERS
def test_rest_of_a_map_that_gave_up_is_cancelled(shell: Shell, app: Application) -> None:
    async def child(number: int) -> str:
        if number == 0:
            raise ValueError("first")
        return str(await awaited(either.wait_signal("go")))

    each = app.workflow(child)

    async def parent() -> list[str]:
        found: list[str] = await awaited(either.map_children(each, range(8), max_concurrency=4))
        return found

    with pytest.raises(errors.ChildrenFailedError, match=r"1 of 8 children 'child' failed.*first: builtins:ValueError"):
        run(shell, app.workflow(parent))
    counts = dict.fromkeys(WorkflowStatus, 0)
    for record in all_of(shell, "child"):
        counts[record.status] += 1
    assert (counts[WorkflowStatus.FAILED], counts[WorkflowStatus.CANCELLED]) == (1, 7)


@pytest.mark.shells(("async-worker",))
def test_fan_out_of_ten_thousand(shell: Shell, app: Application, thorough: bool) -> None:
    """Of two thousand without `--all`: more than are executed at once, and than are started in one statement."""
    count = 10_000 if thorough else 2_000
    child = doubling(app)

    async def parent(count: int) -> int:
        return sum(await awaited(either.map_children(child, range(count), max_concurrency=1_000)))

    workflow = app.workflow(parent)
    workflow_id = shell.begin(workflow, count)
    with shell.background(concurrency=400):
        assert shell.result(workflow, workflow_id, timedelta(seconds=100)) == count * (count - 1)
    with shell.sessionmaker() as session:
        assert session.scalars(select(func.count()).select_from(Workflow)).one() == count + 1
        assert session.execute(text("SELECT count(*) FROM durable.signal")).scalar_one() == 0
    assert len(shell.one(workflow_id).steps) == 2


@pytest.mark.parametrize(
    ("items", "options", "message"),
    [
        ([1], {"max_concurrency": 0}, "max_concurrency must be at least 1"),
        ([1], {"tolerate": -1}, "tolerate must be at least 0"),
        (["with a key"], {}, "have no key= and no delay"),
        (range(100_001), {}, "at most 100,000 children, got 100,001"),
        (["text"], {}, "argument 'number'"),
    ],
)
@pytest.mark.shells(("worker",))
def test_map_that_cannot_be_is_refused(
    shell: Shell, app: Application, items: Any, options: dict[str, Any], message: str
) -> None:
    child = doubling(app)
    given: Any = [child.options(key="k").bind(1)] if items == ["with a key"] else items

    async def parent() -> Any:
        return await awaited(either.map_children(child, given, **options))

    with pytest.raises(errors.ArgumentError, match=message):
        shell.run(app.workflow(parent))


def test_map_of_nothing_is_nothing(shell: Shell, app: Application) -> None:
    child = doubling(app)

    async def parent() -> list[int]:
        found: list[int] = await awaited(either.map_children(child, []))
        return found

    assert shell.run(app.workflow(parent)) == []


def _ready(shell: Shell, gone: set[UUID], count: int) -> list[UUID]:
    """Return the children that wait for their signal, once there are as many as there can be."""
    ready = [each.id for each in all_of(shell, "wait") if each.awaits and each.id not in gone]
    return ready if len(ready) >= count else []


@WORKERS
def test_map_that_is_rewound_waits_for_its_new_children(shell: Shell, app: Application) -> None:
    calls: list[int] = []

    async def child(number: int) -> int:
        calls.append(number)
        return len(calls)

    each = app.workflow(child)

    async def parent() -> list[int]:
        found: list[int] = await awaited(either.map_children(each, [1, 2, 3]))
        return found

    workflow = app.workflow(parent)
    workflow_id = shell.begin(workflow)
    assert sorted(finish(shell, workflow, workflow_id)) == [1, 2, 3]
    with shell.sessionmaker.begin() as session:
        manage.rewind(session, workflow_id, to_step="start:child")
    assert sorted(finish(shell, workflow, workflow_id)) == [4, 5, 6]


@WORKERS
def test_fork_in_the_middle_of_a_map_comes_to_an_end(shell: Shell, app: Application) -> None:
    child = doubling(app)

    async def parent() -> list[int]:
        found: list[int] = await awaited(either.map_children(child, [1, 2, 3]))
        return found

    workflow = app.workflow(parent)
    workflow_id = shell.begin(workflow)
    assert finish(shell, workflow, workflow_id) == [2, 4, 6]
    with shell.sessionmaker.begin() as session:
        forked = manage.fork(session, workflow_id, from_step="map:double").id
    assert finish(shell, workflow, forked) == [2, 4, 6]


@pytest.mark.shells(("async-worker",))
def test_map_that_is_cancelled_before_it_begins_leaves_nothing_unfinished(shell: Shell, app: Application) -> None:
    child = doubling(app)

    async def parent() -> int:
        for turns in range(3):
            task: asyncio.Future[Any] = asyncio.ensure_future(either.map_children(child, [1, 2]))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        return sum(await either.map_children(child, [1, 2]))

    assert run(shell, app.workflow(parent)) == 6


@pytest.mark.shells(("async-worker",))
@pytest.mark.parametrize("way", ["fails", "returns", "is cancelled"])
def test_deferred_children_start_when_their_parent_ends_while_the_map_still_runs(
    shell: Shell, app: Application, way: str
) -> None:
    child = doubling(app)
    others = child.options(queue="others", detached=way == "is cancelled")

    async def parent() -> None:
        task: asyncio.Future[Any] = asyncio.ensure_future(either.map_children(others, [1, 2, 3], max_concurrency=1))
        await either.wait_signal("go")
        if way == "fails":
            raise LookupError(way)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    workflow = app.workflow(parent)
    workflow_id = shell.begin(workflow)
    with shell.background(queues=["default"]):
        races.wait_until(lambda: shell.one(workflow_id).awaits, what="the suspension")
        assert [each.status.value for each in all_of(shell, child.name)] == ["pending", "suspended", "suspended"]
        if way == "is cancelled":
            with shell.sessionmaker.begin() as session:
                assert manage.cancel(session, workflow_id) == [workflow_id]
        else:
            with shell.client() as client:
                client.signal(workflow_id, "go")
                client.commit()
        races.wait_until(lambda: shell.one(workflow_id).finished_at, what="the parent's end")
    with shell.background(queues=["others"]):
        races.wait_until(lambda: all(each.finished_at for each in all_of(shell, child.name)), what="their ends")
    assert {each.status for each in all_of(shell, child.name)} == {WorkflowStatus.SUCCEEDED}


@pytest.mark.shells(("async-worker",))
def test_deferred_children_of_an_earlier_history_are_started(shell: Shell, app: Application) -> None:
    child = doubling(app)

    async def parent() -> int:
        return sum(await either.map_children(child.options(queue="others"), [1, 2, 3], max_concurrency=1))

    workflow = app.workflow(parent)
    workflow_id = shell.begin(workflow)
    with shell.background(queues=["default"]):
        races.wait_until(lambda: shell.one(workflow_id).awaits, what="the suspension")
        with shell.sessionmaker.begin() as session:
            manage.rewind(session, workflow_id, to_step="start:double")
        started, deferred = ["pending"] * 3, ["pending", "suspended", "suspended"]
        races.wait_until(
            lambda: [each.status.value for each in all_of(shell, child.name)] == started + deferred,
            what="the release of the first children, and of one of the second ones",
        )


@pytest.mark.shells(("worker", "async-worker"))
def test_a_map_goes_on_when_the_row_of_the_next_child_was_locked(shell: Shell, app: Application) -> None:
    """A `cancel` locked it and was rolled back later, for which there is no notification."""
    child = waiting(app)

    async def parent() -> list[str]:
        found: list[str] = await awaited(either.map_children(child, [child.bind(), child.bind()], max_concurrency=1))
        return found

    workflow = app.workflow(parent)
    workflow_id = shell.begin(workflow)
    with shell.background():
        (first,) = races.wait_until(partial(_ready, shell, set[UUID](), 1), what="the first child's wait")
        (second,) = (each.id for each in all_of(shell, child.name) if each.id != first)
        with shell.sessionmaker() as caller, shell.client() as client:
            assert manage.cancel(caller, second) == [second]
            client.signal(first, "go")
            client.commit()
            races.wait_until(lambda: shell.one(workflow_id).wake_at, what="the time at which the parent polls again")
            caller.rollback()
        with shell.sessionmaker.begin() as session:
            advance(session, timedelta(seconds=5))
        with shell.client() as client:
            client.signal(second, "go")
            client.commit()
        assert shell.result(workflow, workflow_id) == ["None", "None"]
