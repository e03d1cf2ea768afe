"""A parent always goes on: whatever becomes of its children, in whatever order, it is woken or has a notice."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, create_engine, func, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable import manage
from sqla_durable.errors import NotFoundError
from sqla_durable.models import Signal, Workflow
from sqla_durable.models.base import WorkflowStatus
from sqla_durable.store import (
    Awaited,
    Completion,
    Fence,
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
from sqla_durable.unwinding import AttemptLost
from tests.store import races
from tests.store.plans import explain, fill

EXAMPLES = os.environ.get("SQLA_DURABLE_EXAMPLES")
ERROR = '{"type": "builtins:ValueError"}'
FRONT = UUID(int=0)


def children_of(session: Session, parent: UUID, count: int, **columns: Any) -> list[UUID]:
    """Start detached children of a workflow: an operator may delete one once it has ended."""
    given = {"parent_id": parent, "parent_key": "start", "detached": True, **columns}
    return sorted(races.enqueue(session, count, **given))


def running(session: Session, parent: UUID, count: int = 1, **columns: Any) -> list[Fence]:
    """Start such children, and claim them."""
    tokens = [uuid7() for _ in range(count)]
    for each in tokens:
        state = {"status": "running", "token": each, "worker_id": uuid7(), "started_at": func.statement_timestamp()}
        children_of(session, parent, 1, **state, **columns)
    found = session.execute(select(Workflow.id, Workflow.token).where(Workflow.token.in_(tokens)).order_by(Workflow.id))
    return [Fence(row.id, row.token) for row in found]


def fail(session: Session, *fences: Fence) -> None:
    races.end(session, [Completion(each, WorkflowStatus.FAILED, error=ERROR) for each in fences])


def suspend(session: Session, fence: Fence, *awaits: Awaited) -> None:
    assert races.end(session, [Suspend(fence, None, awaits)]) == {fence.workflow_id}


def deliver(engine: Engine) -> int:
    """Deliver until there is nothing; return how many were woken."""
    woken = 0
    with Session(engine) as session:
        while True:
            delivered, more = signals.deliver(session, limit=100)
            session.commit()
            woken += more
            if not delivered:
                return woken


def notices(session: Session) -> int:
    return session.scalars(select(func.count()).select_from(Signal)).one()


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


def orders_of(*events: str) -> list[tuple[str, ...]]:
    """Return every order of these and a delivery in which a child ends, that is committed, and then the last comes."""
    every = itertools.permutations([*events, "deliver"])
    return [each for each in every if each.index("end") < each.index("commit") < each.index(events[-1])]


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
        races.end(session, [replace(races.success(again.fence), has_notices=True)])
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
        races.end(of_parent, [replace(races.success(parent), has_notices=True)])
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


class Family:
    """Two parents that wait for their children, beside all that can happen to those, in transactions that stay open.

    What would wait for another transaction is rolled back. Whatever came before, once every transaction has ended and
    what there is has been delivered, no parent waits for what is there, and no notice is left.
    """

    def __init__(self, engine: Engine, hasty: Engine, seed: int) -> None:
        self.engine = engine
        self.random = random.Random(seed)
        self.sessions = [Session(hasty) for _ in range(3)]
        self.fences: dict[UUID, Fence] = {}
        self.read_children: dict[Fence, list[UUID]] = {}
        with Session(engine) as session:
            self.parents = races.enqueue(session, 2)
            self.children = [child for each in self.parents for child in children_of(session, each, 2)]

    def live(self, operations: int) -> None:
        """Do one thing after another, then let everything end: each parent that waits is woken."""
        acts = [self.read, self.suspend, self.suspend, self.end, self.end, self.manage, self.deliver, self.give_up]
        try:
            for _ in range(operations):
                self.claim()
                self.random.choice(acts)()
            self.settle()
            self.claim()
            with Session(self.engine) as session:
                fail(session, *(self.fences[each] for each in self.children if each in self.fences))
                session.commit()
            self.settle()
            with Session(self.engine) as session:
                assert session.scalars(select(Workflow.id).where(Workflow.awaits.is_not(None))).all() == []
        finally:
            for each in self.sessions:
                each.close()

    def claim(self) -> None:
        with Session(self.engine) as session:
            self.fences |= {each.fence.workflow_id: each.fence for each in races.claim(session, 100)}
            session.commit()

    def read(self) -> None:
        parent = self.random.choice(self.parents)
        with Session(self.engine) as session:
            mine = select(Workflow.id).where(Workflow.parent_id == parent, Workflow.finished_at.is_(None))
            self.read_children[self.fences[parent]] = sorted(session.scalars(mine))

    def suspend(self) -> None:
        """Suspend a parent until what it has seen, a while ago perhaps, is not so any more."""
        fence = self.fences[self.random.choice(self.parents)]
        named = self.read_children.pop(fence, [])
        if named:
            awaited = Awaited(children=named, open=self.random.randrange(len(named)))
            self.at(lambda session: races.end(session, [Suspend(fence, None, (awaited,))]))
        else:
            self.read()

    def end(self) -> None:
        chosen = self.random.choice([*self.children, *self.children, *self.parents])
        if chosen in self.fences:
            self.at(lambda session: fail(session, self.fences[chosen]))

    def manage(self) -> None:
        verbs: list[Callable[..., object]] = [
            manage.cancel,
            manage.retry,
            manage.resume,
            manage.delete,
            manage.delete,
            manage.delete,
        ]
        verb, child = self.random.choice(verbs), self.random.choice(self.children)
        chosen = child if verb in (manage.cancel, manage.delete) else self.random.choice([child, *self.parents])
        self.at(lambda session: verb(session, chosen))

    def deliver(self) -> None:
        limit = self.random.choice([1, 100])
        self.at(lambda session: signals.deliver(session, limit=limit))

    def give_up(self) -> None:
        """Cancel children, as an attempt does that may have lost its workflow."""
        if self.random.random() < 0.3:
            checkpoint = races.checkpoint(self.fences[self.random.choice(self.parents)])
            self.at(lambda session: children.cancel_rest(session, checkpoint, ids=self.children))

    def settle(self) -> None:
        for each in self.sessions:
            each.commit()
        deliver(self.engine)
        with Session(self.engine) as session:
            waiting = session.execute(select(Workflow.id, Workflow.awaits).where(Workflow.awaits.is_not(None))).all()
            unfinished = set(map(str, session.scalars(select(Workflow.id).where(Workflow.finished_at.is_(None)))))
            for row in waiting:
                assert all(len(unfinished & {*each["children"]}) > each["open"] for each in row.awaits), row
            assert notices(session) == 0

    def at(self, operation: Callable[[Session], object]) -> None:
        """Execute in one of the transactions, which may stay open."""
        session = self.random.choice(self.sessions)
        try:
            operation(session)
        except (AttemptLost, OperationalError):
            session.rollback()
        ending = self.random.choice(["open", "commit", "commit", "rollback"])
        if ending != "open":
            getattr(session, ending)()


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
