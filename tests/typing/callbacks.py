"""Callbacks as type checkers see them."""
# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import Coroutine
from datetime import timedelta
from typing import Any, assert_type

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

import sqla_durable.asyncio as aio
from sqla_durable import Callback, complete_callback, create_callback, fail_callback, heartbeat_callback


def sync_code() -> None:
    callback = create_callback(int, timeout=timedelta(days=1), heartbeat=timedelta(hours=1), step_key="payment")
    assert_type(callback, Callback[int])
    assert_type(callback.token, str)
    assert_type(callback.result(), int)
    assert_type(create_callback().result(), Any)


async def async_code() -> None:
    callback = await aio.create_callback(int, timeout=timedelta(days=1))
    assert_type(callback, aio.AsyncCallback[int])
    assert_type(await callback, int)
    assert_type(await callback.result(), int)
    assert_type(await (await aio.create_callback()), Any)


def answering(session: Session, token: str) -> None:
    complete_callback(session, token, 7)
    fail_callback(session, token, "card declined", details={"code": 7})
    heartbeat_callback(session, token)


async def answering_async(session: AsyncSession, token: str) -> None:
    done: Coroutine[Any, Any, None] = aio.complete_callback(session, token)
    await done
    await aio.fail_callback(session, token, "card declined")
    await aio.heartbeat_callback(session, token)


def wrong_calls(session: Session, token: str) -> None:
    create_callback(int, timeout=3)  # type: ignore[arg-type]
    create_callback(int, timedelta())  # type: ignore[call-arg]
    complete_callback(token, 7)  # type: ignore[arg-type]
    fail_callback(session, token)  # type: ignore[call-arg]
    fail_callback(session, token, ValueError())  # type: ignore[arg-type]
    heartbeat_callback(session, 7)  # type: ignore[arg-type]


async def wrong_namespace(session: Session, async_session: AsyncSession, token: str) -> None:
    complete_callback(async_session, token)  # type: ignore[arg-type]
    await aio.complete_callback(session, token)  # type: ignore[arg-type]
    await create_callback(int)  # type: ignore[misc]
