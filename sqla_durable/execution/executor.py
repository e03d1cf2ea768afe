"""`Executor` and `AsyncExecutor`: start or find a workflow, claim it, execute it, and finish it inline.

Written once, over functions of a `Session`; how the transactions end in which they are called is in `recorder`.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, ParamSpec, Self, TypeVar
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable.api.polling import refuse_event_loop
from sqla_durable.api.sessions import id_of, session_advice
from sqla_durable.api.workflows import AsyncWorkflowFunction, BoundWorkflow, WorkflowFunction, add
from sqla_durable.definitions.registry import WorkflowDefinition
from sqla_durable.errors import ArgumentError, AttemptLostError, SessionError, UsageError, WorkflowRunningError
from sqla_durable.execution.recorder import (
    CommittedTransactions,
    JoinedTransactions,
    SessionRecorder,
    SessionTransactions,
)
from sqla_durable.models import Workflow
from sqla_durable.models.base import WorkflowStatus
from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.runtime import run_blocking
from sqla_durable.operations.transaction import in_session
from sqla_durable.operations.workflow import WorkflowOutcome, run_workflow
from sqla_durable.runtime.runtimes import AsyncRuntime, BlockingRuntime
from sqla_durable.runtime.tasks import hosting, in_attempt_task
from sqla_durable.store import (
    Claimed,
    Completion,
    WorkflowState,
    claims,
    current_record,
    failures,
    inbox,
    schema,
    signals,
    workers,
    workflows,
)
from sqla_durable.unwinding import AttemptLost, ContinuedAsNew, Interrupted, Suspended, Unwound

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
        self._execution = _InlineExecution(CommittedTransactions(session, lease))

    @classmethod
    def joined(cls, session: Session) -> Self:
        """Return an executor inside the session's transaction: each step is a savepoint, nothing is ever committed.

        Nothing is visible to others, workers included, until the caller commits; if the caller rolls back, nothing
        happened. For tests whose session rolls back, and for short work that is all or nothing.
        """
        executor = cls(session)
        executor._execution = _InlineExecution(JoinedTransactions(session))
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
        self._require(workflow, "run")
        value: R = run_blocking(self._execution.run(workflow.definition, workflow.bind(*args, **kwargs)))
        return value

    def execute(self, workflow: WorkflowFunction[..., R], record: Workflow | UUID) -> R:
        """Execute a workflow that was started before and that nobody has claimed; see `run`.

        One that is suspended goes on if what it waits for is there, or its time has come.
        """
        self._require(workflow, "execute")
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
        self._require(workflow, "run_until_waiting")
        return run_blocking(self._execution.run_until_waiting(workflow.definition, workflow.bind(*args, **kwargs)))

    def execute_until_waiting(self, workflow: WorkflowFunction[..., Any], record: Workflow | UUID) -> Workflow:
        """Execute a workflow that was started before until it waits again; see `run_until_waiting`.

        Returns its record as it is, if what it waits for is not there.
        """
        self._require(workflow, "execute_until_waiting")
        return run_blocking(self._execution.execute_until_waiting(workflow.definition, id_of(record)))

    def _require(self, workflow: object, call: str) -> None:
        """Refuse what is no sync workflow, and a call that would block an event loop."""
        _require_kind(workflow, WorkflowFunction, instead="AsyncExecutor(async_session)")
        if not _on_async_engine(self._execution.sync_session):
            refuse_event_loop(f"Executor.{call}()", "use AsyncExecutor, or asyncio.to_thread")


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
        self._execution = _InlineExecution(CommittedTransactions(session, lease))

    @classmethod
    def joined(cls, session: AsyncSession) -> Self:
        """Return an executor inside the session's transaction; see `Executor.joined`."""
        executor = cls(session)
        executor._execution = _InlineExecution(JoinedTransactions(session))
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


@dataclass(frozen=True, slots=True)
class _Aim:
    """How far a workflow is executed: to its end, or until it is suspended where it waits."""

    suspends: bool

    def is_reached(self, status: WorkflowStatus) -> bool:
        return status.finished or (self.suspends and status is WorkflowStatus.SUSPENDED)


_TO_END = _Aim(suspends=False)
_TO_WAIT = _Aim(suspends=True)


