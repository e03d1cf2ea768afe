"""`Executor` and `AsyncExecutor`: what their callers see; what both do is in `inline`."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, ParamSpec, Self, TypeVar
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sqla_durable.api.callers import id_of, session_advice
from sqla_durable.api.functions import AsyncWorkflowFunction, WorkflowFunction
from sqla_durable.api.polling import refuse_event_loop
from sqla_durable.errors import ArgumentError, SessionError, UsageError
from sqla_durable.execution.inline import InlineExecution
from sqla_durable.execution.transactions import CommittedTransactions, JoinedTransactions
from sqla_durable.models import Workflow
from sqla_durable.operations.runtime import run_blocking
from sqla_durable.store import schema

P = ParamSpec("P")
R = TypeVar("R")

DEFAULT_LEASE = timedelta(minutes=5)


class Executor:
    """Executes workflows inline on a `Session`, committing after each step.

    ```python
    with SessionLocal() as session:
        receipt = Executor(session).run(checkout, order.id)
    ```

    The start commits what the session has pending, or rolls it back if it is refused. After a crash the workflow goes
    on where it was: on another `run` with the same key, or on any worker of its queue, once the lease has run out. The
    lease is extended with the commits, so it must be longer than the longest step.

    Args:
        session: the caller's session; it is committed, and not closed.
        lease: how long this executor owns a workflow after each commit.
    """

    def __init__(self, session: Session, *, lease: timedelta = DEFAULT_LEASE) -> None:
        given: object = session
        if not isinstance(given, Session):  # pyright: ignore[reportUnnecessaryIsInstance]
            other = isinstance(given, AsyncSession)
            advice = "Use AsyncExecutor for an AsyncSession." if other else session_advice(given)
            raise SessionError(f"Executor takes a Session, got {given!r}. {advice}")
        self._execution = InlineExecution(CommittedTransactions(session, lease))

    @classmethod
    def joined(cls, session: Session) -> Self:
        """Return an executor inside the session's transaction: each step is a savepoint, nothing is ever committed.

        Nothing is visible to others, workers included, until the caller commits; if the caller rolls back, nothing
        happened. For tests whose session rolls back, and for short work that is all or nothing.
        """
        executor = cls(session)
        executor._execution = InlineExecution(JoinedTransactions(session))
        return executor

    def run(self, workflow: WorkflowFunction[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Start the workflow, or continue the one with its key, execute it to its end, and return its result.

        Args:
            workflow: the workflow, with `options(key=...)` if it has an idempotency key.
            *args: its arguments.
            **kwargs: the same, by name.

        Raises:
            Exception: the workflow's own error, recorded before it is raised.
            WorkflowRunningError: somebody else holds a live lease on the workflow with this key.
            AttemptLostError: the lease ran out, or the workflow was cancelled; what was committed stands.
            UsageError: an event loop is running in this thread, or the workflow is `async def`.
            ArgumentError, EncodingError, SchemaError, SessionError: as `start`; nothing was started.
            DBAPIError: the database was lost; the workflow goes on once the lease has run out.
        """
        _require_kind(workflow, WorkflowFunction, instead="AsyncExecutor(async_session)")
        if not _on_async_engine(self._execution.sync_session):
            refuse_event_loop("Executor.run()", "use AsyncExecutor, or asyncio.to_thread")
        value: R = run_blocking(self._execution.run(workflow.definition, workflow.bind(*args, **kwargs)))
        return value

    def execute(self, workflow: WorkflowFunction[..., R], record: Workflow | UUID) -> R:
        """Execute a workflow that was started before and that nobody has claimed; see `run`.

        One that is suspended goes on if what it waits for is there, or its time has come.
        """
        _require_kind(workflow, WorkflowFunction, instead="AsyncExecutor(async_session)")
        if not _on_async_engine(self._execution.sync_session):
            refuse_event_loop("Executor.execute()", "use AsyncExecutor, or asyncio.to_thread")
        value: R = run_blocking(self._execution.execute_existing(workflow.definition, id_of(record)))
        return value

    def run_until_waiting(self, workflow: WorkflowFunction[P, Any], *args: P.args, **kwargs: P.kwargs) -> Workflow:
        """Start the workflow, or continue the one with its key, execute it until it waits, and return its record.

        ```python
        record = executor.run_until_waiting(approval, order.id)
        assert record.awaits == [{"signal": "approved"}]
        send_signal(session, record, "approved", "Ada")
        assert executor.execute(approval, record) == "approved by Ada"
        ```

        It waits for a signal, an update, a callback, a child, or for a time of more than a second: then it is a row, as
        it would be with a worker, and this returns, at once. `execute` or `execute_until_waiting` go on when what it
        waits for was sent, or the time has come (`testing.advance`). If it does not wait, the record is that of a
        workflow that has succeeded. The record is read in the session's transaction, which is left open.

        Raises:
            Exception: as `run`.
        """
        _require_kind(workflow, WorkflowFunction, instead="AsyncExecutor(async_session)")
        if not _on_async_engine(self._execution.sync_session):
            refuse_event_loop("Executor.run_until_waiting()", "use AsyncExecutor, or asyncio.to_thread")
        return run_blocking(self._execution.run_until_waiting(workflow.definition, workflow.bind(*args, **kwargs)))

    def execute_until_waiting(self, workflow: WorkflowFunction[..., Any], record: Workflow | UUID) -> Workflow:
        """Execute a workflow that was started before until it waits again; see `run_until_waiting`.

        Returns its record as it is, if what it waits for is not there.
        """
        _require_kind(workflow, WorkflowFunction, instead="AsyncExecutor(async_session)")
        if not _on_async_engine(self._execution.sync_session):
            refuse_event_loop("Executor.execute_until_waiting()", "use AsyncExecutor, or asyncio.to_thread")
        return run_blocking(self._execution.execute_until_waiting(workflow.definition, id_of(record)))


