"""From where on a worker reads: what it passes over, and how it finds what stands there all the same."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker
from uuid_utils.compat import uuid7

from sqla_durable import Durable, Worker
from sqla_durable.execution.worker.cursors import Cursors
from sqla_durable.store import hints
from sqla_durable.store.claims import FRONT, Batch, Range, ScanPosition
from sqla_durable.store.work import FULL_SCAN, LATE_COMMIT, ScanStarts, Work
from tests.acceptance.shells import PATIENCE, POLL
from tests.support.notifications import Ear

NOW = datetime(2026, 1, 1, tzinfo=UTC)
BEFORE = NOW - LATE_COMMIT
LONG_AGO = NOW - timedelta(hours=1)


def place(priority: int, moment: datetime = BEFORE, identity: int = 0) -> ScanPosition:
    return ScanPosition(priority, moment, UUID(int=identity))


def seen(*, claimable: bool = False, kept: tuple[str, ...] = ()) -> Work:
    scan_starts = ScanStarts(wake_at="then", found_at=NOW)
    return Work(claimable, False, None, False, False, True, kept=kept, scan_starts=scan_starts)


def looked(cursors: Cursors, what: Work, *, asked: bool = True, took: float = 0.0) -> None:
    cursors.note_poll(what, restarts=cursors.restarts, asked=asked, took=took)


def claimed(cursors: Cursors, *places: ScanPosition, is_full: bool = False) -> None:
    reached = {"default": {each.priority: each for each in places}} if places else {}
    cursors.note_claim(Batch([], reached, NOW if places else None), restarts=cursors.restarts, is_full=is_full)


def test_at_first_everything_is_read() -> None:
    cursors = Cursors(["default"], poll_interval=1.0)
    assert cursors.scan_starts is FULL_SCAN
    assert cursors.ranges() == {"default": [Range(FRONT)]}


def test_after_a_poll_that_found_nothing_other_priorities_are_read_and_this_one_from_there_on() -> None:
    cursors = Cursors(["default"], poll_interval=1.0)
    looked(cursors, seen())
    assert cursors.scan_starts.wake_at == "then"
    assert cursors.ranges() == {"default": [Range(FRONT, until=0), Range(place(0))]}
    claimed(cursors, place(5, NOW))
    assert cursors.ranges()["default"] == [Range(FRONT, until=0), Range(place(0), until=5), Range(place(5))]


def test_a_poll_that_did_not_ask_or_found_something_moves_no_claim() -> None:
    cursors = Cursors(["default"], poll_interval=1.0)
    looked(cursors, seen(), asked=False)
    looked(cursors, seen(claimable=True))
    assert cursors.ranges() == {"default": [Range(FRONT)]}


def test_a_full_claim_is_followed_from_the_place_that_it_reached() -> None:
    cursors = Cursors(["default"], poll_interval=1.0)
    last = place(0, LONG_AGO, 7)
    claimed(cursors, place(-1, NOW), last, is_full=True)
    assert cursors.ranges()["default"] == [Range(last)]
    claimed(cursors)
    assert cursors.ranges()["default"] == [Range(FRONT, until=-1), Range(place(-1), until=0), Range(last)]


def test_of_many_priorities_a_few_have_places_of_their_own() -> None:
    cursors = Cursors(["default"], poll_interval=1.0)
    for each in range(1, 1000):
        claimed(cursors, place(each, NOW))
    claimed(cursors, *(place(each, NOW) for each in range(200)), is_full=True)
    claimed(cursors)
    ranges = cursors.ranges()["default"]
    assert len(ranges) == 17
    assert ranges[0] == Range(FRONT, until=ranges[1].after.priority)
    assert [each.until for each in ranges[:-1]] == [each.after.priority for each in ranges[1:]]


def test_a_queue_that_is_resumed_is_read_from_its_front() -> None:
    cursors = Cursors(["default"], poll_interval=1.0)
    looked(cursors, seen(kept=("default",)))
    looked(cursors, seen(kept=("default",)))
    assert cursors.ranges() != {"default": [Range(FRONT)]}
    looked(cursors, seen())
    assert cursors.ranges() == {"default": [Range(FRONT)]}


def test_a_poll_that_began_before_a_restart_is_not_noted() -> None:
    cursors = Cursors(["default"], poll_interval=1.0)
    before = cursors.restarts
    cursors.restart()
    cursors.note_poll(seen(), restarts=before, asked=True, took=0.0)
    cursors.note_claim(Batch([], {"default": {0: place(0)}}, NOW), restarts=before, is_full=True)
    assert cursors.scan_starts is FULL_SCAN
    assert cursors.ranges() == {"default": [Range(FRONT)]}


def test_everything_is_read_again_after_ten_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 9.9, 10.1])
    monkeypatch.setattr("sqla_durable.execution.worker.claims.time.monotonic", lambda: next(clock))
    cursors = Cursors(["default"], poll_interval=1.0)
    cursors.restart_if_time()
    looked(cursors, seen())
    cursors.restart_if_time()
    assert cursors.scan_starts is not FULL_SCAN
    cursors.restart_if_time()
    assert cursors.scan_starts is FULL_SCAN


def test_everything_is_read_more_seldom_if_that_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 3.0, 62.0, 64.0])
    monkeypatch.setattr("sqla_durable.execution.worker.claims.time.monotonic", lambda: next(clock))
    cursors = Cursors(["default"], poll_interval=1.0)
    cursors.restart_if_time()
    looked(cursors, seen(), took=3.0)
    cursors.restart_if_time()
    assert cursors.scan_starts is not FULL_SCAN
    cursors.restart_if_time()
    assert cursors.scan_starts is FULL_SCAN


def test_what_was_committed_late_is_found_by_a_worker_without_hints(session_factory: sessionmaker[Session]) -> None:
    """As if the transactions that inserted them had been open for an hour: they stand before all cursors."""
    durable = Durable()

    @durable.workflow
    def hello() -> str:
        return "hello"

    def inserted(columns: str, values: str) -> UUID:
        with session_factory.begin() as session:
            insert = f"INSERT INTO durable.workflow (id, name, {columns}) VALUES (:id, 'hello', {values})"
            session.execute(text(insert), {"id": (workflow_id := uuid7())})
            return workflow_id

    with Worker(durable, sessionmaker=session_factory, poll_interval=POLL, listen=False):
        for _ in range(2):
            started = inserted("enqueued_at", "statement_timestamp() - interval '1 hour'")
            assert hello.handle(session_factory, started).result(timeout=PATIENCE) == "hello"
            delayed = inserted("status, wake_at", "'suspended', statement_timestamp() - interval '1 hour'")
            assert hello.handle(session_factory, delayed).result(timeout=PATIENCE) == "hello"


def test_a_start_whose_transaction_was_long_says_so(
    session_factory: sessionmaker[Session], ear: Ear, monkeypatch: pytest.MonkeyPatch
) -> None:
    durable = Durable()

    @durable.workflow
    def hello() -> None: ...

    monkeypatch.setattr("sqla_durable.api.hints._LONG", 0.0)
    with session_factory.begin() as session:
        hello.start(session)
    assert set(ear.hears(2)) == {"q:default", hints.LATE}
