"""Rows of every table as anybody may write them, beside healthy workflows, which must finish.

Whatever the checks of the tables allow: extreme times and numbers, depths, lengths, Unicode, every status. The seed is
fixed; SQLA_DURABLE_FUZZ_SECONDS=600 goes on for so long, with seeds of its own, and SQLA_DURABLE_FUZZ_SEED begins with
another one. What fails says the seed, and the rows that were written.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Engine, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

import sqla_durable.asyncio as aio
from sqla_durable import Durable, Worker, Workflow, manage, send_signal, sleep, start_child
from tests.acceptance.shells import PATIENCE, POLL
from tests.store import races
from tests.support.domain import Entry
from tests.support.forged import NO_CHECK

SECONDS = float(os.environ.get("SQLA_DURABLE_FUZZ_SECONDS", "0"))
SEED = int(os.environ.get("SQLA_DURABLE_FUZZ_SEED", "1"))
ROWS = 150
durable = Durable()


@durable.step
def book(session: Session, cents: int) -> int:
    session.add(Entry(account="fuzz", cents=cents, note=None))
    return cents


@durable.step
async def notify(cents: int) -> int:
    return cents


@durable.workflow
def child(cents: int) -> int:
    return book(cents)


@durable.workflow
async def async_child(cents: int) -> int:
    return await notify(cents)


@durable.workflow
def sync_one(cents: int = 1) -> int:
    sleep(timedelta(milliseconds=1))
    return book(cents) + start_child(child, cents).result()


@durable.workflow
async def async_one(cents: int = 1) -> int:
    await aio.sleep(timedelta(seconds=1.1))  # long enough for a row
    said = await aio.wait_signal("go", int)
    return await notify(cents) + said + await (await aio.start_child(async_child, cents)).result()


@durable.workflow
async def calling() -> str:
    callback = await aio.create_callback(str)
    return await callback.result()


NAMES = ("child", "sync_one", "async_one", "calling")
STATUSES = ("pending", "running", "suspended", "succeeded", "failed", "cancelled")
STEP_STATUSES = ("running", "retrying", "waiting", "succeeded", "failed")
PAST = ("0001-01-02 00:00Z", "1969-12-31", "2020-01-01")
LEGAL = (*PAST, "2099-01-01", "9999-12-30 00:00Z")
TIMES = (*LEGAL, *LEGAL, *LEGAL, "-infinity", "infinity", "0044-03-15 BC", "294000-01-01")
INTERVALS = ("0", "1 microsecond", "-1 day", "100 years", "36500 days", "293000 years", "-178956970 years", "1 month")
NUMBERS = (-(2**31), -1, 0, 1, 2, 9, 2**15 - 1, 2**15, 2**31 - 2, 2**31 - 1)
TEXTS = (
    "x",
    " ",
    "",
    "é" * 400,
    "a" * 1_000,
    "b" * 2_500,
    "c" * 100_000,
    "line\nof \x1b[31mlog",
    "\u202e\U0001f600",
    "%s {} \\",
)
KEYS = (
    "book",
    "notify",
    "sleep",
    "wait_signal",
    "start:child",
    "map:child",
    "create_callback",
    "#patched",
    "child",
    "book#2",
)
SIGNALS = ("go", "#suspended", "#child", "#orphans", "#update:x", "#callback:x", "x")
ERRORS = (
    '{"type": "builtins:ValueError"}',
    '{"type": "x", "message": 1, "args": 2, "state": []}',
    '{"type": "\\u202e"}',
)
HEADERS = (
    '{"tenant": "a"}',
    '{"tenant": 1}',
    f'{{"tenant": {"9" * 5_000}}}',
    f'{{"t": {"[" * 1_500}{"]" * 1_500}}}',
    "{}",
)
JSON = (
    "null",
    "1",
    '"x"',
    "[]",
    "{}",
    '{"cents": 3}',
    '{"cents": "x"}',
    '{"cents": 1e400}',
    f'{{"cents": {"9" * 5_000}}}',
    f'{{"cents": {"[" * 1_500}{"]" * 1_500}}}',
    f'"{"y" * 100_000}"',
    '{"signal": "x", "token": 1, "timeout": "soon", "heartbeat": 1e300}',
    '{"id": "x", "status": "succeeded", "output": 1}',
)
AWAITS = (
    "[]",
    "[1]",
    '["x"]',
    "{}",
    "[[[1]]]",
    '[{"signal": "go"}]',
    '[{"signal": 1}]',
    '[{"children": ["x"], "open": 0}]',
    '[{"children": ["00000000-0000-0000-0000-000000000001"], "open": 0}]',
    '[{"children": [], "open": 1e20}]',
    f"[{','.join(['{}'] * 50_000)}]",
)


NEEDED = frozenset(
    {"id", "name", "key", "status", "output", "error", "token", "worker_id", "finished_at", "workflow_id", "position"}
    | {"attempt", "started_at", "payload", "value", "number", "wake_at", "closed", "queues"}
    | {"heartbeat_at", "lease_expires_at", "is_answer", "is_update", "is_notice"}
)


class Fuzzer:
    """Makes rows, of one seed. Most are such that a status allows them; what the checks refuse was not to be had."""

    def __init__(self, seed: int, engine: Engine) -> None:
        self._chance = random.Random(seed)
        self._engine = engine
        self._ids: list[str] = []
        self._workers: list[str] = []
        self.written: list[tuple[str, dict[str, Any]]] = []

    def write(self, count: int) -> None:
        """Write so many rows."""
        kinds = [self._workflow] * 8 + [self._step] * 6 + [self._signal] * 4
        kinds += [self._event, self._stream_item, self._queue, self._worker]
        while len(self.written) < count:
            self._insert(*self._chance.choice(kinds)())

    def _insert(self, table: str, given: dict[str, Any]) -> None:
        # What is not needed is left out mostly: a row is refused by the first check that it does not pass.
        spare = [name for name in given if name not in NEEDED]
        kept = NEEDED.union(self._chance.sample(spare, min(3, len(spare))))
        row = {name: value for name, value in given.items() if value is not None and name in kept}
        statement = text(
            f"INSERT INTO durable.{table} ({', '.join(row)}) OVERRIDING SYSTEM VALUE "
            f"VALUES ({', '.join(f':{each}' for each in row)})"
        )
        try:
            with self._engine.begin() as connection:
                connection.execute(statement, row)
        except DBAPIError:
            return
        self.written.append((table, row))
        if table in ("workflow", "worker"):
            (self._ids if table == "workflow" else self._workers).append(row["id"])

    def _maybe(self, *values: Any) -> Any:
        return self._chance.choice([None, *values])

    def _id(self) -> str:
        return str(UUID(int=self._chance.getrandbits(128)))

    def _workflow(self) -> tuple[str, dict[str, Any]]:
        pick, status = self._chance.choice, self._chance.choice(STATUSES)
        finished = status in ("succeeded", "failed", "cancelled")
        own = self._id()
        return "workflow", {
            "id": own,
            "name": pick([*NAMES, *NAMES, pick(TEXTS)]),
            "key": self._maybe(None, None, *TEXTS),
            "queue": pick(["default", "default", "default", pick(TEXTS)]),
            "priority": pick([0, -(2**15), 2**15 - 1]),
            "status": status,
            "input": pick(["{}", "{}", pick(JSON)]),
            "output": pick(JSON) if status == "succeeded" else None,
            "error": pick(ERRORS) if status == "failed" else None,
            "attempt": pick([1, 9, 2**15, 2**31 - 2, 2**31 - 1]),
            "crashes": pick(NUMBERS),
            "token": self._id() if status == "running" else None,
            "worker_id": pick([self._id(), *self._workers]) if status == "running" else self._maybe(self._id()),
            "created_at": self._maybe(*TIMES),
            "enqueued_at": self._maybe(*TIMES),
            "wake_at": self._maybe(*TIMES) if status == "suspended" else None,
            "started_at": pick(PAST) if status == "running" else self._maybe(None, *PAST),
            "finished_at": pick(PAST) if finished else None,
            "awaits": self._maybe(*AWAITS) if status == "suspended" else None,
            "deadline_at": self._maybe(None, None, *TIMES),
            "timeout": self._maybe(None, None, *INTERVALS),
            "parent_id": self._maybe(own, *self._ids),
            "parent_key": self._maybe(*KEYS),
            "detached": pick([True, False]),
            "forked_from": self._maybe(own, self._id()),
            "version": self._maybe(None, *TEXTS),
            "cancellation": self._maybe(None, "compensates", "requested", "overdue"),
            "continued_at": self._maybe(None, *TIMES),
            "headers": self._maybe(*HEADERS),
        }

    def _of_workflow(self) -> str:
        return self._chance.choice(self._ids) if self._ids else self._id()

    def _step(self) -> tuple[str, dict[str, Any]]:
        pick, status, began = self._chance.choice, self._chance.choice(STEP_STATUSES), self._chance.choice(PAST)
        key = pick([*KEYS, pick(TEXTS)])
        waits = {"retrying": pick(TIMES), "waiting": self._maybe(*TIMES)}
        return "step", {
            "workflow_id": self._of_workflow(),
            "key": key,
            "name": pick([key, key.partition("#2")[0], *KEYS]),
            "position": pick(NUMBERS[3:]),
            "status": status,
            "output": pick(JSON) if status == "succeeded" else None,
            "error": pick(ERRORS) if status == "failed" else None,
            "attempt": pick(NUMBERS[3:]),
            "attempts": pick([1, *NUMBERS]),
            "started_at": began,
            "finished_at": pick([began, LEGAL[-1]]),
            "wake_at": waits.get(status),
            "details": self._maybe(*JSON),
        }

    def _signal(self) -> tuple[str, dict[str, Any]]:
        name = self._chance.choice([*SIGNALS, *TEXTS])
        return "signal", {
            "workflow_id": self._of_workflow(),
            "id": self._maybe(-(2**63), 2**63 - 1, 0, self._chance.randrange(200)),
            "name": name,
            "is_answer": name.startswith("#callback:") or None,
            "is_update": name.startswith("#update:") or None,
            "is_notice": name in ("#suspended", "#child", "#orphans") or None,
            "key": self._maybe("outcome", *TEXTS),
            "payload": self._chance.choice(JSON),
            "created_at": self._maybe(*TIMES),
            "delivered_at": self._maybe(None, None, *TIMES),
            "consumed_by": self._maybe(None, None, *KEYS, *TEXTS),
        }

    def _event(self) -> tuple[str, dict[str, Any]]:
        return "event", {
            "workflow_id": self._of_workflow(),
            "key": self._chance.choice(["state", "#reply:1", *TEXTS]),
            "id": self._maybe(-(2**63), 2**63 - 1),
            "value": self._chance.choice(JSON),
            "step_key": self._maybe(*KEYS, *TEXTS),
            "created_at": self._maybe(*TIMES),
        }

    def _stream_item(self) -> tuple[str, dict[str, Any]]:
        closed = self._chance.choice([True, False])
        return "stream_item", {
            "workflow_id": self._of_workflow(),
            "name": self._chance.choice(["out", *TEXTS]),
            "number": self._chance.choice(NUMBERS[2:]),
            "value": None if closed else self._chance.choice(JSON),
            "closed": closed,
            "step_key": self._maybe(*KEYS, *TEXTS),
            "attempt": self._chance.choice(NUMBERS[3:]),
            "try_number": self._maybe(*NUMBERS),
            "created_at": self._maybe(*TIMES),
        }

    def _queue(self) -> tuple[str, dict[str, Any]]:
        return "queue", {"name": self._chance.choice(TEXTS), "paused_at": self._maybe(*TIMES)}

    def _worker(self) -> tuple[str, dict[str, Any]]:
        return "worker", {
            "id": self._id(),
            "name": self._chance.choice(TEXTS),
            "queues": self._chance.choice(["{}", "{default}", f"{{{'q' * 100_000}}}"]),
            "started_at": self._maybe(*TIMES),
            "heartbeat_at": LEGAL[0],
            "lease_expires_at": self._chance.choice(TIMES),
        }


def rounds() -> Iterator[int]:
    """Yield the seeds."""
    until = time.monotonic() + SECONDS
    seed = SEED
    yield seed
    while time.monotonic() < until:
        seed += 1
        yield seed


def start_healthy(maker: sessionmaker[Session]) -> list[UUID]:
    with maker.begin() as session:
        healthy = [each.start(session) for each in (sync_one, async_one, async_one)]
        healthy.append(child.start(session, 5))
        session.flush()
        return [each.id for each in healthy]


def finish(maker: sessionmaker[Session], healthy: Sequence[UUID]) -> None:
    """Send them what they wait for, and wait until all have succeeded."""
    with maker.begin() as session:
        for each in healthy[1:3]:
            send_signal(session, each, "go", 7)

    def statuses() -> set[str]:
        with maker() as session:
            return {each.value for each in session.scalars(select(Workflow.status).where(Workflow.id.in_(healthy)))}

    races.wait_until(lambda: statuses() == {"succeeded"}, what="the healthy", seconds=PATIENCE.total_seconds())


def cancel_all(maker: sessionmaker[Session]) -> None:
    """Cancel whatever is left, with the trees under it, in which there may be circles."""
    with maker.begin() as session:
        manage.cancel(session, select(Workflow.id))


async def test_healthy_workflows_finish_beside_rows_that_anybody_has_written(
    engine: Engine, session_factory: sessionmaker[Session], async_engine: AsyncEngine
) -> None:
    maker = async_sessionmaker(async_engine)
    with engine.begin() as connection:
        connection.execute(text(NO_CHECK))  # as if they had been new once, and been changed since
    for seed in rounds():
        fuzzer = Fuzzer(seed, engine)
        fuzzer.write(ROWS)
        healthy = start_healthy(session_factory)
        try:
            async with Worker(
                durable, sessionmaker=session_factory, async_sessionmaker=maker, poll_interval=POLL, grace=POLL
            ):
                await asyncio.to_thread(finish, session_factory, healthy)
            await asyncio.to_thread(cancel_all, session_factory)
        except BaseException:
            for table, row in fuzzer.written:
                print(table, {name: str(value)[:100] for name, value in row.items()})
            print(f"SQLA_DURABLE_FUZZ_SEED={seed}")
            raise
