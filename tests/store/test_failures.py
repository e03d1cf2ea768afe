"""What is overdue fails once, beside whoever else is at its row, and costs nothing while there is none."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import UUID

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from sqla_durable.models import Workflow
from sqla_durable.models.base import WorkflowStatus
from sqla_durable.store import attempts, failures
from sqla_durable.store.failures import _FAIL_OVERDUE  # pyright: ignore[reportPrivateUsage]
from sqla_durable.store.work import find_work
from tests.store import races
from tests.store.plans import explain, fill

PAST, FUTURE = datetime(2020, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)


def failed(session: Session, limit: int = 100) -> set[UUID]:
    return {each.workflow_id for each in failures.fail_overdue(session, limit=limit)}


def test_only_what_is_unfinished_and_overdue_is_failed_and_only_once(engine: Engine) -> None:
    with Session(engine) as session:
        races.enqueue(session)
        races.enqueue(session, deadline_at=FUTURE)
        races.enqueue(session, deadline_at=PAST, status="cancelled", finished_at=PAST)
        overdue = races.enqueue(session, deadline_at=PAST)
        assert failed(session) == set(overdue)
        assert failed(session) == set()


def test_what_has_something_to_undo_is_enqueued_for_that_and_claimed_in_spite_of_its_deadline(engine: Engine) -> None:
    with Session(engine) as session:
        (overdue,) = races.enqueue(session, deadline_at=PAST, cancellation="compensates")
        (undoing,) = races.enqueue(session, deadline_at=PAST, cancellation="requested")
        assert failures.fail_overdue(session, limit=9) == [
            failures.Overdue(overdue, "checkout", compensates=True, worker_id=None)
        ]
        assert not find_work(session, worker_id=races.WORKER, ranges={}, names=[]).overdue
        claimed = {each.fence.workflow_id: each for each in races.claim(session, 9)}
        assert claimed.keys() == {overdue, undoing}
        assert all(each.is_cancelling for each in claimed.values())
        assert (claimed[overdue].overdue or "").startswith("it was not finished at its deadline, 2020-01-01")
        assert claimed[undoing].overdue is None


def test_the_earliest_deadlines_come_first(engine: Engine) -> None:
    with Session(engine) as session:
        (later,) = races.enqueue(session, deadline_at=PAST.replace(month=2))
        (sooner,) = races.enqueue(session, deadline_at=PAST)
        assert failed(session, limit=1) == {sooner}
        assert failed(session, limit=1) == {later}


def test_a_poll_finds_what_is_overdue_and_the_next_deadline(engine: Engine) -> None:
    with Session(engine) as session:
        races.enqueue(session, deadline_at=text("statement_timestamp() + interval '50 s'"))
        seen = find_work(session, worker_id=races.WORKER, ranges={}, names=[])
        assert not seen.overdue
        assert 40 < (seen.next_due_in or 0) <= 50
        races.enqueue(session, deadline_at=PAST)
        assert find_work(session, worker_id=races.WORKER, ranges={}, names=[]).overdue


def test_what_is_overdue_is_neither_claimed_nor_claimable(engine: Engine) -> None:
    with Session(engine) as session:
        (overdue,) = races.enqueue(session, deadline_at=PAST)
        assert races.claim(session) == []
        assert not find_work(
            session, worker_id=races.WORKER, ranges=races.from_front(["default"]), names=["checkout"]
        ).claimable
        (other,) = races.enqueue(session)
        assert [each.fence.workflow_id for each in races.claim(session, 9)] == [other]
        assert races.status_in(session, overdue) is WorkflowStatus.PENDING


def test_a_locked_row_is_skipped_and_found_again(engine: Engine) -> None:
    with Session(engine) as session:
        locked, free = races.enqueue(session, 2, deadline_at=PAST)
    with races.transaction(engine) as caller, Session(engine) as session:
        races.lock(caller.session, locked)
        assert failed(session) == {free}
        caller.session.rollback()
        assert failed(session) == {locked}


def test_a_completion_on_its_way_wins_over_the_deadline(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session:
        session.get_one(Workflow, fence.workflow_id).deadline_at = PAST
        session.commit()
    with races.transaction(engine) as worker, races.transaction(engine) as executor:
        assert attempts.finish(worker.session, races.success(fence))
        waiting = executor.begin_blocked(lambda session: failures.fail_if_overdue(session, fence.workflow_id))
        worker.session.commit()
        assert not waiting.result()
    assert races.status_of(engine, fence.workflow_id) is WorkflowStatus.SUCCEEDED


def test_a_completion_after_the_deadline_is_refused(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session:
        session.get_one(Workflow, fence.workflow_id).deadline_at = PAST
        session.commit()
    with races.transaction(engine) as maintenance, races.transaction(engine) as worker:
        assert failed(maintenance.session) == {fence.workflow_id}
        waiting = worker.begin_blocked(lambda session: attempts.finish(session, races.success(fence)))
        maintenance.session.commit()
        assert not waiting.result()
    assert races.status_of(engine, fence.workflow_id) is WorkflowStatus.FAILED


@pytest.mark.new_database
@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
def test_the_overdue_among_many_rows_are_found_by_their_index(engine: Engine, mode: str) -> None:
    with Session(engine) as session:
        races.enqueue(session, 3, deadline_at=PAST)
        fill(session)
        plan = explain(session, _FAIL_OVERDUE, {"limit": 1_000, "since": "-infinity"}, mode=mode)
    assert plan.uses("workflow_deadline_idx"), plan
    assert not plan.scans("workflow"), plan
    assert plan.rows("CTE overdue") == 3
