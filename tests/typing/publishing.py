"""What type checkers know of events, streams and heartbeats; see `test_typing`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Iterator
from datetime import timedelta
from typing import Any, assert_type
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

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
    write_stream,
)

durable = Durable()


@durable.step
def book(session: Session, order_id: int) -> None:
    set_event(session, "booked", order_id)
    write_stream(session, "log", order_id, "booked")
    close_stream(session, "log")


@durable.step
async def abook(session: AsyncSession, order_id: int) -> None:
    await set_event(session, "booked", order_id)
    await write_stream(session, "log", order_id)
    await close_stream(session, "log")


@durable.step
async def answer(prompt: str) -> None:
    await write_stream("answer", prompt)
    await heartbeat({"words": 1})
    execution = current()
    if execution is not None:
        assert_type(execution.details, Any)


def sync_code() -> None:
    set_event("status", 1)
    write_stream("answer", 1, 2)
    close_stream("answer")
    heartbeat()
    assert_type(set_event("status", None), Awaitable[None])


def reading(maker: sessionmaker[Session], session: Session, workflow: Workflow) -> None:
    assert_type(get_event(maker, workflow, "status", str), str)
    assert_type(get_event(session, workflow.id, "status", timeout=timedelta(seconds=1)), Any)
    assert_type(read_stream(maker, workflow, "answer", str, start=3), Iterator[StreamEntry[str]])
    assert_type(read_stream(session, workflow, "answer"), Iterator[StreamEntry[Any]])


async def areading(maker: async_sessionmaker[AsyncSession], session: AsyncSession, workflow: Workflow) -> None:
    assert_type(await get_event(maker, workflow, "status", str), str)
    assert_type(await get_event(session, workflow.id, "status"), Any)
    assert_type(read_stream(maker, workflow, "answer", str), AsyncIterator[StreamEntry[str]])
    async for entry in read_stream(session, workflow, "answer", int):
        assert_type(entry.value, int)


def wrong_calls(maker: sessionmaker[Session], session: Session) -> None:
    set_event("status")  # type: ignore[call-overload]
    set_event(1, "status")  # type: ignore[call-overload]
    set_event("status", value=1)  # type: ignore[call-overload]
    close_stream("log", 1)  # type: ignore[call-overload]
    write_stream(session)  # type: ignore[call-overload]
    get_event("status")  # type: ignore[call-overload]
    get_event(maker, "1234", "status")  # type: ignore[call-overload]
    get_event(maker, UUID(int=0), "status", timeout=3)  # type: ignore[call-overload]
    read_stream(maker, UUID(int=0), "answer", start="1")  # type: ignore[call-overload]
