"""What tests of races need: connections side by side, and ways to wait that ask PostgreSQL instead of sleeping."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Generic, TypeVar
from uuid import UUID as UUID

from sqlalchemy import Engine, text
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable.execution.worker.database import Database
from sqla_durable.execution.worker.hints import Wakeups
from sqla_durable.execution.worker.writer import Row, Write, Writer
from sqla_durable.models import Workflow
from sqla_durable.models.base import StepStatus, WorkflowStatus
from sqla_durable.operations.suspending import Wakers
from sqla_durable.runtime.waiting import OnLoop, Ticket
from sqla_durable.store import Checkpoint, Claimed, Completion, Fence, NewWorkflow, attempts, claims, starts, workers
from sqla_durable.store.work import find_work
from tests.support.forged import forged

T = TypeVar("T")

PATIENCE = 10.0
LEASE = timedelta(minutes=5)
WORKER = uuid7()


class Concurrent(threading.Thread, Generic[T]):
    """A function that is called in a thread of its own."""

    def __init__(self, function: Callable[[], T]) -> None:
        super().__init__(daemon=True)
        self._function = function
        self._value: list[T] = []
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._value.append(self._function())
        except BaseException as error:
            self._error = error

    def result(self) -> T:
        """Wait for the function and return its result."""
        self.join(PATIENCE)
        assert not self.is_alive(), "the other transaction is still blocked"
        if self._error is not None:
            raise self._error
        return self._value[0]


class Transaction:
    """A session in a transaction of its own whose statements may block; each is executed in a thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.session = Session(engine, expire_on_commit=False)
        self.pid = pid_of(self.session)
        self._begun: list[Concurrent[Any]] = []

    def begin(self, statement: Callable[[Session], T]) -> Concurrent[T]:
        """Execute in a thread."""
        begun = Concurrent(lambda: statement(self.session))
        self._begun.append(begun)
        return begun

    def begin_blocked(self, statement: Callable[[Session], T]) -> Concurrent[T]:
        """Execute in a thread, and return when PostgreSQL says that it waits for a lock."""
        begun = self.begin(statement)
        wait_until_blocked(self._engine, self.pid)
        return begun

    def close(self) -> None:
        """Roll back; what a thread still executes is cancelled, as two threads must not use the session."""
        for begun in self._begun:
            if begun.is_alive():
                with self._engine.connect() as connection:
                    connection.execute(text("SELECT pg_cancel_backend(:pid)"), {"pid": self.pid})
                begun.join(PATIENCE)
                assert not begun.is_alive(), "a statement could not be cancelled"
        self.session.close()


@contextmanager
def transaction(engine: Engine) -> Generator[Transaction]:
    """Open a transaction; it is rolled back unless the test commits it."""
    opened = Transaction(engine)
    try:
        yield opened
    finally:
        opened.close()


def pid_of(session: Session) -> int:
    """Return the process id of the session's backend."""
    return int(session.execute(text("SELECT pg_backend_pid()")).scalar_one())


def wait_until(condition: Callable[[], T], *, what: str = "the condition", seconds: float = PATIENCE) -> T:
    """Ask until the answer is true, less often the longer it takes: asking takes time from what is awaited."""
    began = time.monotonic()
    while not (answer := condition()):
        waited = time.monotonic() - began
        assert waited < seconds, f"{what} did not come true"
        time.sleep(min(max(waited / 10, 0.005), 0.1))
    return answer


def wait_until_blocked(engine: Engine, pid: int) -> None:
    """Wait until a backend waits for a lock that another one holds."""
    with engine.connect() as connection:
        blocked = text("SELECT cardinality(pg_blocking_pids(:pid)) > 0")
        wait_until(lambda: connection.execute(blocked, {"pid": pid}).scalar_one(), what=f"backend {pid} being blocked")


def blocked_statements(engine: Engine) -> dict[int, object]:
    """Return the backends of this database that wait for a lock, and since when they execute their statement."""
    statement = text(
        "SELECT pid, query_start FROM pg_stat_activity "
        "WHERE datname = current_database() AND cardinality(pg_blocking_pids(pid)) > 0"
    )
    with engine.connect() as connection:
        return {row.pid: row.query_start for row in connection.execute(statement)}


def enqueue(session: Session, count: int = 1, **columns: Any) -> list[UUID]:
    """Insert pending workflows named `checkout` and commit them."""
    records = [Workflow(**{"name": "checkout", **columns}) for _ in range(count)]
    with forged(session, columns):
        session.add_all(records)
        session.flush()
    ids = [each.id for each in records]
    session.commit()
    return ids


def claim(session: Session, limit: int = 1, **options: Any) -> list[Claimed]:
    """Claim from the queue `default` what is named `checkout`, with all histories."""
    return claims.with_histories(session, claim_only(session, limit, **options).claimed)


