"""The recorder of an executor's attempts, and the transactions on the caller's session in which it records.

They are committed one by one, or are savepoints inside the caller's transaction. One operation uses the session at a
time; functions of a `Session` are called on it, also where the caller has an `AsyncSession`.
"""

from __future__ import annotations

import contextlib
import copy
import os
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from typing import ClassVar, Self, TypeAlias, TypeVar

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from typing_extensions import override
from uuid_utils.compat import uuid7

from sqla_durable.definitions.checks import require_positive_duration
from sqla_durable.definitions.database_errors import first_line, is_about_data, is_untranslatable
from sqla_durable.definitions.registry import StepDefinition
from sqla_durable.errors import EncodingError, SessionError, UsageError
from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.calls import Position
from sqla_durable.operations.runtime import Recorder
from sqla_durable.operations.suspending import Suspension, Wait, Waker
from sqla_durable.operations.transaction import ReleasingTransaction, SavepointTransaction, StepTransaction, in_session
from sqla_durable.operations.transaction_retries import Phase, Setback, TransactionRetry
from sqla_durable.runtime.waiting import InGreenlet, InThread, OnLoop, Waiting
from sqla_durable.store import (
    Checkpoint,
    Completion,
    Connectable,
    Fence,
    Suspend,
    Verdict,
    attempts,
    refresh_loaded,
    schema,
    steps,
    workers,
)
from sqla_durable.unwinding import AttemptLost, Interrupted

T = TypeVar("T")
Pause: TypeAlias = "Callable[[float], Awaitable[None]]"


Row = TypeVar("Row", Checkpoint, Completion)
_POLL_EVERY = 0.1  # seconds between two looks for what is waited for in memory


