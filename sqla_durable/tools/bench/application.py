"""The workflows that a benchmark executes, as small as they can be, and one table for the steps that write."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta

from sqlalchemy import BigInteger, Identity, MetaData, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqla_durable import Durable
from sqla_durable.asyncio import sleep, wait_signal
from sqla_durable.models import SCHEMA

durable = Durable()

_LONG_ENOUGH_TO_SUSPEND = timedelta(seconds=1.5)  # shorter waits stay in memory


class Base(DeclarativeBase):
    """The declarative base of the table, whose schema is translated like that of the package's own tables."""

    metadata = MetaData(schema=SCHEMA)


class Entry(Base):
    """A row that a transactional step inserts."""

    __tablename__ = "bench_entry"

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    number: Mapped[int] = mapped_column(BigInteger)
    note: Mapped[str] = mapped_column(Text, default="entered by a step")


@durable.step
async def increment(number: int) -> int:
    """Do next to nothing, on the event loop."""
    return number + 1


@durable.step
def increment_in_thread(number: int) -> int:
    """Do next to nothing, in a thread."""
    return number + 1


@durable.step
def enter(session: Session, number: int) -> None:
    """Insert one row."""
    session.add(Entry(number=number))


@durable.step
async def read_clock() -> float:
    """Return when this step began, on a clock that all processes of a machine share."""
    return time.monotonic()


@durable.step
async def wait(seconds: float) -> None:
    """Wait, as for somebody else's answer."""
    await asyncio.sleep(seconds)


@durable.workflow
async def one_wait(seconds: float) -> None:
    """Execute one step that waits."""
    await wait(seconds)


@durable.workflow
async def one_step(number: int) -> int:
    """Execute one plain step."""
    return await increment(number)


@durable.workflow
async def suspends_once(number: int) -> int:
    """Suspend once, then execute one plain step."""
    await sleep(_LONG_ENOUGH_TO_SUSPEND)
    return await increment(number)


@durable.workflow
def one_step_in_thread(number: int) -> int:
    """Execute one plain step, all of it `def`."""
    return increment_in_thread(number)


@durable.workflow
async def many_steps(steps: int) -> int:
    """Execute plain steps, one after another."""
    number = 0
    for _ in range(steps):
        number = await increment(number)
    return number


@durable.workflow
def three_entries(number: int) -> int:
    """Execute three transactional steps."""
    for _ in range(3):
        enter(number)
    return number


@durable.workflow
def many_entries(steps: int) -> int:
    """Execute transactional steps, one after another."""
    for number in range(steps):
        enter(number)
    return steps


@durable.workflow
async def first_step_time() -> float:
    """Return when its first step began."""
    return await read_clock()


@durable.workflow
async def signal_time() -> float:
    """Suspend until a signal comes; return when it came."""
    await wait_signal("go")
    return time.monotonic()
