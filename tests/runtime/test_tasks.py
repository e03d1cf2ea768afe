"""What can be known of the tasks of a workflow: which are branches, and whether all of them wait."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import pytest

from sqla_durable.errors import UsageError
from sqla_durable.execution.replaying import HistoryRecorder
from sqla_durable.operations.attempt import Attempt
from sqla_durable.runtime import loop_timers, tasks
from sqla_durable.runtime.context import Context
from sqla_durable.runtime.runtimes import AsyncRuntime
from sqla_durable.store import Claimed, Fence

Body = Callable[[Callable[[], Any]], Awaitable[Any]]


def _nothing(*_given: object) -> None: ...


def context_of(attempt: Attempt, *, is_operating: bool = False) -> Context:
    return Context(AsyncRuntime(attempt, HistoryRecorder(attempt, is_async=True)), is_operating=is_operating)


async def joined_by_await(branch: Callable[[], Any]) -> None:
    await asyncio.create_task(branch())


async def joined_by_gather(branch: Callable[[], Any]) -> None:
    await asyncio.gather(branch(), branch(), return_exceptions=True)


async def joined_by_group(branch: Callable[[], Any]) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(branch())
        group.create_task(joined_by_gather(branch))


async def joined_by_wait_for(branch: Callable[[], Any]) -> None:
    await asyncio.wait_for(branch(), 600)


async def joined_by_nobody(branch: Callable[[], Any]) -> None:
    await branch()


async def asleep(branch: Callable[[], Any]) -> None:
    task = asyncio.create_task(branch())
    await asyncio.Event().wait()
    await task


async def asleep_in_a_branch(branch: Callable[[], Any]) -> None:
    await asyncio.gather(branch(), asyncio.Event().wait())


async def asleep_in_a_group(branch: Callable[[], Any]) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(branch())
        await asyncio.Event().wait()


async def waiting_for_something_foreign(branch: Callable[[], Any]) -> None:
    await asyncio.gather(branch(), asyncio.get_running_loop().create_future())


async def waiting_for_a_future_in_time(branch: Callable[[], Any]) -> None:
    task = asyncio.create_task(branch())
    await asyncio.wait_for(asyncio.get_running_loop().create_future(), 600)
    await task


@pytest.fixture
def attempt() -> Attempt:
    return Attempt(Claimed(Fence(UUID(int=7), UUID(int=8)), "ship", 1, "{}"))


async def _is_idle(attempt: Attempt, body: Body) -> bool:
    """Execute workflow code whose branches all come to an operation; return whether it is seen to be idle."""
    loop = asyncio.get_running_loop()

    async def branch() -> None:
        attempt.begin_call("charge", 1)
        await loop.create_future()

    async def workflow() -> None:
        attempt.branches.begin(tasks.current_task)
        with (
            context_of(attempt).entered(),
            tasks.branching(),
        ):
            await body(branch)

    running = asyncio.create_task(workflow())
    for _ in range(20):
        await asyncio.sleep(0)
    idle = tasks.are_idle(attempt)
    tasks.abandon(attempt)
    running.cancel()
    await asyncio.wait([running])
    assert loop.get_task_factory() is None
    return idle


@pytest.mark.parametrize(
    "body", [joined_by_await, joined_by_gather, joined_by_group, joined_by_wait_for, joined_by_nobody]
)
async def test_workflow_whose_tasks_wait_for_operations_and_each_other_is_idle(attempt: Attempt, body: Body) -> None:
    assert await _is_idle(attempt, body)


@pytest.mark.parametrize(
    "body",
    [
        asleep,
        asleep_in_a_branch,
        asleep_in_a_group,
        waiting_for_something_foreign,
        waiting_for_a_future_in_time,
    ],
)
async def test_workflow_that_may_have_something_else_to_do_is_not_known_to_be_idle(
    attempt: Attempt, body: Body
) -> None:
    assert not await _is_idle(attempt, body)


async def test_branches_of_tasks_in_tasks_are_named_and_forgotten(attempt: Attempt) -> None:
    async def pay() -> str:
        return attempt.begin_call("charge", 1).key

    async def both() -> list[str]:
        return [*await asyncio.gather(pay(), pay()), attempt.begin_call("charge", 1).key]

    attempt.branches.begin(tasks.current_task)
    with (
        context_of(attempt).entered(),
        tasks.branching(),
    ):
        found = list(await asyncio.gather(both(), both()))
    assert found == [
        ["both/pay/charge", "both/pay#2/charge", "both/charge"],
        ["both#2/pay/charge", "both#2/pay#2/charge", "both#2/charge"],
    ]
    assert attempt.branches.left_open == []


async def test_what_the_engine_makes_while_it_operates_is_no_branch(attempt: Attempt) -> None:
    async def here() -> object:
        return attempt.branches.here()

    attempt.branches.begin(tasks.current_task)
    with context_of(attempt).entered(), tasks.branching():
        with context_of(attempt, is_operating=True).entered():
            assert await asyncio.create_task(here()) is None
        assert await asyncio.create_task(here()) is not None


async def test_two_workflows_on_a_loop_share_a_factory_and_the_last_takes_it_away() -> None:
    loop = asyncio.get_running_loop()
    with tasks.branching():
        ours = loop.get_task_factory()
        with tasks.branching():
            assert loop.get_task_factory() is ours
        assert loop.get_task_factory() is ours
    assert ours is not None
    assert loop.get_task_factory() is None


async def test_an_event_loop_whose_timers_cannot_be_seen_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        __slots__ = ("__weakref__",)

        call_at = call_later = time = _nothing

    monkeypatch.setattr(asyncio, "get_running_loop", Closed)
    words = r"does not let its timers be seen.*asyncio's own event loop, or uvloop"
    with pytest.raises(UsageError, match=words), loop_timers.watching():
        pass


async def test_the_event_loop_is_as_it_was_when_the_last_workflow_has_ended() -> None:
    loop = asyncio.get_running_loop()
    before = dict(vars(loop))
    with loop_timers.watching():
        with loop_timers.watching():
            assert loop.call_at != before.get("call_at")
        assert "call_at" in vars(loop)
    assert not {"call_at", "call_later", "time"} & vars(loop).keys()


async def test_factory_that_somebody_wraps_around_ours_stays(attempt: Attempt) -> None:
    loop = asyncio.get_running_loop()

    async def pay() -> str:
        return attempt.begin_call("charge", 1).key

    attempt.branches.begin(tasks.current_task)
    with context_of(attempt).entered():
        with tasks.branching():
            ours: Any = loop.get_task_factory()

            def theirs(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Any:
                return ours(loop, coroutine, **options)

            loop.set_task_factory(theirs)
        assert loop.get_task_factory() is theirs
        with tasks.branching():
            assert await asyncio.create_task(pay()) == "pay/charge"  # counted once, by the outer of the two
    loop.set_task_factory(None)
