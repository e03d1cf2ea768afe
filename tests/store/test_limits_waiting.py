"""Queues with limits: nothing waits for what does not concern it, and each setting counts as it is now."""

from __future__ import annotations

from collections.abc import Generator
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.orm import Session

from sqla_durable import manage
from sqla_durable.models import QueueKey, Workflow
from tests.store import races
from tests.store.test_limits import MINUTE, batch, claim, fail, finish, ids, keys, make, suspend


@pytest.fixture
def session(engine: Engine) -> Generator[Session]:
    with Session(engine) as session:
        yield session


def several(session: Session, count: int, **options: object) -> list[str | None]:
    """Claim one at a time, and return the keys of what was claimed."""
    return [by for _ in range(count) for by in keys(session, claim(session, 1, **options))]


def test_what_has_no_key_takes_turns_with_those_that_have_one(session: Session) -> None:
    make(session, fair=True)
    races.enqueue(session, 4, by="a")
    races.enqueue(session, 4)
    assert several(session, 6) == ["a", None] * 3


@pytest.mark.parametrize("columns", [{"name": "other"}, {"version": "2"}])
@pytest.mark.parametrize(("by", "claims"), [("a", 2), (None, 4)])
def test_what_this_worker_does_not_know_keeps_nothing_from_it(
    session: Session, columns: dict[str, Any], by: str | None, claims: int
) -> None:
    make(session, fair=True)
    races.enqueue(session, 2, by=by, **columns)
    races.enqueue(session, 2, by="b")
    assert several(session, claims, versions=["1"]) == ["b", "b"]


def test_of_a_key_another_name_waits_alone(session: Session) -> None:
    make(session, per_key=1)
    races.enqueue(session, by="a", name="other")
    races.enqueue(session, by="a")
    assert keys(session, claim(session)) == ["a"]


def test_with_fifo_none_overtakes_what_this_worker_does_not_know(session: Session) -> None:
    make(session, fifo="skip")
    races.enqueue(session, by="a", name="other")
    races.enqueue(session, by="a")
    races.enqueue(session, by="a", priority=1)
    races.enqueue(session, by="b", name="other")
    races.enqueue(session, by="b", priority=1)
    races.enqueue(session, by="c", priority=1)
    assert keys(session, claim(session)) == ["c"]
    assert keys(session, claim(session, names=["other"])) == ["a", "b"]


def test_keys_of_a_better_priority_that_are_behind_many_full_ones_come_before_others(session: Session) -> None:
    """A walk passes 500 keys; the last key that was served is one of the others, again and again."""
    make(session, fair=True, turn="k0900")
    for statement in (
        "INSERT INTO durable.queue_key (queue, by, paused_at) "
        "SELECT 'default', 'k' || lpad(n::text, 4, '0'), statement_timestamp() FROM generate_series(2, 2000) n "
        "WHERE n <> 900",
        "INSERT INTO durable.workflow (name, by) SELECT 'checkout', 'k' || lpad(n::text, 4, '0') "
        "FROM generate_series(1, 2000) n WHERE n <> 900",
    ):
        session.execute(text(statement))
    races.enqueue(session, 20, by="k0900", priority=1)
    found = several(session, 12)
    assert "k0001" in found[:3], found
    assert set(found[:3]) <= {"k0001", "k0900"}


@pytest.mark.parametrize(("before", "after"), [("block", "skip"), ("block", None)])
def test_a_failure_blocks_only_as_long_as_the_queue_says_so(session: Session, before: str, after: str | None) -> None:
    queue = make(session, fifo=before, per_key=1)
    waiting = races.enqueue(session, 2, by="a")
    fail(session, *claim(session))
    assert claim(session) == []
    queue.fifo = after
    session.commit()
    assert ids(claim(session)) == waiting[1:]


