"""Waits, children and what else workflow code calls, in both namespaces, as type checkers see them."""
# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import Coroutine
from datetime import UTC, datetime, timedelta
from typing import Any, assert_type
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

import sqla_durable.asyncio as aio
from sqla_durable import (
    Child,
    Durable,
    Saga,
    Workflow,
    as_completed,
    current_time,
    map_children,
    new_uuid,
    random_number,
    send_signal,
    sleep,
    sleep_until,
    start_child,
    step_scope,
    wait_event,
    wait_first,
    wait_signal,
)

durable = Durable()


@durable.workflow
def ship(parcel: int, *, express: bool = False) -> str:
    raise NotImplementedError


@durable.workflow(name="aship")
async def aship(parcel: int) -> str:
    raise NotImplementedError


@durable.step
def undo(parcel: int) -> None: ...


def sync_code(other: Workflow) -> None:
    sleep(timedelta(days=1), step_key="pause")
    sleep_until(datetime.now(UTC))
    assert_type(wait_signal("approved", bool, timeout=timedelta(days=1)), bool)
    assert_type(wait_signal("approved"), Any)
    assert_type(wait_event(other, "status", str), str)
    assert_type(current_time(), datetime)
    assert_type(new_uuid(step_key="id"), UUID)
    assert_type(random_number(), float)
    child = start_child(ship, 7, express=True)
    assert_type(child, Child[str])
    assert_type(child.result(timeout=timedelta(days=1)), str)
    assert_type(start_child(aship.options(detached=True), 7), Child[str])
    assert_type(wait_first([child]), Child[str])
    for each in as_completed([child]):
        assert_type(each, Child[str])
    assert_type(map_children(ship, [1, 2], max_concurrency=1), list[str])
    assert_type(map_children(ship, [ship.bind(1, express=True)], tolerate=1), list[str | Exception])
    with Saga() as saga, step_scope("adapter"):
        saga.add(undo, 7)


async def async_code(other: Workflow) -> None:
    waiting: Coroutine[Any, Any, None] = aio.sleep(timedelta(days=1), step_key="pause")
    await waiting
    await aio.sleep_until(datetime.now(UTC))
    assert_type(await aio.wait_signal("approved", bool, timeout=timedelta(days=1)), bool)
    assert_type(await aio.wait_signal("approved"), Any)
    assert_type(await aio.wait_event(other, "status", str), str)
    assert_type(await aio.current_time(), datetime)
    assert_type(await aio.new_uuid(step_key="id"), UUID)
    assert_type(await aio.random_number(), float)
    child = await aio.start_child(ship, 7, express=True)
    assert_type(child, aio.AsyncChild[str])
    assert_type(await child, str)
    assert_type(await child.result(timeout=timedelta(days=1)), str)
    assert_type(await aio.wait_first([child]), aio.AsyncChild[str])
    async for each in aio.as_completed([child]):
        assert_type(each, aio.AsyncChild[str])
    assert_type(await aio.map_children(aship, [1, 2], max_concurrency=1), list[str])
    assert_type(await aio.map_children(ship, [1], tolerate=1), list[str | Exception])
    async with aio.Saga() as saga:
        saga.add(undo, 7)


async def wrong_calls(session: Session, async_session: AsyncSession, record: Workflow) -> None:
    sleep(3)  # type: ignore[arg-type]
    sleep(timedelta(), key="pause")  # type: ignore[call-arg]
    wait_signal("approved", timeout=3)  # type: ignore[arg-type]
    start_child(ship, "seven")  # type: ignore[arg-type]
    start_child(ship)  # type: ignore[call-arg]
    start_child(undo, 7)  # type: ignore[arg-type]
    await start_child(ship, 7)  # type: ignore[misc]
    await sleep(timedelta())  # type: ignore[func-returns-value, misc]
    await wait_signal("approved", bool)  # type: ignore[misc]
    await aio.start_child(aship, "seven")  # type: ignore[arg-type]
    number: int = await aio.wait_signal("approved", str)  # type: ignore[arg-type]
    del number
    send_signal(async_session, record, "go")  # type: ignore[arg-type]
    await aio.send_signal(session, record, "go")  # type: ignore[arg-type]
    with aio.Saga() as saga:  # type: ignore[attr-defined]
        del saga
