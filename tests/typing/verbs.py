"""What operators do with workflows, as type checkers see it."""
# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import Coroutine
from datetime import timedelta
from typing import Any, assert_type
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

import sqla_durable.asyncio as aio
from sqla_durable import Workflow, manage


def in_a_session(session: Session, record: Workflow, id_: UUID) -> None:
    assert_type(manage.cancel(session, record), list[UUID])
    assert_type(manage.resume(session, id_), list[UUID])
    assert_type(manage.retry(session, [record, id_]), list[UUID])
    assert_type(manage.change(session, id_, queue="slow", priority=1, delay=timedelta(0)), list[UUID])
    assert_type(manage.rewind(session, select(Workflow), to_step="charge"), list[UUID])
    assert_type(manage.delete(session, select(Workflow.id)), list[UUID])
    assert_type(manage.fork(session, record, from_step="charge", input={"cents": 1}, key="again"), Workflow)
    assert_type(manage.fork(session, [record, id_], outcomes={"charge": 1}), list[Workflow])
    assert_type(manage.fork(session, select(Workflow), version="2"), list[Workflow])

    manage.cancel(session, "checkout")  # type: ignore[arg-type]
    manage.rewind(session, record)  # type: ignore[call-arg]
    manage.fork(session, [record], key="again")  # type: ignore[call-overload]
    manage.fork(session, record, input=7)  # type: ignore[call-overload]


async def in_an_async_session(session: AsyncSession, record: Workflow) -> None:
    cancelling = aio.manage.cancel(session, record)
    _: Coroutine[Any, Any, list[UUID]] = cancelling
    assert_type(await cancelling, list[UUID])
    assert_type(await aio.manage.delete(session, record), list[UUID])
    assert_type(await aio.manage.rewind(session, [record], to_step="charge"), list[UUID])
    assert_type(await aio.manage.fork(session, record), Workflow)
    assert_type(await aio.manage.fork(session, select(Workflow)), list[Workflow])


async def wrong_namespace(session: Session, async_session: AsyncSession, record: Workflow) -> None:
    manage.cancel(async_session, record)  # type: ignore[arg-type]
    await aio.manage.cancel(session, record)  # type: ignore[arg-type]