@pytest.mark.parametrize("settings", [{"concurrency": 1}, {"per_key": 1}])
def test_a_place_is_kept_only_as_long_as_the_queue_says_so(session: Session, settings: dict[str, int]) -> None:
    queue = make(session, while_suspended="hold", **settings)
    waiting = races.enqueue(session, 2, by="a")
    suspend(session, *claim(session))
    assert claim(session) == []
    queue.while_suspended = "release"
    session.commit()
    assert ids(claim(session)) == waiting[1:]


def test_what_kept_a_place_before_counts_like_others_when_it_goes_on(session: Session) -> None:
    make(session, concurrency=2)
    races.enqueue(session, 3)
    races.enqueue(session, 2, place="finished")
    assert len(claim(session)) == 2
    assert claim(session) == []


def test_a_retry_counts_as_a_start(session: Session) -> None:
    make(session, rate=2, rate_period=MINUTE)
    races.enqueue(session, 2)
    for each in claim(session):
        fail(session, each)
    assert len(manage.retry(session, select(Workflow))) == 2
    session.commit()
    assert claim(session) == []


def test_what_is_retried_holds_no_place_before_it_runs(session: Session) -> None:
    make(session, concurrency=1, while_suspended="hold")
    waiting = races.enqueue(session, 2)
    (first,) = claim(session)
    fail(session, first)
    manage.retry(session, select(Workflow))
    session.commit()
    assert ids(claim(session)) == waiting[1:]


def test_the_retry_of_what_blocks_its_key_comes_before_the_others(session: Session) -> None:
    make(session, fifo="block")
    waiting = races.enqueue(session, 2, by="a")
    fail(session, *claim(session))
    manage.retry(session, select(Workflow))
    session.commit()
    (again,) = claim(session)
    assert ids([again]) == waiting[:1]
    finish(session, again)
    assert ids(claim(session)) == waiting[1:]


def test_a_paused_key_keeps_no_room_of_a_rate_from_others(session: Session) -> None:
    make(session, rate=1, rate_period=MINUTE, fair=True, keys=[QueueKey(by="a", paused_at=datetime.now(UTC))])
    for by in ("a", "b"):
        races.enqueue(session, by=by, place="running", attempt=2, crashes=1)
    assert keys(session, claim(session)) == ["b"]


def test_a_paused_key_waits_where_settings_are_for_the_whole_queue(session: Session) -> None:
    queue = make(session, concurrency=5, keys=[QueueKey(by="a", paused_at=datetime.now(UTC))])
    races.enqueue(session, by="a", place="running")
    races.enqueue(session, by="a")
    assert claim(session) == []
    queue.keys[0].paused_at = None
    session.commit()
    assert len(claim(session)) == 2


def test_what_has_no_key_needs_no_room_of_a_rate_per_key_after_a_crash(session: Session) -> None:
    make(session, key_rate=1, key_rate_period=MINUTE)
    races.enqueue(session, 3)
    assert len(claim(session)) == 3
    races.enqueue(session, place="running", attempt=2, crashes=1)
    assert len(claim(session)) == 1


def test_uses_stay_a_while_for_a_claim_that_began_before(session: Session) -> None:
    """Its period begins before that of the claim that deletes."""
    make(session, rate=5, rate_period=MINUTE)
    races.enqueue(session, 2)
    claim(session, 1)
    counted = text("SELECT count(*) FROM durable.queue_use")
    for seconds, found in ((61, 2), (20, 1)):
        session.execute(
            text("UPDATE durable.queue_use SET used_at = used_at - :seconds * interval '1 second'"),
            {"seconds": seconds},
        )
        session.commit()
        races.enqueue(session)
        claim(session, 1)
        assert session.scalar(counted) == found
        session.execute(
            text("DELETE FROM durable.queue_use WHERE used_at > statement_timestamp() - interval '1 minute'")
        )
        session.commit()


def test_a_batch_says_whether_a_rate_has_room_again(session: Session) -> None:
    make(session, rate=1, rate_period=MINUTE)
    races.enqueue(session, 2)
    batch(session)
    assert batch(session).retry_in is not None