class SessionRecorder(Recorder):
    """Records what one attempt decides, each in a transaction of its own on the caller's session.

    Args:
        attempt: the attempt.
        transactions: on that session.
        waiting: how code waits where it is executed.
        suspends: whether the workflow is suspended where it waits; otherwise it waits in memory.
    """

    def __init__(
        self, attempt: Attempt, transactions: SessionTransactions, waiting: Waiting, *, suspends: bool
    ) -> None:
        super().__init__(attempt)
        self.suspends = suspends
        self._transactions = transactions
        self._waiting = waiting
        self._lock = waiting.lock()
        self._noted: list[Checkpoint] = []

    @classmethod
    def of(cls, attempt: Attempt, transactions: SessionTransactions, *, suspends: bool) -> SessionRecorder:
        """Return the recorder of code that is executed on a session of either kind, where that is used."""
        waiting = OnLoop() if isinstance(transactions.session, AsyncSession) else InThread()
        return cls(attempt, transactions, waiting, suspends=suspends)

    @property
    @override
    def commits(self) -> bool:
        return self._transactions.commits

    @property
    @override
    def slot_is_wanted(self) -> bool:
        return self.suspends  # what waits is suspended at once

    @override
    async def settle(self) -> None:
        if self._noted:
            async with self._turn():
                await self._record_noted()
        self.attempt.raise_if_stopped()

    @override
    async def record(self, checkpoint: Checkpoint) -> None:
        async with self._turn():
            await self._record_noted()
            await self._record(checkpoint)

    @override
    def note(self, checkpoint: Checkpoint) -> None:
        self._noted.append(checkpoint)

    @override
    async def execute(self, statement: Callable[[Connectable], T]) -> T:
        async with self._turn():
            return await self._write(statement)

    @override
    async def begin(self, step: StepDefinition) -> StepTransaction:
        await self._lock.acquire()
        try:
            self.attempt.raise_if_stopped()
        except BaseException:
            self._lock.release()
            raise
        # Cancelled in the middle of its end, it would spoil the session's connection.
        transaction = ReleasingTransaction(
            self._transactions.transaction(isolation_level=step.options.isolation_level),
            self._lock.release,
            commits=self._waiting.finish_despite_cancel,
            rolls_back=self._waiting.finish_despite_cancel,
        )
        await transaction.begin()
        return transaction

    @override
    async def finish(self, completion: Completion) -> None:
        async with self._kept():
            try:
                await self._record_noted()
            except EncodingError:
                self._noted.clear()  # another outcome waits for none of them
                raise
            # A step that was called beside the others, and that nobody awaits any more, must not touch the session.
            self.attempt.stop(partial(AttemptLost, self.attempt.workflow_id))
            await _escaping(
                lambda given: self._write(partial(_finish, completion=given, transactions=self._transactions)),
                completion,
            )

    @override
    async def suspend(self, suspension: Suspension, *, remember: Callable[[Connectable], None] | None = None) -> None:
        async with self._kept():
            await self._record_noted()
            if remember is not None:
                await self._write(remember)
            await self._write(partial(_suspend, attempt=self.attempt, suspension=suspension))

    @override
    async def pause(self, seconds: float) -> None:
        await self._waiting.pause(seconds)

    @override
    async def wait_in_memory(self, position: Position, wait: Wait) -> None:
        """Wait, and extend the lease meanwhile."""
        if wait.awaits or wait.polls:
            self._transactions.refuse_waiting(position.key)
            await self.pause(min(wait.seconds, _POLL_EVERY))
            return
        while wait.seconds > 0:
            await self.pause(min(wait.seconds, self._transactions.longest_pause))
            await self.execute(partial(_require_ownership, attempt=self.attempt))

    @override
    def waker(self) -> Waker:
        return self._waiting.waker()

    @override
    def transaction_retry(self) -> TransactionRetry:
        return self._transactions.transaction_retry()

    @override
    def fork(self) -> SessionRecorder:
        session = self._transactions.session
        if isinstance(session, AsyncSession) or schema.engine_of(session).dialect.is_async:
            raise UsageError(
                f"parallel() was called in a workflow on {session!r}, the inside of an AsyncSession, which threads "
                "cannot use: execute the workflow on a Session of a sync engine, or in a worker."
            )
        return self

    @override
    async def in_session(self, work: Callable[[Recorder], T]) -> T:
        """Call a function in the greenlet of the `AsyncSession`, which has the session for itself."""

        def call(session: Session) -> T:
            transactions = self._transactions.on(session)
            return work(SessionRecorder(self.attempt, transactions, InGreenlet(), suspends=self.suspends))

        async with self._turn():
            return await in_session(self._transactions.session, call)

    async def _write(self, statement: Callable[[Session], T]) -> T:
        """Write to the end, also when cancelled meanwhile, which would spoil the session's connection."""
        return await self._waiting.finish_despite_cancel(self._transactions.write(statement, pause=self.pause))

    async def _record_noted(self) -> None:
        """Record what was noted; other operations that settle meanwhile wait for the lock until it is committed."""
        while self._noted:
            await self._record(self._noted[0])
            self._noted.pop(0)

    async def _record(self, checkpoint: Checkpoint) -> None:
        await _escaping(lambda given: self._write(partial(_write_checkpoint, checkpoint=given)), checkpoint)

    @asynccontextmanager
    async def _kept(self) -> AsyncGenerator[None]:
        """Have the session for oneself."""
        await self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    @asynccontextmanager
    async def _turn(self) -> AsyncGenerator[None]:
        """Have the session for oneself, unless the attempt has ended."""
        async with self._kept():
            self.attempt.raise_if_stopped()
            yield


