"""The application that crashes: its steps write to a ledger and to an outside world, and can die at named points."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache, partial

import tenacity
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

import sqla_durable.asyncio as aio
from sqla_durable import (
    Durable,
    Saga,
    UpdateRequest,
    current,
    heartbeat,
    parallel,
    set_event,
    sleep,
    wait_signal,
    wait_update,
    write_stream,
)
from tests.support.domain import Entry

ROUNDS = 3
FROZEN = 4711
"""The advisory lock at which `hold` waits."""


class Fate:
    """Whether this process dies, and at which visit to which point."""

    def __init__(self) -> None:
        self._point: str | None = None
        self._visits = 0
        self._lock = threading.Lock()

    def set(self, point: str | None, visits: int) -> None:
        """Die at that visit to that point."""
        self._point, self._visits = point, visits

    def meet(self, point: str) -> None:
        """Die here if it is time."""
        with self._lock:
            self._visits -= point == self._point
            if point == self._point and self._visits <= 0:
                die()


def die() -> None:
    """End the process as the kernel's out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


fate = Fate()
durable = Durable()


@cache
def outside(url: str) -> Engine:
    """The outside world: it commits what it is asked for, whatever becomes of the asking process."""
    return create_engine(url, isolation_level="AUTOCOMMIT", pool_pre_ping=True)


def _world() -> Engine:
    return outside(os.environ["CRASH_URL"])


def _call(form: str, account: str) -> str:
    execution = current()
    assert execution is not None
    fate.meet(f"{form} plain before")
    with _world().connect() as connection:
        connection.execute(
            text("INSERT INTO entry (account, cents, note) VALUES (:account, 0, :note)"),
            {"account": account, "note": execution.idempotency_key},
        )
    fate.meet(f"{form} plain after")
    return account


@durable.step
def credit(session: Session, account: str) -> str:
    fate.meet("sync transaction before")
    session.add(Entry(account=account, cents=1))
    session.flush()
    fate.meet("sync transaction after")
    return account


@durable.step(wait=tenacity.wait_none())
def call(account: str) -> str:
    return _call("sync", account)


@durable.step
async def credit_async(session: AsyncSession, account: str) -> str:
    fate.meet("async transaction before")
    session.add(Entry(account=account, cents=1))
    await session.flush()
    fate.meet("async transaction after")
    return account


@durable.step(wait=tenacity.wait_none())
async def call_async(account: str) -> str:
    return _call("async", account)


@durable.workflow(name="sync")
def transfer(account: str) -> list[str]:
    done: list[str] = []
    for number in range(ROUNDS):
        done.append(credit(f"{account}/{number}"))
        fate.meet("sync between")
        done.append(call(f"{account}/{number}"))
    return done


@durable.workflow(name="async")
async def transfer_async(account: str) -> list[str]:
    done: list[str] = []
    for number in range(ROUNDS):
        done.append(await credit_async(f"{account}/{number}"))
        fate.meet("async between")
        done.append(await call_async(f"{account}/{number}"))
    return done


@durable.workflow
def small(account: str) -> str:
    """Three durable operations."""
    credit(f"{account}/0")
    call(f"{account}/0")
    return credit(f"{account}/1")


@durable.workflow
async def small_async(account: str) -> str:
    """The same."""
    await credit_async(f"{account}/0")
    await call_async(f"{account}/0")
    return await credit_async(f"{account}/1")


@durable.workflow
def sleepy(account: str) -> None:
    """Two durable operations, and a wait between them that only the test ends."""
    credit(f"{account}/0")
    sleep(timedelta(hours=1))
    credit(f"{account}/1")


@durable.step
def reply(session: Session, account: str, request: UpdateRequest[int]) -> None:
    session.add(Entry(account=account, cents=request.payload))
    request.reply(request.payload, session=session)


def is_positive(cents: int) -> bool:
    return cents > 0


@durable.workflow
def asked(account: str) -> None:
    """Refuses one update, and answers another in a transaction."""
    reply(account, wait_update("credit", int, validate=is_positive))


def _branch(account: str) -> str:
    call(account)
    return credit(account)


@durable.workflow
def forked(account: str) -> list[str]:
    """Two branches of two operations."""
    return list(parallel(partial(_branch, f"{account}/0"), partial(_branch, f"{account}/1")))


async def _branch_async(account: str) -> str:
    await call_async(account)
    return await credit_async(account)


@durable.workflow
async def forked_async(account: str) -> list[str]:
    """The same."""
    return list(await asyncio.gather(_branch_async(f"{account}/0"), _branch_async(f"{account}/1")))


