"""`manage.change`: another queue, priority or time for what waits, and for nothing else."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, func, select, text
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable import Workflow, WorkflowStatus, manage
from sqla_durable.errors import ArgumentError
from sqla_durable.store import NewWorkflow, failures, starts, timers
from tests.manage.test_verbs import in_every_state
from tests.store import races

PENDING, SUSPENDED = WorkflowStatus.PENDING, WorkflowStatus.SUSPENDED
HOUR = timedelta(hours=1)
LATER = datetime(2100, 1, 1, tzinfo=UTC)


def delayed(session: Session, **options: Any) -> Workflow:
    record = starts.add(session, NewWorkflow(uuid7(), "checkout", "{}", "default", delay=3600, **options))
    session.commit()
    return record


def seconds_until(session: Session, record: Workflow) -> float:
    assert record.wake_at is not None
    now: datetime = session.execute(select(func.statement_timestamp())).scalar_one()
    return (record.wake_at - now).total_seconds()


def test_what_waits_is_moved_and_what_runs_or_has_ended_is_not(engine: Engine, session: Session) -> None:
    # behaviour: M1
    found = in_every_state(engine)
    waiting = {found[name] for name in ("pending", "delayed", "suspended")}
    before = {each.id: (each.status, each.wake_at, each.enqueued_at) for each in session.scalars(select(Workflow))}
    session.rollback()
    assert set(manage.change(session, select(Workflow), queue="slow", priority=7)) == waiting
    session.commit()
    for record in session.scalars(select(Workflow)):
        moved = record.id in waiting
        assert (record.queue, record.priority) == (("slow", 7) if moved else ("default", 0))
        assert (record.status, record.wake_at, record.enqueued_at) == before[record.id]


def test_a_time_is_that_of_a_start(engine: Engine, session: Session) -> None:
    """The timer of what has started is a step of its own: such a workflow is left alone, with its queue."""
    # behaviour: Q7
    found = in_every_state(engine)
    assert set(manage.change(session, select(Workflow), at=LATER, queue="slow")) == {found["pending"], found["delayed"]}
    session.commit()
    for record in session.scalars(select(Workflow)):
        changed = record.id in (found["pending"], found["delayed"])
        assert (record.queue == "slow", record.wake_at == LATER) == (changed, changed)
    assert {each for each, status in statuses(session) if status is SUSPENDED} == {
        found["pending"],
        found["delayed"],
        found["suspended"],
    }


def statuses(session: Session) -> list[tuple[UUID, WorkflowStatus]]:
    return [(each.id, each.status) for each in session.scalars(select(Workflow))]


@pytest.mark.parametrize(
    ("change", "seconds"),
    [
        ({"delay": timedelta(minutes=1)}, 60),
        ({"delay": 2 * HOUR}, 7_200),
        ({"at": LATER}, None),
        ({"delay": timedelta(0)}, 0),
        ({"delay": -HOUR}, 0),
        ({"at": datetime(2020, 1, 1, tzinfo=UTC)}, 0),
    ],
)
@pytest.mark.parametrize("is_delayed", [True, False])
def test_a_delay_is_changed_to_earlier_later_and_now(
    session: Session, change: dict[str, Any], seconds: int | None, is_delayed: bool
) -> None:
    # behaviour: Q7
    record = delayed(session) if is_delayed else session.get_one(Workflow, races.enqueue(session)[0])
    place = record.enqueued_at
    assert manage.change(session, record, **change) == [record.id]
    session.commit()
    if seconds == 0:
        assert (record.status, record.wake_at) == (PENDING, None)
        assert (record.enqueued_at == place) is not is_delayed  # behind what was enqueued meanwhile
        (claimed,) = races.claim(session)
        assert claimed.fence.workflow_id == record.id
    else:
        assert record.status is SUSPENDED
        assert seconds is None or abs(seconds_until(session, record) - seconds) < 20
        assert seconds is not None or record.wake_at == LATER
        assert races.claim(session) == []


def test_a_delay_beyond_the_deadline_is_ended_by_that(session: Session) -> None:
    # behaviour: Q7
    record = delayed(session, deadline=60)
    manage.change(session, record, at=LATER)
    session.execute(text("UPDATE durable.workflow SET deadline_at = statement_timestamp()"))
    session.commit()
    failures.fail_overdue(session, limit=10)
    assert races.status_in(session, record.id) is WorkflowStatus.FAILED


@pytest.mark.parametrize("waking_first", [True, False])
def test_a_change_of_one_that_is_just_waking(engine: Engine, waking_first: bool) -> None:
    """Either is first; the change counts as long as no attempt has begun, and a worker does not wait for it."""
    # behaviour: Q7
    with Session(engine) as session:
        found = delayed(session).id
        session.execute(text("UPDATE durable.workflow SET wake_at = statement_timestamp()"))
        session.commit()
    with races.transaction(engine) as worker, races.transaction(engine) as operator:
        if waking_first:
            assert timers.wake_due(worker.session, limit=10)
            changing = operator.begin_blocked(lambda session: manage.change(session, found, at=LATER))
            worker.session.commit()
            assert changing.result() == [found]
        else:
            manage.change(operator.session, found, at=LATER)
            assert not worker.begin(lambda session: timers.wake_due(session, limit=10)).result()
        operator.session.commit()
    assert races.status_of(engine, found) is SUSPENDED


@pytest.mark.parametrize("ending", ["commit", "rollback"])
def test_a_change_that_meets_a_claim(engine: Engine, ending: str) -> None:
    with Session(engine) as session:
        first, second = races.enqueue(session, 2)
    with races.transaction(engine) as worker, races.transaction(engine) as operator:
        assert races.claim(worker.session)
        changing = operator.begin_blocked(lambda session: manage.change(session, [second, first], queue="slow"))
        getattr(worker.session, ending)()
        assert changing.result() == ([second] if ending == "commit" else [first, second])


def test_a_claim_passes_what_is_being_changed(engine: Engine) -> None:
    with Session(engine) as session:
        first, second = races.enqueue(session, 2)
    with races.transaction(engine) as operator, races.transaction(engine) as worker:
        manage.change(operator.session, first, priority=5)
        (claimed,) = worker.begin(lambda session: races.claim(session, 10)).result()
        assert claimed.fence.workflow_id == second


def test_a_priority_decides_from_the_commit_on(session: Session) -> None:
    first, second, third = races.enqueue(session, 3)
    assert manage.change(session, third, priority=-1) == [third]
    session.commit()
    assert [each.fence.workflow_id for each in races.claim(session, 3)] == [third, first, second]


def test_a_delayed_one_is_changed_cancelled_and_resumed(session: Session) -> None:
    # behaviour: Q7
    record = delayed(session)
    manage.change(session, record, delay=2 * HOUR, priority=3)
    assert manage.cancel(session, record) == [record.id]
    assert manage.change(session, record, delay=HOUR) == []
    assert manage.resume(session, record) == [record.id]
    assert (record.status, record.wake_at, record.priority) == (PENDING, None, 3)
    assert manage.change(session, record, delay=HOUR) == [record.id]
    assert (record.status, record.attempt) == (SUSPENDED, 2)


def test_a_rollback_changes_nothing(session: Session) -> None:
    # behaviour: T8
    (found,) = races.enqueue(session)
    manage.change(session, found, queue="slow", priority=2, at=LATER)
    session.rollback()
    record = session.get_one(Workflow, found)
    assert (record.queue, record.priority, record.status) == ("default", 0, PENDING)


def test_a_deferred_child_is_moved_and_keeps_waiting_for_its_turn(session: Session) -> None:
    (parent,) = races.enqueue(session)
    (found,) = races.enqueue(session, status=SUSPENDED, parent_id=parent, parent_key="map")
    assert manage.change(session, found, delay=timedelta(0)) == []
    assert manage.change(session, found, queue="slow") == [found]
    assert races.status_in(session, found) is SUSPENDED


@pytest.mark.parametrize("start", [0, 1])
def test_two_bulk_changes_in_opposite_orders_do_not_deadlock(engine: Engine, start: int) -> None:
    with Session(engine) as session:
        ids = races.enqueue(session, 50)
    with races.transaction(engine) as one, races.transaction(engine) as other:
        assert manage.change(one.session, ids[::-1], priority=1) == ids
        changing = other.begin_blocked(lambda session: manage.change(session, ids[start:], priority=2))
        one.session.commit()
        assert changing.result() == ids[start:]
        other.session.commit()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, "nothing to change"),
        ({"queue": " "}, "queue=' '"),
        ({"priority": 40_000}, "priority=40000"),
        ({"delay": 5}, "not a timedelta"),
        ({"delay": HOUR, "at": LATER}, "contradict each other"),
        ({"at": datetime(2030, 1, 1)}, "no time zone"),
    ],
)
def test_what_makes_no_sense_is_refused(session: Session, change: dict[str, Any], reason: str) -> None:
    (found,) = races.enqueue(session)
    with pytest.raises(ArgumentError, match=reason):
        manage.change(session, found, **change)


def test_a_place_that_is_kept_while_suspended_is_one_of_its_queue(session: Session) -> None:
    (found,) = races.enqueue(session)
    kept = "status = 'suspended', started_at = statement_timestamp(), place = 'finished', wake_at = 'tomorrow'"
    session.execute(text(f"UPDATE durable.workflow SET {kept}"))
    session.commit()
    record = session.get_one(Workflow, found)
    changes: list[tuple[dict[str, Any], str | None]] = [
        ({"priority": 1}, "finished"),
        ({"queue": "default"}, "finished"),
        ({"queue": "slow"}, None),
    ]
    for change, place in changes:
        assert manage.change(session, record, **change) == [found]
        assert record.place == place