class SessionTransactions(ABC):
    """The transactions of one executor, on a session of either kind.

    Attributes:
        session: the caller's session.
        worker_id: the executor's id in the worker table.
    """

    loss: ClassVar[str]
    """Why an attempt may have lost its workflow, for a message."""

    others: ClassVar[str]
    """What a message adds where other processes see the workflow."""

    commits: ClassVar[bool] = True
    """Whether each transaction is committed by itself."""

    def __init__(self, session: Session | AsyncSession) -> None:
        self.session = session
        self.worker_id = uuid7()

    @property
    def sync_session(self) -> Session:
        """The session itself, or the one inside it."""
        return self.session.sync_session if isinstance(self.session, AsyncSession) else self.session

    def on(self, session: Session) -> Self:
        """Return the same on the `Session` inside an `AsyncSession`."""
        inside = copy.copy(self)
        inside.session = session
        return inside

    async def transact(self, statement: Callable[[Session], T]) -> T:
        """Call a function of the session in a transaction of its own."""
        transaction = self.transaction()
        await transaction.begin()
        try:
            value = await transaction.execute(statement)
            await transaction.commit()
        except BaseException:
            await transaction.rollback()
            raise
        return value

    async def write(self, statement: Callable[[Session], T], *, pause: Pause) -> T:
        """Write what the engine records; a lost database interrupts the workflow instead of failing it."""
        again = self.transaction_retry()
        while True:
            try:
                return await self.transact(statement)
            except Exception as error:
                setback = Setback.of(error, Phase.BEFORE)
                if setback is None:
                    raise
                seconds = again.wait_before_next(setback, error, what="an executor's record")
                if seconds is None:
                    raise Interrupted(error) from error
                await pause(seconds)

    @property
    def longest_pause(self) -> float:
        """How many seconds may pass before the lease is to be extended."""
        return float("inf")

    @abstractmethod
    def transaction(self, *, isolation_level: str | None = None) -> StepTransaction:
        """Return a transaction that is not yet begun."""

    def require_usable(self) -> None:  # noqa: B027 (any session is usable by default)
        """Refuse a session whose transaction cannot end as it has to.

        Raises:
            SessionError: it is one.
        """

    async def release(self, fence: Fence) -> None:  # noqa: B027 (without a lease there is nothing to release)
        """Release the workflow of an attempt that ends without an outcome."""

    def refuse_waiting(self, key: str) -> None:  # noqa: B027 (others see the workflow by default)
        """Refuse to wait for what others do, where they cannot see the workflow.

        Raises:
            UsageError: nothing of it is committed before the caller commits.
        """

    def open_lease(self, session: Session) -> None:  # noqa: B027 (no lease by default)
        """Own what is claimed in this transaction."""

    def close_lease(self, session: Session) -> None:  # noqa: B027 (no lease by default)
        """Own nothing any more."""

    def transaction_retry(self) -> TransactionRetry:
        """Return the policy for what undoes a transaction: a lost connection is the caller's to see."""
        return TransactionRetry(outages=False)


class CommittedTransactions(SessionTransactions):
    """Commits each transaction, and extends the lease with the commits."""

    loss = "its lease ran out and another one has reclaimed it, or it was cancelled. What was committed before stands."
    others = " and wait for its result with a handle"

    def __init__(self, session: Session | AsyncSession, lease: timedelta) -> None:
        super().__init__(session)
        require_positive_duration(lease, "lease")
        self._lease = lease
        self._beat_at = 0.0

    @property
    @override
    def longest_pause(self) -> float:
        return self._lease.total_seconds() / 3

    @override
    def transaction(self, *, isolation_level: str | None = None) -> StepTransaction:
        return _LeasedTransaction(self.session, self.extend_lease, isolation_level=isolation_level)

    @override
    def open_lease(self, session: Session) -> None:
        name = f"executor {socket.gethostname()}:{os.getpid()}"
        workers.beat(session, worker_id=self.worker_id, name=name, queues=[], lease=self._lease)
        self._beat_at = time.monotonic()

    @override
    def require_usable(self) -> None:
        # SQLAlchemy has no public way to ask; without the attribute it raises by itself, after the first commit.
        if getattr(self.sync_session, "_trans_context_manager", None) is not None:
            raise SessionError(
                f"{self.session!r} is inside `with session.begin()`, which ends with the first commit, and an executor "
                "commits after each step: give it a session outside of one, or use joined(session)."
            )

    @override
    async def release(self, fence: Fence) -> None:
        # If the database does not let us, the workflow is reclaimed when the lease has run out.
        with contextlib.suppress(Exception, Interrupted):
            await in_session(self.session, Session.rollback)
            await self.transact(lambda session: self._release(session, fence))

    def _release(self, session: Session, fence: Fence) -> None:
        attempts.release(session, [fence])
        self.close_lease(session)

    def extend_lease(self, session: Session) -> None:
        """Extend the lease if a third of it has passed."""
        if self._beat_at and time.monotonic() - self._beat_at > self._lease.total_seconds() / 3:
            self.open_lease(session)

    @override
    def close_lease(self, session: Session) -> None:
        workers.end_lease(session, self.worker_id)
        self._beat_at = 0.0


