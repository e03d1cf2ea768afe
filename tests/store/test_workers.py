from __future__ import annotations

from datetime import timedelta
from itertools import pairwise
from uuid import UUID

import pytest
from sqlalchemy import Engine, func, select, text, update
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable.models import Worker, Workflow
from sqla_durable.models.base import WorkflowStatus
from sqla_durable.store import Fence, Suspend, attempts, timers, workers
from tests.store import races
from tests.store.plans import explain, fill


def reclaimed(session: Session, max_attempts: int = 10) -> list[UUID]:
    found = [each.workflow_id for each in workers.reclaim(session, max_attempts=max_attempts, limit=100)]
    session.commit()
    return found


def test_a_heartbeat_begins_a_lease_and_extends_it(engine: Engine) -> None:
    worker_id = uuid7()
    with Session(engine) as session:
        assert not races.is_alive(session, worker_id)
        workers.beat(session, worker_id=worker_id, name="w", queues=["a"], lease=timedelta(seconds=5))
        session.commit()
        first = session.scalars(select(Worker)).one()
        began, expires = first.started_at, first.lease_expires_at
        workers.beat(session, worker_id=worker_id, name="w", queues=["a"], lease=timedelta(seconds=50))
        session.commit()
        session.refresh(first)
        assert races.is_alive(session, worker_id)
        assert first.started_at == began
        assert first.lease_expires_at - expires >= timedelta(seconds=45)
        workers.end_lease(session, worker_id)
        assert not workers.exists(session, worker_id)


def test_a_workflow_is_reclaimed_after_the_lease_and_not_before(engine: Engine) -> None:
    # behaviour: R1 R2 R3
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session:
        assert reclaimed(session) == []
        races.expire_leases(engine)
        assert reclaimed(session) == [fence.workflow_id]
        assert reclaimed(session) == []
        record = session.get_one(Workflow, fence.workflow_id)
        assert (record.status, record.attempt, record.token) == (WorkflowStatus.PENDING, 2, None)


def test_a_locked_suspect_does_not_delay_the_others(engine: Engine) -> None:
    fences = races.claimed_fences(engine, 2)
    with Session(engine) as session:
        races.end(session, [Suspend(each, 0) for each in fences])
        session.execute(update(Workflow).values(attempt=3, crashes=2))
        session.commit()
        with races.transaction(engine) as caller:
            races.lock(caller.session, fences[0].workflow_id)
            assert timers.wake_due(session, limit=9) == 1
            assert races.status_in(session, fences[1].workflow_id) is WorkflowStatus.PENDING
            session.rollback()
        assert timers.wake_due(session, limit=9) == 1  # one at a time, where both are free


def test_suspects_that_died_together_wait_for_different_times_after_each_crash(engine: Engine) -> None:
    """Two whose times are near once would otherwise be woken, claimed and killed together each time."""
    fences = races.claimed_fences(engine, 2)
    shares: list[float] = []
    for crashed in (2, 3, 4, 5):
        with Session(engine) as session:
            session.execute(
                update(Workflow).values(
                    status=WorkflowStatus.RUNNING,
                    token=uuid7(),
                    worker_id=races.WORKER,
                    wake_at=None,
                    attempt=crashed + 1,
                    crashes=crashed,
                )
            )
            workers.end_lease(session, races.WORKER)
            assert len(reclaimed(session)) == len(fences)
            woken = session.scalars(select(Workflow).order_by(Workflow.id)).all()
            now = session.scalars(select(func.now())).one()
            one, other = [(each.wake_at - now).total_seconds() for each in woken if each.wake_at]
        shares.append(one / other)
    assert all(abs(each - other) > 1e-5 for each, other in pairwise(shares))


def test_a_worker_takes_nothing_back_from_itself(engine: Engine) -> None:
    """Its lease may run out between its look and its reclaim; others may, and it goes on with what they left."""
    (fence,) = races.claimed_fences(engine)
    races.expire_leases(engine)
    with Session(engine) as session:
        assert workers.reclaim(session, max_attempts=9, limit=9, asking=races.WORKER) == []
        (found,) = workers.reclaim(session, max_attempts=9, limit=9, asking=uuid7())
        assert found.workflow_id == fence.workflow_id


