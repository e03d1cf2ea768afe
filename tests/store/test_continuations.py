"""Continue as new deletes the history, also what is recorded while it does."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from sqla_durable.models.base import WorkflowStatus
from sqla_durable.store import continuations, timers
from sqla_durable.store.statements import batch_parameter, fence_row
from sqla_durable.testing import advance
from tests.store import races


def test_what_is_recorded_while_a_workflow_continues_as_new_is_deleted_too(engine: Engine) -> None:
    """By a branch of the same attempt, say: its commit is on its way. The next round would take it for its own."""
    (fence,) = races.claimed_fences(engine)
    with races.transaction(engine) as branch, races.transaction(engine) as ending:
        races.record(branch.session, [races.checkpoint(fence, "charge")])
        waiting = ending.begin_blocked(lambda session: continuations.continue_as_new(session, fence, given="{}"))
        branch.session.commit()
        assert waiting.result()
        ending.session.commit()
    assert races.history_of(engine, fence.workflow_id) == []


def test_a_workflow_whose_worker_dies_between_the_two_statements_continues_as_new_later(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session:
        races.record(session, [races.checkpoint(fence, "charge")])
        assert session.scalar(continuations._SUSPEND.made, batch_parameter("batch", [fence_row(fence)])) == 1  # pyright: ignore[reportPrivateUsage]
        session.commit()
        assert not continuations.continue_as_new(session, fence, given="{}")
        assert races.record(session, [races.checkpoint(fence, "refund")]) == set()
        advance(session, timedelta(minutes=1))
        assert timers.wake_due(session, limit=9) == 1
        (again,) = races.claim(session)
        assert list(again.history) == ["charge"]
        assert continuations.continue_as_new(session, again.fence, given="{}")
        assert races.status_in(session, fence.workflow_id) is WorkflowStatus.PENDING
