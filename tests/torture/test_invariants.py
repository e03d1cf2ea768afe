"""The invariants: they are true after a run, and each is seen to fail where rows are changed by hand."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Generator
from contextlib import closing
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Row, create_engine, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from sqla_durable import Worker
from sqla_durable.tools.torture import bank, traffic
from sqla_durable.tools.torture.bank import Order
from sqla_durable.tools.torture.database import BankDatabase
from sqla_durable.tools.torture.invariants import ALWAYS, AT_THE_END, contradictions, lost, reappeared
from sqla_durable.tools.torture.traffic import Batch
from tests.store.races import wait_until
from tests.support.databases import Databases

ORDERS = tuple(
    Order(transfer=each, source=each, target=each + 1, cents=100 * each, failing_tries=each % 2) for each in (1, 2, 3)
)
TAMPERING = {
    "money is neither made nor lost": "UPDATE torture_bank.account SET cents = cents + 1 WHERE id = 1",
    "nothing is applied twice": """
        INSERT INTO torture_bank.entry (transfer_id, workflow_id, step, kind, account, cents, attempt, worker)
        SELECT transfer_id, workflow_id, step, kind, account, cents, attempt, worker
        FROM torture_bank.entry WHERE transfer_id = 1 AND kind = 'journal'""",
    "only the worker that owns a workflow writes for it": """
        UPDATE durable.step SET attempt = 2 WHERE workflow_id = (SELECT workflow_id FROM torture_bank.transfer LIMIT 1);
        INSERT INTO durable.step SELECT workflow_id, key || '!', name, position, status, output, error, 2, tries,
            started_at, finished_at FROM durable.step WHERE key = 'debit' LIMIT 1""",
    "nothing fails": """UPDATE durable.workflow SET status = 'cancelled', output = NULL""",
    "every call of one step has one key, and no other step has it": """
        INSERT INTO torture_bank.call (transfer_id, workflow_id, step, key, worker)
        SELECT transfer_id, workflow_id, step, key || '!', worker FROM torture_bank.call""",
    "everything is finished": """
        UPDATE durable.workflow SET status = 'pending', token = NULL, output = NULL, finished_at = NULL""",
    "the sum of all accounts is what it was": "UPDATE torture_bank.account SET cents = cents - 1 WHERE id = 2",
    "every transfer is applied once, and its amounts agree": """
        UPDATE torture_bank.entry SET cents = cents + 1 WHERE transfer_id = 2 AND kind = 'credit'""",
    "every movement is counted once": "UPDATE torture_bank.account SET movements = movements + 1 WHERE id = 3",
    "every entry has its checkpoint": "DELETE FROM durable.step WHERE key = 'credit'",
    "every checkpoint has its entry or its call": "DELETE FROM torture_bank.call WHERE transfer_id = 3",
    "every history is complete": "UPDATE durable.step SET position = position + 1 WHERE key = 'journal'",
    "every result is the one of its transfer": "UPDATE durable.workflow SET output = '0'",
    "a transfer and its workflow are started together": "INSERT INTO durable.workflow (name) VALUES ('transfer')",
}


@pytest.fixture(scope="module")
def whole(databases: Databases) -> Generator[str]:
    """A database with three transfers that one worker has carried out, and one that was rolled back."""
    with databases.empty() as url:
        database = BankDatabase(url)
        database.create_bank(4)
        traffic.start_batch(database.engine, Batch(ORDERS, rolled_back=False))
        undone = Order(transfer=4, source=1, target=2, cents=1, failing_tries=0)
        traffic.start_batch(database.engine, Batch((undone,), rolled_back=True))
        asyncio.run(carry_out(url, database))
        database.close()
        yield url


class UncommittedDatabase(BankDatabase):
    """BankDatabase whose questions see a transaction that is not committed, and never will be."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.connection = self.engine.connect()

    def query(self, statement: str, **parameters: Any) -> list[Row[Any]]:
        return list(self.connection.execute(text(statement), parameters))

    def tamper(self, statements: str) -> None:
        for each in statements.split(";"):
            self.connection.exec_driver_sql(each)
        self.connection.exec_driver_sql("SET CONSTRAINTS ALL IMMEDIATE")  # the auditor looks at the commit

    def close(self) -> None:
        self.connection.rollback()
        self.connection.close()
        super().close()


@pytest.fixture
def database(whole: str) -> Generator[UncommittedDatabase]:
    """That database, in a transaction in which rows are changed by hand."""
    with closing(UncommittedDatabase(whole)) as database:
        yield database


async def carry_out(url: str, database: BankDatabase) -> None:
    connect = {"application_name": "torturer"}
    engine, async_engine = create_engine(url, connect_args=connect), create_async_engine(url, connect_args=connect)
    outside = create_engine(url, connect_args=connect, isolation_level="AUTOCOMMIT")
    async_outside = create_async_engine(url, connect_args=connect, isolation_level="AUTOCOMMIT")
    bank.outside.configure(bind=outside)
    bank.async_outside.configure(bind=async_outside)
    async with Worker(
        bank.durable,
        sessionmaker=sessionmaker(engine),
        async_sessionmaker=async_sessionmaker(async_engine),
        poll_interval=timedelta(seconds=0.05),
        name="torturer",
    ):
        finished = functools.partial(wait_until, what="the transfers being carried out")
        await asyncio.to_thread(finished, lambda: database.progress().unfinished == 0)
    engine.dispose()
    outside.dispose()
    await async_engine.dispose()
    await async_outside.dispose()


def test_untouched_rows_contradict_nothing(database: BankDatabase) -> None:
    assert database.progress().succeeded == len(ORDERS)
    assert contradictions(database, {**ALWAYS, **AT_THE_END}) == []
    assert lost(database, {1, 2, 3}) == []
    assert reappeared(database, {4}) == []


@pytest.mark.parametrize("invariant", [*ALWAYS, *AT_THE_END])
def test_invariant_is_seen_to_fail(database: UncommittedDatabase, invariant: str) -> None:
    database.tamper(TAMPERING[invariant])
    found = contradictions(database, {**ALWAYS, **AT_THE_END})
    assert invariant in {each.invariant for each in found}
    for each in found:
        assert each.what
        assert each.workflow_id is None or each.rows is not None


def test_acknowledged_transfer_that_is_not_there_is_lost(database: BankDatabase) -> None:
    assert [each.what for each in lost(database, {1, 5})] == ["transfer 5 is lost"]


@pytest.mark.parametrize(
    "trace",
    [
        "UPDATE torture_bank.transfer SET id = 4 WHERE id = 1",
        "UPDATE torture_bank.entry SET transfer_id = 4 WHERE kind = 'debit'",
        "UPDATE torture_bank.call SET transfer_id = 4",
        """INSERT INTO durable.workflow (name, input) VALUES ('transfer', '{"order": {"transfer": 4}}')""",
    ],
)
def test_rolled_back_transfer_that_left_a_trace_is_seen(database: UncommittedDatabase, trace: str) -> None:
    database.tamper(trace)
    assert [each.what for each in reappeared(database, {4})] == ["transfer 4 exists"]
