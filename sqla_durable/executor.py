"""Executing a workflow inline, durable on the caller's own session: committing per step, or joined to a transaction.

The story is told once, in `_Story`, over functions of a `Session`; `AsyncSession.run_sync` leads them into asyncio.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, ParamSpec, Self, TypeVar
from uuid import UUID

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only
from uuid_utils.compat import uuid7

from sqla_durable.errors import (
    ArgumentError,
    AttemptLost,
    AttemptLostError,
    Interrupted,
    SessionError,
    SyncAsyncError,
    WorkflowRunningError,
)
from sqla_durable.functions import AsyncWorkflowFunction, WorkflowFunction, id_of
from sqla_durable.handle import refuse_event_loop
from sqla_durable.models import Workflow
from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.runtime import StepCall, run_blocking
from sqla_durable.operations.transaction import HeldTransaction, SavepointTransaction, StepTransaction, in_session
from sqla_durable.operations.workflow import Outcome, run_workflow
from sqla_durable.registry import SessionKind, WorkflowDefinition
from sqla_durable.retry import TransientRetry, is_transient
from sqla_durable.runtime import AsyncRuntime, BlockingRuntime
from sqla_durable.start import BoundWorkflow, start
from sqla_durable.status import WorkflowStatus
from sqla_durable.store import Checkpoint, Claimed, Completion, Verdict, queues, schema, steps, workers, workflows

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

DEFAULT_LEASE = timedelta(minutes=5)
MAX_ATTEMPTS = 10


class Executor:
    """Executes workflows inline on a `Session`, committing after each step.

    ```python
    with SessionLocal() as session:
        receipt = Executor(session).run(checkout, order.id)
    ```

    The start commits what the session has pending. After a crash the workflow goes on where it was: on another
    `run` with the same key, or on any worker of its queue, once the lease has run out. The lease is extended with
    each commit, so it must be longer than the longest step.

    Args:
        session: the caller's session; it is committed, and not closed.
        lease: how long this executor owns a workflow after each commit.
    """

    def __init__(self, session: Session, *, lease: timedelta = DEFAULT_LEASE) -> None:
        if not isinstance(session, Session):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SessionError(f"Executor takes a Session, got {session!r}: use AsyncExecutor for an AsyncSession.")
        self._story: _Story = _CommittingStory(session, lease)

    @classmethod
    def joined(cls, session: Session) -> Self:
        """Give an executor inside the session's transaction: each step is a savepoint, nothing is ever committed.

        Nothing is visible to others, workers included, until the caller commits; if the caller rolls back, nothing
        happened. For tests whose session rolls back, and for short jobs that are all or nothing.
        """
        executor = cls(session)
        executor._story = _JoinedStory(session)
        return executor

    def run(self, workflow: WorkflowFunction[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Start the workflow, or take up the one with its key, execute it to its end, and return its result.

        Args:
            workflow: the workflow, with `options(key=...)` if it has an idempotency key.
            *args: its arguments.
            **kwargs: the same, by name.

        Raises:
            Exception: the workflow's own error, recorded before it is raised.
            WorkflowRunningError: somebody else holds a live lease on the workflow with this key.
            AttemptLostError: the lease ran out, or the workflow was cancelled; what was committed stands.
            SyncAsyncError: an event loop is running in this thread, or the workflow is `async def`.
            ArgumentError, EncodingError, SchemaError, SessionError: as `start`; nothing was started.
            DBAPIError: the database was lost; the workflow goes on once the lease has run out.
        """
        _require_kind(workflow, WorkflowFunction, instead="AsyncExecutor(async_session)")
        if not _on_async_engine(self._story.sync_session):
            refuse_event_loop("Executor.run()", "use AsyncExecutor, or asyncio.to_thread")
        value: R = run_blocking(self._story.run(workflow.definition, workflow.bind(*args, **kwargs)))
        return value

    def execute(self, workflow: WorkflowFunction[..., R], record: Workflow | UUID) -> R:
        """Execute a workflow that was started before and that nobody has claimed; see `run`."""
        _require_kind(workflow, WorkflowFunction, instead="AsyncExecutor(async_session)")
        if not _on_async_engine(self._story.sync_session):
            refuse_event_loop("Executor.execute()", "use AsyncExecutor, or asyncio.to_thread")
        value: R = run_blocking(self._story.execute_existing(workflow.definition, id_of(record)))
        return value


