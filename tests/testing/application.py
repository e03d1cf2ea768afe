"""Workflows that survive a crash at any point, some that do not, and what makes their workers."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from functools import cache

import tenacity
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Durable, Worker, current, run_step
from sqla_durable.asyncio import to_thread
from tests.support.domain import Entry

durable = Durable()


@cache
def outside() -> Engine:
    """The outside world: it commits what it is asked for, whatever becomes of the asking process."""
    return create_engine(os.environ["CRASH_URL"], isolation_level="AUTOCOMMIT")


def _note(account: str, note: str) -> None:
    with outside().connect() as connection:
        connection.execute(
            text("INSERT INTO entry (account, cents, note) VALUES (:account, 0, :note)"),
            {"account": account, "note": note},
        )


@durable.step
def credit(session: Session, account: str, cents: int) -> int:
    session.add(Entry(account=account, cents=cents))
    session.flush()
    return cents


@durable.step
async def credit_async(session: AsyncSession, account: str, cents: int) -> int:
    session.add(Entry(account=account, cents=cents))
    await session.flush()
    return cents


@durable.step(wait=tenacity.wait_none(), stop=tenacity.stop_after_attempt(3))
def call(account: str) -> str:
    """Fails the first time in each process, and is idempotent by its key."""
    execution = current()
    assert execution is not None
    if account not in _called:
        _called.add(account)
        raise ConnectionError("try again")
    with outside().connect() as connection:
        connection.execute(
            text(
                "INSERT INTO entry (account, cents, note) SELECT :account, 0, CAST(:note AS text) "
                "WHERE NOT EXISTS (SELECT FROM entry WHERE note = CAST(:note AS text))"
            ),
            {"account": account, "note": execution.idempotency_key},
        )
    return account


_called: set[str] = set()


@durable.step
def careless_call(account: str) -> None:
    """Has an effect that comes again with every execution."""
    _note(account, "call")


@durable.step
def torn(session: Session, account: str) -> None:
    """Commits half of what it does on a connection of its own."""
    session.add(Entry(account=account, cents=-5))
    session.flush()
    _note(account, "the other half")


@durable.workflow
def transfer(account: str) -> dict[str, object]:
    return {"credited": credit(account, 1), "called": call(account), "again": credit(account, 2)}


@durable.workflow
def brief(account: str) -> int:
    return credit(account, 1)


@durable.workflow
async def brief_async(account: str) -> int:
    return await credit_async(account, 1)


@durable.workflow
async def transfer_async(account: str) -> dict[str, object]:
    return {
        "credited": await credit_async(account, 1),
        "called": await to_thread(call, account),
        "again": await credit_async(account, 2),
    }


@durable.step(timeout=timedelta(minutes=1), total_timeout=timedelta(hours=1))
def credit_in_time(session: Session, account: str, cents: int) -> int:
    session.add(Entry(account=account, cents=cents))
    session.flush()
    return cents


@durable.step(total_timeout=timedelta(hours=1))
def call_in_time(account: str) -> str:
    return account


@durable.workflow
def transfer_in_time(account: str) -> dict[str, object]:
    return {
        "credited": credit_in_time(account, 1),
        "called": call_in_time(account),
        "again": credit_in_time(account, 2),
    }


@durable.workflow
def brief_in_time(account: str) -> int:
    return credit_in_time(account, 1)


@durable.workflow
def failing(account: str) -> None:
    """Fails, after it has undone what it did."""
    credit(account, 1)
    try:
        run_step("refuse", refuse)
    except LookupError:
        credit(account, -1)
        raise


def refuse() -> None:
    raise LookupError("refused")


@durable.workflow
def careless(account: str) -> None:
    credit(account, 1)
    careless_call(account)


@durable.workflow
def torn_apart(account: str) -> None:
    credit(account, 1)
    torn(account)


@durable.workflow
def attempted(account: str) -> int:
    """Return a result that depends on its attempt."""
    credit(account, 1)
    execution = current()
    assert execution is not None
    return execution.attempt


@durable.workflow
def stuck(account: str) -> None:
    print("stuck for", account, file=sys.stderr, flush=True)
    threading.Event().wait()


@durable.workflow(queue="elsewhere")
def elsewhere(account: str) -> None: ...


def make_worker(url: str) -> Worker:
    return Worker(durable, sessionmaker=sessionmaker(create_engine(url)), async_sessionmaker=_loop(url, "psycopg"))


def make_worker_asyncpg(url: str) -> Worker:
    return Worker(durable, sessionmaker=sessionmaker(create_engine(url)), async_sessionmaker=_loop(url, "asyncpg"))


def make_worker_sync(url: str) -> Worker:
    own = Durable()
    own.workflow(transfer.definition.fn)
    own.workflow(brief.definition.fn)
    return Worker(own, sessionmaker=sessionmaker(create_engine(url)))


def make_worker_translated(url: str) -> Worker:
    engine = create_engine(url).execution_options(schema_translate_map={"durable": "tenant_7"})
    own = Durable()
    own.workflow(brief.definition.fn)
    return Worker(own, sessionmaker=sessionmaker(engine))


def make_worker_of_one_queue(url: str) -> Worker:
    engine = create_engine(url)
    return Worker(durable, sessionmaker=sessionmaker(engine), async_sessionmaker=_loop(url, "psycopg"), queues=["mail"])


def make_worker_with_short_lease(url: str) -> Worker:
    """Beats all the time: leases are no points."""
    own = Durable()
    own.workflow(brief.definition.fn)
    return Worker(own, sessionmaker=sessionmaker(create_engine(url)), lease=timedelta(seconds=0.06))


def make_worker_that_fails(url: str) -> Worker:
    print("this is what it printed", file=sys.stderr, flush=True)
    raise RuntimeError("no worker today")


def make_nothing(url: str) -> None:
    pass


def make_worker_that_exits(url: str) -> Worker:
    os._exit(3)


def _loop(url: str, driver: str) -> async_sessionmaker[AsyncSession]:
    return async_sessionmaker(create_async_engine(make_url(url).set(drivername=f"postgresql+{driver}")))


def unimportable() -> Callable[[str], Worker]:
    return lambda url: make_worker(url)
