"""What operators do with workflows, as type checkers see it."""
# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, assert_type
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sqla_durable import Workflow, cancel, delete, fork, resume, retry, rewind


def in_a_session(session: Session, record: Workflow, id_: UUID) -> None:
    assert_type(cancel(session, record), list[UUID])
    assert_type(resume(session, id_), list[UUID])
    assert_type(retry(session, [record, id_]), list[UUID])
    assert_type(rewind(session, select(Workflow), to_step="charge"), list[UUID])
    assert_type(delete(session, select(Workflow.id)), list[UUID])
    assert_type(fork(session, record, from_step="charge", input={"cents": 1}, key="again"), Workflow)
    assert_type(fork(session, [record, id_], outcomes={"charge": 1}), list[Workflow])
    assert_type(fork(session, select(Workflow), version="2"), list[Workflow])

    cancel(session, "checkout")  # type: ignore[arg-type]
    rewind(session, record)  # type: ignore[call-overload]
    fork(session, [record], key="again")  # type: ignore[call-overload]
    fork(session, record, input=7)  # type: ignore[call-overload]


async def in_an_async_session(session: AsyncSession, record: Workflow) -> None:
    cancelling = cancel(session, record)
    _: Coroutine[Any, Any, list[UUID]] = cancelling
    assert_type(await cancelling, list[UUID])
    assert_type(await delete(session, record), list[UUID])
    assert_type(await rewind(session, [record], to_step="charge"), list[UUID])
    assert_type(await fork(session, record), Workflow)
    assert_type(await fork(session, select(Workflow)), list[Workflow])