class AsyncExecutor:
    """Executes `async def` workflows inline on an `AsyncSession`, committing after each step. See `Executor`.

    ```python
    async with AsyncSessionLocal() as session:
        receipt = await AsyncExecutor(session).run(checkout, order.id)
    ```

    Steps that are executed at the same time (`asyncio.gather`) share the session: transactional ones take turns.
    """

    def __init__(self, session: AsyncSession, *, lease: timedelta = DEFAULT_LEASE) -> None:
        given: object = session
        if not isinstance(given, AsyncSession):  # pyright: ignore[reportUnnecessaryIsInstance]
            advice = "Use Executor for a Session." if isinstance(given, Session) else session_advice(given)
            raise SessionError(f"AsyncExecutor takes an AsyncSession, got {given!r}. {advice}")
        self._execution = InlineExecution(CommittedTransactions(session, lease))

    @classmethod
    def joined(cls, session: AsyncSession) -> Self:
        """Return an executor inside the session's transaction; see `Executor.joined`."""
        executor = cls(session)
        executor._execution = InlineExecution(JoinedTransactions(session))
        return executor

    async def run(self, workflow: AsyncWorkflowFunction[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Start the workflow, execute it to its end, and return its result. See `Executor.run`."""
        _require_kind(workflow, AsyncWorkflowFunction, instead="Executor(session)")
        value: R = await self._execution.run(workflow.definition, workflow.bind(*args, **kwargs))
        return value

    async def execute(self, workflow: AsyncWorkflowFunction[..., R], record: Workflow | UUID) -> R:
        """Execute a workflow that was started before and that nobody has claimed; see `Executor.run`."""
        _require_kind(workflow, AsyncWorkflowFunction, instead="Executor(session)")
        value: R = await self._execution.execute_existing(workflow.definition, id_of(record))
        return value

    async def run_until_waiting(
        self, workflow: AsyncWorkflowFunction[P, Any], *args: P.args, **kwargs: P.kwargs
    ) -> Workflow:
        """Start the workflow, execute it until it waits, and return its record. See `Executor.run_until_waiting`."""
        _require_kind(workflow, AsyncWorkflowFunction, instead="Executor(session)")
        return await self._execution.run_until_waiting(workflow.definition, workflow.bind(*args, **kwargs))

    async def execute_until_waiting(
        self, workflow: AsyncWorkflowFunction[..., Any], record: Workflow | UUID
    ) -> Workflow:
        """Execute a workflow that was started before until it waits again. See `Executor.execute_until_waiting`."""
        _require_kind(workflow, AsyncWorkflowFunction, instead="Executor(session)")
        return await self._execution.execute_until_waiting(workflow.definition, id_of(record))


def _on_async_engine(session: Session) -> bool:
    """Return whether the session is inside an `AsyncSession`: then blocking calls do not block the event loop."""
    return schema.engine_of(session).dialect.is_async


def _require_kind(workflow: object, kind: type, *, instead: str) -> None:
    if isinstance(workflow, (WorkflowFunction, AsyncWorkflowFunction)) and not isinstance(workflow, kind):
        form = "async def" if isinstance(workflow, AsyncWorkflowFunction) else "def"
        raise UsageError(f"workflow {workflow.name!r} is {form}: execute it with {instead}.")
    if not isinstance(workflow, kind):
        raise ArgumentError(f"an executor runs a function decorated with @durable.workflow, got {workflow!r}.")
