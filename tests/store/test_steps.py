"""Checkpoints: recorded by their owner only, once, alone or in a batch."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session, sessionmaker
from uuid_utils.compat import uuid7

from sqla_durable.models import Step, Workflow
from sqla_durable.models.base import StepStatus, WorkflowStatus
from sqla_durable.store import Checkpoint, Fence, Verdict, attempts, steps, workers
from sqla_durable.unwinding import AttemptLost
from tests.store import races


def test_an_attempt_that_owns_its_workflow_records_a_step_once(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session:
        assert steps.record(session, races.checkpoint(fence)) is Verdict.RECORDED
        session.commit()
        assert steps.record(session, races.checkpoint(fence, output="2")) is Verdict.DUPLICATE
        found = steps.find(session, fence.workflow_id, "charge")
    assert found is not None
    assert found.output == "1"


def test_another_token_and_another_status_lose(engine: Engine) -> None:
    # behaviour: R3
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session:
        stranger = Fence(fence.workflow_id, uuid7())
        assert steps.record(session, races.checkpoint(stranger)) is Verdict.LOST
        assert races.record(session, [races.checkpoint(stranger)]) == set()
        assert not attempts.finish(session, races.success(stranger))
        races.cancel(session, fence.workflow_id)
        assert steps.record(session, races.checkpoint(fence)) is Verdict.LOST
        assert races.record(session, [races.checkpoint(fence)]) == set()
        assert not attempts.finish(session, races.success(fence))
        assert attempts.release(session, [fence]) == set()
        assert session.scalars(select(Step)).all() == []


def test_a_row_of_a_lost_attempt_does_not_slip_in_beside_one_of_the_owner(engine: Engine) -> None:
    """A frozen worker that claims its own workflow again writes for both attempts in one batch."""
    (fence,) = races.claimed_fences(engine)
    lost = Fence(fence.workflow_id, uuid7())
    with Session(engine) as session:
        batch = [races.checkpoint(lost, "old", output="2"), races.checkpoint(fence, "new")]
        assert races.record(session, batch) == {(fence.workflow_id, "new")}
        assert races.end(session, [races.success(lost, "2"), races.success(fence, "1")])
        session.commit()
        assert session.scalars(select(Step.key)).all() == ["new"]
        assert session.scalars(select(Workflow.output)).all() == [1]


def test_a_cancel_between_check_and_commit_waits_and_sees_the_checkpoint(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    with races.transaction(engine) as step, races.transaction(engine) as canceller:
        assert steps.record(step.session, races.checkpoint(fence)) is Verdict.RECORDED
        cancelling = canceller.begin_blocked(lambda session: races.cancel(session, fence.workflow_id))
        step.session.commit()
        cancelling.result()
        seen = canceller.session.scalars(select(Step.key)).all()
        canceller.session.commit()
    assert seen == ["charge"]
    assert races.status_of(engine, fence.workflow_id) is WorkflowStatus.CANCELLED


def test_a_checkpoint_that_waited_for_a_cancel_is_lost(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    with races.transaction(engine) as step, races.transaction(engine) as canceller:
        races.cancel(canceller.session, fence.workflow_id)
        recording = step.begin_blocked(lambda session: steps.record(session, races.checkpoint(fence)))
        canceller.session.commit()
        assert recording.result() is Verdict.LOST
        step.session.commit()
    assert races.history_of(engine, fence.workflow_id) == []


def test_a_checkpoint_that_waited_for_a_reclaim_is_lost(engine: Engine) -> None:
    """Running all the same, but under another token: the row is checked again when its lock is had."""
    (fence,) = races.claimed_fences(engine)
    races.expire_leases(engine)
    with races.transaction(engine) as step, races.transaction(engine) as other:
        workers.beat(other.session, worker_id=uuid7(), name="other", queues=[], lease=races.LEASE)
        assert workers.reclaim(other.session, max_attempts=9, limit=9)
        (taken,) = races.claim(other.session)
        recording = step.begin_blocked(lambda session: steps.record(session, races.checkpoint(fence)))
        other.session.commit()
        assert recording.result() is Verdict.LOST
        step.session.rollback()
        assert steps.record(other.session, races.checkpoint(taken.fence)) is Verdict.RECORDED


def test_a_reclaim_skips_a_workflow_whose_step_is_about_to_commit(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    races.expire_leases(engine)
    with races.transaction(engine) as step, Session(engine) as other:
        assert steps.record(step.session, races.checkpoint(fence)) is Verdict.RECORDED
        assert workers.reclaim(other, max_attempts=9, limit=9) == []
        step.session.commit()
        other.rollback()
        assert len(workers.reclaim(other, max_attempts=9, limit=9)) == 1
        (taken,) = races.claim(other)
        assert list(taken.history) == ["charge"]


def test_two_executions_of_one_step_under_one_token_commit_once(engine: Engine) -> None:
    # behaviour: E8 T5
    (fence,) = races.claimed_fences(engine)
    with races.transaction(engine) as one, races.transaction(engine) as other:
        assert steps.record(one.session, races.checkpoint(fence)) is Verdict.RECORDED
        recording = other.begin_blocked(lambda session: steps.record(session, races.checkpoint(fence, output="2")))
        one.session.commit()
        assert recording.result() is Verdict.DUPLICATE
        found = steps.find(other.session, fence.workflow_id, "charge")
    assert found is not None
    assert found.output == "1"


def test_a_batch_passes_over_locked_rows_and_writes_the_others(engine: Engine) -> None:
    fences = races.claimed_fences(engine, 3)
    with races.transaction(engine) as caller, Session(engine) as session:
        races.lock(caller.session, fences[1].workflow_id)
        written = races.record(session, [races.checkpoint(each) for each in fences])
        finished = races.end(session, [races.success(each) for each in fences])
        session.commit()
    free = {fences[0].workflow_id, fences[2].workflow_id}
    assert written == {(each, "charge") for each in free}
    assert finished == free


def test_a_checkpoint_that_is_alone_in_its_batch_is_written_as_by_the_batch(engine: Engine) -> None:
    """Not beside a lock, which it does not wait for, not by another attempt, and only once."""
    fences = races.claimed_fences(engine, 3)
    stranger = races.checkpoint(Fence(fences[2].workflow_id, uuid7()))
    with races.transaction(engine) as caller, Session(engine) as session:
        races.lock(caller.session, fences[0].workflow_id)
        races.lock(caller.session, fences[1].workflow_id, "KEY SHARE")
        written = [steps.record_unlocked(session, races.checkpoint(each)) for each in fences]
        again = [steps.record_unlocked(session, races.checkpoint(each, output="2")) for each in fences[1:]]
        lost = steps.record_unlocked(session, stranger)
        session.commit()
    assert (written, again, lost) == ([False, True, True], [False, False], False)
    assert [races.history_of(engine, each.workflow_id) for each in fences] == [[], ["charge"], ["charge"]]


def test_a_foreign_key_of_an_open_transaction_does_not_delay_a_batch(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    with races.transaction(engine) as caller, Session(engine) as session:
        races.lock(caller.session, fence.workflow_id, "KEY SHARE")
        assert races.record(session, [races.checkpoint(fence)])
        assert races.end(session, [races.success(fence)])


def test_what_is_recorded_already_counts_for_the_attempt_that_owns_or_ended_the_workflow(engine: Engine) -> None:
    # behaviour: E8
    (fence,) = races.claimed_fences(engine)
    mine, foreign = races.checkpoint(fence), races.checkpoint(Fence(fence.workflow_id, uuid7()))
    with Session(engine) as session:
        assert steps.recorded_among(session, [mine]) == set()
        steps.record(session, mine)
        assert steps.recorded_among(session, [mine]) == {(fence, "charge")}
        attempts.finish(session, races.success(fence))
        assert steps.recorded_among(session, [mine]) == {(fence, "charge")}
        assert steps.recorded_among(session, [foreign]) == set()


def test_the_writer_a_bulk_cancel_and_reclaim_at_the_same_rows_never_deadlock(
    engine: Engine, session_factory: sessionmaker[Session]
) -> None:
    """The cancel takes the rows in the reverse order, one by one; the others in the order of ids, or not at all."""
    fences = races.claimed_fences(engine, 30)
    races.expire_leases(engine)
    backwards = [each.workflow_id for each in reversed(fences)]
    rounds = 25

    def write() -> None:
        for number in range(rounds):
            with session_factory() as session:
                races.record(session, [races.checkpoint(each, f"step-{number}") for each in fences])
                races.end(session, [races.success(each) for each in fences[number::rounds]])
                session.commit()

    def reclaim() -> None:
        for _ in range(rounds):
            with session_factory() as session:
                workers.reclaim(session, max_attempts=9, limit=7)
                races.claim(session, 7)
                session.commit()

    def cancel() -> None:
        for number in range(0, len(backwards), 6):
            with session_factory() as session:
                races.cancel(session, *backwards[number : number + 6])
                session.commit()

    for each in [races.Concurrent(work) for work in (write, reclaim, cancel, write, reclaim)]:
        each.result()  # a deadlock is an error: 40P01
    with session_factory() as session:
        for record in session.scalars(select(Workflow)):
            assert record.status is not WorkflowStatus.RUNNING or record.attempt > 1


def running(fence: Fence, tries: int = 1) -> Checkpoint:
    return races.checkpoint(fence)._replace(status=StepStatus.RUNNING, output=None, tries=tries)


def retrying(fence: Fence, tries: int = 1) -> Checkpoint:
    return running(fence, tries)._replace(status=StepStatus.RETRYING, error='{"type": "a:b"}', delay=60.0)


def step_of(session: Session, fence: Fence) -> tuple[StepStatus, object, int]:
    step = session.get_one(Step, (fence.workflow_id, "charge"), populate_existing=True)
    return step.status, step.details, step.tries


def test_the_outcome_takes_the_place_of_what_was_reported_and_keeps_the_details(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session:
        steps.report_progress(session, running(fence), details='{"line": 1}')
        steps.report_progress(session, running(fence), details='{"line": 2}')
        steps.report_progress(session, running(fence), details=None)
        assert step_of(session, fence) == (StepStatus.RUNNING, {"line": 2}, 1)
        assert steps.find(session, fence.workflow_id, "charge") is None
        assert steps.record(session, races.checkpoint(fence)) is Verdict.RECORDED
        steps.report_progress(session, running(fence), details='{"line": 3}')
        assert step_of(session, fence) == (StepStatus.SUCCEEDED, {"line": 2}, 1)


def test_a_late_report_does_not_undo_that_its_try_failed(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session:
        steps.report_progress(session, running(fence), details="1")
        assert steps.record(session, retrying(fence)) is Verdict.RECORDED
        steps.report_progress(session, running(fence), details="2")
        assert step_of(session, fence) == (StepStatus.RETRYING, 1, 1)
        steps.report_progress(session, running(fence, tries=2), details="3")
        assert step_of(session, fence) == (StepStatus.RUNNING, 3, 2)


def test_a_history_says_how_far_the_step_was_and_that_nothing_is_to_be_waited_for(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session:
        steps.report_progress(session, running(fence, tries=3), details="[1]")
        found = steps.histories(session, [fence.workflow_id])[fence.workflow_id]["charge"]
    assert (found.status, found.details, found.tries, found.due_in) == (StepStatus.RUNNING, "[1]", 3, 0.0)


def test_what_was_reported_is_not_taken_for_the_record_of_a_failed_try(engine: Engine) -> None:
    # behaviour: E8
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session:
        steps.report_progress(session, running(fence), details=None)
        assert steps.recorded_among(session, [retrying(fence)]) == set()
        steps.record(session, retrying(fence))
        assert steps.recorded_among(session, [retrying(fence)]) == {(fence, "charge")}


def test_another_token_and_a_cancelled_workflow_report_nothing(engine: Engine) -> None:
    # behaviour: R3
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session:
        with pytest.raises(AttemptLost):
            steps.report_progress(session, running(Fence(fence.workflow_id, uuid7())), details="1")
        races.cancel(session, fence.workflow_id)
        with pytest.raises(AttemptLost):
            steps.report_progress(session, running(fence), details="1")
        session.commit()
    assert races.history_of(engine, fence.workflow_id) == []
