"""What the tests of sessions share: a small application, sync and async."""

# The sessions here are of classes of the application, which the types of sessionmakers do not let through.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false

from __future__ import annotations

from sqlalchemy import Engine, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sqla_durable import Durable
from tests.support.domain import Entry

durable = Durable()


@durable.step
def book(session: Session, cents: int) -> int:
    session.add(Entry(account="book", cents=cents, note=None))
    return cents


@durable.workflow
def pay(cents: int) -> int:
    return book(cents)


@durable.step
async def abook(session: AsyncSession, cents: int) -> int:
    session.add(Entry(account="book", cents=cents, note=None))
    return cents


@durable.workflow
async def apay(cents: int) -> int:
    return await abook(cents)


def entries(engine: Engine) -> list[Entry]:
    with Session(engine) as session:
        return list(session.scalars(select(Entry)))
