"""The transaction that a step's writes and its checkpoint share, on a session of either kind, and the guard over it.

Everything is a function of a blocking `Session`: `AsyncSession.run_sync` leads it into asyncio, so that sync and async
differ in one line. Source: SQLAlchemy, "Synopsis - Core / ORM", Asynchronous I/O.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.session import SessionTransactionState

from sqla_durable.definitions.log import Log
from sqla_durable.definitions.redaction import brief
from sqla_durable.definitions.registry import ISOLATION_LEVELS
from sqla_durable.errors import SessionError, UsageError
from sqla_durable.store import Checkpoint, Verdict, bind_arguments, connection_of, schema, steps

T = TypeVar("T")

log = Log("sqla_durable.step")


async def in_session(session: Session | AsyncSession, statement: Callable[[Session], T]) -> T:
    """Call a function of a `Session`; suspends only where the session is an `AsyncSession`."""
    if isinstance(session, AsyncSession):
        return await session.run_sync(statement)
    return statement(session)


class StepTransaction:
    """A transaction of one session, from `begin` to `commit`, `rollback` or `discard`.

    Attributes:
        injected: the session, as the step's function gets it.
        session: the same, or the `Session` inside it.
        record: records the step's checkpoint, as the last statement of the transaction.
    """

    record: Callable[[Session, Checkpoint], Verdict] = staticmethod(steps.record_last)

    def __init__(self, injected: Session | AsyncSession, *, isolation_level: str | None = None) -> None:
        self.injected = injected
        self.session = injected.sync_session if isinstance(injected, AsyncSession) else injected
        self.isolation_level = isolation_level

    async def begin(self) -> None:
        """Begin, unless the session is already in a transaction."""
        await self.execute(partial(_begin, isolation_level=self.isolation_level))

    async def execute(self, statement: Callable[[Session], T]) -> T:
        """Call a store function with the blocking session."""
        return await in_session(self.injected, statement)

    async def commit(self) -> None:
        """Commit."""
        await self.execute(_commit)

    async def rollback(self) -> None:
        """Roll back."""
        await self.execute(Session.rollback)

    async def discard(self) -> None:
        """Roll back; where the engine opened the connection, it is not used again."""
        await self.rollback()


class ClosingTransaction(StepTransaction):
    """A transaction whose session is closed when it ends."""

    async def commit(self) -> None:
        """Commit, and close the session."""
        await self.execute(_commit_and_close)

    async def rollback(self) -> None:
        """Roll back, and close the session."""
        await self.execute(Session.close)

    async def discard(self) -> None:
        """Close the session and its connection."""
        await self.execute(Session.invalidate)


class SavepointTransaction(StepTransaction):
    """A savepoint inside the caller's open transaction, which continues afterwards."""

    record = staticmethod(steps.record)

    async def begin(self) -> None:
        """Set the savepoint, after flushing what the caller has pending."""
        await self.execute(schema.require_transaction)
        self._savepoint: SessionTransaction = await self.execute(Session.begin_nested)
        if self.isolation_level is not None:
            try:
                await self.execute(partial(_require_isolation, isolation_level=self.isolation_level))
            except BaseException:
                await self.rollback()
                raise

    async def commit(self) -> None:
        """Release the savepoint; durable when the caller commits."""
        await self.execute(lambda _: _end(self._savepoint, self._savepoint.commit))

    async def rollback(self) -> None:
        """Roll back to the savepoint; the caller's transaction continues."""
        await self.execute(lambda _: self._savepoint.rollback())


ToItsEnd: TypeAlias = Callable[[Coroutine[Any, Any, None]], Awaitable[None]]
"""Awaits what ends a transaction, whether that may be cancelled in its middle or not."""


async def interruptibly(coroutine: Coroutine[Any, Any, None]) -> None:
    """Await what ends a transaction; cancelled meanwhile, it ends in its middle."""
    await coroutine


class ReleasingTransaction(StepTransaction):
    """A transaction that releases a lock or a semaphore when it ends.

    Ending it twice is a no-op: a task that is cancelled while it commits also rolls back, and by then its session may
    be in another transaction.

    Args:
        inner: the transaction itself.
        release: releases the lock, or the place.
        commits: awaits the commit.
        rolls_back: awaits the rollback, or what discards the transaction.
    """

    def __init__(
        self,
        inner: StepTransaction,
        release: Callable[[], None],
        *,
        commits: ToItsEnd = interruptibly,
        rolls_back: ToItsEnd = interruptibly,
    ) -> None:
        super().__init__(inner.injected)
        self.record = inner.record
        self._inner = inner
        self._release = release
        self._commits = commits
        self._rolls_back = rolls_back
        self._holds = True

    async def begin(self) -> None:
        """Begin; release the lock if that fails."""
        try:
            await self._inner.begin()
        except BaseException:
            self._release_once()
            raise

    async def commit(self) -> None:
        """Commit, and release the lock if that succeeds: otherwise `rollback` does."""
        await self._commits(self._commit())

    async def rollback(self) -> None:
        """Roll back, and release the lock."""
        if self._holds:
            await self._rolls_back(self._end(self._inner.rollback))

    async def discard(self) -> None:
        """Discard, and release the lock."""
        if self._holds:
            await self._rolls_back(self._end(self._inner.discard))

    async def _commit(self) -> None:
        await self._inner.commit()
        self._release_once()

    async def _end(self, end: Callable[[], Awaitable[None]]) -> None:
        try:
            await end()
        finally:
            self._release_once()

    def _release_once(self) -> None:
        if self._holds:
            self._holds = False
            self._release()


