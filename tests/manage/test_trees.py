"""Cancel and resume of trees, and what they meet: attempts that end or start children, and each other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, create_engine, event, select, text
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable import Workflow, WorkflowStatus, manage
from sqla_durable.store import Suspend, attempts
from tests.manage import histories
from tests.store import races

CANCELLED, PENDING = WorkflowStatus.CANCELLED, WorkflowStatus.PENDING


def tree(session: Session) -> dict[str, UUID]:
    """Make a tree: a parent, a child that is finished with a grandchild that is not, and one that is detached."""
    parent = histories.claimed(session)
    found = {"parent": parent.workflow_id}
    found["finished"] = histories.child(session, parent.workflow_id)
    (claimed,) = races.claim(session)
    histories.succeed(session, claimed.fence)
    found["grandchild"] = histories.child(session, found["finished"])
    found["child"] = histories.child(session, parent.workflow_id)
    found["detached"] = histories.child(session, parent.workflow_id, detached=True)
    found["below"] = histories.child(session, found["detached"])
    (found["beside"],) = races.enqueue(session)
    return found


def standing(session: Session, found: dict[str, UUID], status: WorkflowStatus) -> set[str]:
    return {name for name, each in found.items() if histories.standing(session, each).status is status}


@pytest.mark.parametrize("durable_schema", ["durable", "tenant_7"], indirect=True)
def test_a_cancel_takes_the_tree_and_a_resume_brings_it_back(session: Session) -> None:
    # behaviour: M1 Q10
    found = tree(session)
    taken = {"parent", "child", "grandchild"}
    ids = sorted(found[name] for name in taken)
    assert manage.cancel(session, found["parent"]) == ids
    session.commit()
    assert standing(session, found, CANCELLED) == taken
    assert manage.resume(session, found["parent"]) == ids
    session.commit()
    assert standing(session, found, CANCELLED) == set()
    assert standing(session, found, WorkflowStatus.SUCCEEDED) == {"finished"}


def test_what_is_finished_is_left_alone_with_its_tree(session: Session) -> None:
    found = tree(session)
    assert manage.cancel(session, found["finished"]) == []


def test_a_part_of_a_tree_is_cancelled_by_itself(session: Session) -> None:
    found = tree(session)
    assert manage.cancel(session, [found["child"], found["detached"]]) == sorted(
        [found["child"], found["detached"], found["below"]]
    )


def test_a_resume_leaves_what_was_cancelled_before(session: Session) -> None:
    # behaviour: M1
    found = tree(session)
    manage.cancel(session, found["child"])
    manage.cancel(session, found["parent"])
    assert manage.resume(session, found["parent"]) == sorted([found["parent"], found["grandchild"]])
    assert standing(session, found, CANCELLED) == {"child"}


def test_a_member_that_was_given_besides_is_cancelled_once(session: Session) -> None:
    found = tree(session)
    assert len(manage.cancel(session, select(Workflow))) == 6
    assert standing(session, found, CANCELLED) == found.keys() - {"finished"}


def test_records_of_the_tree_in_the_session_are_fresh(engine: Engine) -> None:
    with Session(engine, expire_on_commit=False) as session:
        found = tree(session)
        child = session.get_one(Workflow, found["child"])
        manage.cancel(session, found["parent"])
        assert child.status is CANCELLED


@pytest.mark.parametrize("verb", ["cancel", "resume"])
def test_what_a_suspended_workflow_waits_for_is_forgotten(session: Session, verb: str) -> None:
    fence = histories.claimed(session)
    races.end(session, [Suspend(fence, 3600)])
    session.execute(text("UPDATE durable.workflow SET awaits = '[]'"))
    manage.cancel(session, fence.workflow_id)
    if verb == "resume":
        manage.resume(session, fence.workflow_id)
    record = histories.standing(session, fence.workflow_id)
    assert (record.awaits, record.wake_at) == (None, None)


# Cancel against completion in the same instant


def test_an_end_that_is_first_is_seen_by_the_cancel(engine: Engine) -> None:
    # behaviour: M1 Q10
    (fence,) = races.claimed_fences(engine)
    with races.transaction(engine) as attempt, races.transaction(engine) as operator:
        record = operator.session.get_one(Workflow, fence.workflow_id)
        assert attempts.finish(attempt.session, races.success(fence))
        cancelling = operator.begin_blocked(lambda session: manage.cancel(session, record))
        attempt.session.commit()
        assert cancelling.result() == []
        assert record.status is WorkflowStatus.SUCCEEDED, "and its record says why"
        operator.session.commit()
    assert races.status_of(engine, fence.workflow_id) is WorkflowStatus.SUCCEEDED


def test_a_cancel_that_is_first_is_seen_by_the_attempt(engine: Engine) -> None:
    # behaviour: M1 Q10 T1
    (fence,) = races.claimed_fences(engine)
    with races.transaction(engine) as attempt, races.transaction(engine) as operator:
        assert manage.cancel(operator.session, fence.workflow_id) == [fence.workflow_id]
        finishing = attempt.begin_blocked(lambda session: attempts.finish(session, races.success(fence)))
        operator.session.commit()
        assert finishing.result() is False
        attempt.session.commit()
    assert races.status_of(engine, fence.workflow_id) is CANCELLED


@pytest.mark.parametrize("round_number", range(5))
def test_of_both_at_once_exactly_one_wins(engine: Engine, round_number: int) -> None:
    # behaviour: M1 Q10
    (fence,) = races.claimed_fences(engine)
    barrier = threading.Barrier(2)

    def at_once(act: Callable[[Session], Any]) -> Callable[[], Any]:
        def acting() -> Any:
            with Session(engine) as session:
                session.connection()
                barrier.wait(10)
                done = act(session)
                session.commit()
                return done

        return acting

    finishing = races.Concurrent(at_once(lambda session: attempts.finish(session, races.success(fence))))
    cancelling = races.Concurrent(at_once(lambda session: manage.cancel(session, fence.workflow_id)))
    finished, cancelled = finishing.result(), cancelling.result()
    assert finished is not bool(cancelled), round_number
    expected = CANCELLED if cancelled else WorkflowStatus.SUCCEEDED
    assert races.status_of(engine, fence.workflow_id) is expected


# A child that is started meanwhile


def test_a_child_that_is_started_before_the_lock_is_cancelled_too(engine: Engine, session: Session) -> None:
    """Its id comes before its parent's: to lock it behind its parent could deadlock, so the cancel begins again."""
    # behaviour: M1
    low = uuid7()
    fence = histories.claimed(session)
    with races.transaction(engine) as attempt, races.transaction(engine) as operator:
        races.lock(attempt.session, fence.workflow_id)
        attempt.session.add(Workflow(id=low, name="checkout", parent_id=fence.workflow_id, parent_key="child"))
        attempt.session.flush()
        cancelling = operator.begin_blocked(lambda session: manage.cancel(session, fence.workflow_id))
        attempt.session.commit()
        assert cancelling.result() == [low, fence.workflow_id]
        operator.session.commit()
    assert races.status_of(engine, low) is CANCELLED


