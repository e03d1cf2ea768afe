"""Deferred children are started once their parent is gone, and only then, whatever others do to their rows."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, func, select, text
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable import manage
from sqla_durable.models import Signal, Step, Workflow
from sqla_durable.models.base import WorkflowStatus
from sqla_durable.store import (
    NewWorkflow,
    attempts,
    children,
    continuations,
    deferred,
    failures,
    timers,
    workers,
)
from sqla_durable.store.records import Checkpoint, Completion, Fence
from tests.store import races


def parent_with_deferred(engine: Engine, count: int = 2, **columns: object) -> tuple[Fence, list[UUID]]:
    """Return a running parent that has recorded the start of a map, and the ids of its deferred children."""
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session:
        of_parent = {"parent_id": fence.workflow_id, "parent_key": "start:double", "status": "suspended"}
        ids = races.enqueue(session, count, **of_parent, **columns)
        races.record(session, [started(fence, ids)])
        session.commit()
        return fence, ids


def started(fence: Fence, ids: list[UUID]) -> Checkpoint:
    return races.checkpoint(fence, "start:double", output=json.dumps([str(each) for each in ids]))


def failure(fence: Fence) -> Completion:
    return Completion(fence, WorkflowStatus.FAILED, error='{"type": "builtins:ValueError"}', has_deferred=True)


def asked(session: Session) -> int:
    return session.scalar(select(func.count()).select_from(Signal).where(Signal.name == "#orphans")) or 0


def test_orphans_start_with_their_parents_end_and_locked_ones_later(engine: Engine) -> None:
    fence, (first, second) = parent_with_deferred(engine)
    with Session(engine) as session, session.begin():
        assert attempts.write_batch(session, [], [failure(fence)]) == attempts.Unwritten()
    with races.transaction(engine) as caller, Session(engine) as session:
        races.lock(caller.session, first)
        assert deferred.start_orphans(session, limit=9) == 1
        assert (races.status_in(session, second), asked(session)) == (WorkflowStatus.PENDING, 1)
        session.commit()
        caller.session.rollback()
        assert deferred.start_orphans(session, limit=9) == 1
        assert (races.status_in(session, first), asked(session)) == (WorkflowStatus.PENDING, 0)


def test_many_go_some_at_a_time(engine: Engine) -> None:
    fence, _ = parent_with_deferred(engine, 3)
    with Session(engine) as session:
        assert attempts.finish(session, failure(fence))
        assert [deferred.start_orphans(session, limit=2) for _ in range(3)] == [2, 1, 0]
        assert asked(session) == 0


def test_start_on_its_way_is_seen_after_the_end(engine: Engine) -> None:
    """What an attempt starts while its end waits for the row is started too: orphans are looked for after both."""
    (fence,) = races.claimed_fences(engine)
    with races.transaction(engine) as starting, races.transaction(engine) as ending:
        races.lock(starting.session, fence.workflow_id)
        waiting = ending.begin_blocked(lambda session: attempts.finish(session, failure(fence)))
        of_parent = {"parent_id": fence.workflow_id, "parent_key": "start:double", "status": "suspended"}
        races.enqueue(starting.session, 2, **of_parent)
        starting.session.commit()
        assert waiting.result()
        ending.session.commit()
    with Session(engine) as session:
        assert deferred.start_orphans(session, limit=9) == 2


def test_children_of_a_parent_that_goes_on_stay_deferred(engine: Engine) -> None:
    fence, _ = parent_with_deferred(engine)
    with Session(engine) as session:
        deferred.report_orphans(session, [fence.workflow_id])
        assert asked(session) == 1
        assert deferred.start_orphans(session, limit=9) == 0
        assert asked(session) == 0
        session.delete(session.get_one(Step, (fence.workflow_id, "start:double")))
        session.flush()
        deferred.report_orphans(session, [fence.workflow_id])
        assert deferred.start_orphans(session, limit=9) == 2


def test_what_continues_as_new_or_fails_for_its_crashes_leaves_orphans(engine: Engine) -> None:
    fence, _ = parent_with_deferred(engine)
    with Session(engine) as session:
        assert continuations.continue_as_new(session, fence, given="{}")
        assert deferred.start_orphans(session, limit=9) == 2
        session.commit()
    parent_with_deferred(engine)
    races.expire_leases(engine)
    with Session(engine) as session:
        assert [each.status for each in workers.reclaim(session, max_attempts=0, limit=9)] == [WorkflowStatus.FAILED]
        assert deferred.start_orphans(session, limit=9) == 2


def test_a_cancel_starts_what_is_detached_and_deferred(engine: Engine) -> None:
    fence, _ = parent_with_deferred(engine, detached=True)
    with Session(engine) as session:
        assert manage.cancel(session, fence.workflow_id) == [fence.workflow_id]
        assert deferred.start_orphans(session, limit=9) == 2


def test_what_a_rewind_leaves_goes_also_when_others_are_started_under_its_key(engine: Engine) -> None:
    """By the time that a worker looks, the workflow may have come to its map again."""
    fence, left = parent_with_deferred(engine)
    with Session(engine) as session, session.begin():
        assert manage.rewind(session, fence.workflow_id, to_step="start:double") == [fence.workflow_id]
    with Session(engine) as session:
        (again,) = races.claim(session)
        of_parent = {"parent_id": fence.workflow_id, "parent_key": "start:double", "status": "suspended"}
        (new,) = races.enqueue(session, 1, **of_parent)
        races.record(session, [started(again.fence, [new])])
        assert deferred.start_orphans(session, limit=9) == 2
        assert {races.status_in(session, each) for each in left} == {WorkflowStatus.PENDING}
        assert (races.status_in(session, new), asked(session)) == (WorkflowStatus.SUSPENDED, 0)


def test_a_start_whose_outcome_was_replaced_lets_all_go(engine: Engine) -> None:
    """An operator may have given whatever instead of the list of children."""
    fence, _ = parent_with_deferred(engine)
    with Session(engine) as session:
        session.get_one(Step, (fence.workflow_id, "start:double")).output = {"no": "list"}
        session.flush()
        deferred.report_orphans(session, [fence.workflow_id])
        assert deferred.start_orphans(session, limit=9) == 2


def test_all_that_are_deferred_start_and_locked_rows_are_waited_for(engine: Engine) -> None:
    fence, ids = parent_with_deferred(engine)
    release = partial(deferred.start_rest, checkpoint=races.checkpoint(fence, "map:double"), ids=ids)
    with races.transaction(engine) as caller, races.transaction(engine) as giving_up:
        races.lock(caller.session, ids[1])
        waiting = giving_up.begin_blocked(release)
        caller.session.rollback()
        waiting.result()
        assert [races.status_in(giving_up.session, each) for each in ids] == [WorkflowStatus.PENDING] * 2


def test_an_attempt_that_has_lost_its_workflow_lets_nothing_go(engine: Engine) -> None:
    fence, ids = parent_with_deferred(engine, 1)
    with Session(engine) as session:
        stolen = races.checkpoint(fence._replace(token=uuid7()), "map:double")
        deferred.start_rest(session, stolen, ids=ids)
        assert races.status_in(session, ids[0]) is WorkflowStatus.SUSPENDED


def test_deferred_detached_children_of_a_deleted_parent_start(engine: Engine) -> None:
    """Before any worker has seen that it has ended; afterwards they would be nobody's."""
    fence, ids = parent_with_deferred(engine, detached=True)
    with Session(engine) as session:
        attempts.write_batch(session, [], [failure(fence)])
        session.commit()
        assert manage.delete(session, fence.workflow_id) == [fence.workflow_id]
        assert [races.status_in(session, each) for each in ids] == [WorkflowStatus.PENDING] * 2


