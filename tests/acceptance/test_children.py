"""Children: each in one commit with its parent's checkpoint; a parent that waits is a row."""

from __future__ import annotations

import asyncio
import inspect
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from sqla_durable import Workflow, WorkflowFunction, WorkflowStatus, errors, manage, start_child
from sqla_durable.asyncio import AsyncWorkflowFunction
from sqla_durable.testing import advance
from tests.acceptance import either
from tests.acceptance.application import AnyWorkflow, Application
from tests.acceptance.shells import Shell
from tests.store import races
from tests.support.domain import Entry

pytestmark = pytest.mark.few_shells

WORKERS = pytest.mark.shells(("worker", "async-worker", "asyncpg-worker", "mixed-worker"))
COMMITTING = pytest.mark.shells(
    ("executor", "async-executor", "worker", "async-worker", "asyncpg-worker", "mixed-worker")
)
WEEK = timedelta(days=7)


async def awaited(outcome: Any) -> Any:
    """Return the outcome of an operation, in either form."""
    return await outcome if inspect.isawaitable(outcome) else outcome


async def result_of(child: Any, **options: Any) -> Any:
    return await awaited(child.result(**options))


def doubling(app: Application) -> AnyWorkflow[[int], int]:
    async def double(number: int) -> int:
        if number < 0:
            raise ValueError(f"{number} is negative")
        return 2 * number

    return app.workflow(double)


def waiting(app: Application) -> AnyWorkflow[[], str]:
    async def wait() -> str:
        return str(await awaited(either.wait_signal("go")))

    return app.workflow(wait)


def finish(shell: Shell, workflow: AnyWorkflow[..., Any], workflow_id: UUID) -> Any:
    """Bring a parent to its end, with a worker for its children beside it."""
    with shell.background():
        try:
            return shell.result(workflow, workflow_id)
        except errors.ResultTimeoutError:
            raise AssertionError([(each.name, each.status) for each in all_of(shell)]) from None


def run(shell: Shell, workflow: AnyWorkflow[..., Any], *args: Any) -> Any:
    return finish(shell, workflow, shell.begin(workflow, *args))


def all_of(shell: Shell, name: str | None = None) -> list[Workflow]:
    with shell.sessionmaker() as session:
        query = select(Workflow).order_by(Workflow.id)
        return list(session.scalars(query if name is None else query.where(Workflow.name == name)))


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


def test_first_of_no_children_is_refused(shell: Shell, app: Application) -> None:
    async def parent() -> Any:
        return await awaited(either.wait_first([]))

    with pytest.raises(errors.ArgumentError, match="was given no workflows"):
        shell.run(app.workflow(parent))


def test_map_of_nothing_is_nothing(shell: Shell, app: Application) -> None:
    child = doubling(app)

    async def parent() -> list[int]:
        found: list[int] = await awaited(either.map_children(child, []))
        return found

    assert shell.run(app.workflow(parent)) == []


def test_child_outside_a_workflow_is_refused(shell: Shell, app: Application) -> None:
    child = doubling(app)
    assert isinstance(child, (WorkflowFunction, AsyncWorkflowFunction))
    with pytest.raises(errors.UsageError, match="is for the code of a workflow"):
        start_child(child, 1)


def _suspended(shell: Shell) -> list[Workflow]:
    return [each for each in all_of(shell) if each.status is WorkflowStatus.SUSPENDED and each.awaits]


def _finished(shell: Shell, workflow_id: UUID) -> bool:
    return shell.one(workflow_id).finished_at is not None


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
