"""A parent always goes on: whatever becomes of its children, in whatever order, it is woken or has a notice."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session

from sqla_durable import manage
from sqla_durable.errors import NotFoundError
from sqla_durable.models.base import WorkflowStatus
from sqla_durable.store import (
    Awaited,
    Suspend,
    attempts,
    children,
    deferred,
    failures,
    signals,
    timers,
    workers,
)
from sqla_durable.store.attempts import _WRITE_BATCH  # pyright: ignore[reportPrivateUsage]
from sqla_durable.store.signals import (
    _DELIVER,  # pyright: ignore[reportPrivateUsage]
    _RENOTIFY,  # pyright: ignore[reportPrivateUsage]
)
from sqla_durable.store.statements import BEGINNING, batch_parameter
from tests.store import races
from tests.store.families import FRONT, Family, children_of, deliver, fail, notices, orders_of, running, suspend
from tests.store.plans import explain, fill

EXAMPLES = os.environ.get("SQLA_DURABLE_EXAMPLES")


@pytest.fixture
def engine(database_url: str) -> Generator[Engine]:
    """Many small transactions, of which none is to survive the server."""
    engine = create_engine(database_url, connect_args={"options": "-c synchronous_commit=off"})
    yield engine
    engine.dispose()


@pytest.fixture
def hasty(database_url: str) -> Generator[Engine]:
    """Connections that wait for nobody."""
    engine = create_engine(database_url, connect_args={"options": "-c synchronous_commit=off -c lock_timeout=1"})
    yield engine
    engine.dispose()


@pytest.mark.parametrize("gone", ["delete", "retry"])
def test_a_parent_is_woken_by_its_childs_end_in_whatever_order(engine: Engine, gone: str) -> None:
    # behaviour: C7 G3
    orders = orders_of("suspend", "end", "commit", gone)
    assert len(orders) == 20
    parents = races.claimed_fences(engine, len(orders))
    with Session(engine) as worker, Session(engine) as other:
        for order, parent in zip(orders, parents, strict=True):
            (child,) = running(worker, parent.workflow_id)
            for each in order:
                match each:
                    case "suspend":
                        suspend(other, parent, Awaited.any_of([child.workflow_id]))
                    case "end":
                        fail(worker, child)
                    case "commit":
                        worker.commit()
                    case "delete":
                        assert manage.delete(other, child.workflow_id) == [child.workflow_id]
                    case "retry":
                        assert manage.retry(other, child.workflow_id) == [child.workflow_id]
                    case _:
                        signals.deliver(other, limit=100)
                other.commit()
            if gone == "retry":  # nobody may have seen that it had ended; now it does so again
                manage.cancel(other, child.workflow_id)
                other.commit()
        deliver(engine)
        statuses = {
            each: races.status_in(other, parent.workflow_id) for each, parent in zip(orders, parents, strict=True)
        }
        assert [each for each, found in statuses.items() if found is not WorkflowStatus.PENDING] == []
        assert notices(other) == 0


def test_the_first_of_some_is_one_that_ended_or_one_that_is_gone(engine: Engine) -> None:
    (parent,) = races.claimed_fences(engine)
    with Session(engine) as session:
        first, second, third = (each.workflow_id for each in running(session, parent.workflow_id, 3))
        (awaited,) = children.awaited(session, parent.workflow_id, workflow_ids=[third, first, second])
        assert (awaited.children, awaited.open) == ([first, second, third], 2)
        suspend(session, parent, awaited)
        session.commit()
        assert deliver(engine) == 0
        manage.cancel(session, second)
        manage.delete(session, second)
        session.commit()
        assert deliver(engine) == 1
        with pytest.raises(NotFoundError, match=f"no workflow {second} is there to wait for: was it deleted"):
            children.awaited(session, parent.workflow_id, workflow_ids=[first, second])


def test_children_of_others_and_too_many_to_name_are_looked_for(engine: Engine) -> None:
    parent, other = races.claimed_fences(engine, 2)
    with Session(engine) as session:
        mine = children_of(session, parent.workflow_id, children.MOST_NAMED + 1)
        (theirs,) = children_of(session, other.workflow_id, 1)
        assert children.awaited(session, parent.workflow_id, workflow_ids=[mine[0], theirs]) == ()
        assert children.awaited(session, parent.workflow_id, workflow_ids=mine) == ()
        (awaited,) = children.awaited(session, parent.workflow_id, workflow_ids=mine[1:])
        assert len(awaited.children) == children.MOST_NAMED


def test_those_that_are_named_for_many_are_from_all_over_them(engine: Engine) -> None:
    (parent,) = races.claimed_fences(engine)
    with Session(engine) as session:
        ids = children_of(session, parent.workflow_id, 450)
        deferred = children_of(session, parent.workflow_id, 2, status="suspended")
        found = children.progress(session, parent.workflow_id, ids=[*ids, *deferred])
    assert (found.there, found.own, found.finished, found.deferred, found.active) == (452, 452, 0, 2, 450)
    assert children.sample(found.named) == ids[::5]
    assert children.sample(ids) == ids[::5]
    assert children.sample([]) == []


def test_children_of_another_generation_are_none_of_those_that_are_waited_for(engine: Engine) -> None:
    """Of one parent and key: an earlier one failed and is retried while today's are waited for."""
    (parent,) = races.claimed_fences(engine)
    with Session(engine) as session:
        old, *today = running(session, parent.workflow_id, 3)
        fail(session, old)
        ids = [each.workflow_id for each in today]
        suspend(session, parent, Awaited(children=ids, open=0))
        manage.retry(session, old.workflow_id)
        session.commit()
        assert deliver(engine) == 0
        fail(session, *today)
        session.commit()
    assert deliver(engine) == 1


