"""What a worker reads does not grow with the workflows that are suspended: polls, signals and repairs."""

from __future__ import annotations

from itertools import product
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable.store import claims
from sqla_durable.store.claims import _CLAIM, _CLAIM_RECEIVERS  # pyright: ignore[reportPrivateUsage]
from sqla_durable.store.signals import _DELIVER, _RENOTIFY, send  # pyright: ignore[reportPrivateUsage]
from sqla_durable.store.work import _FIND_WORK  # pyright: ignore[reportPrivateUsage]
from tests.store import races
from tests.store.plans import MODES, explain

FEW, MANY = 1_000, 100_000
SLACK = 8  # pages: indexes are a level higher
SINCE = "2020-01-01 00:00Z"

_SUSPENDED = """
INSERT INTO durable.workflow (name, status, input, awaits, wake_at, started_at)
SELECT 'checkout', 'suspended', '{}', '[{"signal"\\: "approved"}]',
    CASE n % 2 WHEN 0 THEN statement_timestamp() + interval '30 days' END, statement_timestamp()
FROM generate_series(1, :count) n
"""


def suspend(engine: Engine, count: int) -> UUID:
    """Let so many workflows wait; return one that a signal was sent to."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("TRUNCATE durable.workflow CASCADE"))
        connection.execute(text(_SUSPENDED), {"count": count})
        connection.execute(text("VACUUM ANALYZE durable.workflow, durable.signal, durable.step"))
    with Session(engine) as session:
        found: UUID = session.scalars(text("SELECT id FROM durable.workflow OFFSET 500 LIMIT 1")).one()
        send(session, [found], name="approved", payload="1", key=None)
        session.commit()
    return found


def statements(receiver: UUID) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return what an idle worker executes now and then, and what it executes for a signal."""
    scans = dict.fromkeys(["since_wake", "since_deadline", "since_sent", "since_expired"], SINCE)
    names = claims.name_parameters(["checkout"], [])
    ranges = claims.range_parameters(races.from_front(["default"]))
    claim: dict[str, Any] = {"limit": 100, "new_token": uuid7(), "claimant": races.WORKER, **names}
    return {
        "poll": (_FIND_WORK, {"polling_id": races.WORKER, "within": 1.0, **scans, **names, **ranges}),
        "claim": (_CLAIM, claim | ranges),
        "claim of receivers": (_CLAIM_RECEIVERS, claim | {"ids": f"{{{receiver}}}", "queues": ["default"]}),
        "delivery": (_DELIVER, {"limit": 1_000, "since": SINCE}),
        "repair": (_RENOTIFY, {"limit": 100, "after": UUID(int=0)}),
    }


@pytest.mark.new_database
def test_what_a_worker_reads_does_not_grow_with_what_is_suspended(engine: Engine) -> None:
    pages: dict[int, dict[tuple[str, str], int]] = {}
    for count in (FEW, MANY):
        receiver = suspend(engine, count)
        with Session(engine) as session:
            pages[count] = {}
            for mode, (name, (statement, parameters)) in product(MODES, statements(receiver).items()):
                # The less of two: the first reads the catalogue's pages, too.
                plans = [explain(session, statement, parameters, mode=mode) for _ in range(2)]
                pages[count][name, mode] = min(each.buffers() for each in plans)
    grown = {name: (few, pages[MANY][name]) for name, few in pages[FEW].items() if pages[MANY][name] > few + SLACK}
    assert not grown, pages
