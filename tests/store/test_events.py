"""Events: set by who owns the workflow, once where they are recorded, and read by anybody."""

from __future__ import annotations

from functools import partial

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable.errors import NotFoundError
from sqla_durable.models import Event
from sqla_durable.models.base import WorkflowStatus
from sqla_durable.store import Fence, Origin, events
from sqla_durable.store.events import Latest
from sqla_durable.unwinding import AttemptLost
from tests.store import races


def values(engine: Engine) -> list[object]:
    with Session(engine) as session:
        return list(session.scalars(select(Event.value).order_by(Event.id)))


def test_a_recorded_event_is_set_once_however_often_it_is_sent(engine: Engine) -> None:
    # behaviour: C4 E2
    (fence,) = races.claimed_fences(engine)
    with races.transaction(engine) as one, races.transaction(engine) as other:
        events.record(one.session, races.checkpoint(fence), key="status", value="1")
        again = other.begin_blocked(
            lambda session: events.record(session, races.checkpoint(fence), key="status", value="2")
        )
        one.session.commit()
        again.result()
        other.session.commit()
    assert values(engine) == [1]
    assert races.history_of(engine, fence.workflow_id) == ["charge"]


def test_an_event_that_waited_for_a_cancel_is_not_set(engine: Engine) -> None:
    # behaviour: R3
    (fence,) = races.claimed_fences(engine)
    with races.transaction(engine) as one, races.transaction(engine) as other:
        races.cancel(one.session, fence.workflow_id)
        setting = other.begin_blocked(
            lambda session: events.put(session, Origin(fence, 1, "charge"), key="status", value="1")
        )
        one.session.commit()
        with pytest.raises(AttemptLost):
            setting.result()
        other.session.commit()
    assert values(engine) == []


def test_another_token_sets_nothing(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    stranger = Fence(fence.workflow_id, uuid7())
    with Session(engine) as session:
        with pytest.raises(AttemptLost):
            events.put(session, Origin(stranger, 1, "charge"), key="status", value="1")
        with pytest.raises(AttemptLost):
            events.record(session, races.checkpoint(stranger), key="status", value="1")
        session.commit()
    assert values(engine) == []


def test_the_latest_value_is_that_of_the_last_commit(engine: Engine) -> None:
    # behaviour: C4
    (fence,) = races.claimed_fences(engine)
    with races.transaction(engine) as one, races.transaction(engine) as other:
        events.put(one.session, Origin(fence, 1, "a"), key="status", value='"first"')
        setting = other.begin_blocked(
            lambda session: events.put(session, Origin(fence, 1, "b"), key="status", value='"last"')
        )
        one.session.commit()
        setting.result()
        other.session.commit()
    with Session(engine) as session:
        assert events.latest(session, fence.workflow_id, "status") == Latest('"last"', WorkflowStatus.RUNNING)
        assert events.latest(session, fence.workflow_id, "other") == Latest(None, WorkflowStatus.RUNNING)
        with pytest.raises(NotFoundError):
            events.latest(session, uuid7(), "status")


def test_another_workflow_takes_the_latest_value_as_its_steps_outcome(engine: Engine) -> None:
    fence, other = races.claimed_fences(engine, 2)
    take = partial(events.take, workflow_id=other.workflow_id, key="status")
    with Session(engine) as session:
        waiting = races.checkpoint(fence, "get_event")
        assert take(session, waiting) == Latest(None, WorkflowStatus.RUNNING)
        assert events.take(session, waiting, workflow_id=uuid7(), key="status") is None
        events.put(session, Origin(other, 1, "a"), key="status", value="1")
        assert take(session, waiting) == Latest("1", WorkflowStatus.RUNNING)
        events.put(session, Origin(other, 1, "a"), key="status", value="2")
        assert take(session, waiting) == Latest("1", WorkflowStatus.RUNNING)
        with pytest.raises(AttemptLost):
            take(session, races.checkpoint(Fence(fence.workflow_id, uuid7()), "b"))
        session.commit()
    assert races.history_of(engine, fence.workflow_id) == ["get_event"]