class JoinedTransactions(SessionTransactions):
    """Sets a savepoint for each transaction; needs no lease, because nobody else sees the rows."""

    loss = (
        "a step has rolled back or closed the session, and with it the transaction that the caller had open. Leave "
        "both to the caller, or use begin_nested()."
    )
    others = ""
    commits = False

    @override
    def transaction(self, *, isolation_level: str | None = None) -> StepTransaction:
        return SavepointTransaction(self.session, isolation_level=isolation_level)

    @override
    def transaction_retry(self) -> TransactionRetry:
        # Its pauses hold the caller's transaction open, so not without an end.
        return TransactionRetry(conflicts=0, obstacles=10, outages=False)

    @override
    def refuse_waiting(self, key: str) -> None:
        raise UsageError(
            f"{key!r} would wait for what others do, and a joined executor's workflow is in the caller's transaction, "
            "where nobody sees it: send what it waits for before, let run_until_waiting() return where it waits, or "
            "give it to a worker."
        )


class _LeasedTransaction(StepTransaction):
    def __init__(
        self,
        injected: Session | AsyncSession,
        extend_lease: Callable[[Session], None],
        *,
        isolation_level: str | None,
    ) -> None:
        super().__init__(injected, isolation_level=isolation_level)
        self._extend_lease = extend_lease

    async def commit(self) -> None:
        await self.execute(self._extend_lease)
        await super().commit()


async def _escaping(write: Callable[[Row], Awaitable[None]], row: Row) -> None:
    """Write a row; where the database does not have the characters of its error, with these escaped.

    Raises:
        EncodingError: the database refuses what the row holds, and would do so again.
    """
    try:
        await write(row)
    except DBAPIError as error:
        if is_untranslatable(error) and row.escaped != row:
            await write(row.escaped)
        elif is_about_data(error):
            raise EncodingError(f"the database refuses what the workflow records: {first_line(error)}") from error
        else:
            raise


def _require_ownership(connectable: Connectable, attempt: Attempt) -> None:
    """Raise if the workflow is no longer this attempt's; the transaction extends the lease."""
    if not attempts.still_owned(connectable, [attempt.fence]):
        raise AttemptLost(attempt.workflow_id)


def _write_checkpoint(session: Session, checkpoint: Checkpoint) -> None:
    if steps.record(session, checkpoint) is Verdict.LOST:
        raise AttemptLost(checkpoint.fence.workflow_id)


def _suspend(session: Session, attempt: Attempt, suspension: Suspension) -> None:
    """Suspend the workflow; wait for whoever locks its row."""
    attempts.lock(session, attempt.fence)
    if attempts.write_batch(session, ends=[Suspend(attempt.fence, suspension.seconds, suspension.awaits)]).ends:
        raise AttemptLost(attempt.workflow_id)
    refresh_loaded(session, [attempt.workflow_id])


def _finish(session: Session, completion: Completion, transactions: SessionTransactions) -> None:
    if not attempts.finish(session, completion):
        raise AttemptLost(completion.fence.workflow_id)
    refresh_loaded(session, [completion.fence.workflow_id])
    transactions.close_lease(session)
