"""What `tail` and `top` read: what has started and finished of late, found without reading all that has finished.

No index has the ends of all workflows. New ones are found by their ids, which begin with the time of their start;
failed ones by the index of their ends; and others because they are looked up while they are unfinished.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import ColumnElement, func, select, tuple_, union_all
from sqlalchemy.orm import Session

from sqla_durable import Workflow, WorkflowStatus, manage
from sqla_durable.store.statements import is_among
from sqla_durable.tools.cli.reading import NOW, SHORT_MESSAGE, Row, queue_rows, worker_rows

MOST_WATCHED = 10_000
"""How many unfinished workflows are looked up at each poll."""

_LATE = timedelta(seconds=10)  # how long after its start or end a transaction may commit and still be found
_UNFINISHED = WorkflowStatus.RUNNING, WorkflowStatus.PENDING, WorkflowStatus.SUSPENDED


class Happening(NamedTuple):
    """A workflow has started, or has come to its end; `what` is "started", or its status then."""

    at: datetime
    what: str
    workflow: Row


@dataclass(slots=True)
class Follower:
    """Finds what has happened since its last poll.

    Attributes:
        conditions: which workflows it follows.
        is_full: more are unfinished than it looks up; of the others it sees the starts and the failures.
    """

    session: Session
    conditions: Sequence[ColumnElement[bool]] = ()
    is_full: bool = False
    _began: datetime = field(init=False)
    _mark: datetime = field(init=False)
    _watched: set[UUID] = field(init=False, default_factory=set[UUID])
    _started: set[UUID] = field(init=False, default_factory=set[UUID])
    _ended: dict[UUID, datetime] = field(init=False, default_factory=dict[UUID, datetime])

    def __post_init__(self) -> None:
        """Begin now: what is unfinished is looked up from here on."""
        self._began = self._mark = self.session.execute(select(NOW)).scalar_one()
        for each in _UNFINISHED:
            self._watch_those(each)
        self.session.rollback()

    def poll(self) -> list[Happening]:
        """Return what has happened since the last poll, in order. Leaves no transaction open."""
        now: datetime = self.session.execute(select(NOW)).scalar_one()
        new = self._rows(Workflow.id >= manage.id_at(self._mark))
        failed = self._rows(Workflow.status == WorkflowStatus.FAILED, Workflow.finished_at >= self._mark)
        watched = self._rows(is_among(Workflow.__table__.c.id, list(self._watched)), Workflow.finished_at.is_not(None))
        self._watch_those(WorkflowStatus.RUNNING)
        self.session.rollback()
        found = [*self._starts(new), *self._ends([*new, *failed, *watched])]
        self._mark = max(self._began, now - _LATE)
        self._forget()
        return sorted(found, key=lambda each: each.at)

    def _rows(self, *which: ColumnElement[bool]) -> list[Row]:
        wanted = select(
            Workflow.id,
            Workflow.name,
            Workflow.queue,
            Workflow.key,
            Workflow.by,
            Workflow.status,
            Workflow.created_at,
            Workflow.started_at,
            Workflow.finished_at,
            Workflow.error["type"].astext.label("error_type"),
            SHORT_MESSAGE.label("error_message"),
        )
        found = self.session.execute(wanted.where(*which, *self.conditions).order_by(Workflow.id)).mappings()
        return [dict(each) for each in found]

    def _watch_those(self, status: WorkflowStatus) -> None:
        wanted = select(Workflow.id).where(Workflow.status == status, *self.conditions).limit(MOST_WATCHED + 1)
        self._watch(self.session.scalars(wanted))

    def _watch(self, ids: Iterable[UUID]) -> None:
        for each in ids:
            if each not in self._watched and len(self._watched) >= MOST_WATCHED:
                self.is_full = True
                return
            self._watched.add(each)

    def _starts(self, rows: Iterable[Row]) -> list[Happening]:
        new = [each for each in rows if each["id"] not in self._started and each["created_at"] >= self._began]
        self._started.update(each["id"] for each in new)
        self._watch(each["id"] for each in new if each["finished_at"] is None)
        return [Happening(each["created_at"], "started", each) for each in new]

    def _ends(self, rows: Iterable[Row]) -> list[Happening]:
        found: list[Happening] = []
        for each in rows:
            ended, workflow_id = each["finished_at"], each["id"]
            if ended is None or ended < self._began:
                continue
            self._watched.discard(workflow_id)
            if self._ended.get(workflow_id) != ended:
                self._ended[workflow_id] = ended
                found.append(Happening(ended, str(each["status"]), each))
        return found

    def _forget(self) -> None:
        """Forget what no later poll can find again."""
        first = manage.id_at(self._mark)
        self._started = {each for each in self._started if each >= first}
        self._ended = {key: at for key, at in self._ended.items() if key >= first or at >= self._mark}


class Rates(NamedTuple):
    """How many of one queue, worker or name have finished in a window, how many failed, and how long they took."""

    finished: int
    failed: int
    p50: timedelta | None
    p95: timedelta | None


_NOTHING = Rates(0, 0, None, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """What happens now: queues, workers and workflow names, each row with its `rates`; of a window in seconds."""

    queues: Sequence[Row]
    workers: Sequence[Row]
    names: Sequence[Row]
    seconds: float


def picture(session: Session, *, window: timedelta, started_within: timedelta) -> Picture:
    """Return what happens now. Leaves no transaction open.

    Args:
        window: the time before now in which they have finished.
        started_within: those that were started earlier than this are counted only if they have failed.
    """
    now: datetime = session.execute(select(NOW)).scalar_one()
    rates = _rates(session, finished_since=now - window, started_since=now - max(window, started_within))
    queues, workers, waiting = queue_rows(session), worker_rows(session), _waiting(session)
    session.rollback()
    by_queue = {each["queue"]: each for each in queues}
    names = sorted({key for kind, key in rates if kind == "name"} | waiting.keys())
    others = sorted({key for kind, key in rates if kind == "queue"} - by_queue.keys())
    empty = {"pending": 0, "running": 0, "pending_since": None, "read_at": now}
    return Picture(
        queues=[
            {**by_queue.get(each, {**empty, "queue": each}), "rates": rates.get(("queue", each), _NOTHING)}
            for each in [*by_queue, *others]
        ],
        workers=[{**each, "rates": rates.get(("worker_id", each["id"]), _NOTHING)} for each in workers],
        names=[
            {"name": each, **waiting.get(each, empty), "read_at": now, "rates": rates.get(("name", each), _NOTHING)}
            for each in names
        ],
        seconds=window.total_seconds(),
    )


def finished(*, finished_since: datetime, started_since: datetime) -> Any:
    """Return the query for the rates of what has finished, by queue, by worker and by name, found by two indexes."""
    took = (Workflow.finished_at - Workflow.started_at).label("took")
    wanted = select(Workflow.queue, Workflow.worker_id, Workflow.name, Workflow.status, took)
    first = manage.id_at(started_since)
    new = wanted.where(Workflow.id >= first, Workflow.finished_at >= finished_since)
    is_failed = Workflow.status == WorkflowStatus.FAILED
    both = union_all(
        new, wanted.where(Workflow.id < first, is_failed, Workflow.finished_at >= finished_since)
    ).subquery()
    kinds = both.c.queue, both.c.worker_id, both.c.name
    return select(
        *kinds,
        func.grouping(*kinds).label("others"),
        func.pg_catalog.count(both.c.status).label("finished"),
        func.pg_catalog.count(both.c.status).filter(both.c.status == WorkflowStatus.FAILED).label("failed"),
        func.pg_catalog.percentile_cont(0.5).within_group(both.c.took.asc()).label("p50"),
        func.pg_catalog.percentile_cont(0.95).within_group(both.c.took.asc()).label("p95"),
    ).group_by(func.grouping_sets(*map(tuple_, kinds)))


_KIND_OF = {0b011: "queue", 0b101: "worker_id", 0b110: "name"}
"""Of which column a row is, by the bits of `grouping`: those of the other two are set."""


def _rates(session: Session, *, finished_since: datetime, started_since: datetime) -> Mapping[tuple[str, Any], Rates]:
    rows = session.execute(finished(finished_since=finished_since, started_since=started_since))
    found: dict[tuple[str, Any], Rates] = {}
    for each in rows.mappings():
        kind = _KIND_OF[each["others"]]
        found[kind, each[kind]] = Rates(each["finished"], each["failed"], each["p50"], each["p95"])
    return found


def _waiting(session: Session) -> dict[str, Row]:
    counted = select(
        Workflow.name,
        func.pg_catalog.count(Workflow.id).label("pending"),
        func.pg_catalog.min(Workflow.enqueued_at).label("pending_since"),
    )
    grouped = counted.where(Workflow.status == WorkflowStatus.PENDING).group_by(Workflow.name)
    return {each["name"]: dict(each) for each in session.execute(grouped).mappings()}
