"""What a running step reports: in a row that gives way to the outcome, and never takes its place."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable.models import Step
from sqla_durable.models.status import StepStatus
from sqla_durable.store import Checkpoint, Fence, Verdict, steps
from sqla_durable.unwinding import AttemptLost
from tests.store import races


def running(fence: Fence, attempts: int = 1) -> Checkpoint:
    return replace(races.checkpoint(fence), status=StepStatus.RUNNING, output=None, attempts=attempts)


def retrying(fence: Fence, attempts: int = 1) -> Checkpoint:
    return replace(running(fence, attempts), status=StepStatus.RETRYING, error='{"type": "a:b"}', delay=60.0)


def step_of(session: Session, fence: Fence) -> tuple[StepStatus, object, int]:
    step = session.get_one(Step, (fence.workflow_id, "charge"), populate_existing=True)
    return step.status, step.details, step.attempts


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


def test_a_late_report_does_not_take_back_that_its_try_failed(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session:
        steps.report_progress(session, running(fence), details="1")
        assert steps.record(session, retrying(fence)) is Verdict.RECORDED
        steps.report_progress(session, running(fence), details="2")
        assert step_of(session, fence) == (StepStatus.RETRYING, 1, 1)
        steps.report_progress(session, running(fence, attempts=2), details="3")
        assert step_of(session, fence) == (StepStatus.RUNNING, 3, 2)


def test_a_history_says_how_far_the_step_was_and_that_nothing_is_to_be_waited_for(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session:
        steps.report_progress(session, running(fence, attempts=3), details="[1]")
        found = steps.histories(session, [fence.workflow_id])[fence.workflow_id]["charge"]
    assert (found.status, found.details, found.attempts, found.due_in) == (StepStatus.RUNNING, "[1]", 3, 0.0)


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
