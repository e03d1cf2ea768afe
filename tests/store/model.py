"""A model of the tables in plain Python: rows, row locks, and what each transaction sees of the others.

It says what PostgreSQL and the statements of the store promise together, from their documentation: READ COMMITTED, an
operation that waits for a row's lock or passes over it, and what it makes of the row then. It knows no SQL. The
operations on it are in `model_operations`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any, ClassVar, TypeVar
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from sqla_durable.models import Step, Worker, Workflow
from sqla_durable.models.base import StepStatus, WorkflowStatus
from sqla_durable.store import Fence

T = TypeVar("T")

LATER = 10**9
LONG_AGO = -1


@dataclass(frozen=True, slots=True)
class Recording:
    """A checkpoint."""

    status: StepStatus
    attempt: int
    tries: int
    output: object


@dataclass(frozen=True, slots=True)
class Row:
    """A workflow. Times are numbers of operations; `wake` may be LATER."""

    id: UUID
    enqueued: int
    queue: str = "default"
    priority: int = 0
    key: str | None = None
    status: WorkflowStatus = WorkflowStatus.PENDING
    token: UUID | None = None
    worker: UUID | None = None
    attempt: int = 1
    crashes: int = 0
    error: str | None = None
    output: object = None
    wake: int | None = None
    steps: Mapping[str, Recording] = field(default_factory=dict[str, Recording])

    @property
    def place(self) -> tuple[int, int, UUID]:
        """Where it stands in its queue."""
        return self.priority, self.enqueued, self.id

    def owned_by(self, fence: Fence) -> bool:
        """Whether an attempt may write."""
        return self.status is WorkflowStatus.RUNNING and (self.id, self.token) == (fence.workflow_id, fence.token)


class Lease(Enum):
    """How long ago a worker's lease ran out."""

    LIVE = auto()
    EXPIRED = auto()
    FORGOTTEN = auto()


@dataclass(frozen=True, slots=True)
class Leased:
    """A worker's row."""

    id: UUID
    lease: Lease


Record = Row | Leased
View = Mapping[Hashable, Record]
Recorded = Mapping[tuple[UUID, str], Recording]


class WouldBlock(Exception):
    """The operation waits for another transaction."""


class Operation:
    """One call of the store: what the model makes of it, and how PostgreSQL is asked for it.

    Attributes:
        waits: whether it waits for rows that another transaction holds, or passes over them.
    """

    waits: ClassVar[bool] = False

    def wants(self, view: View, now: int) -> list[Hashable]:
        """Return what it would lock if nobody else held anything, in its order."""
        raise NotImplementedError

    def takes(self, view: View, free: list[Hashable]) -> tuple[list[Hashable], list[Hashable]]:
        """Return, of what is free, what it locks and what of that it changes."""
        return free, free

    def change(self, view: View, taken: Iterable[Hashable], now: int) -> dict[Hashable, Record | None]:
        """Return the new versions; None is a deleted row."""
        raise NotImplementedError

    def answer(self, before: View, taken: list[Hashable], after: View) -> object:
        """Return what the call returns."""
        raise NotImplementedError

    def perform(self, session: Session) -> object:
        """Call the store."""
        raise NotImplementedError


