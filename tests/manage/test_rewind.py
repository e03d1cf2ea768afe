"""`rewind`: back to before a step, wherever the workflow stands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable import Signal, StepStatus, Workflow, WorkflowStatus, manage
from sqla_durable.errors import ArgumentError
from sqla_durable.store import Fence, Suspend, attempts, steps
from tests.manage import histories
from tests.manage.histories import step
from tests.store import races


def with_history(session: Session, *keys: str) -> Fence:
    fence = histories.claimed(session)
    histories.record(session, [step(fence, key, number) for number, key in enumerate(keys, 1)])
    return fence


def suspend(session: Session, fence: Fence) -> None:
    races.end(session, [Suspend(fence, 3600)])
    awaits = 'UPDATE durable.workflow SET awaits = \'[{"signal": "go"}]\' WHERE id = :id'
    session.execute(text(awaits), {"id": fence.workflow_id})


STATES: dict[str, Callable[[Session, Fence], Any]] = {
    "running": lambda _session, _fence: None,
    "pending": lambda session, fence: attempts.release(session, [fence]),
    "suspended": suspend,
    "succeeded": histories.succeed,
    "failed": histories.fail,
    "cancelled": lambda session, fence: manage.cancel(session, fence.workflow_id),
}


@pytest.mark.parametrize("state", STATES)
def test_it_goes_back_wherever_it_stands(engine: Engine, session: Session, state: str) -> None:
    # behaviour: M1
    fence = with_history(session, "a", "b", "c")
    STATES[state](session, fence)
    session.commit()
    assert manage.rewind(session, fence.workflow_id, to_step="b") == [fence.workflow_id]
    session.commit()
    assert histories.keys(engine, fence.workflow_id) == ["a"]
    record = histories.standing(session, fence.workflow_id)
    assert (record.status, record.attempt, record.crashes) == (WorkflowStatus.PENDING, 2, 0)
    assert (record.token, record.finished_at, record.output, record.error) == (None, None, None, None)
    assert (record.wake_at, record.awaits) == (None, None)
    (again,) = races.claim(session)
    assert (again.attempt, list(again.history)) == (2, ["a"])


def test_a_running_attempt_loses_it(engine: Engine, session: Session) -> None:
    # behaviour: M1 T1
    fence = with_history(session, "a", "b")
    with races.transaction(engine) as committing, races.transaction(engine) as operator:
        steps.record(committing.session, step(fence, "c", 3))
        rewinding = operator.begin_blocked(lambda session: manage.rewind(session, fence.workflow_id, to_step="b"))
        committing.session.commit()
        assert rewinding.result() == [fence.workflow_id]
        operator.session.commit()
    assert histories.keys(engine, fence.workflow_id) == ["a"], "the step that was committing is seen, and deleted"
    assert races.record(session, [step(fence, "d", 4)]) == set()
    assert attempts.finish(session, races.success(fence)) is False


def test_what_the_steps_showed_goes_with_them_and_what_they_consumed_comes_back(session: Session) -> None:
    # behaviour: M1
    fence = with_history(session, "a", "b", "c")
    for key in ("a", "b", "c", "running", None):
        histories.shown(session, fence.workflow_id, key)
    manage.rewind(session, fence.workflow_id, to_step="b")
    assert histories.events(session, fence.workflow_id) == ["a", ""]
    assert [value for _, value in histories.items(session, fence.workflow_id)] == ["a 0", "a 1", "None 0", "None 1"]
    inbox = session.scalars(select(Signal.payload).where(Signal.consumed_by.is_(None)).order_by(Signal.id)).all()
    assert inbox == ["b", "c", "running", None]


def test_to_the_first_step_is_to_the_beginning(engine: Engine, session: Session) -> None:
    fence = with_history(session, "a", "b")
    manage.rewind(session, fence.workflow_id, to_step="a")
    session.commit()
    assert histories.keys(engine, fence.workflow_id) == []


def test_steps_of_one_position_go_together(engine: Engine, session: Session) -> None:
    """Two attempts may have counted parallel branches in two orders."""
    fence = with_history(session, "a")
    histories.record(session, [step(fence, "b", 2), step(fence, "other", 2), step(fence, "c", 3)])
    manage.rewind(session, fence.workflow_id, to_step="b")
    session.commit()
    assert histories.keys(engine, fence.workflow_id) == ["a"]


def test_a_step_that_is_tried_again_can_be_named(engine: Engine, session: Session) -> None:
    fence = with_history(session, "a")
    histories.record(session, [step(fence, "b", 2, StepStatus.RETRYING)])
    manage.rewind(session, fence.workflow_id, to_step="b")
    session.commit()
    assert histories.keys(engine, fence.workflow_id) == ["a"]


def test_several_by_a_select_each_to_its_own_place(engine: Engine, session: Session) -> None:
    first, second = with_history(session, "a", "b"), with_history(session, "x", "a", "b")
    ids = sorted([first.workflow_id, second.workflow_id])
    assert manage.rewind(session, select(Workflow), to_step="a") == ids
    session.commit()
    assert histories.keys(engine, first.workflow_id) == []
    assert histories.keys(engine, second.workflow_id) == ["x"]


def test_one_without_the_step_is_refused_and_nothing_is_changed(engine: Engine, session: Session) -> None:
    first, second = with_history(session, "a", "b"), with_history(session, "a")
    with pytest.raises(ArgumentError, match=f"{second.workflow_id} has no record of a step 'b': it has 'a'. Nothing"):
        manage.rewind(session, select(Workflow), to_step="b")
    session.commit()
    assert histories.keys(engine, first.workflow_id) == ["a", "b"]
    assert histories.standing(session, first.workflow_id).status is WorkflowStatus.RUNNING


def test_a_key_with_marks_is_given_as_it_is_stored(session: Session) -> None:
    fence = with_history(session, "orders%2F7", "b")
    with pytest.raises(
        ArgumentError, match=r"no record of a step 'orders/7', but of 'orders%2F7'.* Nothing was rewound"
    ):
        manage.rewind(session, fence.workflow_id, to_step="orders/7")
    assert manage.rewind(session, fence.workflow_id, to_step="orders%2F7") == [fence.workflow_id]


@pytest.mark.parametrize("name", ["", " ", "\0", 7, None])
def test_a_key_that_is_none_is_refused(session: Session, name: Any) -> None:
    with pytest.raises(ArgumentError, match="to_step="):
        manage.rewind(session, uuid7(), to_step=name)


def test_one_that_is_not_there_is_left_out(session: Session) -> None:
    assert manage.rewind(session, uuid7(), to_step="a") == []