def test_a_tree_that_grows_all_the_time_is_cancelled_all_the_same(engine: Engine, session: Session) -> None:
    """Each look finds another child; after a few rounds the locks are kept: what is held starts nothing more."""
    # behaviour: M1
    parent = histories.claimed(session).workflow_id
    session.commit()
    begun_again: list[None] = []
    started: list[UUID] = []

    def interfere(_connection: Any, _cursor: Any, statement: str, *_more: Any) -> None:
        if statement.startswith("ROLLBACK TO"):
            begun_again.append(None)
        if len(started) < 10 and "FROM durable.workflow" in statement and "FOR NO KEY UPDATE" not in statement:
            with Session(engine) as other:
                started.append(histories.child(other, parent))

    canceller = create_engine(engine.url)
    event.listen(canceller, "before_cursor_execute", interfere)
    with Session(canceller) as own:
        assert manage.cancel(own, parent) == [parent, *started]
        own.commit()
    canceller.dispose()
    assert (len(started), len(begun_again)) == (10, 5)


def test_rows_are_unlocked_before_they_are_locked_again(engine: Engine, session: Session) -> None:
    """While the cancel waits for the child that has appeared, it holds none of the rows whose ids come after."""
    low = uuid7()
    fence = histories.claimed(session)
    free = select(Workflow.id).with_for_update(skip_locked=True)
    with races.transaction(engine) as attempt, races.transaction(engine) as holder:
        races.lock(attempt.session, fence.workflow_id)
        attempt.session.add(Workflow(id=low, name="checkout", parent_id=fence.workflow_id, parent_key="child"))
        attempt.session.flush()
        with races.transaction(engine) as operator:
            begun = threading.Event()

            def hold_the_child(*_: object) -> None:
                if not begun.is_set():  # the parent's row is locked, and the second look comes next
                    races.lock(holder.session, low)
                    begun.set()

            cancelling = operator.begin_blocked(lambda session: manage.cancel(session, fence.workflow_id))
            event.listen(operator.session.connection(), "before_execute", hold_the_child)
            attempt.session.commit()
            assert begun.wait(10)
            races.wait_until_blocked(engine, operator.pid)
            assert session.scalars(free).all() == [fence.workflow_id]
            session.rollback()
            holder.session.rollback()
            assert cancelling.result() == [low, fence.workflow_id]


def test_two_cancels_of_overlapping_trees_end_both(engine: Engine, session: Session) -> None:
    """Each holds its rows in the order of ids, whichever end of the tree it was asked for."""
    ids = sorted(uuid7() for _ in range(6))
    for parent, each in zip([None, *reversed(ids)], reversed(ids), strict=False):
        races.enqueue(session, id=each, parent_id=parent, parent_key=parent and "child")
    for _ in range(10):
        barrier = threading.Barrier(2)

        def act(wanted: Any, barrier: threading.Barrier = barrier) -> list[UUID]:
            with Session(engine) as own:
                own.connection()
                barrier.wait(10)
                done = manage.cancel(own, wanted)
                own.commit()
                return done

        first = races.Concurrent(lambda act=act: act(ids[-1]))  # type: ignore[misc]
        second = races.Concurrent(lambda act=act: act([ids[3], ids[0]]))  # type: ignore[misc]
        assert sorted(first.result() + second.result()) == ids
        assert manage.resume(session, select(Workflow)) == ids
        session.commit()