class Model:
    """The committed rows, the locks, and the rows that open transactions have changed."""

    def __init__(self) -> None:
        self.committed: dict[Hashable, Record] = {}
        self.now = 0
        self._locks: dict[Hashable, object] = {}
        self._changed: dict[object, dict[Hashable, Record | None]] = {}

    def execute(self, transaction: object, operation: Operation) -> object:
        """Execute an operation in a transaction and return its answer.

        Raises:
            WouldBlock: it waits for another transaction; nothing has happened.
        """
        view = self.view(transaction)
        wanted = operation.wants(view, self.now + 1)
        free = [each for each in wanted if self._locks.get(each, transaction) is transaction]
        if operation.waits and free != wanted:
            raise WouldBlock
        self.now += 1
        locked, taken = operation.takes(view, free)
        self._locks |= dict.fromkeys(locked, transaction)
        self._changed.setdefault(transaction, {}).update(operation.change(view, taken, self.now))
        return operation.answer(view, taken, self.view(transaction))

    def would_block(self, transaction: object, operation: Operation) -> bool:
        """Return whether an operation would wait for another transaction."""
        wanted = operation.wants(self.view(transaction), self.now + 1)
        return operation.waits and any(self._locks.get(each, transaction) is not transaction for each in wanted)

    def view(self, transaction: object) -> View:
        """Return what a transaction sees: what is committed, and its own changes."""
        seen = {**self.committed, **self._changed.get(transaction, {})}
        return {name: record for name, record in seen.items() if record is not None}

    def commit(self, transaction: object) -> None:
        """End a transaction so that everybody sees what it did."""
        self.committed = dict(self.view(transaction))
        self.rollback(transaction)

    def rollback(self, transaction: object) -> None:
        """End a transaction so that nothing of it has happened."""
        self._changed.pop(transaction, None)
        self._locks = {name: holder for name, holder in self._locks.items() if holder is not transaction}

    @property
    def rows(self) -> list[Row]:
        """The committed workflows."""
        return rows_of(self.committed)


def rows_of(view: View) -> list[Row]:
    """Return the workflows of a view, in the order of their ids."""
    return sorted((each for each in view.values() if isinstance(each, Row)), key=lambda row: row.id)


def live(view: View, worker_id: UUID | None) -> bool:
    """Return whether a worker's lease is live in a view."""
    found = view.get(worker_id)
    return isinstance(found, Leased) and found.lease is Lease.LIVE


def compare(model: Model, session: Session) -> Recorded:
    """Prove that the committed tables are the model's: every column, every checkpoint, and the order of the queues.

    Returns:
        The checkpoints of the tables.
    """
    records = list(session.scalars(select(Workflow).order_by(Workflow.id).execution_options(populate_existing=True)))
    assert [_shown(each) for each in records] == [_expected(each, model.now) for each in model.rows]
    steps = {(each.workflow_id, each.key): _recording(each) for each in session.scalars(select(Step))}
    assert steps == {(row.id, key): each for row in model.rows for key, each in row.steps.items()}
    pending = sorted((each for each in records if each.status is WorkflowStatus.PENDING), key=_place)
    expected = sorted((each for each in model.rows if each.status is WorkflowStatus.PENDING), key=lambda row: row.place)
    assert [each.id for each in pending] == [each.id for each in expected]
    leases = {each for each in model.committed.values() if isinstance(each, Leased)}
    assert set(session.scalars(select(Worker.id))) == {each.id for each in leases}
    return steps


def _expected(row: Row, now: int) -> dict[str, Any]:
    names = ("id", "queue", "priority", "key", "status", "token", "attempt", "crashes", "error", "output")
    finished = row.status.finished
    due = None if row.wake is None else row.wake <= now
    return {**{name: getattr(row, name) for name in names}, "finished": finished, "due": due}


def _shown(record: Workflow) -> dict[str, Any]:
    names = ("id", "queue", "priority", "key", "status", "token", "attempt", "crashes", "output")
    error = None if record.error is None else record.error["type"]
    # What is due lies in the past of everything that happened, and what is not lies an hour or more ahead.
    due = None if record.wake_at is None else (record.wake_at - record.created_at).total_seconds() < 1_800
    shown = {name: getattr(record, name) for name in names}
    return {**shown, "error": error, "finished": record.finished_at is not None, "due": due}


def _recording(step: Step) -> Recording:
    return Recording(step.status, step.attempt, step.tries, step.output)


def _place(record: Workflow) -> tuple[Any, ...]:
    return record.priority, record.enqueued_at, record.id


def changed(row: Row, **values: Any) -> Row:
    """Return a new version of a row."""
    return replace(row, **values)
