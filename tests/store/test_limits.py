from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable.models import Queue, QueueKey, Workflow
from sqla_durable.models.base import WorkflowStatus
from sqla_durable.store import attempts, claims, queues
from sqla_durable.store.records import Claimed, Completion, Suspend
from tests.store import races

MINUTE = timedelta(minutes=1)


@pytest.fixture
def session(engine: Engine) -> Any:
    with Session(engine) as session:
        yield session


def make(session: Session, **settings: Any) -> Queue:
    queue = Queue(name="default", **settings)
    session.add(queue)
    session.commit()
    return queue


def batch(session: Session, limit: int = 10, *, executing: int = 0, **options: Any) -> claims.Batch:
    given: dict[str, Any] = {"worker_id": races.WORKER, "token": uuid7(), "names": ["checkout"], "queue": "default"}
    found = claims.claim_limited(session, limit=limit, executing=executing, **{**given, **options})
    session.commit()
    return found


def claim(session: Session, limit: int = 10, **options: Any) -> list[Claimed]:
    return batch(session, limit, **options).claimed


def ids(claimed: Sequence[Claimed]) -> list[UUID]:
    return [each.fence.workflow_id for each in claimed]


def keys(session: Session, claimed: Sequence[Claimed]) -> list[str | None]:
    return [session.get_one(Workflow, each).by for each in ids(claimed)]


def finish(session: Session, *claimed: Claimed) -> None:
    assert races.end(session, [races.success(each.fence) for each in claimed]) == set(ids(claimed))
    session.commit()


def fail(session: Session, claimed: Claimed) -> None:
    error = '{"type": "builtins:ValueError", "message": "no"}'
    assert races.end(session, [Completion(claimed.fence, WorkflowStatus.FAILED, error=error)])
    session.commit()


def suspend(session: Session, claimed: Claimed) -> None:
    assert races.end(session, [Suspend(claimed.fence, 3600.0)])
    session.commit()


def wake(session: Session) -> None:
    session.execute(text("UPDATE durable.workflow SET status = 'pending', wake_at = NULL WHERE status = 'suspended'"))
    session.commit()


def test_no_more_run_at_once_than_the_concurrency(session: Session) -> None:
    # behaviour: Q2
    make(session, concurrency=3)
    waiting = races.enqueue(session, 10)
    first = claim(session)
    assert ids(first) == waiting[:3]
    assert claim(session) == []
    finish(session, first[1])
    assert ids(claim(session)) == waiting[3:4]


def test_the_ordinary_claim_leaves_a_queue_with_limits_alone(session: Session) -> None:
    make(session, concurrency=3)
    races.enqueue(session, 2)
    assert races.claim(session, 10) == []


def test_what_runs_in_one_worker_is_taken_off_its_share(session: Session) -> None:
    make(session, per_worker=3)
    races.enqueue(session, 10)
    assert len(claim(session, executing=1)) == 2
    assert len(claim(session, executing=3)) == 0
    assert len(claim(session, executing=0)) == 3


def test_no_more_of_a_key_run_than_it_has_places(session: Session) -> None:
    make(session, per_key=2)
    for by in ("a", "b"):
        races.enqueue(session, 5, by=by)
    first = claim(session)
    assert sorted(map(str, keys(session, first))) == ["a", "a", "b", "b"]
    assert claim(session) == []
    finish(session, next(each for each in first if session.get_one(Workflow, each.fence.workflow_id).by == "b"))
    assert keys(session, claim(session)) == ["b"]


def test_what_has_no_key_has_no_limit_per_key(session: Session) -> None:
    make(session, per_key=1)
    races.enqueue(session, 3, by="a")
    races.enqueue(session, 3)
    taken = keys(session, claim(session))
    assert sorted(map(str, taken)) == ["None", "None", "None", "a"]


def test_a_rate_counts_starts_in_a_rolling_window(session: Session) -> None:
    # behaviour: Q3
    make(session, rate=3, rate_period=MINUTE)
    races.enqueue(session, 10)
    first = claim(session, 2)
    finish(session, *first)
    found = batch(session)
    assert len(found.claimed) == 1
    assert found.retry_in is not None
    again = batch(session)
    assert again.claimed == []
    assert again.retry_in is not None
    assert 50 < again.retry_in <= 60
    session.execute(text("UPDATE durable.queue_use SET used_at = used_at - interval '2 minutes' WHERE number = 2"))
    session.commit()
    assert len(claim(session)) == 2
    assert session.scalar(text("SELECT sum(number) FROM durable.queue_use")) == 3


def test_a_rate_per_key(session: Session) -> None:
    make(session, key_rate=2, key_rate_period=MINUTE)
    for by in ("a", "b"):
        races.enqueue(session, 5, by=by)
    assert sorted(map(str, keys(session, claim(session)))) == ["a", "a", "b", "b"]
    assert claim(session) == []


def test_keys_take_turns(session: Session) -> None:
    make(session, fair=True)
    for by in ("a", "b", "c"):
        races.enqueue(session, 4, by=by)
    assert "".join(str(keys(session, claim(session, 1))[0]) for _ in range(7)) == "abcabca"
    assert sorted(map(str, keys(session, claim(session, 4)))) == ["a", "b", "b", "c"]


