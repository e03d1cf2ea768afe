"""How the transactions of an executor end: committed one by one, or as savepoints inside the caller's transaction.

Functions of a `Session` are called in them, also where the caller has an `AsyncSession`.
"""

from __future__ import annotations

import contextlib
import copy
import os
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import ClassVar, Self, TypeAlias, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from typing_extensions import override
from uuid_utils.compat import uuid7

from sqla_durable.definitions.checks import require_positive_duration
from sqla_durable.errors import SessionError, UsageError
from sqla_durable.operations.transaction import SavepointTransaction, StepTransaction, in_session
from sqla_durable.operations.transaction_retries import Phase, Setback, TransactionRetry
from sqla_durable.store import Fence, attempts, workers
from sqla_durable.unwinding import Interrupted

T = TypeVar("T")
Pause: TypeAlias = "Callable[[float], Awaitable[None]]"


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
