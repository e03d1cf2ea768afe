"""The calls of the store as operations on the model, each next to how it is asked of PostgreSQL."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar
from uuid import UUID

from sqlalchemy.orm import Session

from sqla_durable.models.base import StepStatus, WorkflowStatus
from sqla_durable.store import Checkpoint, Completion, Fence, NewWorkflow, Suspend, Verdict, claims, starts, steps
from sqla_durable.store import attempts as store_attempts
from tests.store import races
from tests.store.model import LATER, Operation, Record, Recording, Row, View, changed, rows_of

NAME = "checkout"
QUEUES = ("default", "mail")
HOUR = timedelta(hours=1)
_FAILED = "builtins:ValueError"


def row_in(view: View, name: Hashable) -> Row:
    """Return a workflow of a view."""
    found = view[name]
    assert isinstance(found, Row)
    return found


class OnWorkflows(Operation):
    """An operation that turns each workflow that it gets into a new version."""

    def wanted(self, row: Row, view: View, now: int) -> bool:
        """Return whether it is about this row."""
        raise NotImplementedError

    def version(self, row: Row, now: int) -> Row:
        """Return the new version."""
        raise NotImplementedError

    def wants(self, view: View, now: int) -> list[Hashable]:
        return [row.id for row in rows_of(view) if self.wanted(row, view, now)]

    def change(self, view: View, taken: Iterable[Hashable], now: int) -> dict[Hashable, Record | None]:
        return {name: self.version(row_in(view, name), now) for name in taken}

    def answer(self, before: View, taken: list[Hashable], after: View) -> object:
        return set(taken)


class _Fenced(OnWorkflows):
    """What an attempt writes."""

    fence: Fence

    def wanted(self, row: Row, view: View, now: int) -> bool:
        return row.owned_by(self.fence)


@dataclass(frozen=True)
class Start(Operation):
    """Start a workflow: a new one, or the one that has the key already; at once or much later."""

    id: UUID
    queue: str = "default"
    priority: int = 0
    key: str | None = None
    delayed: bool = False
    waits: ClassVar[bool] = True

    def wants(self, view: View, now: int) -> list[Hashable]:
        # A key that is known is not inserted, so that whoever is changing its row is not in the way.
        return [] if self._known(view) else [self._lock]

    def takes(self, view: View, free: list[Hashable]) -> tuple[list[Hashable], list[Hashable]]:
        return ([], []) if self._known(view) else (free, free)

    def change(self, view: View, taken: Iterable[Hashable], now: int) -> dict[Hashable, Record | None]:
        row = Row(self.id, now, self.queue, self.priority, self.key)
        if self.delayed:
            row = changed(row, status=WorkflowStatus.SUSPENDED, wake=LATER)
        return {self.id: row} if taken else {}

    def answer(self, before: View, taken: list[Hashable], after: View) -> object:
        return self._known(before) or self.id

    def perform(self, session: Session) -> object:
        delay = HOUR.total_seconds() if self.delayed else None
        new = NewWorkflow(self.id, NAME, "{}", self.queue, self.priority, self.key, delay)
        if self.key is not None:
            return starts.insert_unless_known(session, new).id
        record = starts.add(session, new)
        session.flush()
        return record.id

    @property
    def _lock(self) -> Hashable:
        return self.id if self.key is None else ("key", self.key)

    def _known(self, view: View) -> UUID | None:
        return next((row.id for row in rows_of(view) if self.key is not None and row.key == self.key), None)


@dataclass(frozen=True)
class Claim(OnWorkflows):
    """Claim the first workflows of these queues."""

    worker_id: UUID
    token: UUID
    limit: int = 1
    listened: tuple[str, ...] = QUEUES

    def wanted(self, row: Row, view: View, now: int) -> bool:
        return row.status is WorkflowStatus.PENDING and row.queue in self.listened

    def takes(self, view: View, free: list[Hashable]) -> tuple[list[Hashable], list[Hashable]]:
        # The heads of all queues are locked before the first of them are chosen.
        ordered = sorted((row_in(view, name) for name in free), key=lambda row: row.place)
        heads = [row for queue in self.listened for row in [r for r in ordered if r.queue == queue][: self.limit]]
        chosen = sorted(heads, key=lambda row: row.place)[: self.limit]
        return [row.id for row in heads], [row.id for row in chosen]

    def version(self, row: Row, now: int) -> Row:
        return changed(row, status=WorkflowStatus.RUNNING, token=self.token, worker=self.worker_id)

    def answer(self, before: View, taken: list[Hashable], after: View) -> object:
        return [_as_claimed(row_in(after, name)) for name in taken]

    def perform(self, session: Session) -> object:
        found = claims.claim(
            session,
            worker_id=self.worker_id,
            token=self.token,
            ranges=races.from_front(self.listened),
            names=[NAME],
            limit=self.limit,
        )
        return [_claimed(each) for each in claims.with_histories(session, found.claimed)]


@dataclass(frozen=True)
class ClaimOne(OnWorkflows):
    """Claim this workflow."""

    id: UUID
    worker_id: UUID
    token: UUID
    waits: ClassVar[bool] = True

    def wanted(self, row: Row, view: View, now: int) -> bool:
        return row.status is WorkflowStatus.PENDING and row.id == self.id

    def version(self, row: Row, now: int) -> Row:
        return changed(row, status=WorkflowStatus.RUNNING, token=self.token, worker=self.worker_id)

    def answer(self, before: View, taken: list[Hashable], after: View) -> object:
        return [_as_claimed(row_in(after, name)) for name in taken]

    def perform(self, session: Session) -> object:
        found = claims.claim_one(session, self.id, worker_id=self.worker_id, token=self.token)
        return [] if found is None else [_claimed(each) for each in claims.with_histories(session, [found])]


def _as_claimed(row: Row) -> tuple[Any, ...]:
    history = {key: (each.status, each.tries) for key, each in row.steps.items()}
    return row.id, row.token, row.attempt, history


def _claimed(claimed: Any) -> tuple[Any, ...]:
    history = {key: (each.status, each.tries) for key, each in claimed.history.items()}
    return claimed.fence.workflow_id, claimed.fence.token, claimed.attempt, history


@dataclass(frozen=True)
class Write:
    """A checkpoint to be recorded."""

    fence: Fence
    key: str
    status: StepStatus
    attempt: int
    tries: int = 1
    output: int = 1

    @property
    def recording(self) -> Recording:
        """What will stand in the table."""
        output = self.output if self.status is StepStatus.SUCCEEDED else None
        return Recording(self.status, self.attempt, self.tries, output)

    @property
    def checkpoint(self) -> Checkpoint:
        """What is given to the store."""
        return Checkpoint(
            fence=self.fence,
            key=self.key,
            name=self.key,
            position=1,
            status=self.status,
            output=str(self.output) if self.status is StepStatus.SUCCEEDED else None,
            error='{"type": "builtins:ValueError"}' if self.status is StepStatus.FAILED else None,
            attempt=self.attempt,
            tries=self.tries,
            elapsed=0.0,
            delay=HOUR.total_seconds() if self.status is StepStatus.RETRYING else None,
        )

    def fits(self, row: Row) -> bool:
        """Whether there is no outcome yet under this key."""
        return self.key not in row.steps or not row.steps[self.key].status.finished


def _written(row: Row, writes: Iterable[Write]) -> Row:
    steps = {each.key: each.recording for each in writes if row.owned_by(each.fence) and each.fits(row)}
    return changed(row, steps={**row.steps, **steps})


@dataclass(frozen=True)
class RecordOne(_Fenced):
    """Record the checkpoint of a transactional step."""

    write: Write
    waits: ClassVar[bool] = True

    @property
    def fence(self) -> Fence:  # type: ignore[override]
        return self.write.fence

    def version(self, row: Row, now: int) -> Row:
        return _written(row, [self.write])

    def answer(self, before: View, taken: list[Hashable], after: View) -> object:
        if not taken:
            return Verdict.LOST
        return Verdict.RECORDED if self.write.fits(row_in(before, taken[0])) else Verdict.DUPLICATE

    def perform(self, session: Session) -> object:
        return steps.record(session, self.write.checkpoint)


@dataclass(frozen=True)
class RecordBatch(OnWorkflows):
    """Record the checkpoints of plain steps."""

    writes: tuple[Write, ...]

    def wanted(self, row: Row, view: View, now: int) -> bool:
        return any(row.owned_by(each.fence) for each in self.writes)

    def version(self, row: Row, now: int) -> Row:
        return _written(row, self.writes)

    def answer(self, before: View, taken: list[Hashable], after: View) -> object:
        return {
            (row.id, each.key)
            for row in (row_in(before, name) for name in taken)
            for each in self.writes
            if row.owned_by(each.fence) and each.fits(row)
        }

    def perform(self, session: Session) -> object:
        return races.record(session, [each.checkpoint for each in self.writes])


@dataclass(frozen=True)
class RecordedAmong(Operation):
    """Ask which checkpoints are recorded already."""

    writes: tuple[Write, ...]

    def wants(self, view: View, now: int) -> list[Hashable]:
        return []

    def change(self, view: View, taken: Iterable[Hashable], now: int) -> dict[Hashable, Record | None]:
        return {}

    def answer(self, before: View, taken: list[Hashable], after: View) -> object:
        return {(each.fence, each.key) for each in self.writes if self._recorded(each, before)}

    def perform(self, session: Session) -> object:
        return steps.recorded_among(session, [each.checkpoint for each in self.writes])

    def _recorded(self, write: Write, view: View) -> bool:
        row = view.get(write.fence.workflow_id)
        found = row.steps.get(write.key) if isinstance(row, Row) and row.token == write.fence.token else None
        if found is None or found.status.finished:
            return found is not None
        return write.status is found.status and write.tries == found.tries


@dataclass(frozen=True)
class Finish(_Fenced):
    """Record an outcome."""

    fence: Fence
    status: WorkflowStatus = WorkflowStatus.SUCCEEDED
    waits: ClassVar[bool] = True

    def version(self, row: Row, now: int) -> Row:
        if self.status is WorkflowStatus.FAILED:
            return changed(row, status=self.status, error=_FAILED)
        return changed(row, status=self.status, output=7)

    def answer(self, before: View, taken: list[Hashable], after: View) -> object:
        return bool(taken)

    def perform(self, session: Session) -> object:
        return store_attempts.finish(session, self.completion)

    @property
    def completion(self) -> Completion:
        """What is given to the store."""
        failed = self.status is WorkflowStatus.FAILED
        error, output = (f'{{"type": "{_FAILED}"}}', None) if failed else (None, "7")
        return Completion(self.fence, self.status, output=output, error=error)


class FinishUnlocked(Finish):
    """The same by the writer."""

    waits: ClassVar[bool] = False

    def perform(self, session: Session) -> object:
        return bool(races.end(session, [self.completion]))


@dataclass(frozen=True)
class SuspendOne(_Fenced):
    """Suspend a workflow by its own attempt."""

    fence: Fence

    def version(self, row: Row, now: int) -> Row:
        return changed(row, status=WorkflowStatus.SUSPENDED, token=None, worker=None, wake=LATER)

    def perform(self, session: Session) -> object:
        return races.end(session, [Suspend(self.fence, HOUR.total_seconds())])


@dataclass(frozen=True)
class Release(_Fenced):
    """Return a workflow to its queue."""

    fence: Fence
    waits: ClassVar[bool] = True

    def version(self, row: Row, now: int) -> Row:
        return changed(row, status=WorkflowStatus.PENDING, token=None, worker=None)

    def perform(self, session: Session) -> object:
        return store_attempts.release(session, [self.fence])


class ReleaseUnlocked(Release):
    """The same by a worker that stops; returns what it still owns."""

    waits: ClassVar[bool] = False

    def answer(self, before: View, taken: list[Hashable], after: View) -> object:
        return [self.fence] if any(row.owned_by(self.fence) for row in rows_of(after)) else []

    def perform(self, session: Session) -> object:
        return store_attempts.release_unlocked(session, [self.fence])
