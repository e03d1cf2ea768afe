"""Starts transfers all the time, in transactions of its own, some of which it rolls back.

It knows which it has committed (they must be found, whatever happens to the server), which it has rolled back (nothing
of them may be found), and which are unknown, because the server was lost during the commit.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from sqla_durable.tools.torture import bank
from sqla_durable.tools.torture.bank import Order
from sqla_durable.tools.torture.database import Transfer

_LARGEST_BATCH = 12
_ROLLED_BACK = 0.15
_FAILING_TRIES = [0] * 8 + [1, 2]
_PAUSE = 0.02
_UNFINISHED = text(
    "SELECT (SELECT count(*) FROM durable.workflow WHERE status = 'pending') "
    "+ (SELECT count(*) FROM durable.workflow WHERE status = 'running')"
)


@dataclass(frozen=True, slots=True)
class Batch:
    """Transfers that are started in one transaction, and whether it is rolled back."""

    orders: tuple[Order, ...]
    rolled_back: bool


def batches(seed: int, *, accounts: int) -> Iterator[Batch]:
    """Yield the transfers of a seed, without end; a pure function of it."""
    chance = random.Random(f"{seed}/transfers")  # noqa: S311 (repeatable, not secret)
    number = 0
    while True:
        count = chance.randint(1, _LARGEST_BATCH)
        orders = tuple(_order(chance, number + each, accounts) for each in range(1, count + 1))
        number += count
        yield Batch(orders, rolled_back=chance.random() < _ROLLED_BACK)


def _order(chance: random.Random, number: int, accounts: int) -> Order:
    source, target = chance.sample(range(1, accounts + 1), 2)
    cents = chance.randint(1, 10_000)
    return Order(
        transfer=number, source=source, target=target, cents=cents, failing_tries=chance.choice(_FAILING_TRIES)
    )


class Traffic:
    """A thread that starts transfers so that about `backlog` of them are unfinished.

    Attributes:
        committed: the transfers whose start was acknowledged.
        rolled_back: those whose transaction was rolled back.
    """

    def __init__(self, url: str, *, seed: int, accounts: int, backlog: int) -> None:
        self.committed: set[int] = set()
        self.rolled_back: set[int] = set()
        self.error: BaseException | None = None
        self._engine = create_engine(url, connect_args={"application_name": "torture"})
        self._batches = batches(seed, accounts=accounts)
        self._backlog = backlog
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="torture traffic", daemon=True)

    def begin(self) -> None:
        """Start the thread."""
        self._thread.start()

    def end(self) -> None:
        """Start no more transfers, and end the thread."""
        self._ended.set()
        self._thread.join()
        self._engine.dispose()

    def _run(self) -> None:
        try:
            for batch in self._batches:
                if self._ended.is_set():
                    return
                self._start(batch)
                self._ended.wait(_PAUSE)
        except BaseException as error:
            self.error = error

    def _start(self, batch: Batch) -> None:
        """Start a batch when the backlog has room for it; do not try again if the server is lost."""
        try:
            self._wait_for_room()
            start_batch(self._engine, batch)
        except OperationalError:
            return
        numbers = {each.transfer for each in batch.orders}
        if batch.rolled_back:
            self.rolled_back |= numbers
        else:
            self.committed |= numbers

    def _wait_for_room(self) -> None:
        while not self._ended.is_set() and count_unfinished(self._engine) >= self._backlog:
            self._ended.wait(_PAUSE)


def start_batch(engine: Engine, batch: Batch) -> None:
    """Start a batch of transfers in one transaction: every other one as `async def`, some with a key."""
    with Session(engine) as session:
        for order in batch.orders:
            workflow = bank.async_transfer if order.transfer % 2 else bank.transfer
            keyed = workflow.options(key=f"transfer-{order.transfer}") if order.transfer % 3 == 0 else workflow
            record = keyed.start(session, order)
            session.flush()
            session.add(
                Transfer(
                    id=order.transfer,
                    workflow_id=record.id,
                    source=order.source,
                    target=order.target,
                    cents=order.cents,
                )
            )
        session.flush()
        if batch.rolled_back:
            session.rollback()
        else:
            session.commit()


def count_unfinished(engine: Engine) -> int:
    """Return how many workflows are pending or running, read from their partial indexes."""
    with engine.connect() as connection:
        return int(connection.execute(_UNFINISHED).scalar_one())