class _InlineExecution:
    """Start or find, claim, execute, finish: on a session of either kind."""

    def __init__(self, transactions: SessionTransactions) -> None:
        self.sync_session = transactions.sync_session
        self._transactions = transactions

    async def run(self, definition: WorkflowDefinition, bound: BoundWorkflow) -> Any:
        """Start or find the workflow, and bring it to its end."""
        if bound.new.delay is not None or bound.new.wake_at is not None:
            raise ArgumentError(
                "an executor executes at once, so it takes no delay= or at=: start the workflow for a worker."
            )
        return await self._bring_to_end(definition, lambda session: add(session, bound).id)

    async def execute_existing(self, definition: WorkflowDefinition, workflow_id: UUID) -> Any:
        """Bring a workflow that is there already to its end."""
        return await self._bring_to_end(definition, lambda _: workflow_id)

    async def run_until_waiting(self, definition: WorkflowDefinition, bound: BoundWorkflow) -> Workflow:
        """Start or find the workflow, and execute it until it waits or has ended."""
        return await self._bring_to_wait(definition, lambda session: add(session, bound).id)

    async def execute_until_waiting(self, definition: WorkflowDefinition, workflow_id: UUID) -> Workflow:
        """Execute a workflow that is there already until it waits or has ended."""
        return await self._bring_to_wait(definition, lambda _: workflow_id)

    async def _bring_to_end(self, definition: WorkflowDefinition, find: Callable[[Session], UUID]) -> Any:
        return (await self._bring(definition, find, _TO_END)).value(definition)

    async def _bring_to_wait(self, definition: WorkflowDefinition, find: Callable[[Session], UUID]) -> Workflow:
        outcome = await self._bring(definition, find, _TO_WAIT)
        if outcome.state.status.finished:
            outcome.value(definition)  # raises its error
        read = partial(_record, workflow_id=outcome.state.workflow_id)
        return await in_session(self._transactions.session, read)

    async def _bring(
        self, definition: WorkflowDefinition, find: Callable[[Session], UUID], aim: _Aim
    ) -> WorkflowOutcome:
        self._transactions.require_usable()
        claimed = await self._transactions.transact(lambda session: self._claim(session, definition, find, aim))
        while isinstance(claimed, Claimed):
            workflow_id = claimed.fence.workflow_id
            again = partial(self._claim, definition=definition, find=partial(_found, workflow_id=workflow_id), aim=aim)
            try:
                claimed = await self._execute(definition, Attempt(claimed), aim)
            except ContinuedAsNew:
                claimed = await self._transactions.transact(again)
            except Suspended:
                claimed = await self._transactions.transact(partial(_outcome_of, workflow_id=workflow_id))
        return claimed

    def _claim(
        self, session: Session, definition: WorkflowDefinition, find: Callable[[Session], UUID], aim: _Aim
    ) -> Claimed | WorkflowOutcome:
        """Claim the workflow, or return the outcome that it has."""
        schema.require(session)
        workflow_id = find(session)
        session.flush()
        state = workflows.state(session, workflow_id)
        definition.require_record(state.name, workflow_id)
        if state.status is WorkflowStatus.RUNNING:
            workers.reclaim_one(session, workflow_id, max_attempts=workers.DEFAULT_MAX_ATTEMPTS)
            state = workflows.state(session, workflow_id)
        if state.status.finished:
            return WorkflowOutcome(state)
        if state.status is WorkflowStatus.SUSPENDED:
            signals.wake_one(session, workflow_id)
        self._transactions.open_lease(session)
        claim = partial(claims.claim_one, session, workflow_id, worker_id=self._transactions.worker_id, token=uuid7())
        claimed = claim()
        if claimed is None and failures.fail_if_overdue(session, workflow_id):
            claimed = claim()  # to undo what it did
        if claimed is not None:
            return claims.with_histories(session, [claimed])[0]
        outcome = _outcome_of(session, workflow_id)
        if not aim.is_reached(outcome.state.status):
            raise _not_claimable(session, outcome.state, self._transactions.others)
        self._transactions.close_lease(session)
        return outcome

    async def _execute(self, definition: WorkflowDefinition, attempt: Attempt, aim: _Aim) -> WorkflowOutcome:
        recorder = SessionRecorder.of(attempt, self._transactions, suspends=aim.suspends)
        is_async = isinstance(self._transactions.session, AsyncSession)
        runtime = AsyncRuntime(attempt, recorder) if is_async else BlockingRuntime(attempt, recorder)
        running = run_workflow(runtime, definition)
        try:
            completion = await (_in_task(running, attempt) if is_async else running)
        except AttemptLost:
            loss = self._transactions.loss
            raise AttemptLostError(
                f"workflow {attempt.name!r} {attempt.workflow_id} is no longer this executor's: {loss}",
                workflow_id=attempt.workflow_id,
            ) from None
        except (Interrupted, Unwound) as ending:
            await self._transactions.release(attempt.fence)
            raise ending.error from None
        except BaseException:
            await self._transactions.release(attempt.fence)
            raise
        finally:
            attempt.stop(partial(AttemptLost, attempt.workflow_id))
            runtime.close()
        return WorkflowOutcome.of(attempt.name, completion)


