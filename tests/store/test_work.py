"""The poll of an idle worker: what it finds, and that it costs the same however much there is."""

from __future__ import annotations

from datetime import datetime

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable.models import Queue
from sqla_durable.store import Suspend, timers, workers
from sqla_durable.store.claims import name_parameters, range_parameters
from sqla_durable.store.work import (
    _FIND_WORK,  # pyright: ignore[reportPrivateUsage]
    LATE_COMMIT,
    ScanStarts,
    Work,
    find_work,
)
from tests.store import races
from tests.store.plans import MODES, Plan, explain, fill

BEGIN: dict[str, object] = dict.fromkeys(["since_wake", "since_deadline", "since_sent", "since_expired"], "-infinity")
BEGIN["within"] = 60.0
NOTHING = Work(claimable=False, due=False, next_due_in=None, undelivered=False, abandoned=False, alive=False)


def seen(session: Session, *queues: str) -> Work:
    return find_work(
        session, worker_id=races.WORKER, ranges=races.from_front(queues or ["default"]), names=["checkout"]
    )


def test_an_empty_database_holds_nothing_to_do(engine: Engine) -> None:
    with Session(engine) as session:
        assert seen(session) == NOTHING


def test_what_waits_in_the_queues_under_a_known_name_is_claimable(engine: Engine) -> None:
    with Session(engine) as session:
        races.enqueue(session, name="unknown")
        races.enqueue(session, queue="elsewhere")
        assert not seen(session).claimable
        assert seen(session, "default", "elsewhere").claimable
        races.enqueue(session)
        assert seen(session).claimable
        assert not find_work(session, worker_id=races.WORKER, ranges={}, names=["checkout"]).claimable


def test_what_another_version_is_to_claim_is_not_claimable(engine: Engine) -> None:
    with Session(engine) as session:
        races.enqueue(session, version="1")
        for versions, claimable in (([], True), (["1"], True), (["2"], False)):
            found = find_work(
                session,
                worker_id=races.WORKER,
                ranges=races.from_front(["default"]),
                names=["checkout"],
                versions=versions,
            )
            assert found.claimable is claimable


def test_a_paused_queue_holds_nothing_to_claim(engine: Engine) -> None:
    with Session(engine) as session:
        races.enqueue(session)
        session.add(Queue(name="default"))
        session.flush()
        assert seen(session).claimable
        session.execute(text("UPDATE durable.queue SET paused_at = statement_timestamp()"))
        assert not seen(session).claimable


def test_poll_returns_due_timers_or_the_time_of_the_next(engine: Engine) -> None:
    first, second, third = races.claimed_fences(engine, 3)
    with Session(engine) as session:
        races.end(session, [Suspend(first, 50), Suspend(second, 500)])
        session.commit()
        assert not seen(session).due
        assert 40 < (seen(session).next_due_in or 0) <= 50
        races.end(session, [Suspend(third, 0)])
        session.commit()
        found = seen(session)
        assert found.due
        assert 40 < (found.next_due_in or 0) <= 50


def test_a_dead_worker_counts_once_it_has_left_something(engine: Engine) -> None:
    other = uuid7()
    with Session(engine) as session:
        workers.beat(session, worker_id=other, name="idle", queues=[], lease=races.LEASE)
        session.commit()
    races.claimed_fences(engine)
    with Session(engine) as session:
        assert (seen(session).abandoned, seen(session).alive) == (False, True)
        races.expire_leases(engine)
        session.rollback()
        assert (seen(session).abandoned, seen(session).alive) == (True, False)
        workers.end_lease(session, races.WORKER)  # what it left belongs to nobody that is remembered
        assert not seen(session).abandoned


@pytest.mark.new_database
@pytest.mark.parametrize("dead_workers", [0, 3])
@pytest.mark.parametrize("is_vacuumed", [False, True])
def test_a_poll_costs_a_few_pages_among_many_rows(engine: Engine, is_vacuumed: bool, dead_workers: int) -> None:
    with Session(engine) as session:
        fill(session)
        for _ in range(dead_workers):
            workers.beat(session, worker_id=uuid7(), name="dead", queues=[], lease=races.LEASE)
        session.commit()
    races.expire_leases(engine)
    if is_vacuumed:  # as autovacuum does in its own time, and plans are others from then on
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM ANALYZE"))
    with Session(engine) as session:
        parameters: dict[str, object] = {"polling_id": races.WORKER, **name_parameters(["checkout"], ["1"])}
        parameters |= range_parameters(races.from_front(["a", "default"])) | BEGIN
        # The less of two: a session whose catalogue caches were reset meanwhile reads the catalogue's pages, too.
        plans = [[explain(session, _FIND_WORK, parameters, mode=mode) for _ in range(2)] for mode in MODES]
    for plan in (min(each, key=Plan.buffers) for each in plans):
        assert plan.uses("workflow_pending_idx"), plan
        assert plan.uses("workflow_suspended_idx"), plan
        assert plan.uses("workflow_deadline_idx"), plan
        assert not plan.scans("workflow"), plan
        assert plan.buffers() < 60, plan


def test_the_next_poll_begins_two_seconds_before_what_is_left(engine: Engine) -> None:
    """What is committed within that time after its statement is seen, and nothing that is due is passed over."""
    with Session(engine) as session:
        for seconds in (-3_600, -60, 30):
            session.execute(
                text(
                    "INSERT INTO durable.workflow (name, status, wake_at) VALUES "
                    "('checkout', 'suspended', statement_timestamp() + make_interval(secs => :seconds))"
                ),
                {"seconds": seconds},
            )
        first = find_work(session, worker_id=races.WORKER, ranges={}, names=[])
        second = find_work(session, worker_id=races.WORKER, ranges={}, names=[], scan_starts=first.scan_starts)
        assert first.scan_starts.found_at is not None
        ago = {
            name: first.scan_starts.found_at - datetime.fromisoformat(at)
            for name, at in ages(first.scan_starts).items()
        }
        assert 3_600 < ago["wake_at"].total_seconds() < 3_700
        assert ago["sent_at"] == ago["deadline_at"] == LATE_COMMIT
        assert second.due
        assert second.scan_starts.wake_at == first.scan_starts.wake_at
        assert timers.wake_due(session, limit=9, since=first.scan_starts.wake_at) == 2
        assert not find_work(session, worker_id=races.WORKER, ranges={}, names=[], scan_starts=first.scan_starts).due


def ages(marks: ScanStarts) -> dict[str, str]:
    return {"wake_at": marks.wake_at, "sent_at": marks.sent_at, "deadline_at": marks.deadline_at}
