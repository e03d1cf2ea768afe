"""While a snapshot is open elsewhere, what is dead stays in the indexes: nothing that a worker repeats reads it again.

As pages, which do not depend on the machine.
"""

from __future__ import annotations

from collections.abc import Generator
from datetime import datetime
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, func, select, text
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable.execution.worker.cursors import Cursors
from sqla_durable.store import Awaited, Fence, Suspend, attempts, claims, deferred, failures, signals, timers, workers
from sqla_durable.store import statements as store_statements
from sqla_durable.store import work as store_work
from sqla_durable.store.work import FULL_SCAN, LATE_COMMIT, ScanStarts
from tests.store import races
from tests.store.plans import Plan, explain
from tests.support.databases import Databases

# pyright: reportPrivateUsage=false

ROUNDS, SIZE = 6, 150


class Life:
    """Workflows that are claimed, wait for a signal, are woken, wait for a timer, are woken, and succeed."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._place = claims.FRONT

    def pass_by(self, size: int) -> None:
        started = "INSERT INTO durable.workflow (name, deadline_at) SELECT 'checkout', statement_timestamp() + '1 hour'"
        ids = self._session.scalars(
            text(f"{started} FROM generate_series(1, :size) RETURNING id"), {"size": size}
        ).all()
        self._session.commit()
        self._end([Suspend(each, None, [Awaited(signal="go")]) for each in self._claimed(size)])
        signals.send(self._session, ids, name="go", payload="1", key=None)
        assert signals.deliver(self._session, limit=1_000) == (2 * size, size)
        self._end([Suspend(each, 0.0) for each in self._claimed(size)])
        assert timers.wake_due(self._session, limit=1_000) == size
        self._end([races.success(each) for each in self._claimed(size)])

    def _claimed(self, size: int) -> list[Fence]:
        self._session.commit()
        batch = claims.claim(
            self._session,
            worker_id=races.WORKER,
            token=uuid7(),
            ranges={"default": [claims.Range(self._place)]},
            names=["checkout"],
            limit=size,
        )
        self._session.commit()
        self._place = batch.last_positions["default"][0]
        assert len(batch.claimed) == size
        return [each.fence for each in batch.claimed]

    def _end(self, ends: list[attempts.End]) -> None:
        assert not attempts.write_batch(self._session, ends=ends).ends
        self._session.commit()


@pytest.fixture(scope="module")
def burdened(databases: Databases) -> Generator[Engine]:
    """A database in which 900 workflows have passed by since a snapshot that is open."""
    with databases.migrated("durable", used=False) as url:
        engine = create_engine(url)
        with Session(engine) as old, Session(engine) as session:
            workers.beat(session, worker_id=races.WORKER, name="w", queues=["default"], lease=races.LEASE)
            session.execute(text("ALTER TABLE durable.workflow SET (autovacuum_enabled = off)"))
            session.commit()
            old.connection(execution_options={"isolation_level": "REPEATABLE READ"})
            old.execute(text("SELECT FROM durable.workflow LIMIT 1"))
            life = Life(session)
            for _ in range(ROUNDS):
                life.pass_by(SIZE)
            session.execute(text("ANALYZE"))
            session.commit()
            yield engine
        engine.dispose()


def now(session: Session) -> datetime:
    moment: datetime = session.execute(select(func.statement_timestamp())).scalar_one()
    return moment


def pages(session: Session, scan_starts: ScanStarts, ranges: claims.Ranges) -> dict[str, int]:
    """Measure what a worker repeats."""
    known = claims.name_parameters(["checkout"], []) | claims.range_parameters(ranges)
    statements: dict[str, tuple[Any, dict[str, Any]]] = {
        "poll": (
            store_work._FIND_WORK,
            {"polling_id": races.WORKER, "within": 1.0, **known, **store_work._scan_parameters(scan_starts)},
        ),
        "claim": (claims._CLAIM, {"limit": 100, "new_token": uuid7(), "claimant": races.WORKER, **known}),
        "deliver": (signals._DELIVER, {"limit": 1_000, "since": scan_starts.sent_at}),
        "wake": (timers._WAKE_DUE, {"limit": 1_000, "since": scan_starts.wake_at}),
        "fail": (failures._FAIL_OVERDUE, {"limit": 1_000, "since": scan_starts.deadline_at}),
        "start orphans": (deferred._START_ORPHANS, {"limit": 1_000, "since": scan_starts.sent_at}),
    }
    return {
        name: min(explain(session, *each, mode="force_generic_plan").buffers() for _ in range(2))
        for name, each in statements.items()
    }


def marks_at(moment: datetime) -> ScanStarts:
    then = moment.isoformat()
    return ScanStarts(then, then, then, then, found_at=moment)


def cursors_at(moment: datetime) -> Cursors:
    cursors = Cursors(["default"], poll_interval=1.0)
    seen = store_work.Work(False, False, None, False, False, True, scan_starts=marks_at(moment + LATE_COMMIT))
    cursors.note_poll(seen, restarts=0, asked=True, took=0.0)
    return cursors


def test_what_a_worker_repeats_does_not_read_what_is_dead(burdened: Engine) -> None:
    # behaviour: G1 G2
    with Session(burdened) as session:
        moment = now(session)
        everything = pages(session, FULL_SCAN, races.from_front(["default"]))
        after = pages(session, marks_at(moment), cursors_at(moment).ranges())
    assert after["poll"] < 40, after
    assert all(count < 15 for name, count in after.items() if name != "poll"), after
    dead = {name for name, count in everything.items() if count > 5 * max(after[name], 10)}
    assert {"poll", "claim"} <= dead, (everything, after)


def test_a_woken_workflow_is_claimed_past_what_is_dead(burdened: Engine) -> None:
    # behaviour: G1
    with Session(burdened) as session:
        moment = now(session)
        (workflow_id,) = races.enqueue(session)
        claim = {"limit": 100, "new_token": uuid7(), "claimant": races.WORKER} | claims.name_parameters(
            ["checkout"], []
        )
        plan = explain(
            session,
            claims._CLAIM,
            claim | claims.range_parameters(cursors_at(moment).ranges()),
            mode="force_generic_plan",
        )
        races.cancel(session, workflow_id)
        session.commit()
    assert plan.rows("CTE claimable") == 1
    assert plan.buffers() < 40, plan


def test_an_attempt_is_found_by_its_id_and_not_among_what_runs(burdened: Engine) -> None:
    # behaviour: G1
    batch = store_statements.batch_parameter("batch", [{"id": uuid7().hex, "token": uuid7().hex}])
    with Session(burdened) as session:
        plan = min(
            (explain(session, attempts._STILL_OWNED, batch, mode="force_generic_plan") for _ in range(2)),
            key=Plan.buffers,
        )
    assert plan.buffers() < 10, plan