class AsyncExecutor:
    """Executes `async def` workflows inline on an `AsyncSession`, committing after each step. See `Executor`.

    ```python
    async with AsyncSessionLocal() as session:
        receipt = await AsyncExecutor(session).run(checkout, order.id)
    ```

    Steps that are executed at the same time (`asyncio.gather`) share the session: transactional ones take turns.
    """

    def __init__(self, session: AsyncSession, *, lease: timedelta = DEFAULT_LEASE) -> None:
        if not isinstance(session, AsyncSession):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SessionError(f"AsyncExecutor takes an AsyncSession, got {session!r}: use Executor for a Session.")
        self._story: _Story = _CommittingStory(session, lease)

    @classmethod
    def joined(cls, session: AsyncSession) -> Self:
        """Give an executor inside the session's transaction; see `Executor.joined`."""
        executor = cls(session)
        executor._story = _JoinedStory(session)
        return executor

    async def run(self, workflow: AsyncWorkflowFunction[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Start the workflow, execute it to its end, and return its result. See `Executor.run`."""
        _require_kind(workflow, AsyncWorkflowFunction, instead="Executor(session)")
        value: R = await self._story.run(workflow.definition, workflow.bind(*args, **kwargs))
        return value

    async def execute(self, workflow: AsyncWorkflowFunction[..., R], record: Workflow | UUID) -> R:
        """Execute a workflow that was started before and that nobody has claimed; see `Executor.run`."""
        _require_kind(workflow, AsyncWorkflowFunction, instead="Executor(session)")
        value: R = await self._story.execute_existing(workflow.definition, id_of(record))
        return value


class _Story:
    """Start or find, claim, execute, finish: on a session of either kind."""

    def __init__(self, session: Session | AsyncSession) -> None:
        self.session = session
        self.worker_id = uuid7()

    @property
    def sync_session(self) -> Session:
        return self.session.sync_session if isinstance(self.session, AsyncSession) else self.session

    async def run(self, definition: WorkflowDefinition, bound: BoundWorkflow) -> Any:
        """Start or find the workflow, and bring it to its end."""
        if bound.new.delay is not None or bound.new.wake_at is not None:
            raise ArgumentError("an executor executes now: start a workflow with delay= or at= for a worker.")
        return await self._bring_to_end(definition, lambda session: start(session, bound).id)

    async def execute_existing(self, definition: WorkflowDefinition, workflow_id: UUID) -> Any:
        """Bring a workflow that is there already to its end."""
        return await self._bring_to_end(definition, lambda _: workflow_id)

    async def _bring_to_end(self, definition: WorkflowDefinition, find: Callable[[Session], UUID]) -> Any:
        taken = await self.transact(lambda session: self._take(session, find))
        if isinstance(taken, Claimed):
            taken = await self._execute(definition, Attempt(taken))
        return taken.value(definition)

    def _take(self, session: Session, find: Callable[[Session], UUID]) -> Claimed | Outcome:
        """Claim the workflow, or give the outcome that it has."""
        schema.require(session)
        workflow_id = find(session)
        session.flush()
        self.open_lease(session)
        standing = workflows.standing(session, workflow_id)
        if standing.status.finished:
            return Outcome(standing)
        if standing.status is WorkflowStatus.RUNNING:
            workers.reclaim_one(session, workflow_id, max_attempts=MAX_ATTEMPTS)
        claimed = queues.claim_one(session, workflow_id, worker_id=self.worker_id, token=uuid7())
        if claimed is not None:
            return claimed
        raise WorkflowRunningError(
            f"workflow {standing.name!r} {workflow_id} is {standing.status}, and not to be claimed now: a worker or "
            "an executor holds a live lease on it, or it waits. Wait for its result with a handle.",
            workflow_id=workflow_id,
        )

    async def _execute(self, definition: WorkflowDefinition, attempt: Attempt) -> Outcome:
        runtime = self._runtime(attempt)
        try:
            completion = await run_workflow(runtime, definition, lambda given: runtime.body(definition, given))
        except AttemptLost:
            raise AttemptLostError(
                f"workflow {attempt.name!r} {attempt.workflow_id} is no longer this executor's: its lease ran out "
                "and another took over, or it was cancelled. What was committed before stands.",
                workflow_id=attempt.workflow_id,
            ) from None
        except Interrupted as interrupted:
            await self._hand_back(attempt)
            raise interrupted.error from None
        except BaseException:
            await self._hand_back(attempt)
            raise
        return Outcome.of(attempt.name, completion)

    def _runtime(self, attempt: Attempt) -> _BlockingInline | _AsyncInline:
        return (_AsyncInline if isinstance(self.session, AsyncSession) else _BlockingInline)(self, attempt)

    async def _hand_back(self, attempt: Attempt) -> None:
        """Release the workflow if the database lets us; otherwise it is reclaimed when the lease has run out."""
        with contextlib.suppress(DBAPIError, Interrupted):
            await in_session(self.session, Session.rollback)
            await self.transact(lambda session: workflows.release(session, [attempt.fence]))

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

    async def write(self, statement: Callable[[Session], None]) -> None:
        """Write what the engine records; a lost database interrupts the workflow instead of failing it."""
        again = self.transient_retry()
        while True:
            try:
                await self.transact(statement)
            except Exception as error:
                if again.wait_before_next(error) is None:
                    raise (Interrupted(error) if is_transient(error) else error) from error
            else:
                return

    def transaction(self) -> StepTransaction:
        """Give a transaction that is not yet begun."""
        raise NotImplementedError

    def open_lease(self, session: Session) -> None:
        """Own what is claimed in this transaction."""

    def close_lease(self, session: Session) -> None:
        """Own nothing any more."""

    def transient_retry(self) -> TransientRetry:
        """Give the policy for transient errors: a lost connection is the caller's to see."""
        return TransientRetry(outages=False)

    def twin(self, session: Session) -> _Story:
        """Give the same story on the `Session` inside an `AsyncSession`."""
        raise NotImplementedError


class _CommittingStory(_Story):
    """Commits per step, and extends its lease with the commits."""

    def __init__(self, session: Session | AsyncSession, lease: timedelta) -> None:
        super().__init__(session)
        self._lease = lease
        self._beat_at = 0.0

    def transaction(self) -> StepTransaction:
        return _LeasedTransaction(self.session, self.extend_lease)

    def open_lease(self, session: Session) -> None:
        name = f"executor {socket.gethostname()}:{os.getpid()}"
        workers.beat(session, worker_id=self.worker_id, name=name, queues=[], lease=self._lease)
        self._beat_at = time.monotonic()

    def extend_lease(self, session: Session) -> None:
        if self._beat_at and time.monotonic() - self._beat_at > self._lease.total_seconds() / 3:
            self.open_lease(session)

    def close_lease(self, session: Session) -> None:
        workers.leave(session, self.worker_id)
        self._beat_at = 0.0

    def twin(self, session: Session) -> _Story:
        twin = _CommittingStory(session, self._lease)
        twin.worker_id, twin._beat_at = self.worker_id, self._beat_at
        return twin


class _JoinedStory(_Story):
    """Sets a savepoint per step; needs no lease, because nobody else sees its rows."""

    def transaction(self) -> StepTransaction:
        return SavepointTransaction(self.session)

    def transient_retry(self) -> TransientRetry:
        return TransientRetry(conflicts=0, outages=False)

    def twin(self, session: Session) -> _Story:
        return _JoinedStory(session)


class _LeasedTransaction(StepTransaction):
    def __init__(self, injected: Session | AsyncSession, extend_lease: Callable[[Session], None]) -> None:
        super().__init__(injected)
        self._extend_lease = extend_lease

    async def commit(self) -> None:
        await self.execute(self._extend_lease)
        await super().commit()


class _BlockingInline(BlockingRuntime):
    def __init__(self, story: _Story, attempt: Attempt) -> None:
        super().__init__(attempt)
        self._story = story

    async def pause(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251 (the blocking shell: no event loop runs it)

    async def settle(self) -> None:
        self.attempt.proceed()

    async def record(self, checkpoint: Checkpoint) -> None:
        await self._story.write(lambda session: _record(session, checkpoint))

    async def begin(self, kind: SessionKind) -> StepTransaction:
        transaction = self._story.transaction()
        await transaction.begin()
        return transaction

    async def finish(self, completion: Completion) -> None:
        await self._story.write(lambda session: _finish(session, completion, self._story))

    def transient_retry(self) -> TransientRetry:
        return self._story.transient_retry()


class _GreenletInline(_BlockingInline):
    """A sync step on the `Session` inside an `AsyncSession`, which SQLAlchemy calls in a greenlet."""

    async def pause(self, seconds: float) -> None:
        await_only(asyncio.sleep(seconds))


class _AsyncInline(AsyncRuntime):
    def __init__(self, story: _Story, attempt: Attempt) -> None:
        super().__init__(attempt)
        self._story = story
        self._lock = asyncio.Lock()

    async def pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def settle(self) -> None:
        self.attempt.proceed()

    async def record(self, checkpoint: Checkpoint) -> None:
        async with self._lock:
            await self._story.write(lambda session: _record(session, checkpoint))

    async def begin(self, kind: SessionKind) -> StepTransaction:
        await self._lock.acquire()
        transaction = HeldTransaction(self._story.transaction(), self._lock.release)
        await transaction.begin()
        return transaction

    async def finish(self, completion: Completion) -> None:
        async with self._lock:
            await self._story.write(lambda session: _finish(session, completion, self._story))

    async def perform_blocking(self, call: StepCall) -> Any:
        def perform(session: Session) -> Any:
            return _GreenletInline(self._story.twin(session), self.attempt).perform(call)

        async with self._lock:
            return await in_session(self._story.session, perform)

    def transient_retry(self) -> TransientRetry:
        return self._story.transient_retry()


def _record(session: Session, checkpoint: Checkpoint) -> None:
    if steps.record(session, checkpoint) is Verdict.LOST:
        raise AttemptLost(checkpoint.fence.workflow_id)


def _finish(session: Session, completion: Completion, story: _Story) -> None:
    if not workflows.finish(session, completion):
        raise AttemptLost(completion.fence.workflow_id)
    workflows.refresh_known(session, completion.fence.workflow_id)
    story.close_lease(session)


def _on_async_engine(session: Session) -> bool:
    """Tell whether the session is the inside of an `AsyncSession`: then blocking calls do not block the event loop."""
    return schema.engine_of(session).dialect.is_async


def _require_kind(workflow: object, kind: type, *, instead: str) -> None:
    if isinstance(workflow, (WorkflowFunction, AsyncWorkflowFunction)) and not isinstance(workflow, kind):
        form = "async def" if isinstance(workflow, AsyncWorkflowFunction) else "def"
        raise SyncAsyncError(f"workflow {workflow.name!r} is {form}: execute it with {instead}.")
    if not isinstance(workflow, kind):
        raise ArgumentError(f"an executor runs a function decorated with @durable.workflow, got {workflow!r}.")