def test_a_workflow_whose_worker_has_no_row_is_reclaimed(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session:
        workers.end_lease(session, races.WORKER)
        assert reclaimed(session) == [fence.workflow_id]


def test_an_expired_lease_is_reclaimed_once_by_two_racing_workers(engine: Engine) -> None:
    # behaviour: R2
    fences = races.claimed_fences(engine, 20)
    races.expire_leases(engine)
    with races.transaction(engine) as one, races.transaction(engine) as other:
        first = workers.reclaim(one.session, max_attempts=9, limit=15)
        second = workers.reclaim(other.session, max_attempts=9, limit=15)
        one.session.commit()
        other.session.commit()
    assert len(first) == 15
    assert {each.workflow_id for each in (*first, *second)} == {each.workflow_id for each in fences}
    assert len(second) == 5


def test_a_workflow_that_was_reclaimed_and_claimed_meanwhile_is_not_reclaimed_again(engine: Engine) -> None:
    """The new owner is not in the snapshot of a reclaim that began before: its token shows it.

    A trigger holds the slow reclaim at its first row, so that it comes to the second one after the other worker.
    """
    first, second = races.claimed_fences(engine, 2)
    races.expire_leases(engine)
    with engine.begin() as connection:
        connection.execute(
            text(
                "CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
                "IF current_setting('test.slow', true) = 'on' THEN PERFORM pg_advisory_xact_lock(1); END IF; "
                "RETURN NEW; END $$"
            )
        )
        connection.execute(
            text("CREATE TRIGGER hold BEFORE UPDATE ON durable.workflow FOR EACH ROW EXECUTE FUNCTION hold()")
        )
    with races.transaction(engine) as gate, races.transaction(engine) as slow, Session(engine) as quick:
        gate.session.execute(text("SELECT pg_advisory_xact_lock(1)"))
        for setting in ("test.slow = 'on'", "enable_hashjoin = off", "enable_mergejoin = off"):
            slow.session.execute(text(f"SET LOCAL {setting}"))
        reclaiming = slow.begin_blocked(lambda session: workers.reclaim(session, max_attempts=9, limit=9))
        newcomer = uuid7()
        workers.beat(quick, worker_id=newcomer, name="new", queues=[], lease=races.LEASE)
        taken = [each.workflow_id for each in workers.reclaim(quick, max_attempts=9, limit=9)]
        claimed = [each.fence for each in races.claim(quick, 9, worker_id=newcomer)]
        quick.commit()
        gate.session.rollback()
        found = [each.workflow_id for each in reclaiming.result()]
        slow.session.commit()
    assert taken == [second.workflow_id], "the trigger did not hold the slow reclaim between its two rows"
    assert found == [first.workflow_id]
    with Session(engine) as session:
        assert attempts.still_owned(session, claimed) == set(claimed)


def test_reclaim_waits_for_no_lock(engine: Engine) -> None:
    locked, free = races.claimed_fences(engine, 2)
    races.expire_leases(engine)
    with races.transaction(engine) as caller, Session(engine) as session:
        races.lock(caller.session, locked.workflow_id)
        assert reclaimed(session) == [free.workflow_id]
        caller.session.rollback()
        assert reclaimed(session) == [locked.workflow_id]


def test_reclaim_one_waits_for_the_row_and_sees_what_became_of_it(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    races.expire_leases(engine)
    with races.transaction(engine) as other, races.transaction(engine) as mine:
        newcomer = uuid7()
        workers.beat(other.session, worker_id=newcomer, name="other", queues=[], lease=races.LEASE)
        workers.reclaim(other.session, max_attempts=9, limit=9)
        races.claim(other.session, worker_id=newcomer)
        reclaiming = mine.begin_blocked(lambda session: workers.reclaim_one(session, fence.workflow_id, max_attempts=9))
        other.session.commit()
        assert reclaiming.result() is None


@pytest.mark.parametrize(
    ("queues", "is_last"),
    [
        (None, True),
        (["a_b.c"], True),
        (["x", "a_*"], True),
        (["*"], True),
        (["a%"], False),
        (["a_b_c", "a?b.c"], False),
    ],
)
def test_only_queues_of_the_worker_that_reclaims_see_the_last_attempt(
    engine: Engine, queues: list[str] | None, is_last: bool
) -> None:
    # behaviour: R4
    with Session(engine) as session:
        races.enqueue(session, queue="a_b.c")
        workers.beat(session, worker_id=races.WORKER, name="w", queues=["a_*"], lease=races.LEASE)
        assert races.claim(session, queues=["a_b.c"], worker_id=races.WORKER)
        session.commit()
        races.expire_leases(engine)
        (found,) = workers.reclaim(session, max_attempts=1, limit=9, queues=queues)
        assert (found.status is WorkflowStatus.FAILED) == is_last


def test_the_last_attempt_ends_with_an_error_that_says_so(engine: Engine) -> None:
    # behaviour: R4
    (fence,) = races.claimed_fences(engine)
    races.expire_leases(engine)
    with Session(engine) as session:
        (found,) = workers.reclaim(session, max_attempts=1, limit=9)
        session.commit()
        assert found.status is WorkflowStatus.FAILED
        record = session.get_one(Workflow, fence.workflow_id)
        assert record.error is not None
        assert record.error["type"] == workers.MAX_ATTEMPTS_TYPE
        assert "attempt 1" in record.error["message"]
        assert record.finished_at is not None
        assert record.attempt == 1


def test_abandoning_reclaims_only_ones_own_attempt(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session:
        assert workers.abandon_attempt(session, Fence(fence.workflow_id, uuid7()), reason="it broke", max_attempts=9)
        assert session.get_one(Workflow, fence.workflow_id).attempt == 1
        assert workers.abandon_attempt(session, fence, reason="it broke", max_attempts=9)
        assert workers.abandon_attempt(session, fence, reason="it broke", max_attempts=9)
        session.expire_all()
        record = session.get_one(Workflow, fence.workflow_id)
        assert (record.status, record.attempt, record.crashes) == (WorkflowStatus.PENDING, 2, 1)


def test_abandoning_does_not_wait_for_a_locked_row(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    with races.transaction(engine) as holder, Session(engine) as session:
        races.lock(holder.session, fence.workflow_id)
        assert not workers.abandon_attempt(session, fence, reason="it broke", max_attempts=9)
        session.rollback()
        holder.session.rollback()
        assert workers.abandon_attempt(session, fence, reason="it broke", max_attempts=9)


def test_running_of_gives_what_the_tables_say_a_worker_executes(engine: Engine) -> None:
    # behaviour: E8
    fences = races.claimed_fences(engine, 3)
    races.claimed_fences(engine, 1, worker_id=uuid7())
    with Session(engine) as session:
        assert set(workers.attempts_of(session, races.WORKER)) == set(fences)
        assert attempts.release_unlocked(session, fences) == []
        assert workers.attempts_of(session, races.WORKER) == []


def test_workers_that_are_long_dead_are_forgotten(engine: Engine) -> None:
    races.claimed_fences(engine)
    with Session(engine) as session:
        workers.delete_dead(session)
        assert workers.exists(session, races.WORKER)
        session.execute(
            text(
                "UPDATE durable.worker SET heartbeat_at = heartbeat_at - interval '2 days', "
                "lease_expires_at = lease_expires_at - interval '26 hours'"
            )
        )
        workers.delete_dead(session)
        assert not workers.exists(session, races.WORKER)


@pytest.mark.new_database
@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
def test_reclaim_reads_running_workflows_only(engine: Engine, mode: str) -> None:
    with Session(engine) as session:
        fill(session)
        mine = {"mine_names": ["checkout"], "mine_queues": ["default"], "asking_id": races.WORKER}
        parameters = {"max_attempts": 9, "limit": 10, "reason": "its worker died", **mine}
        plan = explain(session, workers._RECLAIM, parameters, mode=mode)  # pyright: ignore[reportPrivateUsage]
    assert plan.uses("workflow_running_idx"), plan
    assert not plan.scans("workflow"), plan
