"""Checks what is read of asyncio's internals, with the standard library only: executed by each Python that is there."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import Callable, Coroutine
from typing import Any

Waits = Callable[["asyncio.Future[None]"], Coroutine[Any, Any, object]]


def load(path: str) -> Any:
    """Return the module at a path, without its package."""
    spec = importlib.util.spec_from_file_location("asyncio_internals", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def wait_done(future: asyncio.Future[None]) -> None:
    waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def wake(_: object) -> None:
        if not waiter.done():
            waiter.set_result(None)

    future.add_done_callback(wake)
    await waiter


async def by_await(future: asyncio.Future[None]) -> None:
    await future


async def by_gather(future: asyncio.Future[None]) -> None:
    await asyncio.gather(future, by_await(future))


async def by_group(future: asyncio.Future[None]) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(by_await(future))
        group.create_task(by_await(future))


async def by_wait_for(future: asyncio.Future[None]) -> None:
    await asyncio.wait_for(future, 600)


async def by_sleep(_future: asyncio.Future[None]) -> None:
    await asyncio.sleep(600)


async def by_gather_beside_a_sleep(future: asyncio.Future[None]) -> None:
    await asyncio.gather(future, asyncio.sleep(600))


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def check_waits(internals: Any) -> None:
    seen: tuple[Waits, ...] = (by_await, by_gather, by_group, by_wait_for, wait_done)
    unseen: tuple[Waits, ...] = (by_sleep, by_gather_beside_a_sleep)
    for waits in seen:
        assert await is_seen(internals, waits), f"{waits.__name__} is not seen"
    for waits in unseen:
        assert not await is_seen(internals, waits), f"{waits.__name__} is taken for a wait for the future"


async def is_seen(internals: Any, waits: Waits) -> bool:
    """Return whether a task that waits for a future, and for tasks that wait for it, is seen to do so."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    before = asyncio.all_tasks()
    task = asyncio.ensure_future(waits(future))
    await turns()
    others = {each for each in asyncio.all_tasks() - before if each is not task and not _sleeps(each)}
    seen: bool = internals.waits_only_for(task, {future, *others}, functions=(wait_done,))
    for each in asyncio.all_tasks() - before:
        each.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return seen


def _sleeps(task: asyncio.Task[Any]) -> bool:
    return getattr(task.get_coro(), "__qualname__", "") == "sleep"


async def check_cancels(internals: Any) -> None:
    task = asyncio.ensure_future(asyncio.sleep(600))
    await turns()
    assert internals.cancels_met(task) == 0
    counts: list[int] = []

    async def cancelled_by_itself() -> None:
        here = asyncio.current_task()
        assert here is not None
        here.cancel()
        counts.append(internals.cancels_met(here))
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            counts.append(internals.cancels_met(here))

    await asyncio.ensure_future(cancelled_by_itself())
    assert counts == [0, 1], counts
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def check_errors(internals: Any) -> None:
    async def fail() -> None:
        raise ValueError("no")

    reported: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: reported.append(context))
    task = asyncio.ensure_future(fail())
    await turns()
    assert isinstance(internals.error_of(task), ValueError)
    del task
    await turns()
    assert reported, "to look at an error must not mark it as retrieved"


async def check_futures(internals: Any) -> None:
    task = asyncio.ensure_future(asyncio.sleep(600))
    gathered, shielded = asyncio.gather(task), asyncio.shield(task)
    assert {gathered, shielded} <= set(internals.futures_of(task))
    task.cancel()
    await asyncio.gather(gathered, shielded, return_exceptions=True)


async def check_coroutines(internals: Any) -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    coroutine = by_await(future)
    assert internals.module_of(coroutine) == __name__
    assert future in internals.variables_of(coroutine)
    assert internals.unwrap_anyio(coroutine) is coroutine
    coroutine.close()
    assert internals.module_of(coroutine) == ""
    assert internals.variables_of(coroutine) == ()
    assert internals.module_of(future) == ""


async def check_without(internals: Any) -> None:
    """Where nothing of it is there, nothing is claimed, and nothing fails."""

    class Bare:
        def cancelling(self) -> int:
            return 1

    bare = Bare()
    assert internals.cancels_met(bare) == 1
    assert internals.error_of(bare) is None
    assert internals.futures_of(bare) == []
    assert not internals.waits_only_for(bare, {bare})
    assert internals.module_of(bare) == ""
    assert internals.variables_of(bare) == ()
    assert internals.unwrap_anyio(bare) is bare
    assert not internals.is_in_wait_for()


async def check_wait_for(internals: Any) -> None:
    """A task that `wait_for` makes is known while it is being made; newer versions of Python make none."""
    found: list[bool] = []

    def factory(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Any:
        found.append(internals.is_in_wait_for())
        return asyncio.Task(coroutine, loop=loop, **options)

    loop = asyncio.get_running_loop()
    loop.set_task_factory(factory)
    try:
        await asyncio.wait_for(asyncio.sleep(0), 600)
        made_by_wait_for = list(found)
        await asyncio.ensure_future(asyncio.sleep(0))
    finally:
        loop.set_task_factory(None)
    assert all(made_by_wait_for)
    assert not found[-1]


async def check(path: str) -> None:
    internals = load(path)
    for each in (
        check_waits,
        check_cancels,
        check_errors,
        check_futures,
        check_coroutines,
        check_wait_for,
        check_without,
    ):
        await each(internals)


if __name__ == "__main__":
    asyncio.run(check(sys.argv[1]))
