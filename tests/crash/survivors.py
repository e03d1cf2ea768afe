"""The application that lives through outages, and its processes: workers, and a client that goes on starting workflows.

Every step returns a fresh value and writes down the value that it was given, its ground: a checkpoint that was
acknowledged and then lost shows, because what was done on its ground names a value that the history does not know.
Plain steps write to the outside world, a database on another server, which does not go down.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from sqlalchemy import Engine, create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Durable, Worker, Workflow
from tests.store import races
from tests.support.domain import Entry
from tests.support.processes import forked

Kind = Literal["sync", "psycopg", "asyncpg"]
"""What a worker runs on: a `sessionmaker` alone, or with an `async_sessionmaker` on one of the two drivers."""

ROUNDS = 3
LONGEST_HOLD = 100
GATED_CREDIT, GATED_CALL = "gated credit", "gated call"
ARRIVED, ACKNOWLEDGED = "arrived", "acknowledged"

durable = Durable()
sync_only = Durable()


@cache
def _outside() -> Engine:
    return create_engine(
        os.environ["OUTSIDE_URL"], isolation_level="AUTOCOMMIT", pool_size=5, max_overflow=0, pool_timeout=60
    )


def write_outside(account: str, note: str) -> None:
    """Write to the outside world; it stands at once, whatever becomes of this process."""
    with _outside().connect() as connection:
        connection.execute(
            text("INSERT INTO entry (account, cents, note) VALUES (:account, 0, :note)"),
            {"account": account, "note": note},
        )


def _gate(account: str, step: str) -> Path | None:
    """Return the gate at which this step waits: the first of its kind in an account named after it."""
    if not (account.startswith(step) and account.endswith("/0")):
        return None
    write_outside(ARRIVED, account)
    return Path(os.environ["GATE"])


def _hold(account: str, step: str) -> None:
    gate = _gate(account, step)
    if gate is not None:
        races.wait_until(gate.exists, what="the gate's opening", seconds=LONGEST_HOLD)


async def _hold_async(account: str, step: str) -> None:
    gate = _gate(account, step)
    while gate is not None and not gate.exists():
        await asyncio.sleep(0.01)


@durable.step
def credit(session: Session, account: str, ground: str) -> str:
    value = uuid4().hex
    session.add(Entry(account=account, cents=1, note=f"{ground} {value}"))
    session.flush()
    _hold(account, GATED_CREDIT)
    return value


@durable.step
def call(account: str, ground: str) -> str:
    value = uuid4().hex
    write_outside(account, f"{ground} {value}")
    _hold(account, GATED_CALL)
    return value


@durable.step
async def credit_async(session: AsyncSession, account: str, ground: str) -> str:
    value = uuid4().hex
    session.add(Entry(account=account, cents=1, note=f"{ground} {value}"))
    await session.flush()
    await _hold_async(account, GATED_CREDIT)
    return value


@durable.step
async def call_async(account: str, ground: str) -> str:
    value = uuid4().hex
    write_outside(account, f"{ground} {value}")
    await _hold_async(account, GATED_CALL)
    return value


def chain(account: str) -> str:
    ground = "nothing"
    for number in range(ROUNDS):
        ground = call(f"{account}/{number}", credit(f"{account}/{number}", ground))
    return ground


async def chain_async(account: str) -> str:
    ground = "nothing"
    for number in range(ROUNDS):
        ground = await call_async(f"{account}/{number}", await credit_async(f"{account}/{number}", ground))
    return ground


durable.workflow(chain, name="sync")
durable.workflow(chain_async, name="async")
sync_only.workflow(chain, name="sync")

FORMS: dict[Kind, tuple[str, ...]] = {"sync": ("sync",), "psycopg": ("sync", "async"), "asyncpg": ("sync", "async")}
"""The workflows that a worker of each kind knows."""

# Processes


@contextmanager
def worker(kind: Kind, url: str, **options: Any) -> Generator[BaseProcess]:
    """A worker in a process of its own, killed at the end if it lives; `OUTSIDE_URL` and `GATE` are its world."""
    with _process(_work, kind, url, options) as process:
        yield process


@contextmanager
def client(url: str, forms: tuple[str, ...]) -> Generator[BaseProcess]:
    """A client that starts workflows without an end and writes outside which starts were acknowledged to it."""
    with _process(_start_for_ever, url, forms) as process:
        yield process


@contextmanager
def _process(target: Callable[..., None], *args: Any) -> Generator[BaseProcess]:
    world = {name: os.environ[name] for name in ("OUTSIDE_URL", "GATE")}
    process = forked.Process(target=_enter, args=(world, target, args), daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()
        process.close()


def _enter(world: dict[str, str], target: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.update(world)
    target(*args)


def _work(kind: Kind, url: str, options: dict[str, Any]) -> None:
    engine_options: dict[str, Any] = options.pop("engine", {})
    maker = sessionmaker(create_engine(url, **engine_options))
    if kind == "sync":
        Worker(sync_only, sessionmaker=maker, **options).run()
        return
    on_loop = create_async_engine(make_url(url).set(drivername=f"postgresql+{kind}"), **engine_options)
    Worker(durable, sessionmaker=maker, async_sessionmaker=async_sessionmaker(on_loop), **options).run()


def _start_for_ever(url: str, forms: tuple[str, ...]) -> None:
    """Start as an application does whose caller asks again after an error: under a new account, the old is unknown."""
    maker = sessionmaker(create_engine(url))
    pause = threading.Event()
    for number in itertools.count():
        account = f"client {number}"
        try:
            with maker.begin() as session:
                session.add(Workflow(name=forms[number % len(forms)], input={"account": account}))
        except DBAPIError:
            pause.wait(0.05)
        else:
            write_outside(ACKNOWLEDGED, account)
            pause.wait(0.01)
