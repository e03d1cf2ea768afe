"""What is due is woken once, and nothing else is read."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable.models import Workflow
from sqla_durable.models.base import WorkflowStatus
from sqla_durable.store import timers
from tests.store import races
from tests.store.plans import explain, fill


def test_what_is_due_is_woken_once_in_its_place(engine: Engine) -> None:
    # behaviour: Q7
    with Session(engine) as session:
        for seconds in (3_600, -1, -10):
            session.execute(
                text(
                    "INSERT INTO durable.workflow (name, status, wake_at, enqueued_at) VALUES "
                    "('checkout', 'suspended', statement_timestamp() + make_interval(secs => :seconds), "
                    "statement_timestamp() - interval '5 s')"
                ),
                {"seconds": seconds},
            )
        session.commit()
    with races.transaction(engine) as one, races.transaction(engine) as other:
        assert timers.wake_due(one.session, limit=10) == 2
        assert timers.wake_due(other.session, limit=10) == 0
        one.session.commit()
        other.session.rollback()
        assert timers.wake_due(other.session, limit=10) == 0
        woken = select(Workflow).where(Workflow.status == WorkflowStatus.PENDING).order_by(Workflow.enqueued_at)
        early, late = other.session.scalars(woken).all()
    assert (early.wake_at, late.wake_at) == (None, None)
    # Both stand where claims look for them: not where they were due, which claims have passed.
    assert early.enqueued_at == late.enqueued_at > early.created_at


@pytest.mark.new_database
@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
def test_waking_reads_what_is_due_and_nothing_else(session_factory: sessionmaker[Session], mode: str) -> None:
    with session_factory() as session:
        fill(session)
        plan = explain(session, timers._WAKE_DUE, {"limit": 10, "since": "-infinity"}, mode=mode)  # pyright: ignore[reportPrivateUsage]
    assert plan.uses("workflow_suspended_idx"), plan
    assert not plan.scans("workflow"), plan
    assert plan.buffers("CTE due") < 60, plan