def deferred_under(child: Fence) -> NewWorkflow:
    of_child: dict[str, Any] = {"parent_id": child.workflow_id, "parent_key": "start:double", "detached": True}
    return NewWorkflow(id=uuid7(), name="double", input="{}", queue="default", **of_child)


def start_map(session: Session, fence: Fence) -> UUID:
    """Start a map of two detached children, of which the second is deferred; return its id."""
    both = sorted((deferred_under(fence) for _ in range(2)), key=lambda new: new.id)
    children.start(session, races.checkpoint(fence, "start:double"), both, active=1)
    return both[1].id


def test_what_a_child_starts_while_its_parent_cancels_it_is_found_after_that(engine: Engine) -> None:
    """The statement that cancels has waited for the child's row, and does not see what was committed meanwhile."""
    parent, child = races.claimed_fences(engine, 2)
    with Session(engine) as session, session.begin():
        session.get_one(Workflow, child.workflow_id).parent_id = parent.workflow_id
    give_up = partial(children.cancel_rest, checkpoint=races.checkpoint(parent, "map"), ids=[child.workflow_id])
    with races.transaction(engine) as starting, races.transaction(engine) as giving_up:
        left = start_map(starting.session, child)
        cancelling = giving_up.begin_blocked(give_up)
        starting.session.commit()
        assert cancelling.result() == 1
        giving_up.session.commit()
    with Session(engine) as session:
        assert deferred.start_orphans(session, limit=9) == 1
        assert (races.status_in(session, left), asked(session)) == (WorkflowStatus.PENDING, 0)


@pytest.mark.parametrize("end", ["reclaimed", "refused"])
def test_what_a_workflow_starts_beside_its_end_from_outside_is_found_after_that(engine: Engine, end: str) -> None:
    """The statement that ends it began before the start was committed, and locks the row after that."""
    (fence,) = races.claimed_fences(engine)
    races.expire_leases(engine)
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as before, before.begin():
        before.execute(text("SELECT FROM durable.workflow"))  # has its snapshot now
        with Session(engine) as session, session.begin():
            left = start_map(session, fence)
        if end == "reclaimed":
            assert [each.status for each in workers.reclaim(before, max_attempts=0, limit=9)] == [WorkflowStatus.FAILED]
        else:
            assert failures.fail_refused(before, fence.workflow_id, reason="too large")
    with Session(engine) as session:
        assert deferred.start_orphans(session, limit=9) == 1
        assert (races.status_in(session, left), asked(session)) == (WorkflowStatus.PENDING, 0)


def test_deferred_children_end_at_their_parents_deadline_and_those_without_one_start(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session:
        session.get_one(Workflow, fence.workflow_id).deadline_at = datetime.now(UTC) + timedelta(days=1)
        session.flush()
        left = start_map(session, fence)
        (other,) = races.enqueue(
            session, parent_id=fence.workflow_id, parent_key="start:other", detached=True, status="suspended"
        )
        timers.advance(session, timedelta(days=2).total_seconds())
        assert len(failures.fail_overdue(session, limit=9)) == 3
        assert races.status_in(session, left) is WorkflowStatus.FAILED
        assert deferred.start_orphans(session, limit=9) == 1
        assert (races.status_in(session, other), asked(session)) == (WorkflowStatus.PENDING, 0)
