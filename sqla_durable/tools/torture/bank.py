"""The bank's workflows: a transfer in four steps, once as `def` and once as `async def`.

Three steps are transactional and must take effect exactly once. The plain step calls an outside service, which may see
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

from sqla_durable import Durable, current_step
from sqla_durable.tools.torture.database import Account, Call, Entry

durable = Durable()
outside: sessionmaker[Session] = sessionmaker()
"""Opens the sessions of the outside service; in AUTOCOMMIT, as a separate service has transactions of its own."""
async_outside: async_sessionmaker[AsyncSession] = async_sessionmaker()
"""The same for `async def`."""


class InjectedError(Exception):
    """A try of a step fails on purpose; its policy tries it again."""


class Order(BaseModel):
    """The amount and the accounts of a transfer; `failing_tries` is how often its steps fail before they succeed."""

    model_config = ConfigDict(frozen=True)

    transfer: int
    source: int
    target: int
    cents: Annotated[int, Field(gt=0)]
    failing_tries: int


class _ThisWorker:
    """The worker of this process, which sets its name when it starts."""

    name = "?"


def set_worker_name(name: str) -> None:
    """Set the name that this process writes into its entries and calls."""
    _ThisWorker.name = name


@durable.workflow
def transfer(order: Order) -> int:
    """Execute a transfer."""
    debit(order)
    call(order)
    credit(order)
    journal(order)
    return order.cents


@durable.workflow
async def async_transfer(order: Order) -> int:
    """Execute a transfer, in asyncio."""
    await async_debit(order)
    await async_call(order)
    await async_credit(order)
    await async_journal(order)
    return order.cents


@durable.step(stop=tenacity.stop_after_attempt(10), wait=tenacity.wait_fixed(0.02))
def debit(session: Session, order: Order) -> int:
    """Debit the source account."""
    return _move(session, order, account_id=order.source, cents=-order.cents)


@durable.step(stop=tenacity.stop_after_attempt(10), wait=tenacity.wait_fixed(0.02))
def credit(session: Session, order: Order) -> int:
    """Credit the target account."""
    return _move(session, order, account_id=order.target, cents=order.cents)


@durable.step
def journal(session: Session, order: Order) -> int:
    """Write the journal, and count the transfer on both accounts."""
    return _journal(session, order)


@durable.step(wait=tenacity.wait_random_exponential(multiplier=0.02, max=0.5))
def call(order: Order) -> str:
    """Call the outside service; try again for as long as it is unavailable."""
    with outside() as session:
        return _call(session, order)


@durable.step(stop=tenacity.stop_after_attempt(10), wait=tenacity.wait_fixed(0.02))
async def async_debit(session: AsyncSession, order: Order) -> int:
    """Debit the source account."""
    return await session.run_sync(lambda inner: _move(inner, order, account_id=order.source, cents=-order.cents))


@durable.step(stop=tenacity.stop_after_attempt(10), wait=tenacity.wait_fixed(0.02))
async def async_credit(session: AsyncSession, order: Order) -> int:
    """Credit the target account."""
    return await session.run_sync(lambda inner: _move(inner, order, account_id=order.target, cents=order.cents))


@durable.step
async def async_journal(session: AsyncSession, order: Order) -> int:
    """Write the journal, and count the transfer on both accounts."""
    return await session.run_sync(_journal, order)


@durable.step(wait=tenacity.wait_random_exponential(multiplier=0.02, max=0.5))
async def async_call(order: Order) -> str:
    """Call the outside service; try again for as long as it is unavailable."""
    async with async_outside() as session:
        return await session.run_sync(_call, order)


def _move(session: Session, order: Order, *, account_id: int, cents: int) -> int:
    account = session.get_one(Account, account_id, with_for_update=True)
    account.cents += cents
    _enter(session, order, account_id=account_id, cents=cents)
    _fail_first_tries(order)  # after the writes, which must be rolled back with the try
    return account.cents


def _journal(session: Session, order: Order) -> int:
    _enter(session, order, account_id=order.source, cents=order.cents)
    for account_id in (order.source, order.target):
        session.execute(update(Account).where(Account.id == account_id).values(movements=Account.movements + 1))
    return order.transfer


def _call(session: Session, order: Order) -> str:
    _fail_first_tries(order)
    step = current_step()
    session.add(
        Call(
            transfer_id=order.transfer,
            workflow_id=step.workflow_id,
            step=step.step,
            key=step.idempotency_key,
            worker=_ThisWorker.name,
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
        worker=_ThisWorker.name,
    )
    session.add(entry)
    session.flush()


def _fail_first_tries(order: Order) -> None:
    tries = current_step().try_number
    if tries <= order.failing_tries:
        raise InjectedError(f"transfer {order.transfer} fails on purpose, try {tries}")