def test_keys_get_their_weights(session: Session) -> None:
    make(session, fair=True, keys=[QueueKey(by="a", weight=3)])
    for by in ("a", "b"):
        races.enqueue(session, 20, by=by)
    assert sorted(map(str, keys(session, claim(session, 8)))) == ["a"] * 6 + ["b"] * 2


def test_a_paused_key_waits(session: Session) -> None:
    make(session, fair=True, keys=[QueueKey(by="a", paused_at=datetime.now(UTC))])
    for by in ("a", "b"):
        races.enqueue(session, 2, by=by)
    assert keys(session, claim(session)) == ["b", "b"]


def test_a_paused_key_waits_in_a_queue_without_any_setting(session: Session) -> None:
    """So a pause holds when a worker that starts brings other settings into the table."""
    (paused,), (other,) = races.enqueue(session, by="a"), races.enqueue(session, by="b")
    queues.pause_key(session, "default", "a")
    session.commit()
    assert races.claim(session) == []
    assert ids(claim(session)) == [other]
    queues.resume_key(session, "default", "a")
    session.commit()
    assert [each.fence.workflow_id for each in races.claim(session)] == [paused]


def test_a_better_priority_comes_first_also_where_keys_take_turns(session: Session) -> None:
    make(session, per_key=2)
    races.enqueue(session, 3, by="a", priority=1)
    races.enqueue(session, 3, by="b", priority=1)
    races.enqueue(session, 1, by="b", priority=0)
    assert keys(session, claim(session, 1)) == ["b"]
    assert sorted(map(str, keys(session, claim(session)))) == ["a", "a", "b"]


@pytest.mark.parametrize("fifo", ["skip", "block"])
def test_fifo_executes_one_of_a_key_at_a_time_in_order(session: Session, fifo: str) -> None:
    make(session, fifo=fifo)
    waiting = races.enqueue(session, 3, by="a")
    (first,) = claim(session)
    assert claim(session) == []
    suspend(session, first)
    assert claim(session) == []
    wake(session)
    (again,) = claim(session)
    assert ids([again]) == waiting[:1]
    finish(session, again)
    assert ids(claim(session)) == waiting[1:2]


def test_a_failure_blocks_its_key_or_is_skipped(session: Session) -> None:
    # behaviour: Q5
    queue = make(session, fifo="block")
    for by in ("a", "b"):
        races.enqueue(session, 2, by=by)
    for each in claim(session):
        if session.get_one(Workflow, each.fence.workflow_id).by == "a":
            fail(session, each)
        else:
            finish(session, each)
    assert keys(session, claim(session)) == ["b"]
    session.execute(text("UPDATE durable.workflow SET place = NULL WHERE status = 'failed'"))
    queue.fifo = "skip"
    session.commit()
    (second,) = claim(session)
    fail(session, second)
    assert claim(session) == []


def test_a_suspended_one_gives_its_place_back_or_holds_it(session: Session) -> None:
    queue = make(session, concurrency=1)
    waiting = races.enqueue(session, 3)
    (first,) = claim(session)
    suspend(session, first)
    (second,) = claim(session)
    finish(session, second)
    queue.while_suspended = "hold"
    session.commit()
    (third,) = claim(session)
    suspend(session, third)
    assert claim(session) == []
    wake(session)
    assert ids(claim(session)) == waiting[2:]


def test_what_waits_long_counts_as_a_better_priority(session: Session) -> None:
    make(session, aging=MINUTE)
    (low,) = races.enqueue(session, priority=5)
    (lower,) = races.enqueue(session, priority=9)
    high = races.enqueue(session, 2, priority=0)
    assert ids(claim(session, 1)) == high[:1]
    session.execute(text("UPDATE durable.workflow SET enqueued_at = enqueued_at - interval '6 minutes'"))
    session.commit()
    races.enqueue(session, priority=0)
    assert ids(claim(session, 1)) == high[1:]
    assert ids(claim(session, 1)) == [low]
    assert lower not in ids(claim(session, 1))


def test_two_claims_for_the_last_place(engine: Engine, session: Session) -> None:
    make(session, concurrency=1)
    races.enqueue(session, 3)
    with races.transaction(engine) as one:
        given: dict[str, Any] = {"worker_id": races.WORKER, "names": ["checkout"], "queue": "default"}
        first = claims.claim_limited(one.session, token=uuid7(), limit=5, executing=0, **given)
        assert len(first.claimed) == 1
        second = batch(session)
        assert second.claimed == []
        one.session.commit()
    assert batch(session).claimed == []
    assert attempts.release(session, [first.claimed[0].fence]) is not None
    session.commit()
    assert len(batch(session).claimed) == 1


@pytest.mark.parametrize("at_once", [1, 4])
def test_ten_of_one_key_are_done_in_twice_their_places_behind_thousands_of_another(
    session: Session, at_once: int
) -> None:
    # behaviour: Q4
    make(session, fair=True, concurrency=4)
    races.enqueue(session, 2_000, by="many")
    running = claim(session, 4)
    races.enqueue(session, 10, by="few")
    served: list[str | None] = []
    while served.count("few") < 10:
        finish(session, *running[:at_once])
        taken = claim(session, at_once)
        running = running[at_once:] + taken
        served += keys(session, taken)
    assert len(served) <= 20