async def _in_task(running: Coroutine[Any, Any, Completion], attempt: Attempt) -> Completion:
    with hosting():
        return await in_attempt_task(running, attempt)


def _found(_session: Session, *, workflow_id: UUID) -> UUID:
    return workflow_id


def _outcome_of(session: Session, workflow_id: UUID) -> WorkflowOutcome:
    return WorkflowOutcome(workflows.state(session, workflow_id))


def _record(session: Session, workflow_id: UUID) -> Workflow:
    if not session.in_transaction():
        session.begin()
    return current_record(session, workflow_id)


def _not_claimable(session: Session, state: WorkflowState, others: str) -> WorkflowRunningError:
    label = f"workflow {state.name!r} {state.workflow_id} is {state.status}"
    holder = workers.holder(session, state.workflow_id)
    waiting = workflows.waited_for(session, state.workflow_id)
    if waiting is not None:
        return WorkflowRunningError(
            f"{label} and waits {_waits_for(waiting)}: {_ways_on(waiting)}give it to a worker{others}.",
            workflow_id=state.workflow_id,
        )
    if holder is None:
        return WorkflowRunningError(
            f"{label}, and it cannot be claimed now: somebody else has just claimed it. Wait for its result with a "
            "handle.",
            workflow_id=state.workflow_id,
        )
    return WorkflowRunningError(
        f"{label}, and it cannot be claimed now: {holder.name!r} holds a lease on it until "
        f"{holder.lease_expires_at.isoformat(sep=' ', timespec='seconds')}. If that process is dead, the workflow can "
        "be executed again then; a shorter lease, such as Executor(session, lease=timedelta(seconds=30)), must be "
        "longer than the longest step. If it is alive, wait for its result with a handle.",
        workflow_id=state.workflow_id,
        lease_expires_at=holder.lease_expires_at,
    )


def _waits_for(waiting: workflows.WaitedFor) -> str:
    found = [f"for {_shown(each)}" for each in waiting.signals]
    if waiting.waits_for_children:
        found.append("for its children")
    if waiting.wake_at is not None:
        found.append(f"until {waiting.wake_at.isoformat(sep=' ', timespec='seconds')}")
    return " or ".join(found) or "for nothing that it has recorded"


def _shown(name: str) -> str:
    """Return what a signal is to who sends it."""
    if name.startswith(inbox.CALLBACK):
        return "the outcome of a callback"
    if name.startswith(inbox.UPDATE):
        return f"update {name.removeprefix(inbox.UPDATE)!r}"
    return f"signal {name!r}"


def _ways_on(waiting: workflows.WaitedFor) -> str:
    ways: list[str] = []
    if waiting.signals:
        untaken = ", ".join(map(repr, waiting.untaken))
        ways.append(f"send it (sent and not taken: {untaken})" if untaken else "send it")
    if waiting.waits_for_children:
        ways.append("execute the children")
    if waiting.wake_at is not None:
        ways.append("let the time pass with sqla_durable.testing.advance(session, timedelta(...))")
    return "".join(f"{each}, " for each in ways) + ("or " if ways else "")


def _on_async_engine(session: Session) -> bool:
    """Return whether the session is inside an `AsyncSession`: then blocking calls do not block the event loop."""
    return schema.engine_of(session).dialect.is_async


def _require_kind(workflow: object, kind: type, *, instead: str) -> None:
    if isinstance(workflow, (WorkflowFunction, AsyncWorkflowFunction)) and not isinstance(workflow, kind):
        form = "async def" if isinstance(workflow, AsyncWorkflowFunction) else "def"
        raise UsageError(f"workflow {workflow.name!r} is {form}: execute it with {instead}.")
    if not isinstance(workflow, kind):
        raise ArgumentError(f"an executor runs a function decorated with @durable.workflow, got {workflow!r}.")
