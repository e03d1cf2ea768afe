"""Two transactions at a queue with limits, in every order that could take a place twice or lose one."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable.definitions.queues import QueueOptions
from sqla_durable.models import Queue
from sqla_durable.models.base import WorkflowStatus
from sqla_durable.store import attempts, claims, queues
from sqla_durable.store.records import Claimed, Completion, Fence, Suspend
from tests.store import races
from tests.store.test_limits import claim, finish, ids, keys, make, suspend

LOCK = 1_713


@pytest.fixture
def session(engine: Engine) -> Generator[Session]:
    with Session(engine) as session:
        yield session


def claim_in(session: Session, limit: int = 10, *names: str) -> list[Claimed]:
    """Claim, and leave the transaction open."""
    given: dict[str, Any] = {"worker_id": races.WORKER, "token": uuid7(), "names": names or ["checkout"]}
    return claims.claim_limited(session, queue="default", executing=0, limit=limit, **given).claimed


LIMITS: dict[str, dict[str, Any]] = {
    "concurrency": {"concurrency": 1},
    "per_key": {"per_key": 1},
    "fifo": {"fifo": "skip"},
    "rate": {"rate": 1, "rate_period": "1 minute"},
    "key_rate": {"key_rate": 1, "key_rate_period": "1 minute"},
}


def make_limited(session: Session, limits: str) -> None:
    """Make a queue of which one workflow of the key `a` can be claimed, and let three wait."""
    columns = ", ".join(LIMITS[limits])
    values = ", ".join(f":{each}" for each in LIMITS[limits])
    session.execute(text(f"INSERT INTO durable.queue (name, {columns}) VALUES ('default', {values})"), LIMITS[limits])
    races.enqueue(session, 3, by="a")


@pytest.mark.parametrize("limits", LIMITS)
def test_of_two_claims_for_the_last_place_one_has_it(engine: Engine, session: Session, limits: str) -> None:
    make_limited(session, limits)
    with races.transaction(engine) as one:
        assert len(claim_in(one.session)) == 1
        assert claim(session) == []
        one.session.commit()
    assert claim(session) == []


@pytest.mark.parametrize("limits", LIMITS)
def test_a_claim_that_is_rolled_back_has_taken_nothing(engine: Engine, session: Session, limits: str) -> None:
    make_limited(session, limits)
    with races.transaction(engine) as one:
        first = claim_in(one.session)
        assert claim(session) == []
        one.session.rollback()
    assert ids(claim(session)) == ids(first)


@contextmanager
def old_snapshot(engine: Engine) -> Generator[races.Transaction]:
    """A transaction whose statements stop when they have their snapshot and look for the queue's row.

    They go on when the advisory lock is free: a policy waits for it, which is nothing to a superuser.
    """
    with engine.begin() as connection:
        role = f"claimer_{uuid7().hex}"
        for each in (
            f"CREATE FUNCTION wait_here() RETURNS boolean LANGUAGE plpgsql AS "
            f"'BEGIN PERFORM pg_advisory_xact_lock_shared({LOCK}); RETURN true; END'",
            "ALTER TABLE durable.queue ENABLE ROW LEVEL SECURITY",
            "CREATE POLICY waits ON durable.queue USING (wait_here())",
            f"CREATE ROLE {role}",
            f"GRANT USAGE ON SCHEMA durable TO {role}",
            f"GRANT ALL ON ALL TABLES IN SCHEMA durable TO {role}",
        ):
            connection.execute(text(each))
    try:
        with races.transaction(engine) as opened:
            opened.session.execute(text(f"SET LOCAL ROLE {role}"))
            yield opened
    finally:
        with engine.begin() as connection:
            connection.execute(text(f"DROP OWNED BY {role}"))
            connection.execute(text(f"DROP ROLE {role}"))


@contextmanager
def behind(engine: Engine, late: races.Transaction) -> Generator[list[Claimed]]:
    """Let a claim take its snapshot, execute the block, and let the claim go on: the list is what it has claimed."""
    claimed: list[Claimed] = []
    with engine.connect() as holder:
        holder.execute(text(f"SELECT pg_advisory_xact_lock({LOCK})"))
        claiming = late.begin_blocked(claim_in)
        yield claimed
        holder.rollback()
        claimed += claiming.result()
        late.session.commit()


@pytest.mark.parametrize("limits", LIMITS)
def test_a_claim_with_a_snapshot_from_before_another_claim_takes_nothing(
    engine: Engine, session: Session, limits: str
) -> None:
    make_limited(session, limits)
    with old_snapshot(engine) as late:
        with behind(engine, late) as claimed:
            assert len(claim(session)) == 1
        assert claimed == []


CHANGES: dict[str, tuple[Callable[[Session], object], int]] = {
    "a pause": (lambda session: queues.pause(session, "default"), 0),
    "a lower limit": (lambda session: queues.put(session, "default", QueueOptions(concurrency=1)), 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_claim_with_a_snapshot_from_before_a_change_of_the_queue_takes_nothing(
    engine: Engine, session: Session, change: str
) -> None:
    make(session, concurrency=5)
    races.enqueue(session, 2)
    apply, places = CHANGES[change]
    with old_snapshot(engine) as late:
        with behind(engine, late) as claimed:
            apply(session)
            session.commit()
        assert claimed == []
    assert len(claim(session)) == places


@pytest.mark.parametrize("columns", [{"place": "running"}, {"by": "a"}, {}], ids=["goes on", "with a key", "without"])
@pytest.mark.parametrize("limits", [{"concurrency": 5}, {"fair": True}], ids=["queue", "keys"])
def test_what_is_moved_to_another_queue_meanwhile_is_not_claimed(
    engine: Engine, session: Session, limits: dict[str, Any], columns: dict[str, str]
) -> None:
    make(session, **limits)
    moved, stays = races.enqueue(session, 2, **columns)
    with old_snapshot(engine) as late:
        with behind(engine, late) as claimed:
            session.execute(text("UPDATE durable.workflow SET queue = 'other' WHERE id = :id"), {"id": moved})
            session.commit()
        assert ids(claimed) == [stays]
    assert races.status_of(engine, moved) is WorkflowStatus.PENDING


def test_places_that_become_free_meanwhile_are_found_by_the_next_claim(engine: Engine, session: Session) -> None:
    make(session, concurrency=1)
    races.enqueue(session, 2)
    (first,) = claim(session)
    with old_snapshot(engine) as late:
        with behind(engine, late) as claimed:
            finish(session, first)
        assert claimed == []
    assert len(claim(session)) == 1


def test_a_claim_in_repeatable_read_fails_rather_than_counting_what_was(engine: Engine, session: Session) -> None:
    make(session, concurrency=1)
    races.enqueue(session, 2)
    with Session(engine.execution_options(isolation_level="REPEATABLE READ")) as old:
        old.execute(text("SELECT FROM durable.workflow LIMIT 1"))
        claim(session)
        with pytest.raises(OperationalError, match="could not serialize"):
            claim_in(old)


def test_a_change_of_settings_waits_for_an_open_claim(engine: Engine, session: Session) -> None:
    make(session, concurrency=3)
    races.enqueue(session, 5)
    with races.transaction(engine) as one, races.transaction(engine) as operator:
        assert len(claim_in(one.session, 2)) == 2
        changing = operator.begin_blocked(lambda each: queues.put(each, "default", QueueOptions(concurrency=2)))
        one.session.commit()
        assert changing.result()
        assert claim(session) == []  # it does not wait for the change
        operator.session.commit()
    assert claim(session) == []


def test_an_open_change_of_settings_keeps_claims_waiting_for_nothing(engine: Engine, session: Session) -> None:
    make(session, concurrency=1)
    races.enqueue(session, 5)
    with races.transaction(engine) as operator:
        assert queues.put(operator.session, "default", QueueOptions(concurrency=3))
        assert claim(session) == []
        operator.session.commit()
    assert len(claim(session)) == 3


def test_a_pause_of_the_queue_waits_for_an_open_claim(engine: Engine, session: Session) -> None:
    make(session, concurrency=3)
    races.enqueue(session, 5)
    with races.transaction(engine) as one, races.transaction(engine) as operator:
        assert len(claim_in(one.session, 2)) == 2
        pausing = operator.begin_blocked(lambda each: queues.pause(each, "default"))
        one.session.commit()
        pausing.result()
        operator.session.commit()
    assert claim(session) == []
    queues.resume(session, "default")
    assert len(claim(session)) == 1


def test_a_pause_of_a_key_waits_for_nobody(engine: Engine, session: Session) -> None:
    make(session, fair=True)
    for by in ("a", "b"):
        races.enqueue(session, 3, by=by)
    with races.transaction(engine) as one:
        assert len(claim_in(one.session, 2)) == 2
        queues.pause_key(session, "default", "a")
        session.commit()
        one.session.commit()
    assert keys(session, claim(session)) == ["b", "b"]
    queues.resume_key(session, "default", "a")
    session.commit()
    assert keys(session, claim(session)) == ["a", "a"]


def end_late(session: Session, fence: Fence, late: str) -> None:
    """Let an attempt end once more."""
    failure = Completion(fence, WorkflowStatus.FAILED, error='{"type": "builtins:ValueError", "message": ""}')
    ends: dict[str, attempts.End] = {
        "success": races.success(fence),
        "failure": failure,
        "suspend": Suspend(fence, 3600.0),
    }
    if late == "release":
        attempts.release(session, [fence])
    else:
        races.end(session, [ends[late]])
    session.commit()


@pytest.mark.parametrize("late", ["release", "success", "failure", "suspend"])
@pytest.mark.parametrize("ended", ["finished", "released"])
def test_an_attempt_that_ends_once_more_frees_nobodys_place(session: Session, ended: str, late: str) -> None:
    make(session, concurrency=1)
    races.enqueue(session, 2)
    (first,) = claim(session)
    if ended == "finished":
        finish(session, first)
    else:
        attempts.release(session, [first.fence])
        session.commit()
    assert len(claim(session)) == 1
    end_late(session, first.fence, late)
    assert claim(session) == []


@pytest.mark.parametrize("limit", [1, 10])
@pytest.mark.parametrize(
    "settings", [{"concurrency": 9}, {"per_key": 9}, {"fair": True}, {"concurrency": 9, "fair": True}]
)
def test_a_row_that_a_user_has_locked_keeps_nothing_else_waiting(
    engine: Engine, session: Session, settings: dict[str, Any], limit: int
) -> None:
    make(session, **settings)
    locked, *others = races.enqueue(session, 2, by="a")
    (alone,) = races.enqueue(session, by="b")
    others += races.enqueue(session, 2, by="c")
    with races.transaction(engine) as user:
        races.lock(user.session, locked)
        races.lock(user.session, alone)
        found = {each for _ in range(6) for each in ids(claim(session, limit))}
    assert found == set(others)


@pytest.mark.parametrize("limit", [1, 10])
def test_with_fifo_none_overtakes_a_row_that_a_user_has_locked(engine: Engine, session: Session, limit: int) -> None:
    make(session, fifo="skip")
    (locked,) = races.enqueue(session, by="a")
    races.enqueue(session, by="a")
    races.enqueue(session, by="a", priority=1)
    (other,) = races.enqueue(session, by="b")
    with races.transaction(engine) as user:
        races.lock(user.session, locked)
        assert [each for _ in range(4) for each in ids(claim(session, limit))] == [other]
    assert ids(claim(session)) == [locked]


@pytest.mark.parametrize(
    "limits", [{"rate": 9, "rate_period": "1 minute"}, {"concurrency": 1, "while_suspended": "hold"}]
)
def test_of_what_goes_on_a_locked_row_keeps_the_next_one_from_nothing(
    engine: Engine, session: Session, limits: dict[str, Any]
) -> None:
    columns = ", ".join(limits)
    values = ", ".join(f":{each}" for each in limits)
    session.execute(text(f"INSERT INTO durable.queue (name, {columns}) VALUES ('default', {values})"), limits)
    locked, other = races.enqueue(session, 2, place="finished" if "while_suspended" in limits else "running")
    with races.transaction(engine) as user:
        races.lock(user.session, locked)
        assert ids(claim(session, 1)) == [other]


def test_what_runs_already_when_a_limit_is_set_counts_and_goes_on(session: Session) -> None:
    waiting = races.enqueue(session, 4, by="a")
    first, second = races.claim(session, 2)
    session.commit()
    make(session, concurrency=2, per_key=2, while_suspended="hold")
    assert claim(session) == []
    suspend(session, first)  # it has taken no place that it could hold
    assert ids(claim(session)) == waiting[2:3]
    finish(session, second)
    assert ids(claim(session)) == waiting[3:]


def test_a_queue_that_is_deleted_and_made_again_counts_what_runs(session: Session) -> None:
    queue = make(session, concurrency=2)
    races.enqueue(session, 5)
    assert len(claim(session)) == 2
    session.delete(queue)
    session.commit()
    session.add(Queue(name="default", concurrency=3, created_at=datetime.now(UTC)))
    session.commit()
    assert len(claim(session)) == 1
