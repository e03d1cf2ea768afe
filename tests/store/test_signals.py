"""Signals and suspending: whichever is committed later finds the other, and nobody waits for anybody's transaction."""

from __future__ import annotations

import itertools
from uuid import UUID

import pytest
from sqlalchemy import Engine, select, text, update
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable.models import Signal, Step, Workflow
from sqla_durable.models.base import StepStatus, WorkflowStatus
from sqla_durable.store import Awaited, Completion, Fence, Suspend, deferred, failures, manage, signals, steps, timers
from sqla_durable.store.selecting import Selection
from sqla_durable.store.signals import _DELIVER  # pyright: ignore[reportPrivateUsage]
from sqla_durable.unwinding import AttemptLost
from tests.store import races
from tests.store.plans import explain, fill

APPROVED = Awaited(signal="approved")


def suspend(engine: Engine, fence: Fence, *awaits: Awaited, delay: float | None = None) -> None:
    with Session(engine) as session:
        assert races.end(session, [Suspend(fence, delay, awaits)]) == {fence.workflow_id}
        session.commit()


def send(session: Session, *ids: UUID, name: str = "approved") -> None:
    signals.send(session, ids, name=name, payload="7", key=None)


def deliver(engine: Engine, limit: int = 100) -> tuple[int, int]:
    with Session(engine) as session:
        found = signals.deliver(session, limit=limit)
        session.commit()
        return found


def take(engine: Engine, fence: Fence, key: str = "signal:approved") -> str | None:
    with Session(engine) as session:
        found = signals.take(session, races.checkpoint(fence, key), name="approved")
        session.commit()
        return found


def sent(engine: Engine) -> list[str]:
    with Session(engine) as session:
        return list(session.scalars(select(Signal.name).order_by(Signal.id)))


ORDERS = [
    each
    for each in itertools.permutations(["send", "commit", "suspend", "deliver", "deliver again"])
    if each.index("send") < each.index("commit")
]


@pytest.mark.parametrize("order", ORDERS)
def test_whichever_is_later_finds_the_other(engine: Engine, order: tuple[str, ...]) -> None:
    """The sender's statement and commit, the receiver's suspending, and deliveries, in every order that there is."""
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as sender:
        for each in order:
            match each:
                case "send":
                    send(sender, fence.workflow_id)
                case "commit":
                    sender.commit()
                case "suspend":
                    suspend(engine, fence, APPROVED)
                case _:
                    deliver(engine)
        deliver(engine)
    assert races.status_of(engine, fence.workflow_id) is WorkflowStatus.PENDING
    with Session(engine) as session:
        woken = session.get_one(Workflow, fence.workflow_id)
        assert (woken.awaits, woken.wake_at) == (None, None)
    assert sent(engine) == ["approved"]


