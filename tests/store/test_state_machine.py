"""Random histories of three overlapping transactions, in the tables and in the model at once.

`SQLA_DURABLE_EXAMPLES=2000` executes more histories, other ones each time; by default they are the same every time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from itertools import count
from typing import Any, ClassVar
from uuid import UUID

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session

from sqla_durable.models.base import StepStatus, WorkflowStatus
from sqla_durable.store import Fence
from tests.store.model import Lease, Model, Operation, Recording, Row, compare, rows_of
from tests.store.model_keepers import (
    Abandon,
    Beat,
    Cancel,
    Expire,
    ForgetDead,
    MakeDue,
    Reclaim,
    ReclaimOne,
    Resume,
    WakeDue,
)
from tests.store.model_operations import (
    QUEUES,
    Claim,
    ClaimOne,
    Finish,
    FinishUnlocked,
    RecordBatch,
    RecordedAmong,
    RecordOne,
    Release,
    ReleaseUnlocked,
    Start,
    SuspendOne,
    Write,
)
from tests.support.databases import Databases

EXAMPLES = os.environ.get("SQLA_DURABLE_EXAMPLES")
WORKERS = [UUID(int=number) for number in range(1, 4)]
KEYS = ["charge", "ship"]

transactions = st.integers(0, 2)
endings = st.sampled_from(["open", "open", "open", "commit", "commit", "rollback"])
"""What follows an operation: mostly its transaction stays open, so that the others meet its locks."""
workers = st.sampled_from(WORKERS)
choice = st.data()


class Histories(RuleBasedStateMachine):
    """Each rule executes an operation in one of the transactions, which may stay open."""

    engine: ClassVar[Engine]

    def __init__(self) -> None:
        super().__init__()
        with self.engine.begin() as connection:
            connection.execute(text("DELETE FROM durable.workflow"))
            connection.execute(text("DELETE FROM durable.worker"))
        self.model = Model()
        self.ids = (UUID(int=number) for number in count(100))  # the same in every replay of an example
        self.sessions = [Session(self.engine) for _ in range(3)]
        self.fences: dict[Fence, int] = {}
        self.outcomes: dict[tuple[UUID, str], Recording] = {}

    @initialize()
    def begin(self) -> None:
        for worker_id in WORKERS:
            self.execute(0, Beat(worker_id), "open")
        for priority in (1, 0, 1):
            for queue in QUEUES:
                self.execute(0, Start(next(self.ids), queue, priority), "open")
        self.end(0, "commit")

    # Starting and claiming

    @rule(
        at=transactions,
        queue=st.sampled_from(QUEUES),
        priority=st.sampled_from([0, 0, 1]),
        key=st.sampled_from([None, None, "once", "twice"]),
        delayed=st.sampled_from([False, False, True]),
        then=endings,
    )
    def start(self, at: int, queue: str, priority: int, key: str | None, delayed: bool, then: str) -> None:
        self.execute(at, Start(next(self.ids), queue, priority, key, delayed), then)

    @rule(
        at=transactions,
        worker_id=workers,
        limit=st.integers(1, 4),
        listened=st.sampled_from([QUEUES, QUEUES, QUEUES[:1]]),
        then=endings,
    )
    def claim(self, at: int, worker_id: UUID, limit: int, listened: tuple[str, ...], then: str) -> None:
        self.execute(at, Claim(worker_id, next(self.ids), limit, listened), then)

    @rule(at=transactions, worker_id=workers, data=choice, then=endings)
    def claim_one(self, at: int, worker_id: UUID, data: st.DataObject, then: str) -> None:
        self.execute(at, ClaimOne(self.any_row(at, data), worker_id, next(self.ids)), then)

    # What attempts write

    @rule(at=transactions, data=choice, then=endings)
    def checkpoint(self, at: int, data: st.DataObject, then: str) -> None:
        for _ in range(2):
            self.execute(at, RecordOne(self.any_write(at, data)), then)

    @rule(at=transactions, data=choice, count=st.integers(2, 5), then=endings)
    def batch(self, at: int, data: st.DataObject, count: int, then: str) -> None:
        chosen = [self.any_write(at, data) for _ in range(count)]
        # A frozen worker that has claimed its own workflow again writes for both attempts in one batch.
        frozen = [each for each in self.fences if each.workflow_id == chosen[0].fence.workflow_id]
        chosen += [Write(each, f"of {each.token}", StepStatus.SUCCEEDED, self.fences[each]) for each in frozen]
        writes = {(each.fence.workflow_id, each.key): each for each in chosen}
        self.execute(at, RecordBatch(tuple(writes.values())), then)
        self.execute(at, RecordedAmong(tuple(writes.values())), "open")

    @rule(at=transactions, data=choice, then=endings)
    def try_again_and_suspend(self, at: int, data: st.DataObject, then: str) -> None:
        fence = self.any_fence(at, data)
        write = Write(fence, KEYS[0], StepStatus.RETRYING, self.fences.get(fence, 1), tries=2)
        self.execute(at, RecordBatch((write,)), "open")
        self.execute(at, SuspendOne(fence), then)

    @rule(
        at=transactions,
        data=choice,
        verb=st.sampled_from([Finish, FinishUnlocked]),
        status=st.sampled_from([WorkflowStatus.SUCCEEDED, WorkflowStatus.FAILED]),
        then=endings,
    )
    def finish(self, at: int, data: st.DataObject, verb: type[Finish], status: WorkflowStatus, then: str) -> None:
        self.execute(at, verb(self.any_fence(at, data), status), then)

    @rule(
        at=transactions,
        data=choice,
        verb=st.sampled_from([SuspendOne, Release, ReleaseUnlocked, Abandon, Abandon]),
        then=endings,
    )
    def leave(self, at: int, data: st.DataObject, verb: Callable[[Fence], Operation], then: str) -> None:
        self.execute(at, verb(self.any_fence(at, data)), then)

    # Time and death

    @rule(at=transactions, data=choice, long_ago=st.booleans(), then=endings)
    def make_due(self, at: int, data: st.DataObject, long_ago: bool, then: str) -> None:
        waiting = [row.id for row in rows_of(self.model.view(self.sessions[at])) if row.wake is not None]
        if waiting:
            self.execute(at, MakeDue(data.draw(st.sampled_from(waiting)), long_ago), then)

    @rule(at=transactions, then=endings)
    def wake(self, at: int, then: str) -> None:
        self.execute(at, WakeDue(), then)

    @rule(at=transactions, worker_id=workers, then=endings)
    def heartbeat(self, at: int, worker_id: UUID, then: str) -> None:
        self.execute(at, Beat(worker_id), then)

    @rule(at=transactions, worker_id=workers, lease=st.sampled_from([Lease.EXPIRED, Lease.FORGOTTEN]), then=endings)
    def expire(self, at: int, worker_id: UUID, lease: Lease, then: str) -> None:
        self.execute(at, Expire(worker_id, lease), then)

    @rule(at=transactions, limit=st.sampled_from([1, 2, 1_000]), then=endings)
    def reclaim(self, at: int, limit: int, then: str) -> None:
        self.execute(at, Reclaim(limit), then)

    @rule(at=transactions, data=choice, then=endings)
    def reclaim_one(self, at: int, data: st.DataObject, then: str) -> None:
        self.execute(at, ReclaimOne(self.any_row(at, data)), then)

    @rule(at=transactions, worker_id=workers)
    def die_and_be_claimed_again(self, at: int, worker_id: UUID) -> None:
        """What happens to a workflow that kills its workers, each step in a transaction of its own."""
        self.execute(at, Expire(worker_id), "commit")
        self.execute(at, Reclaim(2), "commit")
        self.wake_all(at)
        self.execute(at, Claim(worker_id, next(self.ids), 2), "commit")

    @rule(at=transactions, worker_id=workers, queue=st.sampled_from(QUEUES))
    def go_on(self, at: int, worker_id: UUID, queue: str) -> None:
        """A good worker, after an operator has cleared what had stopped."""
        self.execute(at, Beat(worker_id), "commit")
        self.execute(at, Resume(queue=queue), "commit")
        self.wake_all(at)
        self.execute(at, Claim(worker_id, next(self.ids), 4), "commit")

    def wake_all(self, at: int) -> None:
        """Let the times of all suspended workflows come, the newest first."""
        for row in reversed([row for row in self.rows(at) if row.wake is not None]):
            self.execute(at, MakeDue(row.id, long_ago=row.enqueued % 2 == 0), "open")  # no statement of the store
        self.execute(at, WakeDue(), "commit")

    @rule(at=transactions, then=endings)
    def forget_dead(self, at: int, then: str) -> None:
        self.execute(at, ForgetDead(), then)

    # Operators

    @rule(at=transactions, data=choice, verb=st.sampled_from([Cancel, Resume, Resume]), then=endings)
    def manage(self, at: int, data: st.DataObject, verb: type[Cancel | Resume], then: str) -> None:
        self.execute(at, verb(frozenset({self.any_row(at, data), self.any_row(at, data)})), then)

    @rule(at=transactions, queue=st.sampled_from(QUEUES), verb=st.sampled_from([Cancel, Resume, Resume]), then=endings)
    def manage_queue(self, at: int, queue: str, verb: type[Cancel | Resume], then: str) -> None:
        self.execute(at, verb(queue=queue), then)

    # Transactions

    @rule(at=transactions, ending=st.sampled_from(["commit", "commit", "rollback"]))
    def end(self, at: int, ending: str) -> None:
        session = self.sessions[at]
        getattr(session, ending)()
        getattr(self.model, ending)(session)
        session.expunge_all()
        if ending == "commit":
            self.check()

    @invariant()
    def no_transaction_has_failed(self) -> None:
        assert all(each.is_active for each in self.sessions)

    def execute(self, at: int, operation: Operation, then: str) -> None:
        """Execute in both, unless it would wait for another of the transactions."""
        session = self.sessions[at]
        if self.model.would_block(session, operation):
            return
        expected = self.model.execute(session, operation)
        assert operation.perform(session) == expected, operation
        self.fences |= {Fence(row.id, row.token): row.attempt for row in self.rows(at) if row.token is not None}
        if then != "open":
            self.end(at, then)

    def check(self) -> None:
        """Compare; and prove, without the model, that no recorded outcome of a step has changed or gone."""
        with Session(self.engine) as session:
            steps = compare(self.model, session)
        found = {name: each for name, each in steps.items() if each.status.finished}
        assert {name: found.get(name) for name in self.outcomes} == self.outcomes
        self.outcomes = found

    def teardown(self) -> None:
        for session in self.sessions:
            session.close()  # an example that failed must leave no locks to the next one

    def rows(self, at: int) -> list[Row]:
        """Return the workflows that a transaction sees."""
        return rows_of(self.model.view(self.sessions[at]))

    def any_row(self, at: int, data: st.DataObject) -> UUID:
        """Choose a workflow that the transaction sees."""
        return data.draw(st.sampled_from([row.id for row in self.rows(at)]))

    def any_fence(self, at: int, data: st.DataObject) -> Fence:
        """Choose an attempt: mostly one that the transaction sees as the owner, sometimes any that ever was."""
        owners = [Fence(r.id, r.token) for r in self.rows(at) if r.status is WorkflowStatus.RUNNING and r.token]
        known = [*owners, *owners, *owners, *self.fences]
        return data.draw(st.sampled_from(known or [Fence(self.any_row(at, data), next(self.ids))]))

    def any_write(self, at: int, data: st.DataObject) -> Write:
        """Choose a checkpoint."""
        fence = self.any_fence(at, data)
        status = data.draw(st.sampled_from(list(StepStatus)))
        tries, output = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
        return Write(fence, data.draw(st.sampled_from(KEYS)), status, self.fences.get(fence, 1), tries, output)


@pytest.fixture
def histories(databases: Databases) -> Generator[type[Histories]]:
    """The machine on a database of its own; waiting for a lock for long is an error there."""
    with databases.migrated("durable") as url:
        engine = create_engine(url, connect_args={"options": "-c lock_timeout=1s"})
        Histories.engine = engine
        yield Histories
        engine.dispose()


@pytest.mark.timeout(0 if EXAMPLES else 300)
def test_the_tables_follow_the_model_through_random_histories(histories: type[Histories], thorough: bool) -> None:
    # behaviour: E8 R3 R4 Q1 T8
    chosen: dict[str, Any] = {"max_examples": int(EXAMPLES)} if EXAMPLES else {"derandomize": True}
    chosen.setdefault("max_examples", 30 if thorough else 10)
    run_state_machine_as_test(
        histories,
        settings=settings(
            **chosen,
            stateful_step_count=60,
            deadline=None,
            database=None,
            print_blob=True,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
