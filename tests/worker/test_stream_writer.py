"""Group commit of streams: one statement for many, and nobody's trouble is the others'."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable import StreamItem
from sqla_durable.execution.worker.database import ThreadDatabase
from sqla_durable.execution.worker.writer import StreamWriter
from sqla_durable.store import Fence, Origin
from sqla_durable.store.streams import Append, Appended
from sqla_durable.unwinding import AttemptLost
from tests.store import races
from tests.support.statements import executed_on


@asynccontextmanager
async def running(engine: Engine) -> AsyncGenerator[StreamWriter]:
    database = ThreadDatabase(engine, limit=races.PATIENCE)
    writer = StreamWriter(database)
    task = asyncio.create_task(writer.run())
    try:
        yield writer
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await database.close()


def item(fence: Fence, value: str = "1", *, step_key: str = "answer") -> Append:
    return Append(Origin(fence, 1, step_key, 1), "log", [value])


def written(engine: Engine, fence: Fence) -> list[object]:
    wanted = select(StreamItem.value).where(StreamItem.workflow_id == fence.workflow_id).order_by(StreamItem.number)
    with Session(engine) as session:
        return list(session.scalars(wanted))


async def test_what_comes_at_the_same_time_is_one_statement(engine: Engine) -> None:
    fences = races.claimed_fences(engine, 20)
    async with running(engine) as writer:
        with executed_on(engine) as statements:
            outcomes = await asyncio.gather(*(writer.append(item(each)) for each in fences))
    assert set(outcomes) == {Appended.WRITTEN}
    assert len(statements) == 1
    assert all(written(engine, each) == [1] for each in fences)


async def test_steps_of_one_workflow_take_turns(engine: Engine) -> None:
    # behaviour: C5
    (fence,) = races.claimed_fences(engine)
    async with running(engine) as writer:
        await asyncio.gather(*(writer.append(item(fence, str(n), step_key=f"s{n}")) for n in range(5)))
    assert written(engine, fence) == [0, 1, 2, 3, 4]


async def test_only_the_step_whose_workflows_row_is_locked_waits(engine: Engine) -> None:
    locked, free = races.claimed_fences(engine, 2)
    async with running(engine) as writer:
        with races.transaction(engine) as caller:
            races.lock(caller.session, locked.workflow_id)
            waiting = asyncio.create_task(writer.append(item(locked)))
            assert await writer.append(item(free)) is Appended.WRITTEN
            assert not waiting.done()
        assert await waiting is Appended.WRITTEN
    assert written(engine, locked) == [1]


async def test_who_has_lost_its_workflow_and_who_sends_what_is_no_json_fail_alone(engine: Engine) -> None:
    # behaviour: C6 R3
    fine, broken, taken = races.claimed_fences(engine, 3)
    stranger = Fence(taken.workflow_id, uuid7())
    async with running(engine) as writer:
        given = [item(fine), item(broken, "{"), item(stranger)]
        one, two, three = await asyncio.gather(*map(writer.append, given), return_exceptions=True)
    assert one is Appended.WRITTEN
    assert isinstance(two, DBAPIError)
    assert isinstance(three, AttemptLost)
    assert [written(engine, each) for each in (fine, broken, taken)] == [[1], [], []]


async def test_after_its_end_nothing_is_written(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    async with running(engine) as writer:
        await writer.append(item(fence))
    with pytest.raises(AttemptLost):
        await writer.append(item(fence, "2"))
    assert written(engine, fence) == [1]
