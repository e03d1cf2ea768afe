"""Where an executor's attempts record: on the caller's own session, which one operation uses at a time."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from typing_extensions import override

from sqla_durable.definitions.database_errors import first_line, is_about_data, is_untranslatable
from sqla_durable.definitions.registry import StepDefinition
from sqla_durable.errors import EncodingError, UsageError
from sqla_durable.execution.transactions import SessionTransactions
from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.calls import Position
from sqla_durable.operations.runtime import Recorder
from sqla_durable.operations.suspending import Suspension, Wait, Waker
from sqla_durable.operations.transaction import ReleasingTransaction, StepTransaction, in_session
from sqla_durable.operations.transaction_retries import TransactionRetry
from sqla_durable.runtime.waiting import InGreenlet, InThread, OnLoop, Waiting
from sqla_durable.store import (
    Checkpoint,
    Completion,
    Connectable,
    Suspend,
    Verdict,
    attempts,
    refresh_loaded,
    schema,
    steps,
)
from sqla_durable.unwinding import AttemptLost

T = TypeVar("T")
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