def _begin(session: Session, *, isolation_level: str | None) -> None:
    """Begin, and connect at once, so that a lost database is noticed before the user's code is called."""
    begun_before = session.in_transaction()
    if not begun_before:
        session.begin()
    try:
        if begun_before and isolation_level is not None:
            _require_isolation(session, isolation_level=isolation_level)
        require_transaction(session, isolation_level=None if begun_before else isolation_level)
    except BaseException:
        session.rollback()
        raise


def _require_isolation(session: Session, *, isolation_level: str) -> None:
    """Refuse a transaction that began with a weaker level: PostgreSQL can set it only at the beginning."""
    begun_with = connection_of(session).get_isolation_level()
    strong_enough = ISOLATION_LEVELS[ISOLATION_LEVELS.index(isolation_level) :]
    if begun_with not in strong_enough:
        raise SessionError(
            f"a step asks for {isolation_level} and {session!r} is already in a {begun_with} transaction: "
            f"begin it with session.connection(execution_options={{'isolation_level': {isolation_level!r}}})."
        )


def require_transaction(session: Session, *, isolation_level: str | None = None) -> None:
    """Begin with this isolation level; refuse a session in AUTOCOMMIT, whose statements commit one by one.

    Raises:
        SessionError: its engine is in AUTOCOMMIT.
    """
    options = None if isolation_level is None else {"isolation_level": isolation_level}
    session.connection(bind_arguments=bind_arguments(), execution_options=options)
    schema.require_transaction(session)


def _commit_and_close(session: Session) -> None:
    _commit(session)
    session.close()


def _commit(session: Session) -> None:
    _end(session.get_transaction(), session.commit)


def _end(transaction: SessionTransaction | None, commit: Callable[[], None]) -> None:
    """Commit; an error of an `after_commit` listener is logged, because the transaction is committed already.

    SQLAlchemy leaves such a session in its transaction, where not even a rollback is possible.
    """
    try:
        commit()
    except BaseException as error:
        # SQLAlchemy has no public attribute for it.
        if transaction is None or getattr(transaction, "_state", None) is not SessionTransactionState.COMMITTED:
            raise
        session = transaction.session
        transaction.close()
        if session.expire_on_commit and not transaction.nested:
            session.expire_all()
        if not isinstance(error, Exception):
            raise
        log.warning(
            "a listener of after_commit raised %s; the transaction is committed nevertheless",
            brief(error),
            exc_info=True,
        )


# Not in Session.info, which is the user's: a step that clears it must not remove its guard.
_watched: WeakKeyDictionary[Session, TransactionGuard] = WeakKeyDictionary()


class TransactionGuard:
    """Prevents a step from ending its own transaction, and from using two databases in it.

    A commit by the step is refused before it happens, because its writes would be durable without the checkpoint. A
    rollback or a close is noticed afterwards: then nothing of the step is written. Savepoints are allowed.
    """

    def __init__(self, session: Session, *, step: str) -> None:
        self._session = session
        self._step = step
        self._transaction = _innermost(session)
        self._connections = 1  # the one for the checkpoint is there from the beginning
        self._outer = _watched.get(session)
        _watched[session] = self

    def check(self) -> None:
        """Stop guarding, and check that the step has left its transaction open and usable.

        Raises:
            UsageError: it is no longer the transaction that the step received, or a flush in it failed.
        """
        transaction = self._transaction
        self.leave()
        if not any(each is transaction for each in _open(self._session)):
            raise self._error("rolled back or closed its session", "leave both to the engine, or use begin_nested()")
        if transaction is None or not transaction.is_active:
            raise self._error("went on after a failed flush", "do not catch its error, or flush inside begin_nested()")

    def leave(self) -> None:
        """Stop guarding."""
        if self._transaction is not None:
            self._transaction = None
            if self._outer is None:
                _watched.pop(self._session, None)
            else:
                _watched[self._session] = self._outer

    def refuse_commit(self) -> None:
        """Refuse a commit of the step's transaction, or of the whole one around it.

        Raises:
            UsageError: this is one of them.
        """
        if _innermost(self._session) in (self._transaction, self._session.get_transaction()):
            raise self._error("committed its session", "return, and the engine commits both together")

    def refuse_second(self, transaction: SessionTransaction) -> None:
        """Refuse a second connection.

        Raises:
            UsageError: this is one.
        """
        self._connections += not transaction.nested
        if self._connections > 1:
            raise self._error("uses two databases in one session", "write to the second one in a step of its own")

    def _error(self, what: str, instead: str) -> UsageError:
        return UsageError(f"step {self._step!r} {what}, but its checkpoint must commit with its writes: {instead}.")


def is_step_session(session: Session) -> bool:
    """Return whether the session belongs to a step that is being executed."""
    return session in _watched


# For all sessions: to add and remove a listener of one takes forty microseconds in every step.
@event.listens_for(Session, "before_commit")
def _before_commit(session: Session) -> None:
    guard = _watched.get(session)
    if guard is not None:
        guard.refuse_commit()


@event.listens_for(Session, "after_begin")
def _after_begin(session: Session, transaction: SessionTransaction, _connection: Connection) -> None:
    guard = _watched.get(session)
    if guard is not None:
        guard.refuse_second(transaction)


def _innermost(session: Session) -> SessionTransaction | None:
    return session.get_nested_transaction() or session.get_transaction()


def _open(session: Session) -> list[SessionTransaction]:
    found: list[SessionTransaction] = []
    transaction = _innermost(session)
    while transaction is not None:
        found.append(transaction)
        transaction = transaction.parent
    return found
