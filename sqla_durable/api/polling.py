"""Waiting from outside a workflow for what others commit: polls in short transactions, and the handles that use them.

A poll has a transaction of its own, so it sees what workers commit and keeps nothing open between two polls.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Generic, TypeAlias, TypeVar
from uuid import UUID

from sqlalchemy import Engine
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable.api.sessions import explain_missing_rights, require_async_session, require_sync_session
from sqla_durable.definitions.checks import require_duration
from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.definitions.registry import WorkflowDefinition
from sqla_durable.errors import ResultTimeoutError, SessionError, UsageError
from sqla_durable.models.base import WorkflowStatus
from sqla_durable.operations.workflow import WorkflowOutcome
from sqla_durable.store import schema, workflows
from sqla_durable.store.schema import autocommit

T = TypeVar("T")
R = TypeVar("R", covariant=True)

Source: TypeAlias = "Session | sessionmaker[Session] | AsyncSession | async_sessionmaker[AsyncSession]"
"""Where to poll: on the engine of a session, which is not used itself, or of a sessionmaker."""

SHORTEST, LONGEST = 0.001, 0.25  # seconds
_SHARE = 0.25
"""A pause is this share of the time waited so far: what comes soon is seen soon, and long waits poll seldom."""


def pauses(timeout: timedelta | None, *, shortest: float = SHORTEST) -> Iterator[float]:
    """Yield the seconds of the pauses between polls, until the time is up.

    Raises:
        ArgumentError: the timeout is no timedelta.
    """
    if timeout is not None:
        require_duration(timeout, "timeout")
    began = time.monotonic()
    while timeout is None or time.monotonic() < began + timeout.total_seconds():
        yield max(shortest, min(_SHARE * (time.monotonic() - began), LONGEST))


@contextmanager
def explain_exhausted_pool() -> Generator[None]:
    """Add to the error of an exhausted pool why a connection was needed."""
    try:
        yield
    except PoolTimeoutError as error:
        error.add_note(
            "This polls with a connection of its own from the pool: close the session before, or raise pool_size."
        )
        raise


def refuse_event_loop(what: str, instead: str) -> None:
    """Refuse a blocking call in a running event loop, which would stop everything else in it.

    Raises:
        UsageError: an event loop is running in this thread.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise UsageError(f"{what} would block the event loop that is running in this thread: {instead}.")