@durable.step
def hold(session: Session, account: str) -> None:
    session.add(Entry(account=account, cents=1))
    session.flush()
    session.execute(text("SELECT pg_advisory_xact_lock_shared(:key)"), {"key": FROZEN})


@durable.workflow
def holding(account: str) -> None:
    hold(f"{account}/0")
    credit(f"{account}/1")


TRIES = 3


@durable.step(stop=tenacity.stop_after_attempt(TRIES), wait=tenacity.wait_fixed(3600))
def refuse(account: str) -> str:
    _call("sync", account)
    raise ConnectionError(account)


@durable.step(stop=tenacity.stop_after_attempt(TRIES), wait=tenacity.wait_fixed(3600))
async def refuse_async(account: str) -> str:
    _call("async", account)
    raise ConnectionError(account)


@durable.workflow
def stubborn(account: str) -> str:
    return refuse(account)


@durable.workflow
async def stubborn_async(account: str) -> str:
    return await refuse_async(account)


@durable.step
def hold_outside(account: str) -> str:
    """A plain step that waits there."""
    with _world().connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock_shared(:key)"), {"key": FROZEN})
        connection.execute(text("SELECT pg_advisory_unlock_shared(:key)"), {"key": FROZEN})
    return account


@durable.step
async def hold_outside_async(account: str) -> str:
    """The same, on the event loop's side."""
    return await asyncio.to_thread(hold_outside.definition.fn, account)


@durable.workflow
def holding_outside(account: str) -> str:
    return hold_outside(account)


@durable.workflow
async def holding_outside_async(account: str) -> str:
    return await hold_outside_async(account)


def _found() -> object:
    execution = current()
    assert execution is not None
    return execution.details


@durable.step
def report(account: str) -> object:
    """Write a stream, and return what an earlier try has reported."""
    found = _found()
    for number in range(ROUNDS):
        write_stream("story", f"{account}/{number}")
        heartbeat(number)
        fate.meet("sync report")
    return found


@durable.step
async def report_async(account: str) -> object:
    """The same."""
    found = _found()
    for number in range(ROUNDS):
        await aio.write_stream("story", f"{account}/{number}")
        await aio.heartbeat(number)
        fate.meet("async report")
    return found


@durable.workflow
def reporting(account: str) -> object:
    set_event("status", "reporting")
    return report(account)


@durable.workflow
async def reporting_async(account: str) -> object:
    await aio.set_event("status", "reporting")
    return await report_async(account)


@durable.step
def debit(session: Session, account: str) -> None:
    session.add(Entry(account=account, cents=-1))
    session.flush()
    fate.meet("compensation after")


@durable.workflow
def trip(account: str) -> None:
    """Two credits, and a wait that only its deadline or a cancel ends."""
    with Saga() as saga:
        for number in range(2):
            credit(f"{account}/{number}")
            saga.add(debit, f"{account}/{number}")
        wait_signal("never")


@durable.workflow
async def gives_up(account: str) -> None:
    """Fails beside its map, whose children are for another worker."""
    accounts = [f"{account}/{number}" for number in range(3)]
    async with asyncio.TaskGroup() as branches:
        branches.create_task(_mapped(accounts))
        await aio.wait_signal("fail")
        fate.meet("before the failure")
        raise LookupError(account)


async def _mapped(accounts: list[str]) -> None:
    await aio.map_children(small_async.options(queue="others"), accounts, max_concurrency=1)


@durable.step
def ship(session: Session, account: str) -> None:
    session.add(Entry(account=f"{account}/shipped", cents=1))
    session.flush()
    time.sleep(1.5)  # so much longer than the timeouts that a busy machine does not reverse their order


@durable.workflow
async def called_off(account: str) -> str:
    """Calls an order off, and once more, in the middle of a step that nothing can end; stays until that has ended."""
    try:
        async with asyncio.timeout(0.15), asyncio.timeout(0.1):
            await aio.to_thread(ship, account)
    except TimeoutError:
        await credit_async(f"{account}/called off")
        await asyncio.sleep(0.3)
        return await call_async(f"{account}/called off")
    return "shipped"


POINTS: list[str] = [
    f"{form} {place}"
    for form in ("sync", "async")
    for place in ("transaction before", "transaction after", "between", "plain before", "plain after")
]
HISTORY: Callable[[str], list[str]] = lambda form: [  # noqa: E731
    f"{name}{'_async' if form == 'async' else ''}{f'#{number + 1}' if number else ''}"
    for number in range(ROUNDS)
    for name in ("credit", "call")
]
