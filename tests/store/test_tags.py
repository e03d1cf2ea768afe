"""Tags of a running workflow: merged by who owns it, and once where they are recorded."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from sqla_durable.models import Workflow
from sqla_durable.store import Fence, Origin, tags
from sqla_durable.unwinding import AttemptLost
from tests.store import races


def of(engine: Engine, fence: Fence) -> Any:
    with Session(engine) as session:
        return session.get_one(Workflow, fence.workflow_id).tags


def test_recorded_tags_are_merged_once_with_what_another_connection_has_committed(engine: Engine) -> None:
    # behaviour: M3 E2
    (fence,) = races.claimed_fences(engine)
    with races.transaction(engine) as one, races.transaction(engine) as other:
        tags.merge(one.session, Origin(fence, 1, "charge"), tags='{"a": "1"}')
        tags.record(one.session, races.checkpoint(fence), tags='{"b": "2"}')
        again = other.begin_blocked(
            lambda session: tags.record(session, races.checkpoint(fence), tags='{"b": "3", "a": null}')
        )
        one.session.commit()
        again.result()
        tags.merge(other.session, Origin(fence, 1, "charge"), tags='{"c": "4"}')
        other.session.commit()
    assert of(engine, fence) == {"a": "1", "b": "2", "c": "4"}
    assert races.history_of(engine, fence.workflow_id) == ["charge"]


def test_tags_that_waited_for_a_cancel_are_not_set(engine: Engine) -> None:
    # behaviour: R3
    (fence,) = races.claimed_fences(engine)
    with races.transaction(engine) as one, races.transaction(engine) as other:
        races.cancel(one.session, fence.workflow_id)
        setting = other.begin_blocked(lambda session: tags.record(session, races.checkpoint(fence), tags='{"a": "1"}'))
        one.session.commit()
        with pytest.raises(AttemptLost):
            setting.result()
        other.session.commit()
    with Session(engine) as session, pytest.raises(AttemptLost):
        tags.merge(session, Origin(fence, 1, "charge"), tags='{"a": "1"}')
    assert of(engine, fence) is None
