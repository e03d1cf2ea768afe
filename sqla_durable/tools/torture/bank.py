"""The bank's workflows: a transfer in four steps, once as `def` and once as `async def`.

Three steps are transactional and must take effect exactly once. The plain step calls the outside world, which may see
a call again, but then with the same key. `journal` locks two accounts in the order of the transfer: opposite transfers
deadlock now and then, as they should here.
"""

from __future__ import annotations

from typing import Annotated

import tenacity
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable.api.durable import Durable
from sqla_durable.runtime.context import current_step
from sqla_durable.tools.torture.tables import Account, Call, Entry

durable = Durable()
outside: sessionmaker[Session] = sessionmaker()
"""Opens the sync connection to the outside world; in AUTOCOMMIT, as a service elsewhere would keep its own books."""
async_outside: async_sessionmaker[AsyncSession] = async_sessionmaker()
"""The same for `async def`."""


class Stumble(Exception):
    """A step fails at first; its policy has it tried again."""


class Order(BaseModel):
    """What a transfer is to do; `stumbles` is how often each of its steps fails before it works."""

    model_config = ConfigDict(frozen=True)

    transfer: int
    source: int
    target: int
    cents: Annotated[int, Field(gt=0)]
    stumbles: int


class _Me:
    """Who executes steps in this process; the worker says so when it starts."""

    name = "?"


def introduce(name: str) -> None:
    """Tell under which name this process makes its entries."""
    _Me.name = name


@durable.workflow
def transfer(order: Order) -> int:
    """Carry out a transfer."""
    debit(order)
    call(order)
    credit(order)
    journal(order)
    return order.cents


@durable.workflow
async def async_transfer(order: Order) -> int:
    """Carry out a transfer, in asyncio."""
    await async_debit(order)
    await async_call(order)
    await async_credit(order)
    await async_journal(order)
    return order.cents


@durable.step(stop=tenacity.stop_after_attempt(10), wait=tenacity.wait_fixed(0.02))
def debit(session: Session, order: Order) -> int:
    """Take the money from its source."""
    return _move(session, order, account_id=order.source, cents=-order.cents)


@durable.step(stop=tenacity.stop_after_attempt(10), wait=tenacity.wait_fixed(0.02))
def credit(session: Session, order: Order) -> int:
    """Give the money to its target."""
    return _move(session, order, account_id=order.target, cents=order.cents)


@durable.step
def journal(session: Session, order: Order) -> int:
    """Write the journal, and count the movement on both accounts."""
    return _journal(session, order)


@durable.step(wait=tenacity.wait_random_exponential(multiplier=0.02, max=0.5))
def call(order: Order) -> str:
    """Tell the outside world; goes on trying for as long as it is out of reach."""
    with outside() as session:
        return _call(session, order)


@durable.step(stop=tenacity.stop_after_attempt(10), wait=tenacity.wait_fixed(0.02))
async def async_debit(session: AsyncSession, order: Order) -> int:
    """Take the money from its source."""
    return await session.run_sync(lambda inner: _move(inner, order, account_id=order.source, cents=-order.cents))


@durable.step(stop=tenacity.stop_after_attempt(10), wait=tenacity.wait_fixed(0.02))
async def async_credit(session: AsyncSession, order: Order) -> int:
    """Give the money to its target."""
    return await session.run_sync(lambda inner: _move(inner, order, account_id=order.target, cents=order.cents))


@durable.step
async def async_journal(session: AsyncSession, order: Order) -> int:
    """Write the journal, and count the movement on both accounts."""
    return await session.run_sync(_journal, order)


@durable.step(wait=tenacity.wait_random_exponential(multiplier=0.02, max=0.5))
async def async_call(order: Order) -> str:
    """Tell the outside world; goes on trying for as long as it is out of reach."""
    async with async_outside() as session:
        return await session.run_sync(_call, order)


def _move(session: Session, order: Order, *, account_id: int, cents: int) -> int:
    account = session.get_one(Account, account_id, with_for_update=True)
    account.cents += cents
    _enter(session, order, account_id=account_id, cents=cents)
    _stumble(order)  # after the writes, which must go with the try
    return account.cents


def _journal(session: Session, order: Order) -> int:
    _enter(session, order, account_id=order.source, cents=order.cents)
    for account_id in (order.source, order.target):
        session.execute(update(Account).where(Account.id == account_id).values(movements=Account.movements + 1))
    return order.transfer


def _call(session: Session, order: Order) -> str:
    _stumble(order)
    step = current_step()
    session.add(
        Call(
            transfer_id=order.transfer,
            workflow_id=step.workflow_id,
            step=step.step,
            key=step.idempotency_key,
            worker=_Me.name,
        )
    )
    session.commit()
    return step.idempotency_key


def _enter(session: Session, order: Order, *, account_id: int, cents: int) -> None:
    step = current_step()
    entry = Entry(
        transfer_id=order.transfer,
        workflow_id=step.workflow_id,
        step=step.step,
        kind=step.step.removeprefix("async_"),
        account=account_id,
        cents=cents,
        attempt=step.attempt,
        worker=_Me.name,
    )
    session.add(entry)
    session.flush()


def _stumble(order: Order) -> None:
    tries = current_step().step_attempt
    if tries <= order.stumbles:
        raise Stumble(f"transfer {order.transfer} stumbles for the {tries}. time")