def claim_only(session: Session, limit: int = 1, **options: Any) -> claims.Batch:
    """Do so with the histories that come with the claim."""
    settings: dict[str, Any] = {"worker_id": WORKER, "token": uuid7(), "names": ["checkout"]}
    settings["ranges"] = from_front(options.pop("queues", ["default"]))
    return claims.claim(session, limit=limit, **{**settings, **options})


def record(session: Session, checkpoints: Sequence[Checkpoint]) -> set[tuple[UUID, str]]:
    """Record checkpoints as the writer does, and return workflow and key of those that were written."""
    unwritten = attempts.write_batch(session, checkpoints).checkpoints
    return {(each.fence.workflow_id, each.key) for each in checkpoints if (each.fence, each.key) not in unwritten}


def end(session: Session, ends: Sequence[attempts.End]) -> set[UUID]:
    """Finish or suspend as the writer does, and return the workflows whose attempts have ended."""
    unwritten = attempts.write_batch(session, ends=ends).ends
    return {each.fence.workflow_id for each in ends if each.fence not in unwritten}


def is_alive(session: Session, worker_id: UUID) -> bool:
    """Return whether a worker's lease is live."""
    return find_work(session, worker_id=worker_id, ranges={}, names=[]).alive


def from_front(queues: Iterable[str]) -> claims.Ranges:
    """Return the ranges that read all of these queues."""
    return {each: [claims.Range(claims.FRONT)] for each in queues}


def claimed_fences(engine: Engine, count: int = 1, *, worker_id: UUID = WORKER) -> list[Fence]:
    """Enqueue workflows and claim them under a live lease; in the order of their ids."""
    with Session(engine) as session:
        enqueue(session, count)
        workers.beat(session, worker_id=worker_id, name="w", queues=["default"], lease=LEASE)
        claimed = claim(session, count, worker_id=worker_id)
        session.commit()
    return sorted((each.fence for each in claimed), key=lambda fence: fence.workflow_id)


def expire_leases(engine: Engine) -> None:
    """Let every lease have run out a minute ago."""
    with engine.begin() as connection:
        connection.execute(
            text(
                "UPDATE durable.worker SET heartbeat_at = heartbeat_at - interval '1 day', "
                "lease_expires_at = statement_timestamp() - interval '1 minute'"
            )
        )


def checkpoint(fence: Fence, key: str = "charge", *, output: str = "1", position: int = 1) -> Checkpoint:
    """Make a checkpoint of a step that succeeded."""
    return Checkpoint(
        fence=fence,
        key=key,
        name=key,
        position=position,
        status=StepStatus.SUCCEEDED,
        output=output,
        error=None,
        attempt=1,
        tries=1,
        elapsed=0.0,
    )


def success(fence: Fence, output: str = "1") -> Completion:
    """Make a completion of a workflow that succeeded."""
    return Completion(fence, WorkflowStatus.SUCCEEDED, output=output)


def cancel(session: Session, *workflow_ids: UUID) -> None:
    """Cancel as an operator would: by an UPDATE, in the order in which the ids are given."""
    for workflow_id in workflow_ids:
        session.execute(
            text(
                "UPDATE durable.workflow SET status = 'cancelled', finished_at = statement_timestamp(), "
                "wake_at = NULL WHERE id = :id AND status IN ('pending', 'running', 'suspended')"
            ),
            {"id": workflow_id},
        )


def lock(session: Session, workflow_id: UUID, strength: str = "NO KEY UPDATE") -> None:
    """Lock a workflow's row until the transaction ends."""
    session.execute(text(f"SELECT FROM durable.workflow WHERE id = :id FOR {strength}"), {"id": workflow_id})


def status_of(engine: Engine, workflow_id: UUID) -> WorkflowStatus:
    """Return the committed status of a workflow."""
    with Session(engine) as session:
        return session.get_one(Workflow, workflow_id).status


def status_in(session: Session, workflow_id: UUID) -> WorkflowStatus:
    """Return the status of a workflow as this session's transaction sees it."""
    return session.get_one(Workflow, workflow_id, populate_existing=True).status


def history_of(engine: Engine, workflow_id: UUID) -> list[str]:
    """Return the keys of a workflow's checkpoints in the order of their positions."""
    with Session(engine) as session:
        return [each.key for each in session.get_one(Workflow, workflow_id).steps]


def one(new: NewWorkflow) -> Callable[[Session], UUID]:
    """Return the function that inserts a workflow with a key."""
    return lambda session: starts.insert_unless_known(session, new).id


def writer(database: Database) -> Writer:
    """Return a worker's writer, whose commits wake nothing."""
    return Writer(database, Wakeups(), Wakers())


def submit(writer: Writer, row: Row, *, after: Ticket | None = None) -> Ticket:
    """Let a worker's writer commit a row, as an attempt does."""
    write = Write(row, after)
    writer.add(write)
    return write


async def settled(ticket: Ticket) -> None:
    """Wait until a row is committed, as an attempt on the event loop does."""
    await OnLoop().settled(ticket)