def session_of(source: Source, *, what: str) -> Session | AsyncSession:
    """Return a session of the source, for its engine; scoped sessions and the like are sources too.

    Raises:
        SessionError: there is none.
    """
    found: object = source() if callable(source) else source
    if not isinstance(found, (Session, AsyncSession)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise SessionError(f"{what} takes a Session, an AsyncSession or a sessionmaker first, got {source!r}.")
    return found


@dataclass(frozen=True, slots=True)
class PollingEngine:
    """An engine on which to poll, each time in a session and a transaction of its own."""

    engine: Engine

    @classmethod
    def of_sync(cls, source: Source, *, name: str) -> PollingEngine:
        """Find the engine of a `Session` or its maker, for a function of `sqla_durable`.

        Raises:
            SessionError: it is an async one, or none, or the engine is not PostgreSQL's.
        """
        session = session_of(source, what=f"{name}()")
        require_sync_session(session, name)
        return cls.of(session)

    @classmethod
    def of_async(cls, source: Source, *, name: str) -> PollingEngine:
        """Find the engine of an `AsyncSession` or its maker, for a function of `sqla_durable.asyncio`.

        Raises:
            SessionError: it is a sync one, or none, or the engine is not PostgreSQL's.
        """
        session = session_of(source, what=f"{name}()")
        require_async_session(session, name)
        return cls.of(session)

    @classmethod
    def of(cls, session: Session | AsyncSession) -> PollingEngine:
        """Find the engine of a session.

        Raises:
            SessionError: it is not PostgreSQL's.
        """
        sync_session = session.sync_session if isinstance(session, AsyncSession) else session
        engine = schema.engine_of(sync_session)
        return cls(engine.execution_options(**autocommit(engine)))

    def read(self, statement: Callable[[Session], T]) -> T:
        """Call a function of a session."""
        with explain_missing_rights("caller"), explain_exhausted_pool(), Session(self.engine) as session:
            return _required(session, statement)

    async def read_async(self, statement: Callable[[Session], T]) -> T:
        """Call a function of the session inside an `AsyncSession`."""
        with explain_missing_rights("caller"), explain_exhausted_pool():
            async with AsyncSession(AsyncEngine(self.engine)) as session:
                return await session.run_sync(_required, statement)


def _required(session: Session, statement: Callable[[Session], T]) -> T:
    schema.require(session)
    return statement(session)


class _BaseHandle(Generic[R]):
    def __init__(self, definition: WorkflowDefinition, engine: PollingEngine, workflow_id: UUID) -> None:
        self._definition = definition
        self._engine = engine
        self.workflow_id = workflow_id
        self._seen: WorkflowStatus | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of workflow {self._definition.name!r} {self.workflow_id}>"

    def _outcome(self, session: Session) -> WorkflowOutcome | None:
        """Read the outcome; None while there is none."""
        state = workflows.state(session, self.workflow_id)
        self._definition.require_record(state.name, self.workflow_id)
        self._seen = state.status
        return WorkflowOutcome(state) if state.status.finished else None

    def _pauses(self, timeout: timedelta | None) -> Iterator[float]:
        """Yield the seconds of the pauses between polls; raise when the time is up."""
        yield from pauses(timeout)
        raise ResultTimeoutError(
            f"workflow {self._definition.name!r} {self.workflow_id} has no outcome after {timeout}; it is "
            f"{self._seen}, and goes on. Is a worker running for its queue, "
            f"{self._definition.options.queue!r} by default?",
            workflow_id=self.workflow_id,
        )


class Handle(_BaseHandle[R]):
    """Waits for a workflow in sync code.

    ```python
    handle = checkout.handle(SessionLocal, workflow.id)
    receipt = handle.result(timeout=timedelta(seconds=30))
    ```
    """

    def result(self, timeout: timedelta | None = None) -> R:
        """Wait for the workflow to finish; return its result or raise its error.

        Uses short transactions of its own; takes no lock.

        Args:
            timeout: how long to wait; None waits as long as it takes.

        Raises:
            Exception: the workflow's own error, where its type is known and imported here.
            WorkflowFailedError: the same, where it is not.
            WorkflowCancelledError, MaxAttemptsError: it was cancelled, or its workers died too often.
            WorkflowTimeoutError: it was not finished at its deadline.
            ResultTimeoutError: it has no outcome yet.
            NotFoundError: there is no such workflow, or its start is not committed.
            ArgumentError: the record is of another workflow.
            DecodingError: the recorded result does not fit the annotation that the code has now.
            SchemaError, SessionError: the database does not hold the tables.
            UsageError: this was called in a running event loop, which it would block.
        """
        name = self._definition.name
        refuse_event_loop("Handle.result()", f"await {name}.handle(async_sessionmaker, ...).result()")
        pauses = self._pauses(timeout)
        while (outcome := self._engine.read(self._outcome)) is None:
            time.sleep(next(pauses))
        value: R = outcome.value(self._definition)
        return value


class AsyncHandle(_BaseHandle[R]):
    """Waits for a workflow in async code.

    ```python
    handle = checkout.handle(AsyncSessionLocal, workflow.id)
    receipt = await handle.result(timeout=timedelta(seconds=30))
    ```

    `await handle` is `await handle.result()`.
    """

    async def result(self, timeout: timedelta | None = None) -> R:  # noqa: ASYNC109 (durable work is not cancelled by it)
        """Wait for the workflow to finish; return its result or raise its error. See `Handle.result`."""
        pauses = self._pauses(timeout)
        while (outcome := await self._engine.read_async(self._outcome)) is None:  # noqa: ASYNC110 (it waits for other processes)
            await asyncio.sleep(next(pauses))
        value: R = outcome.value(self._definition)
        return value

    def __await__(self) -> Generator[Any, None, R]:
        return self.result().__await__()
