"""The calls by which workers, operators and time act on workflows that are not their own attempts, on the model."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar
from uuid import UUID

from sqlalchemy import Select, select, text
from sqlalchemy.orm import Session

from sqla_durable import manage
from sqla_durable.models import Workflow
from sqla_durable.models.base import WorkflowStatus
from sqla_durable.store import Fence, timers, workers
from tests.store.model import LATER, LONG_AGO, Lease, Leased, Operation, Record, Row, View, changed, live
from tests.store.model_operations import OnWorkflows, row_in

MAX_ATTEMPTS = 3
LEASE = timedelta(hours=1)


@dataclass(frozen=True)
class WakeDue(OnWorkflows):
    """Enqueue the suspended workflows whose time has come; of those that crashed several times only the first."""

    def wanted(self, row: Row, view: View, now: int) -> bool:
        return row.status is WorkflowStatus.SUSPENDED and row.wake is not None and row.wake <= now

    def takes(self, view: View, free: list[Hashable]) -> tuple[list[Hashable], list[Hashable]]:
        rows = [row_in(view, name) for name in free]
        suspects = sorted((each for each in rows if each.crashes >= 2), key=lambda row: (row.wake or 0, row.id))
        taken: list[Hashable] = [each.id for each in (*(row for row in rows if row.crashes < 2), *suspects[:1])]
        return taken, taken

    def version(self, row: Row, now: int) -> Row:
        return changed(row, status=WorkflowStatus.PENDING, wake=None, enqueued=now)

    def answer(self, before: View, taken: list[Hashable], after: View) -> object:
        return len(taken)

    def perform(self, session: Session) -> object:
        return timers.wake_due(session, limit=1_000)


@dataclass(frozen=True)
class MakeDue(OnWorkflows):
    """Let the time of a suspended workflow come: now, or before it was enqueued."""

    id: UUID
    long_ago: bool = False
    waits: ClassVar[bool] = True

    def wanted(self, row: Row, view: View, now: int) -> bool:
        return row.id == self.id and row.status is WorkflowStatus.SUSPENDED

    def version(self, row: Row, now: int) -> Row:
        return changed(row, wake=LONG_AGO if self.long_ago else now)

    def perform(self, session: Session) -> object:
        time = "'2000-01-01'" if self.long_ago else "statement_timestamp()"
        statement = f"UPDATE durable.workflow SET wake_at = {time} WHERE id = :id AND status = 'suspended' RETURNING id"
        return set(session.scalars(text(statement), {"id": self.id}))


class _EndedFromOutside(OnWorkflows):
    """What ends an attempt from outside."""

    suspends: ClassVar[bool] = True

    def version(self, row: Row, now: int) -> Row:
        progress = any(each.attempt == row.attempt and each.status.finished for each in row.steps.values())
        row = changed(row, crashes=0 if progress else row.crashes + 1, token=None)
        if row.crashes >= MAX_ATTEMPTS:
            return changed(row, status=WorkflowStatus.FAILED, error=workers.MAX_ATTEMPTS_TYPE)
        if row.crashes > 1 and self.suspends:
            return changed(row, attempt=row.attempt + 1, status=WorkflowStatus.SUSPENDED, wake=LATER)
        return changed(row, attempt=row.attempt + 1, status=WorkflowStatus.PENDING)

    def answer(self, before: View, taken: list[Hashable], after: View) -> object:
        return {(row.id, row.status) for row in (row_in(after, name) for name in taken)}


@dataclass(frozen=True)
class Reclaim(_EndedFromOutside):
    """Reclaim what workers without a live lease had running."""

    limit: int = 1_000

    def wanted(self, row: Row, view: View, now: int) -> bool:
        return row.status is WorkflowStatus.RUNNING and not live(view, row.worker)

    def takes(self, view: View, free: list[Hashable]) -> tuple[list[Hashable], list[Hashable]]:
        return free[: self.limit], free[: self.limit]

    def perform(self, session: Session) -> object:
        found = workers.reclaim(session, max_attempts=MAX_ATTEMPTS, limit=self.limit)
        _hold_off(session, [each.workflow_id for each in found])
        return {(each.workflow_id, each.status) for each in found}


@dataclass(frozen=True)
class ReclaimOne(_EndedFromOutside):
    """Reclaim this one if its worker has no live lease."""

    id: UUID
    waits: ClassVar[bool] = True
    suspends: ClassVar[bool] = False

    def wanted(self, row: Row, view: View, now: int) -> bool:
        return row.status is WorkflowStatus.RUNNING and row.id == self.id and not live(view, row.worker)

    def perform(self, session: Session) -> object:
        found = workers.reclaim_one(session, self.id, max_attempts=MAX_ATTEMPTS)
        return {(each.workflow_id, each.status) for each in [found] if each is not None}


@dataclass(frozen=True)
class Abandon(_EndedFromOutside):
    """End an attempt of this worker that broke, and enqueue its workflow."""

    fence: Fence

    def wanted(self, row: Row, view: View, now: int) -> bool:
        return row.owned_by(self.fence)

    def answer(self, before: View, taken: list[Hashable], after: View) -> object:
        return bool(taken) or not any(isinstance(row, Row) and row.owned_by(self.fence) for row in after.values())

    def perform(self, session: Session) -> object:
        done = workers.abandon_attempt(session, self.fence, reason="it broke", max_attempts=MAX_ATTEMPTS)
        _hold_off(session, [self.fence.workflow_id])
        return done


def _hold_off(session: Session, ids: list[UUID]) -> None:
    """Let a back-off of about a second be over an hour later, so that it does not end while the model is not looking.

    Only where this transaction has just suspended the workflow: whoever else did so has moved the time already.
    """
    near = "wake_at BETWEEN statement_timestamp() AND statement_timestamp() + interval '10 minutes'"
    session.execute(
        text(
            "UPDATE durable.workflow SET wake_at = wake_at + interval '1 hour' WHERE id = ANY(:ids) "
            f"AND status = 'suspended' AND {near} AND xmin = pg_current_xact_id()::xid"
        ),
        {"ids": ids},
    )


@dataclass(frozen=True)
class _Managed(OnWorkflows):
    """What an operator does with some workflows, or with those of a queue."""

    wanted_ids: frozenset[UUID] | None = None
    queue: str | None = None
    waits: ClassVar[bool] = True

    def chosen(self, row: Row) -> bool:
        """Return whether the operator means this row."""
        return row.queue == self.queue if self.wanted_ids is None else row.id in self.wanted_ids

    def selected(self) -> list[UUID] | Select[Any]:
        """Return what the operator names."""
        if self.wanted_ids is not None:
            return list(self.wanted_ids)
        return select(Workflow).where(Workflow.queue == self.queue)

    def answer(self, before: View, taken: list[Hashable], after: View) -> object:
        return list(taken)


class Cancel(_Managed):
    """Cancel what is not finished."""

    def wanted(self, row: Row, view: View, now: int) -> bool:
        return self.chosen(row) and not row.status.finished

    def version(self, row: Row, now: int) -> Row:
        return changed(row, status=WorkflowStatus.CANCELLED, wake=None)

    def perform(self, session: Session) -> object:
        return manage.cancel(session, self.selected())


class Resume(_Managed):
    """Enqueue again what was cancelled or stopped for its crashes."""

    def wanted(self, row: Row, view: View, now: int) -> bool:
        stopped = row.status is WorkflowStatus.FAILED and row.error == workers.MAX_ATTEMPTS_TYPE
        return self.chosen(row) and (stopped or row.status is WorkflowStatus.CANCELLED)

    def version(self, row: Row, now: int) -> Row:
        again = changed(row, status=WorkflowStatus.PENDING, attempt=row.attempt + 1, crashes=0, enqueued=now)
        return changed(again, token=None, worker=None, error=None)

    def perform(self, session: Session) -> object:
        return manage.resume(session, self.selected())


@dataclass(frozen=True)
class Beat(Operation):
    """Begin or extend a worker's lease."""

    worker_id: UUID
    waits: ClassVar[bool] = True

    def wants(self, view: View, now: int) -> list[Hashable]:
        return [self.worker_id]

    def change(self, view: View, taken: Iterable[Hashable], now: int) -> dict[Hashable, Record | None]:
        return {self.worker_id: Leased(self.worker_id, Lease.LIVE)}

    def answer(self, before: View, taken: list[Hashable], after: View) -> object:
        return None

    def perform(self, session: Session) -> object:
        workers.beat(session, worker_id=self.worker_id, name="w", queues=[], lease=LEASE)
        return None


