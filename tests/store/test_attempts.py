"""The ends of attempts, one by one and in batches: only the owner writes, and nothing waits."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable import manage
from sqla_durable.models import Step, Workflow
from sqla_durable.models.base import StepStatus, WorkflowStatus
from sqla_durable.store import Checkpoint, Fence, Suspend, attempts, steps
from sqla_durable.store.statements import batch_parameter
from tests.store import races
from tests.store.plans import explain, fill


def test_only_the_owner_finishes_and_only_once(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session:
        assert not attempts.finish(session, races.success(Fence(fence.workflow_id, uuid7())))
        assert attempts.finish(session, races.success(fence))
        assert not attempts.finish(session, races.success(fence))
        assert attempts.finished_by(session, [fence]) == {fence: WorkflowStatus.SUCCEEDED}
        assert attempts.finished_by(session, [Fence(fence.workflow_id, uuid7())]) == {}


def test_a_completion_that_waited_for_a_cancel_is_lost(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    with races.transaction(engine) as canceller, races.transaction(engine) as owner:
        races.cancel(canceller.session, fence.workflow_id)
        finishing = owner.begin_blocked(lambda session: attempts.finish(session, races.success(fence)))
        canceller.session.commit()
        assert finishing.result() is False
    assert races.status_of(engine, fence.workflow_id) is WorkflowStatus.CANCELLED


def test_a_cancel_that_waited_for_a_completion_changes_nothing(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    with races.transaction(engine) as canceller, races.transaction(engine) as owner:
        assert attempts.finish(owner.session, races.success(fence))
        cancelling = canceller.begin_blocked(lambda session: races.cancel(session, fence.workflow_id))
        owner.session.commit()
        cancelling.result()
        canceller.session.commit()
    assert races.status_of(engine, fence.workflow_id) is WorkflowStatus.SUCCEEDED


def test_nothing_is_written_to_a_cancelled_workflow_although_it_keeps_its_token(engine: Engine) -> None:
    fences = races.claimed_fences(engine, 3)
    first, second, third = fences
    with Session(engine) as session:
        assert len(manage.cancel(session, [each.workflow_id for each in fences])) == 3
        assert session.get_one(Workflow, first.workflow_id).token == first.token
        lost = attempts.write_batch(session, [races.checkpoint(first)], [races.success(first), Suspend(second, None)])
        assert lost == attempts.Unwritten({(first, "charge")}, {first, second})
        assert attempts.release(session, [third]) == set()
        assert attempts.release_unlocked(session, [third]) == []
        assert not attempts.finish(session, races.success(third))
        assert {races.status_in(session, each.workflow_id) for each in fences} == {WorkflowStatus.CANCELLED}


def test_a_released_workflow_keeps_its_place_and_its_attempt(engine: Engine) -> None:
    first, second = races.claimed_fences(engine, 2)
    with Session(engine) as session:
        later = races.enqueue(session, 1)
        assert attempts.release(session, [second, first]) == {first.workflow_id, second.workflow_id}
        session.commit()
        again = races.claim(session, 3)
    assert [each.fence.workflow_id for each in again] == [first.workflow_id, second.workflow_id, *later]
    assert {each.attempt for each in again} == {1}


def test_checkpoints_and_what_ends_their_attempts_are_written_together(engine: Engine) -> None:
    finished, suspended, going_on = races.claimed_fences(engine, 3)
    with Session(engine) as session:
        unwritten = attempts.write_batch(
            session,
            [races.checkpoint(each, key) for each in (finished, suspended, going_on) for key in ("a", "b")],
            [races.success(finished), Suspend(suspended, 60)],
        )
        session.commit()
        assert unwritten == attempts.Unwritten()
        assert len(session.scalars(select(Step)).all()) == 6
        standing = {
            each.id: (each.status, each.token, each.wake_at is None) for each in session.scalars(select(Workflow))
        }
    assert standing == {
        finished.workflow_id: (WorkflowStatus.SUCCEEDED, finished.token, True),
        suspended.workflow_id: (WorkflowStatus.SUSPENDED, None, False),
        going_on.workflow_id: (WorkflowStatus.RUNNING, going_on.token, True),
    }


@pytest.mark.parametrize("end", ["finish", "suspend"])
def test_an_attempt_does_not_end_before_all_of_its_checkpoints_are_written(engine: Engine, end: str) -> None:
    """One of them is there already, recorded by an earlier try of the same batch."""
    (fence,) = races.claimed_fences(engine)
    ending: attempts.End = races.success(fence) if end == "finish" else Suspend(fence, 60)
    with Session(engine) as session:
        steps.record(session, races.checkpoint(fence, "a", output="1"))
        again = [races.checkpoint(fence, "a", output="2"), races.checkpoint(fence, "b")]
        assert attempts.write_batch(session, again, [ending]) == attempts.Unwritten({(fence, "a")}, {fence})
        assert races.status_in(session, fence.workflow_id) is WorkflowStatus.RUNNING
        assert dict(session.execute(select(Step.key, Step.output)).all()) == {"a": 1, "b": 1}
        assert attempts.write_batch(session, ends=[ending]) == attempts.Unwritten()
        assert races.status_in(session, fence.workflow_id) is not WorkflowStatus.RUNNING


def test_what_is_lost_or_locked_is_returned_and_the_rest_is_written(engine: Engine) -> None:
    mine, locked, lost = races.claimed_fences(engine, 3)
    stranger = Fence(lost.workflow_id, uuid7())
    with races.transaction(engine) as caller, Session(engine) as session:
        races.lock(caller.session, locked.workflow_id)
        fences = mine, locked, stranger
        unwritten = attempts.write_batch(
            session, [races.checkpoint(each) for each in fences], [races.success(each) for each in fences]
        )
        session.commit()
    assert unwritten == attempts.Unwritten({(locked, "charge"), (stranger, "charge")}, {locked, stranger})


def test_a_try_gives_way_to_the_outcome_and_an_outcome_to_nothing(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    tried = races.checkpoint(fence)._replace(status=StepStatus.RETRYING, output=None, delay=60.0)
    with Session(engine) as session:
        for checkpoint, is_written in ((tried, True), (races.checkpoint(fence), True), (tried, False)):
            unwritten = attempts.write_batch(session, [checkpoint]).checkpoints
            assert unwritten == (set() if is_written else {(fence, checkpoint.key)})


def test_an_empty_batch_is_nothing(engine: Engine) -> None:
    with Session(engine) as session:
        assert attempts.write_batch(session) == attempts.Unwritten()


@pytest.mark.new_database
@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
def test_a_batch_reads_no_table_from_end_to_end(engine: Engine, mode: str) -> None:
    with Session(engine) as session:
        fill(session)
        fences = races.claimed_fences(engine, 50)
        checkpoints: list[Checkpoint] = [races.checkpoint(each) for each in fences]
        parameters = batch_parameter("batch", [steps.CHECKPOINT.row(each) for each in checkpoints])
        ends = [attempts._end_row(races.success(each), 1) for each in fences]  # pyright: ignore[reportPrivateUsage]
        session.execute(text("ANALYZE durable.step"))
        statement = attempts._WRITE_BATCH  # pyright: ignore[reportPrivateUsage]
        plan = explain(session, statement, parameters | batch_parameter("ending", ends), mode=mode)
    assert plan.rows("CTE recorded") == plan.rows("CTE ended") == len(fences), plan
    assert plan.uses("workflow_pkey"), plan
    assert not plan.scans("workflow"), plan
