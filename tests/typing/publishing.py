"""What type checkers know of events, streams and heartbeats; see `test_typing`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine, Iterator
from datetime import timedelta
from typing import Any, assert_type
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

import sqla_durable.asyncio as aio
from sqla_durable import (
    Durable,
    StreamEntry,
    Workflow,
    close_stream,
    current,
    get_event,
    heartbeat,
    read_stream,
    set_event,
    set_tags,
    write_stream,
)

durable = Durable()


@durable.step
def book(session: Session, order_id: int) -> None:
    set_event("booked", order_id, session=session)
    set_tags({"booked": "yes"}, session=session)
    write_stream("log", order_id, "booked", session=session)
    close_stream("log", session=session)


@durable.step
async def abook(session: AsyncSession, order_id: int) -> None:
    await aio.set_event("booked", order_id, session=session)
    await aio.set_tags({"booked": None}, session=session)
    await aio.write_stream("log", order_id, session=session)
    await aio.close_stream("log", session=session)


@durable.step
async def answer(prompt: str) -> None:
    published: Coroutine[Any, Any, None] = aio.set_event("status", None)
    await published
    await aio.write_stream("answer", prompt)
    await aio.heartbeat({"words": 1})
    execution = current()
    if execution is not None:
        assert_type(execution.details, Any)


def sync_code() -> None:
    set_event("status", 1)
    set_tags({"tenant": "7", "region": None})
    write_stream("answer", 1, 2)
    close_stream("answer")
    heartbeat()


def reading(maker: sessionmaker[Session], session: Session, workflow: Workflow) -> None:
    assert_type(get_event(maker, workflow, "status", str), str)
    assert_type(get_event(session, workflow.id, "status", timeout=timedelta(seconds=1)), Any)
    assert_type(read_stream(maker, workflow, "answer", str, start=3), Iterator[StreamEntry[str]])
    assert_type(read_stream(session, workflow, "answer"), Iterator[StreamEntry[Any]])


async def areading(maker: async_sessionmaker[AsyncSession], session: AsyncSession, workflow: Workflow) -> None:
    assert_type(await aio.get_event(maker, workflow, "status", str), str)
    assert_type(await aio.get_event(session, workflow.id, "status"), Any)
    assert_type(aio.read_stream(maker, workflow, "answer", str), AsyncIterator[StreamEntry[str]])
    async for entry in aio.read_stream(session, workflow, "answer", int):
        assert_type(entry.value, int)


def wrong_calls(maker: sessionmaker[Session], session: Session) -> None:
    set_event("status")  # type: ignore[call-arg]
    set_event(1, "status")  # type: ignore[arg-type]
    set_tags({"tenant": 7})  # type: ignore[dict-item]
    close_stream("log", 1)  # type: ignore[arg-type, call-arg]
    write_stream(session)  # type: ignore[arg-type]
    get_event("status")  # type: ignore[arg-type, call-arg]
    get_event(maker, "1234", "status")  # type: ignore[arg-type]
    get_event(maker, UUID(int=0), "status", timeout=3)  # type: ignore[arg-type]
    read_stream(maker, UUID(int=0), "answer", start="1")  # type: ignore[arg-type]


async def wrong_namespace(session: Session, async_session: AsyncSession, maker: sessionmaker[Session]) -> None:
    set_event("status", 1, session=async_session)  # type: ignore[arg-type]
    await aio.set_event("status", 1, session=session)  # type: ignore[arg-type]
    get_event(async_session, UUID(int=0), "status")  # type: ignore[arg-type]
    await aio.get_event(maker, UUID(int=0), "status")  # type: ignore[arg-type]
    await heartbeat()  # type: ignore[func-returns-value, misc]
