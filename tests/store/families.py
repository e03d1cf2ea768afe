"""Parents and their children as rows, and `Family`, which lets all that can happen to them happen at random."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any
from uuid import UUID

from sqlalchemy import Engine, func, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable import manage
from sqla_durable.models import Signal, Workflow
from sqla_durable.models.base import WorkflowStatus
from sqla_durable.store import (
    Awaited,
    Completion,
    Fence,
    Suspend,
    children,
    signals,
)
from sqla_durable.unwinding import AttemptLost
from tests.store import races

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


def orders_of(*events: str) -> list[tuple[str, ...]]:
    """Return every order of these and a delivery in which a child ends, that is committed, and then the last comes."""
    every = itertools.permutations([*events, "deliver"])
    return [each for each in every if each.index("end") < each.index("commit") < each.index(events[-1])]


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