def test_many_ends_of_one_transaction_are_one_notice(engine: Engine) -> None:
    (parent,) = races.claimed_fences(engine)
    with Session(engine) as session:
        fail(session, *running(session, parent.workflow_id, 5))
        session.commit()
        assert notices(session) == 1


def test_no_notice_outlives_the_workflow_that_it_is_for(engine: Engine) -> None:
    """It was suspended, is woken by its time, and has taken what its child did before any notice was delivered."""
    # behaviour: G3
    (parent,) = races.claimed_fences(engine)
    with Session(engine) as session:
        (child,) = running(session, parent.workflow_id)
        races.end(session, [Suspend(parent, 0.0, [Awaited.any_of([child.workflow_id])])])
        fail(session, child)
        session.commit()
        assert timers.wake_due(session, limit=10) == 1
        (again,) = races.claim(session)
        session.commit()
        assert notices(session) == 2
        races.end(session, [races.success(again.fence)._replace(has_notices=True)])
        session.commit()
        assert notices(session) == 0


@pytest.mark.parametrize("way", ["cancelled", "finished by an executor", "overdue", "crashed"])
def test_no_notice_outlives_a_workflow_that_ends_otherwise(engine: Engine, way: str) -> None:
    # behaviour: G3
    (parent,) = races.claimed_fences(engine)
    with Session(engine) as session:
        fail(session, *running(session, parent.workflow_id))
        session.commit()
        assert notices(session) == 1
        match way:
            case "cancelled":
                manage.cancel(session, parent.workflow_id)
            case "finished by an executor":
                assert attempts.finish(session, races.success(parent))
            case "overdue":
                session.execute(text("UPDATE durable.workflow SET deadline_at = statement_timestamp()"))
                session.commit()
                assert len(failures.fail_overdue(session, limit=10)) == 1
            case _:
                assert workers.abandon_attempt(session, parent, reason="it broke", max_attempts=1)
        session.commit()
        assert races.status_in(session, parent.workflow_id).finished
        assert deferred.start_orphans(session, limit=10) == 0  # what was running may have left some
        assert notices(session) == 0


def test_a_child_that_ends_beside_its_parents_end_leaves_a_notice_to_the_next_delivery(engine: Engine) -> None:
    # behaviour: G3
    (parent,) = races.claimed_fences(engine)
    with Session(engine) as of_child, Session(engine) as of_parent:
        fail(of_child, *running(of_child, parent.workflow_id))
        races.end(of_parent, [races.success(parent)._replace(has_notices=True)])
        of_parent.commit()
        of_child.commit()
        assert notices(of_parent) == 1
    assert deliver(engine) == 0
    with Session(engine) as session:
        assert notices(session) == 0


def test_an_attempt_that_cancels_children_wakes_the_attempt_that_reclaimed_its_workflow(engine: Engine) -> None:
    """Before it commits, the next attempt has read its children, and waits for that child."""
    (parent,) = races.claimed_fences(engine)
    with Session(engine) as session, Session(engine) as first:
        (child,) = running(session, parent.workflow_id, detached=False)
        session.commit()
        assert children.cancel_rest(first, races.checkpoint(parent), ids=[child.workflow_id]) == 1
        attempts.release(session, [parent])
        session.commit()
        (second,) = races.claim(session)
        suspend(session, second.fence, Awaited.any_of([child.workflow_id]))
        session.commit()
        assert deliver(engine) == 0
        first.commit()
    assert deliver(engine) == 1


def test_a_child_that_ends_while_its_failed_parent_is_retried_wakes_it(engine: Engine) -> None:
    """Its end began while the parent was finished, and is committed after that has looked and waits."""
    (parent,) = races.claimed_fences(engine)
    with Session(engine) as session, Session(engine) as ending:
        (child,) = running(session, parent.workflow_id)
        fail(session, parent)
        session.commit()
        fail(ending, child)
        assert manage.retry(session, parent.workflow_id) == [parent.workflow_id]
        (again,) = races.claim(session)
        suspend(session, again.fence, Awaited.any_of([child.workflow_id]))
        session.commit()
        assert deliver(engine) == 0
        ending.commit()
    assert deliver(engine) == 1


