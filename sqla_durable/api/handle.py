"""Waiting for the outcome of a workflow, from anywhere that reaches its database.

A handle polls in short transactions of its own, so that it sees what workers commit and holds nothing open.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator, Iterator
from datetime import timedelta
from typing import Any, Generic, TypeVar
from uuid import UUID

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

import sqla_durable.api.polling as polling
from sqla_durable.api.callers import noting_rights
from sqla_durable.definitions.registry import WorkflowDefinition
from sqla_durable.errors import ResultTimeoutError, UsageError
from sqla_durable.models.status import WorkflowStatus
from sqla_durable.operations.workflow import Outcome
from sqla_durable.store import schema, workflows
from sqla_durable.store.schema import alone

R = TypeVar("R", covariant=True)


class _BaseHandle(Generic[R]):
    def __init__(self, definition: WorkflowDefinition, engine: Engine, workflow_id: UUID) -> None:
        self._definition = definition
        self._engine = alone(engine)
        self.workflow_id = workflow_id
        self._seen: WorkflowStatus | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of workflow {self._definition.name!r} {self.workflow_id}>"

    def _outcome(self, session: Session) -> Outcome | None:
        """Read the outcome; None while there is none."""
        schema.require(session)
        standing = workflows.state(session, self.workflow_id)
        self._definition.require_record(standing.name, self.workflow_id)
        self._seen = standing.status
        return Outcome(standing) if standing.status.finished else None

    def _pauses(self, timeout: timedelta | None) -> Iterator[float]:
        """Give the pauses between polls; end with the error when the time is up."""
        yield from polling.pauses(timeout)
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
        while (outcome := self._poll()) is None:
            time.sleep(next(pauses))
        value: R = outcome.value(self._definition)
        return value

    def _poll(self) -> Outcome | None:
        with noting_rights("caller"), polling.noting_pool(), Session(self._engine) as session:
            return self._outcome(session)


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
        while (outcome := await self._poll()) is None:  # noqa: ASYNC110 (it waits for other processes)
            await asyncio.sleep(next(pauses))
        value: R = outcome.value(self._definition)
        return value

    def __await__(self) -> Generator[Any, None, R]:
        return self.result().__await__()

    async def _poll(self) -> Outcome | None:
        with noting_rights("caller"), polling.noting_pool():
            async with AsyncSession(AsyncEngine(self._engine)) as session:
                return await session.run_sync(self._outcome)


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
