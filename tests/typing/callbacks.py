"""Callbacks as type checkers see them."""
# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import Coroutine
from datetime import timedelta
from typing import Any, assert_type

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sqla_durable import (
    AsyncCallback,
    Callback,
    complete_callback,
    create_callback,
    fail_callback,
    heartbeat_callback,
)


def sync_code() -> None:
    callback = create_callback(int, timeout=timedelta(days=1), heartbeat=timedelta(hours=1), key="payment")
    assert_type(callback, Callback[int])
    assert_type(callback.token, str)
    assert_type(callback.result(), int)
    assert_type(create_callback().result(), Any)


async def async_code() -> None:
    callback = await create_callback.aio(int, timeout=timedelta(days=1))
    assert_type(callback, AsyncCallback[int])
    assert_type(await callback, int)
    assert_type(await callback.result(), int)
    assert_type(await (await create_callback.aio()), Any)


def answering(session: Session, token: str) -> None:
    complete_callback(session, token, 7)
    fail_callback(session, token, "card declined", details={"code": 7})
    heartbeat_callback(session, token)


async def answering_async(session: AsyncSession, token: str) -> None:
    done: Coroutine[Any, Any, None] = complete_callback(session, token)
    await done
    await fail_callback(session, token, "card declined")
    await heartbeat_callback(session, token)


def wrong_calls(session: Session, token: str) -> None:
    create_callback(int, timeout=3)  # type: ignore[call-overload]
    create_callback(int, timedelta())  # type: ignore[call-overload]
    complete_callback(token, 7)  # type: ignore[call-overload]
    fail_callback(session, token)  # type: ignore[call-overload]
    fail_callback(session, token, ValueError())  # type: ignore[call-overload]
    heartbeat_callback(session, 7)  # type: ignore[call-overload]
