"""Random histories of queues with limits: what happens to them, and what every claim is compared with.

Nothing here knows how a claim counts: it reads all rows before the claim, and says what may and what must be taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from random import Random
from typing import Any, TypeAlias
from uuid import UUID

from sqlalchemy import Engine, Row, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable import manage
from sqla_durable.definitions.queues import QueueOptions
from sqla_durable.models import Workflow
from sqla_durable.models.base import WorkflowStatus
from sqla_durable.store import Fence, Suspend, attempts, claims, queues, timers, workers
from sqla_durable.store.records import Claimed, Completion
from tests.store import races
from tests.support.forged import forged

PERIOD = timedelta(milliseconds=30)
QUEUES = "default", "other"
KEYS = None, "a", "b", "c"
NAMES = ["checkout", "refund"]
WORKERS = [uuid7() for _ in range(2)]
SETTINGS: Sequence[dict[str, Any]] = (
    {"concurrency": 3},
    {"concurrency": 3, "while_suspended": "hold"},
    {"per_key": 2},
    {"per_key": 1, "concurrency": 3, "while_suspended": "hold"},
    {"fifo": "skip"},
    {"fifo": "block", "concurrency": 3},
    {"rate": (3, PERIOD), "concurrency": 6},
    {"key_rate": (2, PERIOD), "per_key": 2},
    {"rate": (4, PERIOD), "fifo": "skip"},
    {"fair": True, "concurrency": 4},
    {"concurrency": 2, "aging": PERIOD},
    {},
)
ERROR = '{"type": "builtins:ValueError", "message": "no"}'
Rows: TypeAlias = "Sequence[Row[Any]]"

_ROWS = text(
    "SELECT id, name, queue, priority, enqueued_at, by, status, place, crashes, worker_id, token, "
    "statement_timestamp() AS seen_at FROM durable.workflow ORDER BY priority, enqueued_at, id"
)
_QUEUE = text(
    "SELECT queue.*, ARRAY(SELECT by FROM durable.queue_key WHERE queue = queue.name AND paused_at IS NOT NULL) "
    "AS paused_keys FROM durable.queue WHERE name = :name"
)


@dataclass(frozen=True)
class Start:
    """A start that a rate counts."""

    queue: str
    by: str | None
    at: datetime


@dataclass
class Open:
    """A claim whose transaction is open."""

    session: Session
    queue: str | None = None
    starts: list[Start] = field(default_factory=list[Start])


class Situation:
    """The rows of one queue, before a claim, with its settings."""

    def __init__(self, rows: Rows, queue: Any, starts: Sequence[Start]) -> None:
        self.queue = queue
        self.rows = [each for each in rows if each.queue == queue.name]
        self._starts = [each for each in starts if each.queue == queue.name]
        self.is_keyed = queue.fair or any((queue.per_key, queue.key_rate, queue.fifo))
        self.per_key = 1 if queue.fifo else queue.per_key

    @property
    def counts_starts(self) -> bool:
        return bool(self.queue.rate or self.queue.key_rate)

    def running(self) -> Rows:
        """What runs, or keeps its place while it is suspended."""
        return [each for each in self.rows if each.status == "running" or self._keeps_place(each, "suspended")]

    def running_of(self, by: str) -> Rows:
        """What takes a place of a key."""
        mine = [each for each in self.rows if each.by == by]
        kept = [each for each in mine if self._keeps and each.status == "suspended" and each.place not in _NOT_KEPT]
        if self.queue.fifo == "block":
            kept += [each for each in mine if each.status == "failed" and each.place == "key_failed"]
        return [each for each in mine if each.status == "running"] + kept

    @property
    def _keeps(self) -> bool:
        return self.queue.fifo is not None or self.queue.while_suspended == "hold"

    def _keeps_place(self, row: Any, status: str) -> bool:
        return bool(self.queue.while_suspended == "hold" and row.status == status and row.place == "finished")

    def used(self, at: datetime, by: str | None = None, *, of_key: bool = False) -> int:
        """How many starts there were in the period before a time."""
        return sum(each.at > at - PERIOD and (not of_key or each.by == by) for each in self._starts)

    def going_on(self, by: str) -> Rows:
        """What of a key waits, and has started before and keeps its place."""
        return [
            each
            for each in self.rows
            if self._keeps and each.status == "pending" and each.by == by and each.place not in _NOT_KEPT
        ]

    def could_go(self) -> Rows:
        """What a claim that can take all names must not leave."""
        is_paused = self.queue.paused_at is not None
        return [each for each in self.rows if not is_paused and each.status == "pending" and self._could_go(each)]

    def _could_go(self, row: Any) -> bool:
        queue, by, goes_on = self.queue, row.by, row.place is not None
        taken = len(self.running())
        if not goes_on:
            taken += sum(self._keeps_place(each, "pending") for each in self.rows)
        if queue.concurrency is not None and taken >= queue.concurrency:
            return False
        if not goes_on or row.crashes:
            if queue.rate and self.used(row.seen_at) >= queue.rate:
                return False
            if by and queue.key_rate and self.used(row.seen_at, by, of_key=True) >= queue.key_rate:
                return False
        if by is None or not self.is_keyed:
            return True
        if by in queue.paused_keys:
            return False
        if self.per_key is not None:
            of_key = len(self.running_of(by)) + (0 if goes_on else len(self.going_on(by)))
            return of_key < self.per_key
        return True


_NOT_KEPT = None, "running"


def _shown(*rows: object) -> str:
    return "\n".join(map(str, rows))


class Crowd:
    """Two workers, operators and users at two queues: each step is one of them, some transactions stay open."""

    def __init__(self, engine: Engine, chance: Random) -> None:
        self.chance = chance
        self.claims = 0
        self.taken = 0
        # No transaction to roll back: psycopg would forget its prepared statements.
        self._reader = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._claims = [Open(Session(engine)) for _ in range(3)]
        self._user = Session(engine)
        self._operator = Session(engine)
        self._fences: list[Fence] = []
        self._starts: list[Start] = []
        with engine.begin() as connection:
            for table in ("workflow", "worker", "queue"):
                connection.execute(text(f"DELETE FROM durable.{table}"))

    def close(self) -> None:
        """Roll everything back that is open."""
        for each in (*(each.session for each in self._claims), self._user, self._operator):
            each.close()

    def live(self, steps: int, *, first: int) -> None:
        """Do so many things, at first with certain limits."""
        for number, name in enumerate(QUEUES):
            with self._operating() as session:
                queues.put(session, name, QueueOptions(**SETTINGS[(first + number) % len(SETTINGS)]))
        self._beat()
        self.start()
        for _ in range(steps):
            self.chance.choices([each for each, _ in _STEPS], [weight for _, weight in _STEPS])[0](self)

    def finish_all(self) -> None:
        """End what is open, resume what is paused, and prove that everything is executed."""
        for each in self._claims:
            self._end(each, commit=True)
        self._user.rollback()
        with self._operating() as session:
            session.execute(text("UPDATE durable.queue SET paused_at = NULL WHERE paused_at IS NOT NULL"))
            session.execute(text("UPDATE durable.queue_key SET paused_at = NULL"))
        for _ in range(1_000):
            for name in QUEUES:
                self._claim(self._claims[0], name, NAMES, limit=50)
                self._end(self._claims[0], commit=True)
            self._end_attempts([races.success(each) for each in self._running()])
            self.wake()
            self.retry()
            if all(each.status not in ("pending", "running", "suspended", "failed") for each in self._rows()):
                return
        raise AssertionError(f"not finished: {self._rows()}")

    # Starting, claiming and ending

    def start(self) -> None:
        for _ in range(self.chance.randint(1, 6)):
            columns: dict[str, Any] = {"by": self.chance.choice(KEYS), "priority": self.chance.choice([0, 0, 1])}
            name = self.chance.choice(["checkout", "checkout", "checkout", "refund"])
            with self._operating() as session:
                races.enqueue(session, name=name, queue=self.chance.choice(QUEUES), **columns)

    def claim(self) -> None:
        closed = [each for each in self._claims if not each.session.in_transaction()]
        if not closed:
            return
        claim = self.chance.choice(closed)
        names = self.chance.choice([NAMES, NAMES, NAMES[:1]])
        is_limited = self._claim(claim, self.chance.choice(QUEUES), names, limit=self.chance.choice([1, 2, 5, 50]))
        ending = self.chance.choice(["open", "open", "commit", "commit", "rollback"])
        if ending != "open" or not is_limited:
            self._end(claim, commit=ending != "rollback")

    def end(self) -> None:
        self._end(self.chance.choice(self._claims), commit=self.chance.random() < 0.8)

    def finish(self) -> None:
        self._end_attempts([races.success(each) for each in self._some_fences()])

    def fail(self) -> None:
        self._end_attempts([Completion(each, WorkflowStatus.FAILED, error=ERROR) for each in self._some_fences()])

    def suspend(self) -> None:
        self._end_attempts([Suspend(each, 3600.0) for each in self._some_fences()])

    def release(self) -> None:
        with self._operating() as session:
            attempts.release(session, self._some_fences())

    # Time and death

    def wake(self) -> None:
        with self._operating() as session:
            session.execute(
                text(
                    "UPDATE durable.workflow SET wake_at = statement_timestamp() WHERE id IN "
                    "(SELECT id FROM durable.workflow WHERE status = 'suspended' FOR UPDATE SKIP LOCKED)"
                )
            )
        with self._operating() as session:
            timers.wake_due(session, limit=100)

    def die(self) -> None:
        with self._operating() as session:
            workers.end_lease(session, self.chance.choice(WORKERS))
        with self._operating() as session:
            workers.reclaim(session, max_attempts=1_000, limit=self.chance.choice([1, 100]))
        self._beat()

    # Operators and users

    def cancel(self) -> None:
        with self._operating() as session:
            races.cancel(session, *self._some_ids())

    def retry(self) -> None:
        with self._operating() as session:
            manage.retry(session, select(Workflow).where(Workflow.status == WorkflowStatus.FAILED))

    def delete(self) -> None:
        with self._operating() as session, forged(session):
            session.execute(text("DELETE FROM durable.workflow WHERE id = ANY (:ids)"), {"ids": self._some_ids()[:1]})

    def move(self) -> None:
        with self._operating() as session:
            session.execute(
                text(
                    "UPDATE durable.workflow SET queue = :queue WHERE id = ANY (:ids) "
                    "AND status IN ('pending', 'suspended')"
                ),
                {"ids": self._some_ids(), "queue": self.chance.choice(QUEUES)},
            )

    def set_limits(self) -> None:
        with self._operating() as session:
            queues.put(session, self.chance.choice(QUEUES), QueueOptions(**self.chance.choice(SETTINGS)))

    def pause(self) -> None:
        name, key = self.chance.choice(QUEUES), self.chance.choice(KEYS)
        with self._operating() as session:
            if key is None:
                queues.pause(session, name)
            else:
                queues.pause_key(session, name, key)

    def resume(self) -> None:
        with self._operating() as session:
            for name in QUEUES:
                queues.resume(session, name)
                for key in KEYS[1:]:
                    queues.resume_key(session, name, str(key))

    def lock(self) -> None:
        """A user locks a row for a while, or unlocks what is locked."""
        if self._user.in_transaction():
            self._user.commit()
        else:
            self._user.execute(
                text(
                    "SELECT FROM durable.workflow WHERE id = ANY (:ids) AND status = 'pending' "
                    "FOR NO KEY UPDATE SKIP LOCKED"
                ),
                {"ids": self._some_ids()},
            )

    # What there is

    def _rows(self) -> Rows:
        with self._reader.connect() as connection:
            return connection.execute(_ROWS).all()

    def _running(self) -> list[Fence]:
        return [Fence(each.id, each.token) for each in self._rows() if each.status == "running"]

    def _some_fences(self) -> list[Fence]:
        """Some that run, and an attempt of any time."""
        running = self._running()
        late = [self.chance.choice(self._fences)] if self._fences else []
        some = self.chance.sample(running, self.chance.randint(0, min(3, len(running))))
        return list({each.workflow_id: each for each in (*late, *some)}.values())

    def _some_ids(self) -> list[UUID]:
        ids = [each.id for each in self._rows()]
        return self.chance.sample(ids, min(2, len(ids)))

    @contextmanager
    def _operating(self) -> Any:
        """A transaction that gives up where it would have to wait."""
        try:
            self._operator.execute(text("SET LOCAL lock_timeout = '3ms'"))
            yield self._operator
            self._operator.commit()
        except OperationalError as error:
            self._operator.rollback()
            if "lock timeout" not in str(error):
                raise
        finally:
            self._operator.expunge_all()

    def _beat(self) -> None:
        for each in WORKERS:
            with self._operating() as session:
                workers.beat(session, worker_id=each, name="w", queues=[*QUEUES], lease=races.LEASE)

    def _end_attempts(self, ends: Sequence[attempts.End]) -> None:
        with self._operating() as session:
            races.end(session, ends)

    def _end(self, claim: Open, *, commit: bool) -> None:
        if commit:
            claim.session.commit()
            self._starts += claim.starts
        else:
            claim.session.rollback()
        claim.queue, claim.starts = None, []

    # The claim

    def _claim(self, claim: Open, name: str, names: list[str], *, limit: int) -> bool:
        """Claim, and compare; return whether the queue has limits."""
        rows = self._rows()
        with self._reader.connect() as connection:
            queue = connection.execute(_QUEUE, {"name": name}).one()
        before = Situation(rows, queue, self._starts)
        given: dict[str, Any] = {"worker_id": self.chance.choice(WORKERS), "token": uuid7(), "names": names}
        if not any((before.is_keyed, queue.concurrency, queue.rate, queue.aging)):
            claimed = claims.claim(claim.session, ranges=races.from_front([name]), limit=limit, **given).claimed
            self._note(claimed)
            return False
        is_alone = not any(each.session.in_transaction() for each in (*self._claims, Open(self._user)))
        batch = claims.claim_limited(claim.session, queue=name, executing=0, limit=limit, **given)
        self._note(batch.claimed)
        ids = {each.fence.workflow_id for each in batch.claimed}
        taken = [each for each in rows if each.id in ids]
        assert len(taken) == len(ids), "it took what was not there before"
        if is_alone and not taken and not batch.again and names is NAMES:
            assert not before.could_go(), _shown(queue, *before.could_go(), "of", *before.rows)
        if not taken:
            return True
        self.claims += 1
        self.taken += len(taken)
        assert all(each.queue != name for each in self._claims), "two open claims have taken something"
        assert queue.paused_at is None
        claim.queue = name
        after = Situation(claim.session.execute(_ROWS).all(), queue, [])
        self._check_places(before, after, taken)
        if before.counts_starts:
            at = batch.claimed_at
            assert at is not None
            claim.starts = [Start(name, each.by, at) for each in taken if each.place is None or each.crashes]
            self._check_rates(Situation(rows, queue, self._starts + claim.starts), at, claim.starts)
        return True

    def _note(self, claimed: Sequence[Claimed]) -> None:
        self._fences += [each.fence for each in claimed]

    def _check_places(self, before: Situation, after: Situation, taken: Rows) -> None:
        queue = after.queue
        assert all(each.status == "pending" and each.queue == queue.name for each in taken)
        if queue.concurrency is not None:
            assert len(after.running()) <= queue.concurrency, _shown(queue, *taken, "of", *before.rows)
        if not after.is_keyed:
            return
        for each in taken:
            if each.by is None:
                continue
            assert each.by not in queue.paused_keys
            if after.per_key is not None:
                assert len(after.running_of(each.by)) <= after.per_key, (each, after.rows, queue)
            if queue.fifo and each.place is None:
                assert not before.going_on(each.by), (each, before.rows)
                waiting = [row for row in before.rows if row.by == each.by and row.status == "pending"]
                assert waiting[0].id == each.id, (each, before.rows)

    def _check_rates(self, now: Situation, at: datetime, starts: Sequence[Start]) -> None:
        queue = now.queue
        if queue.rate and starts:
            assert now.used(at) <= queue.rate, (starts, queue)
        for each in starts:
            if queue.key_rate and each.by is not None:
                assert now.used(at, each.by, of_key=True) <= queue.key_rate, (starts, queue)


_STEPS: Sequence[tuple[Callable[[Crowd], None], int]] = (
    (Crowd.start, 6),
    (Crowd.claim, 14),
    (Crowd.end, 8),
    (Crowd.finish, 6),
    (Crowd.fail, 2),
    (Crowd.suspend, 5),
    (Crowd.release, 2),
    (Crowd.wake, 3),
    (Crowd.die, 2),
    (Crowd.cancel, 1),
    (Crowd.retry, 1),
    (Crowd.delete, 1),
    (Crowd.move, 2),
    (Crowd.set_limits, 1),
    (Crowd.pause, 1),
    (Crowd.resume, 2),
    (Crowd.lock, 3),
)
