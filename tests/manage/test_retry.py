"""`retry`: which outcomes are forgotten, and what becomes of the workflow."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, func, select, update
from sqlalchemy.orm import Session

from sqla_durable import Signal, Step, StepStatus, Workflow, WorkflowStatus, manage
from sqla_durable.store import Fence, workers
from tests.manage import histories
from tests.manage.histories import FAILED, OK, REFUSED, step
from tests.store import races

LOST = LookupError("lost")


def group() -> Exception:
    try:
        raise ExceptionGroup("in a TaskGroup", [LOST, REFUSED])
    except ExceptionGroup as error:
        return error


def wrapped() -> Exception:
    try:
        raise ValueError("cannot pay") from REFUSED
    except ValueError as error:
        return error


Recorded = tuple[str, StepStatus, dict[str, Any]]
PARALLEL: dict[str, Any] = {"elapsed": 60.0}  # begun before the others ended
# What was recorded, in the order of positions and of time; the workflow's error; what is left.
HISTORIES: dict[str, tuple[list[Recorded], BaseException, list[str]]] = {
    "the last step failed": ([("a", OK, {}), ("b", FAILED, {})], REFUSED, ["a"]),
    "no step failed": ([("a", OK, {})], LOST, ["a"]),
    "nothing is recorded": ([], LOST, []),
    "caught, and gone on": ([("a", FAILED, {"error": LOST}), ("b", OK, {}), ("c", FAILED, {})], REFUSED, ["a", "b"]),
    "caught, gone on, and failed without a step": (
        [("a", FAILED, {"error": LOST}), ("b", OK, {})],
        REFUSED,
        ["a", "b"],
    ),
    "caught with the same error, and gone on": (
        [("a", FAILED, {}), ("b", OK, {}), ("c", FAILED, {})],
        REFUSED,
        ["a", "b"],
    ),
    "a way out that failed as well": ([("a", FAILED, {"error": LOST}), ("b", FAILED, {})], REFUSED, []),
    "cleaned up, and raised again": ([("a", FAILED, {}), ("cleanup", OK, {})], REFUSED, ["cleanup"]),
    "cleaned up, and raised another from it": ([("a", FAILED, {}), ("cleanup", OK, {})], wrapped(), ["cleanup"]),
    "beside one that succeeded": ([("a", FAILED, {}), ("b", OK, PARALLEL)], REFUSED, ["b"]),
    "two beside each other": ([("a", FAILED, {}), ("b", OK, PARALLEL), ("c", FAILED, {"error": LOST})], REFUSED, ["b"]),
    "a group": ([("a", FAILED, {"error": LOST}), ("b", FAILED, {}), ("c", OK, PARALLEL)], group(), ["c"]),
    "one of a group, after others": ([("a", FAILED, {"error": LOST}), ("b", OK, {})], group(), ["b"]),
    "beside one that is tried again": ([("a", StepStatus.RETRYING, {}), ("b", FAILED, {})], REFUSED, []),
    "beside one that waits": ([("a", StepStatus.WAITING, {}), ("b", FAILED, {})], REFUSED, ["a"]),
    "beside one that runs": ([("a", StepStatus.RUNNING, {}), ("b", FAILED, {})], REFUSED, ["a"]),
}


@pytest.mark.parametrize("history", HISTORIES)
def test_what_made_it_fail_is_forgotten(engine: Engine, session: Session, history: str) -> None:
    # behaviour: M1
    recorded, error, left = HISTORIES[history]
    fence = histories.claimed(session)
    checkpoints = [
        step(fence, key, number, status, **values) for number, (key, status, values) in enumerate(recorded, 1)
    ]
    histories.record(session, checkpoints)
    histories.fail(session, fence, error)
    assert manage.retry(session, fence.workflow_id) == [fence.workflow_id]
    session.commit()
    assert histories.keys(engine, fence.workflow_id) == left
    record = histories.standing(session, fence.workflow_id)
    assert (record.status, record.attempt, record.error) == (WorkflowStatus.PENDING, 2, None)
    assert (record.token, record.worker_id, record.finished_at, record.output) == (None, None, None, None)


def test_a_row_written_by_sql_without_a_message_is_no_obstacle(engine: Engine, session: Session) -> None:
    fence = histories.claimed(session)
    histories.record(session, [step(fence, "a", 1, FAILED), step(fence, "b", 2)])
    histories.fail(session, fence)
    for model in (Step, Workflow):
        error = update(model).where(model.error.is_not(None)).values(error={"type": "mine"})
        session.execute(error, execution_options={"synchronize_session": False})
    assert manage.retry(session, fence.workflow_id) == [fence.workflow_id]
    session.commit()
    assert histories.keys(engine, fence.workflow_id) == ["b"]


def test_only_what_failed_by_itself_is_retried(session: Session) -> None:
    # behaviour: M1
    failed, cancelled, stopped, succeeded, _running = (histories.claimed(session) for _ in range(5))
    histories.fail(session, failed)
    histories.succeed(session, succeeded)
    manage.cancel(session, cancelled.workflow_id)
    workers.abandon_attempt(session, stopped, reason="it broke", max_attempts=1)
    session.commit()
    races.enqueue(session)
    assert manage.retry(session, select(Workflow)) == [failed.workflow_id]
    assert manage.resume(session, select(Workflow)) == sorted([cancelled.workflow_id, stopped.workflow_id])


def test_a_deadline_that_has_passed_is_set_again(session: Session) -> None:
    passed, ahead, bare = (histories.claimed(session) for _ in range(3))
    for fence, hours, timeout in ((passed, -1, 2), (ahead, 1, 2), (bare, -1, None)):
        deadline = func.statement_timestamp() + timedelta(hours=hours)
        values: dict[str, Any] = {"deadline_at": deadline, "timeout": timeout and timedelta(hours=timeout)}
        session.execute(update(Workflow).where(Workflow.id == fence.workflow_id).values(values))
        histories.fail(session, fence)
    before = histories.standing(session, ahead.workflow_id).deadline_at
    manage.retry(session, select(Workflow))
    now = session.scalars(select(func.statement_timestamp())).one()
    renewed = histories.standing(session, passed.workflow_id).deadline_at
    assert renewed is not None
    assert timedelta(hours=1.9) < renewed - now <= timedelta(hours=2)
    assert histories.standing(session, ahead.workflow_id).deadline_at == before
    assert histories.standing(session, bare.workflow_id).deadline_at is None


def test_a_step_that_is_executed_again_takes_its_old_place(engine: Engine, session: Session) -> None:
    fence = histories.claimed(session)
    histories.record(session, [step(fence, "a", 1), step(fence, "b", 2, FAILED)])
    histories.fail(session, fence)
    manage.retry(session, fence.workflow_id)
    session.commit()
    (again,) = races.claim(session)
    assert list(again.history) == ["a"]
    histories.record(session, [step(again.fence, "b", 2)])
    histories.succeed(session, again.fence)
    assert histories.keys(engine, fence.workflow_id) == ["a", "b"]


def test_the_old_attempt_writes_nothing_more(session: Session) -> None:
    # behaviour: M1 T1
    fence = histories.claimed(session)
    histories.fail(session, fence)
    manage.retry(session, fence.workflow_id)
    session.commit()
    races.claim(session)
    assert races.record(session, [step(Fence(fence.workflow_id, fence.token), "late", 9)]) == set()


def test_of_two_that_retry_one_does(engine: Engine, session: Session) -> None:
    fence = histories.claimed(session)
    histories.fail(session, fence)
    with races.transaction(engine) as first, races.transaction(engine) as second:
        assert manage.retry(first.session, fence.workflow_id) == [fence.workflow_id]
        waiting = second.begin_blocked(lambda session: manage.retry(session, fence.workflow_id))
        first.session.commit()
        assert waiting.result() == []


def test_the_steps_of_a_record_are_read_again(session: Session) -> None:
    fence = histories.claimed(session)
    histories.record(session, [step(fence, "a", 1), step(fence, "b", 2, FAILED)])
    histories.fail(session, fence)
    record = session.get_one(Workflow, fence.workflow_id)
    assert len(record.steps) == 2
    manage.retry(session, record)
    assert [each.key for each in record.steps] == ["a"]


def test_what_a_forgotten_step_consumed_is_back_in_the_inbox(session: Session) -> None:
    """A payload that did not fit the code of yesterday may fit that of today."""
    fence = histories.claimed(session)
    histories.record(session, [step(fence, "a", 1), step(fence, "b", 2, FAILED)])
    for key in ("a", "b"):
        histories.shown(session, fence.workflow_id, key)
    histories.fail(session, fence)
    manage.retry(session, fence.workflow_id)
    assert session.scalars(select(Signal.payload).where(Signal.consumed_by.is_(None))).all() == ["b"]
    assert histories.events(session, fence.workflow_id) == ["a", "b"], "what a failed try has shown stays"