def test_waits_without_a_notice_are_found_in_parts(engine: Engine) -> None:
    """SQL of other hands has deleted one child, and ended another; a third goes on."""
    parents = races.claimed_fences(engine, 3)
    with Session(engine) as session:
        deleted, ended, going_on = (running(session, each.workflow_id)[0].workflow_id for each in parents)
        for parent, child in zip(parents, (deleted, ended, going_on), strict=True):
            suspend(session, parent, Awaited.any_of([child]))
        session.commit()
        assert deliver(engine) == 0
        session.execute(text("DELETE FROM durable.workflow WHERE id = :id"), {"id": deleted})
        races.cancel(session, ended)
        session.commit()
        assert deliver(engine) == 0
        seen = [FRONT]
        while (last := signals.renotify(session, after=seen[-1], limit=2)) is not None:
            seen.append(last)
        session.commit()
        assert seen == [FRONT, parents[1].workflow_id, parents[2].workflow_id]
        assert notices(session) == 2
        assert deliver(engine) == 2
        assert races.status_in(session, parents[2].workflow_id) is WorkflowStatus.SUSPENDED


@pytest.mark.new_database
@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
def test_renotifying_costs_what_is_checked_and_no_more(engine: Engine, mode: str) -> None:
    # behaviour: G2
    with Session(engine) as session:
        fill(session)
        session.execute(
            text(
                "INSERT INTO durable.workflow (name, status, awaits) SELECT 'checkout', 'suspended', "
                "jsonb_build_array(jsonb_build_object('open', 0, 'children', jsonb_build_array(gen_random_uuid()))) "
                "FROM generate_series(1, 5000)"
            )
        )
        session.execute(text("ANALYZE durable.workflow"))
        session.commit()
        plan = explain(session, _RENOTIFY, {"after": FRONT, "limit": 100}, mode=mode)
    assert plan.uses("workflow_suspended_idx"), plan
    assert not plan.scans("workflow"), plan
    assert plan.buffers() < 600, plan  # a row, and a child of it that is not there


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
def test_a_parent_of_many_children_is_checked_once_for_all_their_notices(engine: Engine, mode: str) -> None:
    # behaviour: G1
    with Session(engine) as session:
        fill(session)
        (parent,) = races.claimed_fences(engine)
        ids = children_of(session, parent.workflow_id, 2_000)
        suspend(session, parent, Awaited(children=children.sample(ids), open=75))
        notice = text(
            "INSERT INTO durable.signal (workflow_id, name, is_notice) "
            "SELECT :id, '#child', true FROM generate_series(1, 300)"
        )
        session.execute(notice, {"id": parent.workflow_id})
        session.execute(text("ANALYZE durable.workflow, durable.signal"))
        session.commit()
        plan = explain(session, _DELIVER, {"limit": 1000, "since": BEGINNING}, mode=mode)
    assert plan.rows("CTE receivers") == 1
    assert plan.buffers("CTE due") < 600, plan
    assert not plan.scans("workflow"), plan


@pytest.mark.new_database
@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
def test_an_end_costs_the_same_however_many_signals_were_taken(engine: Engine, mode: str) -> None:
    # behaviour: G1
    (ending,) = races.claimed_fences(engine)
    with Session(engine) as session:
        taken = (
            "INSERT INTO durable.signal (workflow_id, name, delivered_at, consumed_by) "
            "SELECT :id, 'approved', statement_timestamp(), 'step' FROM generate_series(1, 5000)"
        )
        session.execute(text(taken), {"id": ending.workflow_id})
        session.execute(text("ANALYZE durable.signal"))
        session.commit()
        row = {"id": ending.workflow_id.hex, "token": ending.token.hex, "checkpoints": 0, "has_notices": True}
        parameters = batch_parameter("batch", []) | batch_parameter(
            "ending", [row | {"status": "succeeded", "output": "1"}]
        )
        plan = explain(session, _WRITE_BATCH, parameters, mode=mode)
    assert plan.uses("signal_untaken_idx"), plan
    assert plan.buffers() < 100, plan


@pytest.mark.timeout(0 if EXAMPLES else 120)
def test_parents_go_on_through_random_histories(engine: Engine, hasty: Engine) -> None:
    # behaviour: C7 G3 M1
    for seed in range(int(EXAMPLES or 4)):
        family = Family(engine, hasty, seed)
        try:
            family.live(40)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error
        with engine.begin() as connection:
            connection.execute(text("DELETE FROM durable.workflow"))
