"""What is executed: workflows as small as they can be, and one table for the steps that write."""

from __future__ import annotations

import time
from datetime import timedelta

from sqlalchemy import BigInteger, Identity, MetaData, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqla_durable.api.durable import Durable
from sqla_durable.api.signals import wait_signal
from sqla_durable.api.timers import sleep
from sqla_durable.models import SCHEMA

durable = Durable()

_AS_A_ROW = timedelta(seconds=1.5)  # longer than what is waited for in memory


class Base(DeclarativeBase):
    """The declarative base of the table; it is translated to the schema of the bench together with ours."""

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
async def look_at_clock() -> float:
    """Tell when this step began, on a clock that all processes of a machine share."""
    return time.monotonic()


@durable.workflow
async def one_step(number: int) -> int:
    """Take one plain step."""
    return await increment(number)


@durable.workflow
async def suspended_once(number: int) -> int:
    """Wait as a row, then take one plain step."""
    await sleep(_AS_A_ROW)
    return await increment(number)


@durable.workflow
def one_step_in_thread(number: int) -> int:
    """Take one plain step, all of it `def`."""
    return increment_in_thread(number)


@durable.workflow
async def many_steps(steps: int) -> int:
    """Take plain steps, one after another."""
    number = 0
    for _ in range(steps):
        number = await increment(number)
    return number


@durable.workflow
def three_entries(number: int) -> int:
    """Take three transactional steps."""
    for _ in range(3):
        enter(number)
    return number


@durable.workflow
def many_entries(steps: int) -> int:
    """Take transactional steps, one after another."""
    for number in range(steps):
        enter(number)
    return steps


@durable.workflow
async def timed() -> float:
    """Give when its first step began."""
    return await look_at_clock()


@durable.workflow
async def signalled() -> float:
    """Give when a signal had come for which it waited as a row."""
    await wait_signal.aio("go")
    return time.monotonic()