def test_suspended_workflow_is_not_woken_by_what_it_does_not_wait_for(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    suspend(engine, fence, APPROVED)
    with Session(engine) as session:
        send(session, fence.workflow_id, name="rejected")
        session.commit()
    assert deliver(engine) == (2, 0)
    assert deliver(engine) == (0, 0)
    assert races.status_of(engine, fence.workflow_id) is WorkflowStatus.SUSPENDED


def test_one_of_several_is_enough(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    suspend(engine, fence, Awaited(signal="rejected"), APPROVED, delay=3600)
    with Session(engine) as session:
        send(session, fence.workflow_id)
        session.commit()
    assert deliver(engine) == (2, 1)


def test_what_was_taken_before_wakes_nothing(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session:
        send(session, fence.workflow_id)
        session.commit()
    assert take(engine, fence) == "7"
    suspend(engine, fence, APPROVED)
    assert deliver(engine) == (1, 0)


def test_children_wake_when_there_are_enough(engine: Engine) -> None:
    (parent,) = races.claimed_fences(engine)
    with Session(engine) as session:
        children = races.enqueue(session, 3, name="child", parent_id=parent.workflow_id, parent_key="ship")
        claimed = [each.fence for each in races.claim(session, 3, names=["child"])]
        session.commit()
    assert {each.workflow_id for each in claimed} == set(children)
    suspend(engine, parent, Awaited(children=children, open=1))
    woken: list[int] = []
    for each in claimed:
        with Session(engine) as session:
            races.end(session, [races.success(each)])
            session.commit()
        woken.append(deliver(engine)[1])
    assert woken == [0, 1, 0]
    assert sent(engine) == []


def test_child_of_a_finished_parent_leaves_nothing(engine: Engine) -> None:
    (parent,) = races.claimed_fences(engine)
    with Session(engine) as session:
        races.enqueue(session, name="child", parent_id=parent.workflow_id, parent_key="ship")
        (child,) = races.claim(session, names=["child"])
        races.end(session, [races.success(parent)])
        session.commit()
        races.end(session, [races.success(child.fence)])
        session.commit()
    assert deliver(engine) == (1, 0)
    assert sent(engine) == []


def test_senders_open_transaction_blocks_nothing(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    with races.transaction(engine) as sender:
        send(sender.session, fence.workflow_id)
        with Session(engine) as session:
            session.execute(text("SET lock_timeout = '1s'"))
            assert races.record(session, [races.checkpoint(fence)]) == {(fence.workflow_id, "charge")}
            session.commit()
        assert take(engine, fence) is None
        suspend(engine, fence, APPROVED)
        assert deliver(engine) == (1, 0)
        sender.session.commit()
    assert deliver(engine) == (1, 1)


def test_receiver_whose_row_is_locked_is_delivered_to_later_and_delays_no_other(engine: Engine) -> None:
    locked, free = races.claimed_fences(engine, 2)
    suspend(engine, locked, APPROVED)
    suspend(engine, free, APPROVED)
    with Session(engine) as session:
        send(session, locked.workflow_id, free.workflow_id)
        session.commit()
    with races.transaction(engine) as caller:
        races.lock(caller.session, locked.workflow_id)
        assert deliver(engine, limit=2) == (2, 1)
        assert deliver(engine, limit=2) == (0, 0)
    assert deliver(engine) == (2, 1)


def test_two_deliveries_at_once_wake_once(engine: Engine) -> None:
    fences = races.claimed_fences(engine, 10)
    for each in fences:
        suspend(engine, each, APPROVED)
    with Session(engine) as session:
        send(session, *[each.workflow_id for each in fences])
        session.commit()
    with races.transaction(engine) as one, races.transaction(engine) as other:
        first = signals.deliver(one.session, limit=7)
        second = signals.deliver(other.session, limit=100)
        one.session.commit()
        other.session.commit()
    rest = deliver(engine)
    assert first[1] + second[1] + rest[1] == 10
    with Session(engine) as session:
        assert set(session.scalars(select(Workflow.status))) == {WorkflowStatus.PENDING}


def test_signal_is_taken_once_and_known_after_a_lost_acknowledgement(engine: Engine) -> None:
    # behaviour: E8
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session:
        send(session, fence.workflow_id)
        send(session, fence.workflow_id)
        session.commit()
    assert take(engine, fence) == "7"
    assert take(engine, fence) == "7"
    with Session(engine) as session:
        assert session.scalars(select(Signal.consumed_by).order_by(Signal.id)).all() == ["signal:approved", None]


def test_attempt_that_lost_its_workflow_takes_nothing(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session:
        send(session, fence.workflow_id)
        session.commit()
    with pytest.raises(AttemptLost):
        take(engine, Fence(fence.workflow_id, uuid7()))
    with Session(engine) as session, pytest.raises(AttemptLost):
        steps.begin_wait(session, races.checkpoint(Fence(fence.workflow_id, uuid7())))
    with Session(engine) as session:
        races.cancel(session, fence.workflow_id)
        session.commit()
    with pytest.raises(AttemptLost):
        take(engine, fence)
    with Session(engine) as session:
        assert session.scalars(select(Signal.consumed_by)).all() == [None]


def test_cancel_in_the_middle_waits_for_what_is_taken(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session:
        send(session, fence.workflow_id)
        session.commit()
    with races.transaction(engine) as receiver, races.transaction(engine) as operator:
        assert signals.take(receiver.session, races.checkpoint(fence), name="approved") == "7"
        cancelling = operator.begin_blocked(lambda session: races.cancel(session, fence.workflow_id))
        receiver.session.commit()
        cancelling.result()
        operator.session.commit()
    with Session(engine) as session:
        assert session.scalars(select(Step.status)).all() == [StepStatus.SUCCEEDED]


def test_what_waits_behind_the_cancel_of_its_call_takes_nothing(engine: Engine) -> None:
    """The statement began before the cancel was recorded, and so does not see it."""
    (fence,) = races.claimed_fences(engine)
    checkpoint = races.checkpoint(fence, "signal:approved")
    cancelled = checkpoint._replace(status=StepStatus.FAILED, output=None, error='{"type": "asyncio:CancelledError"}')
    with Session(engine) as session:
        send(session, fence.workflow_id)
        session.commit()
    with races.transaction(engine) as settling, races.transaction(engine) as receiver:
        assert steps.settle(settling.session, cancelled).status is StepStatus.FAILED
        taking = receiver.begin_blocked(lambda session: signals.take(session, checkpoint, name="approved"))
        settling.session.commit()
        assert taking.result() is None
        receiver.session.commit()
    assert take(engine, fence, key="signal:approved#2") == "7"


def test_waking_by_time_forgets_what_else_was_waited_for(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    suspend(engine, fence, APPROVED, delay=0)
    with Session(engine) as session:
        assert timers.wake_due(session, limit=10) == 1
        session.commit()
        assert session.get_one(Workflow, fence.workflow_id).awaits is None
    assert deliver(engine) == (1, 0)


@pytest.mark.new_database
@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
def test_delivery_costs_a_few_pages_among_many_rows(engine: Engine, mode: str) -> None:
    with Session(engine) as session:
        fill(session)
        session.execute(
            text(
                "INSERT INTO durable.signal (workflow_id, name, delivered_at) "
                "SELECT id, 'old', statement_timestamp() FROM durable.workflow LIMIT 10000"
            )
        )
        (receiver,) = races.enqueue(session)
        send(session, receiver)
        session.execute(
            update(Workflow)
            .where(Workflow.id == receiver)
            .values(status=WorkflowStatus.SUSPENDED, awaits=[APPROVED.to_json()])
        )
        session.commit()
        session.execute(text("ANALYZE durable.signal, durable.workflow"))
        session.commit()
        plan = explain(session, _DELIVER, {"limit": 1000, "since": "-infinity"}, mode=mode)
    assert plan.uses("signal_new_idx"), plan
    assert not plan.scans("signal"), plan
    assert not plan.scans("workflow"), plan
    assert plan.buffers() < 60, plan


@pytest.mark.parametrize("count", [1, 2])
def test_two_branches_never_take_the_same_signal(engine: Engine, count: int) -> None:
    """The second waits for the row of their workflow, with a snapshot in which the signal is still there."""
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session:
        for number in range(count):
            signals.send(session, [fence.workflow_id], name="approved", payload=str(number), key=None)
        session.commit()
    with races.transaction(engine) as first:
        begun = first.begin(
            lambda session: signals.take(session, races.checkpoint(fence, "a/signal:approved"), name="approved")
        )
        assert begun.result() == "0"
        with races.transaction(engine) as second:
            other = second.begin_blocked(
                lambda session: signals.take(session, races.checkpoint(fence, "b/signal:approved"), name="approved")
            )
            first.session.commit()
            assert other.result() in (None, "1")


def test_child_that_ends_notifies_a_parent_that_is_retried_meanwhile(engine: Engine) -> None:
    """The parent has failed when a caller cancels its child, and waits for it again when the caller commits."""
    (parent,) = races.claimed_fences(engine)
    with Session(engine) as session:
        (child,) = races.enqueue(session, 1, name="child", parent_id=parent.workflow_id, parent_key="ship")
        races.end(session, [Completion(parent, WorkflowStatus.FAILED, error='{"type": "builtins:ValueError"}')])
        session.commit()
    with Session(engine) as canceller:
        locked, _ = manage.lock_unfinished_trees(canceller, Selection([child]))
        manage.cancel(canceller, locked, Selection([child]))
        with Session(engine) as session:
            manage.retry(session, Selection([parent.workflow_id]))
            session.commit()
        (again,) = _claimed_again(engine)
        suspend(engine, again, Awaited.any_of([child]))
        deliver(engine)
        canceller.commit()
    deliver(engine)
    assert races.status_of(engine, parent.workflow_id) is WorkflowStatus.PENDING


def test_orphans_of_a_parent_that_ended_without_a_notice_are_found(engine: Engine) -> None:
    """A row that is refused is failed alone, and an application's own SQL leaves no notices at all."""
    ended, going_on = races.claimed_fences(engine, 2)
    with Session(engine) as session:
        of_parents = ({"parent_id": each.workflow_id, "parent_key": "start:double"} for each in (ended, going_on))
        orphans, kept = (races.enqueue(session, 2, status="suspended", **each) for each in of_parents)
        assert failures.fail_refused_alone(session, ended.workflow_id, reason="refused")
        assert deferred.start_orphans(session, limit=9) == 0
        signals.renotify(session, after=UUID(int=0), limit=100)
        assert session.scalars(select(Signal.workflow_id).where(Signal.name == "#orphans")).all() == [ended.workflow_id]
        assert deferred.start_orphans(session, limit=9) == 2
        assert {races.status_in(session, each) for each in orphans} == {WorkflowStatus.PENDING}
        assert {races.status_in(session, each) for each in kept} == {WorkflowStatus.SUSPENDED}


def _claimed_again(engine: Engine) -> list[Fence]:
    with Session(engine) as session:
        found = [each.fence for each in races.claim(session, 1)]
        session.commit()
        return found


# behaviour: A1
def test_a_take_that_reaches_the_server_after_its_call_was_cancelled_takes_nothing(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    checkpoint = races.checkpoint(fence, "signal:approved")
    cancelled = checkpoint._replace(status=StepStatus.FAILED, output=None, error='{"type": "cancelled"}')
    with Session(engine) as session:
        send(session, fence.workflow_id)
        session.commit()
        assert steps.settle(session, cancelled).status is StepStatus.FAILED
        session.commit()
    assert take(engine, fence) is None
    assert take(engine, fence, key="signal:approved#2") == "7"