@dataclass(frozen=True)
class Expire(Operation):
    """Let a worker's lease have run out, a minute or two days ago."""

    worker_id: UUID
    lease: Lease = Lease.EXPIRED
    waits: ClassVar[bool] = True

    def wants(self, view: View, now: int) -> list[Hashable]:
        return [self.worker_id] if self.worker_id in view else []

    def change(self, view: View, taken: Iterable[Hashable], now: int) -> dict[Hashable, Record | None]:
        return {name: Leased(self.worker_id, self.lease) for name in taken}

    def answer(self, before: View, taken: list[Hashable], after: View) -> object:
        return len(taken)

    def perform(self, session: Session) -> object:
        ago = "1 minute" if self.lease is Lease.EXPIRED else "2 days"
        statement = (
            f"UPDATE durable.worker SET heartbeat_at = statement_timestamp() - interval '3 days', "
            f"lease_expires_at = statement_timestamp() - interval '{ago}' WHERE id = :id RETURNING id"
        )
        return len(session.scalars(text(statement), {"id": self.worker_id}).all())


@dataclass(frozen=True)
class ForgetDead(Operation):
    """Delete the rows of workers that have been dead for long."""

    def wants(self, view: View, now: int) -> list[Hashable]:
        return [each.id for each in view.values() if isinstance(each, Leased) and each.lease is Lease.FORGOTTEN]

    def change(self, view: View, taken: Iterable[Hashable], now: int) -> dict[Hashable, Record | None]:
        return dict.fromkeys(taken)

    def answer(self, before: View, taken: list[Hashable], after: View) -> object:
        return None

    def perform(self, session: Session) -> object:
        workers.delete_dead(session)
        return None
