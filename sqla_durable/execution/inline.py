"""What an executor does: start or find the workflow, claim it, execute it, finish it.

Written once, over functions of a `Session`; how the transactions end in which they are called is in `transactions`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable.api.start import BoundWorkflow, add
from sqla_durable.definitions.registry import WorkflowDefinition
from sqla_durable.errors import ArgumentError, AttemptLostError, WorkflowRunningError
from sqla_durable.execution.recorder import SessionRecorder
from sqla_durable.execution.transactions import SessionTransactions
from sqla_durable.models import Workflow
from sqla_durable.models.status import WorkflowStatus
from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.transaction import in_session
from sqla_durable.operations.workflow import Outcome, run_workflow
from sqla_durable.runtime.shells import AsyncRuntime, BlockingRuntime
from sqla_durable.runtime.tasks import in_attempt_task
from sqla_durable.store import (
    Claimed,
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
from sqla_durable.unwinding import AttemptLost, ContinuedAsNew, Interrupted, Suspended


@dataclass(frozen=True, slots=True)
class _Aim:
    """How far a workflow is executed: to its end, or until it is suspended where it waits."""

    suspends: bool

    def is_reached(self, status: WorkflowStatus) -> bool:
        return status.finished or (self.suspends and status is WorkflowStatus.SUSPENDED)


_TO_END = _Aim(suspends=False)
_TO_WAIT = _Aim(suspends=True)


class InlineExecution:
    """Start or find, claim, execute, finish: on a session of either kind."""

    def __init__(self, transactions: SessionTransactions) -> None:
        self.sync_session = transactions.sync_session
        self._transactions = transactions

    async def run(self, definition: WorkflowDefinition, bound: BoundWorkflow) -> Any:
        """Start or find the workflow, and bring it to its end."""
        if bound.new.delay is not None or bound.new.wake_at is not None:
            raise ArgumentError("an executor executes now: start a workflow with delay= or at= for a worker.")
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
        if outcome.standing.status.finished:
            outcome.value(definition)  # raises its error
        read = partial(_record, workflow_id=outcome.standing.workflow_id)
        return await in_session(self._transactions.session, read)

    async def _bring(self, definition: WorkflowDefinition, find: Callable[[Session], UUID], aim: _Aim) -> Outcome:
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
                claimed = await self._transactions.transact(partial(_standing, workflow_id=workflow_id))
        return claimed

    def _claim(
        self, session: Session, definition: WorkflowDefinition, find: Callable[[Session], UUID], aim: _Aim
    ) -> Claimed | Outcome:
        """Claim the workflow, or return the outcome that it has."""
        schema.require(session)
        workflow_id = find(session)
        session.flush()
        standing = workflows.state(session, workflow_id)
        definition.require_record(standing.name, workflow_id)
        if standing.status is WorkflowStatus.RUNNING:
            workers.reclaim_one(session, workflow_id, max_attempts=workers.DEFAULT_MAX_ATTEMPTS)
            standing = workflows.state(session, workflow_id)
        if standing.status.finished:
            return Outcome(standing)
        if standing.status is WorkflowStatus.SUSPENDED:
            signals.wake_one(session, workflow_id)
        self._transactions.open_lease(session)
        claim = partial(claims.claim_one, session, workflow_id, worker_id=self._transactions.worker_id, token=uuid7())
        claimed = claim()
        if claimed is None and failures.fail_if_overdue(session, workflow_id):
            claimed = claim()  # to undo what it did
        if claimed is not None:
            return claims.with_histories(session, [claimed])[0]
        outcome = _standing(session, workflow_id)
        if not aim.is_reached(outcome.standing.status):
            raise _not_claimable(session, outcome.standing, self._transactions.others)
        self._transactions.close_lease(session)
        return outcome

    async def _execute(self, definition: WorkflowDefinition, attempt: Attempt, aim: _Aim) -> Outcome:
        recorder = SessionRecorder.of(attempt, self._transactions, suspends=aim.suspends)
        is_async = isinstance(self._transactions.session, AsyncSession)
        runtime = AsyncRuntime(attempt, recorder) if is_async else BlockingRuntime(attempt, recorder)
        running = run_workflow(runtime, definition)
        try:
            completion = await (in_attempt_task(running, attempt) if is_async else running)
        except AttemptLost:
            loss = self._transactions.loss
            raise AttemptLostError(
                f"workflow {attempt.name!r} {attempt.workflow_id} is no longer this executor's: {loss}",
                workflow_id=attempt.workflow_id,
            ) from None
        except Interrupted as interrupted:
            await self._transactions.release(attempt.fence)
            raise interrupted.error from None
        except BaseException:
            await self._transactions.release(attempt.fence)
            raise
        finally:
            attempt.stop(partial(AttemptLost, attempt.workflow_id))
            runtime.close()
        return Outcome.of(attempt.name, completion)


def _found(_session: Session, *, workflow_id: UUID) -> UUID:
    return workflow_id


def _standing(session: Session, workflow_id: UUID) -> Outcome:
    return Outcome(workflows.state(session, workflow_id))


def _record(session: Session, workflow_id: UUID) -> Workflow:
    if not session.in_transaction():
        session.begin()
    return current_record(session, workflow_id)


def _not_claimable(session: Session, standing: WorkflowState, others: str) -> WorkflowRunningError:
    label = f"workflow {standing.name!r} {standing.workflow_id} is {standing.status}"
    holder = workers.holder(session, standing.workflow_id)
    waiting = workflows.waited_for(session, standing.workflow_id)
    if waiting is not None:
        return WorkflowRunningError(
            f"{label} and waits {_waits_for(waiting)}: {_ways_on(waiting)}give it to a worker{others}.",
            workflow_id=standing.workflow_id,
        )
    if holder is None:
        return WorkflowRunningError(
            f"{label}, and not to be claimed now: somebody else has just claimed it. Wait for its result with a "
            "handle.",
            workflow_id=standing.workflow_id,
        )
    return WorkflowRunningError(
        f"{label}, and not to be claimed now: {holder.name!r} holds a lease on it until "
        f"{holder.lease_expires_at.isoformat(sep=' ', timespec='seconds')}. If that process is dead, the workflow can "
        "be executed again then; a shorter lease, such as Executor(session, lease=timedelta(seconds=30)), must be "
        "longer than the longest step. If it is alive, wait for its result with a handle.",
        workflow_id=standing.workflow_id,
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
