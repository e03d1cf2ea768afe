"""The transaction that a step's writes and its checkpoint share, on a session of either kind.

Everything is a function of a blocking `Session`: `AsyncSession.run_sync` leads it into asyncio, so that sync and async
differ in one line. Source: SQLAlchemy, "Synopsis - Core / ORM", Asynchronous I/O.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, TypeAlias, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.session import SessionTransactionState

from sqla_durable.definitions.log import Log
from sqla_durable.definitions.redaction import brief
from sqla_durable.definitions.registry import ISOLATION_LEVELS
from sqla_durable.errors import SessionError
from sqla_durable.store import Checkpoint, Verdict, bind_arguments, connection_of, schema, steps

T = TypeVar("T")

log = Log("sqla_durable.step")


async def in_session(session: Session | AsyncSession, statement: Callable[[Session], T]) -> T:
    """Call a function of a `Session`; suspends only where the session is an `AsyncSession`."""
    if isinstance(session, AsyncSession):
        return await session.run_sync(statement)
    return statement(session)


class StepTransaction:
    """A transaction of the session that is given, from `begin` to `commit`, `rollback` or `discard`.

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
        """Begin, unless the session has begun already."""
        await self.execute(partial(_begin, isolation_level=self.isolation_level))

    async def execute(self, statement: Callable[[Session], T]) -> T:
        """Call a store function with the session."""
        return await in_session(self.injected, statement)

    async def commit(self) -> None:
        """Commit."""
        await self.execute(_commit)

    async def rollback(self) -> None:
        """Roll back."""
        await self.execute(Session.rollback)

    async def discard(self) -> None:
        """Roll back, and do not use the connection again where it is the engine's own."""
        await self.rollback()


class ClosingTransaction(StepTransaction):
    """A transaction of a session that lives only for it."""

    async def commit(self) -> None:
        """Commit, and close the session for good."""
        await self.execute(_commit_and_close)

    async def rollback(self) -> None:
        """Roll back, and close the session for good."""
        await self.execute(Session.close)

    async def discard(self) -> None:
        """Close the session and its connection for good."""
        await self.execute(Session.invalidate)


class SavepointTransaction(StepTransaction):
    """A savepoint inside the transaction that the caller has open, and goes on with."""

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
        """Roll back to the savepoint; the caller's transaction goes on."""
        await self.execute(lambda _: self._savepoint.rollback())


ToItsEnd: TypeAlias = Callable[[Coroutine[Any, Any, None]], Awaitable[None]]
"""Awaits what ends a transaction, whether that may be cancelled in its middle or not."""


async def interruptibly(coroutine: Coroutine[Any, Any, None]) -> None:
    """Await what ends a transaction; cancelled meanwhile, it ends in its middle."""
    await coroutine


class HeldTransaction(StepTransaction):
    """A transaction that holds a lock or a place in a semaphore until it ends.

    What has ended holds nothing, and its session may be in another's transaction by then: to end it again does nothing,
    as where a task is cancelled while it commits, and goes on to roll back.

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
    """Begin with the connection that the checkpoint needs: then a lost database is seen before the user's code."""
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
    """Refuse a transaction that has begun with a weaker level: PostgreSQL changes it only at the beginning."""
    begun_with = connection_of(session).get_isolation_level()
    strong_enough = ISOLATION_LEVELS[ISOLATION_LEVELS.index(isolation_level) :]
    if begun_with not in strong_enough:
        raise SessionError(
            f"a step asks for {isolation_level} and {session!r} is already in a transaction that is {begun_with}: "
            f"begin it with session.connection(execution_options={{'isolation_level': {isolation_level!r}}})."
        )


def require_transaction(session: Session, *, isolation_level: str | None = None) -> None:
    """Refuse a session whose statements commit by themselves; begin with this isolation level.

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
    """Commit; what a listener of `after_commit` raises undoes nothing, and is logged.

    SQLAlchemy leaves such a session in its transaction, where nothing can be done any more, not even a rollback.
    """
    try:
        commit()
    except BaseException as error:
        # There is no public way to ask.
        if transaction is None or getattr(transaction, "_state", None) is not SessionTransactionState.COMMITTED:
            raise
        session = transaction.session
        transaction.close()
        if session.expire_on_commit and not transaction.nested:
            session.expire_all()
        if not isinstance(error, Exception):
            raise
        log.warning("a listener of after_commit has raised %s; what was committed stands", brief(error), exc_info=True)
