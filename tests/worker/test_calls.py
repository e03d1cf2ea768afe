"""What a workflow costs a worker in Python: calls of this package's functions, and what it leaves to the collector."""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
from sqlalchemy import Engine, func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Durable, Worker, Workflow, start_many
from tests.store import races

FEW, MANY = 50, 250
"""Two numbers of workflows: the difference of their costs does not include what a worker costs by itself."""

durable = Durable()


@durable.step
async def increment(number: int) -> int:
    return number + 1


@durable.workflow
async def one_step(number: int) -> int:
    return await increment(number)


@durable.workflow
async def ten_steps(number: int) -> int:
    for _ in range(10):
        number = await increment(number)
    return number


@durable.step
def increment_in_thread(number: int) -> int:
    return number + 1


@durable.workflow
def one_step_in_thread(number: int) -> int:
    return increment_in_thread(number)


@contextmanager
def counting_calls() -> Generator[Counter[str]]:
    """Count the calls of this package's functions and coroutines by name, in threads that begin meanwhile."""
    counts: Counter[str] = Counter()

    def count(frame: FrameType, happening: str, _: Any) -> None:
        if happening == "call" and "/sqla_durable/" in frame.f_code.co_filename:
            counts[frame.f_code.co_qualname] += 1

    threading.setprofile(count)
    try:
        yield counts
    finally:
        threading.setprofile(None)


def execute(
    engine: Engine,
    sessions: sessionmaker[Session],
    asynchronous: async_sessionmaker[AsyncSession],
    bound: Any,
    count: int,
) -> None:
    """Start so many workflows, and let a worker execute them all."""
    with sessions.begin() as session:
        start_many(session, [bound(number) for number in range(count)])
    with Worker(durable, sessionmaker=sessions, async_sessionmaker=asynchronous, concurrency=50):
        races.wait_until(lambda: _unfinished(engine) == 0, seconds=60)


def _unfinished(engine: Engine) -> int:
    with Session(engine) as session:
        return session.scalars(select(func.count()).where(Workflow.finished_at.is_(None))).one()


@pytest.mark.parametrize(
    ("workflow", "most"),
    [
        pytest.param(one_step, 152, id="async"),
        pytest.param(ten_steps, 780, id="ten-steps"),
        pytest.param(one_step_in_thread, 152, id="def"),
    ],
)
async def test_a_workflow_takes_few_calls(
    engine: Engine,
    session_factory: sessionmaker[Session],
    async_session_factory: async_sessionmaker[AsyncSession],
    workflow: Any,
    most: int,
) -> None:
    """A coroutine is also counted each time that it is resumed.

    What is called once per batch is left out: how large the batches are depends on the machine. So only whole calls
    per workflow count.
    """
    found: list[Counter[str]] = []
    for count in (FEW, MANY):
        with counting_calls() as calls:
            bound: Any = workflow.bind
            execute(engine, session_factory, async_session_factory, bound, count)
        found.append(calls)
    few, many = found
    each = {name: (many[name] - few[name]) // (MANY - FEW) for name in many}
    assert sum(each.values()) <= most, each


@pytest.mark.usefixtures("few_objects")
@pytest.mark.parametrize("workflow", [one_step, one_step_in_thread], ids=["async", "def"])
async def test_a_workflow_leaves_nothing_to_the_garbage_collector(
    engine: Engine,
    session_factory: sessionmaker[Session],
    async_session_factory: async_sessionmaker[AsyncSession],
    workflow: Any,
) -> None:
    """To collect garbage among all objects takes a tenth of a second in a large application."""
    execute(engine, session_factory, async_session_factory, workflow.bind, FEW)
    found: list[int] = []
    for count in (FEW, MANY):
        gc.collect()
        gc.disable()
        try:
            execute(engine, session_factory, async_session_factory, workflow.bind, count)
            found.append(gc.collect())
        finally:
            gc.enable()
    assert (found[1] - found[0]) / (MANY - FEW) < 10, "an attempt leaves a cycle of references"
