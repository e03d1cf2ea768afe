from __future__ import annotations

from datetime import timedelta
from functools import partial
from uuid import UUID

import pytest
from sqlalchemy import Engine, func, select, text
from sqlalchemy.orm import Session, sessionmaker
from uuid_utils.compat import uuid7

from sqla_durable.models import Workflow
from sqla_durable.models.status import WorkflowStatus
from sqla_durable.store import Fence, NewWorkflow, attempts, continuations, starts, timers
from sqla_durable.store.statements import batch_parameter, fence_row
from sqla_durable.testing import advance
from tests.store import races
from tests.store.plans import explain, fill


def new(key: str | None = None, **options: object) -> NewWorkflow:
    return NewWorkflow(**{"id": uuid7(), "name": "checkout", "input": {}, "queue": "default", "key": key, **options})  # type: ignore[arg-type]


def count(session: Session) -> int:
    return session.scalar(select(func.count()).select_from(Workflow)) or 0


def test_the_same_key_gives_the_same_record(session_factory: sessionmaker[Session]) -> None:
    with session_factory.begin() as session:
        first = starts.insert_unless_known(session, new("k"))
        assert starts.insert_unless_known(session, new("k")) is first
        assert starts.insert_unless_known(session, new("k", name="refund")) is not first


def test_a_caller_that_lost_the_race_for_a_key_takes_the_winners_record(engine: Engine) -> None:
    # behaviour: T9
    with races.transaction(engine) as one, races.transaction(engine) as other:
        winner = starts.insert_unless_known(one.session, new("k")).id
        starting = other.begin_blocked(races.one(new("k")))
        one.session.commit()
        assert starting.result() == winner
        assert count(other.session) == 1  # its transaction is usable
        other.session.commit()


def test_a_caller_whose_rival_rolls_back_starts_its_own(engine: Engine) -> None:
    with races.transaction(engine) as one, races.transaction(engine) as other:
        rolled_back = starts.insert_unless_known(one.session, new("k")).id
        mine = new("k")
        starting = other.begin_blocked(races.one(mine))
        one.session.rollback()
        assert starting.result() == mine.id != rolled_back
        other.session.commit()


def test_many_are_inserted_in_order_with_known_keys_in_their_places(session_factory: sessionmaker[Session]) -> None:
    with session_factory.begin() as session:
        known = starts.insert_unless_known(session, new("b")).id
        batch = [new("c"), new(), new("b"), new("a"), new("c"), new()]
        ids = starts.insert_many(session, batch)
        assert ids == [batch[0].id, batch[1].id, known, batch[3].id, batch[0].id, batch[5].id]
        assert count(session) == 5


def test_two_bulk_starts_of_the_same_keys_in_opposite_orders_do_not_deadlock(engine: Engine) -> None:
    # behaviour: C3
    keys = [f"key-{number}" for number in range(500)]

    def start(order: list[str]) -> list[UUID]:
        with Session(engine) as session:
            ids = starts.insert_many(session, [new(each) for each in order])
            session.commit()
            return sorted(ids)

    for _ in range(5):
        both = [races.Concurrent(partial(start, order)) for order in (keys, keys[::-1])]
        first, second = [each.result() for each in both]
        assert first == second
        with Session(engine) as session:
            session.execute(text("DELETE FROM durable.workflow"))
            session.commit()


def test_a_bulk_start_waits_for_another_transactions_key_and_takes_its_record(engine: Engine) -> None:
    with races.transaction(engine) as one, races.transaction(engine) as other:
        winner = starts.insert_unless_known(one.session, new("k")).id
        mine = [new("j"), new("k")]
        starting = other.begin_blocked(lambda session: starts.insert_many(session, mine))
        one.session.commit()
        assert starting.result() == [mine[0].id, winner]


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


def test_a_released_workflow_keeps_its_place_and_its_attempt(engine: Engine) -> None:
    first, second = races.claimed_fences(engine, 2)
    with Session(engine) as session:
        later = races.enqueue(session, 1)
        assert attempts.release(session, [second, first]) == {first.workflow_id, second.workflow_id}
        session.commit()
        again = races.claim(session, 3)
    assert [each.fence.workflow_id for each in again] == [first.workflow_id, second.workflow_id, *later]
    assert {each.attempt for each in again} == {1}


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


def test_what_is_recorded_while_a_workflow_begins_anew_is_forgotten_too(engine: Engine) -> None:
    """By a branch of the same attempt, say: its commit is on its way. The next round would take it for its own."""
    (fence,) = races.claimed_fences(engine)
    with races.transaction(engine) as branch, races.transaction(engine) as anew:
        races.record(branch.session, [races.checkpoint(fence, "charge")])
        waiting = anew.begin_blocked(lambda session: continuations.continue_as_new(session, fence, given="{}"))
        branch.session.commit()
        assert waiting.result()
        anew.session.commit()
    assert races.history_of(engine, fence.workflow_id) == []


def test_who_is_gone_in_the_middle_of_beginning_anew_leaves_a_workflow_that_comes_there_again(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session:
        races.record(session, [races.checkpoint(fence, "charge")])
        assert session.scalar(continuations._SUSPEND, batch_parameter("batch", [fence_row(fence)])) == 1  # pyright: ignore[reportPrivateUsage]
        session.commit()
        assert not continuations.continue_as_new(session, fence, given="{}")
        assert races.record(session, [races.checkpoint(fence, "refund")]) == set()
        advance(session, timedelta(minutes=1))
        assert timers.wake_due(session, limit=9) == 1
        (again,) = races.claim(session)
        assert list(again.history) == ["charge"]
        assert continuations.continue_as_new(session, again.fence, given="{}")
        assert races.status_in(session, fence.workflow_id) is WorkflowStatus.PENDING
