"""What an executor does: start or find the workflow, claim it, execute it, finish it.

Told once, over functions of a `Session`; `AsyncSession.run_sync` leads them into asyncio. How its transactions end is
the difference between committing per step and being joined to the caller's transaction.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, ClassVar, TypeAlias, TypeVar
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from typing_extensions import override
from uuid_utils.compat import uuid7

from sqla_durable.api.start import BoundWorkflow, add
from sqla_durable.definitions.checks import require_positive_duration
from sqla_durable.definitions.registry import WorkflowDefinition
from sqla_durable.errors import ArgumentError, AttemptLostError, SessionError, UsageError, WorkflowRunningError
from sqla_durable.execution.inline import AsyncInline, AsyncUntilWaiting, BlockingInline, BlockingUntilWaiting
from sqla_durable.models import Workflow
from sqla_durable.models.status import WorkflowStatus
from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.transaction import SavepointTransaction, StepTransaction, in_session
from sqla_durable.operations.transaction_retries import Phase, Setback, TransactionRetry
from sqla_durable.operations.workflow import Outcome, run_workflow
from sqla_durable.store import (
    Claimed,
    WorkflowState,
    attempts,
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

T = TypeVar("T")
Pause: TypeAlias = "Callable[[float], Awaitable[None]]"


@dataclass(frozen=True, slots=True)
class _Aim:
    """How far a workflow is brought, and on which runtimes: that of a `Session`, that of an `AsyncSession`."""

    blocking: type[BlockingInline]
    on_loop: type[AsyncInline]
    is_reached: Callable[[WorkflowStatus], bool]


_TO_END = _Aim(BlockingInline, AsyncInline, lambda status: status.finished)
_TO_WAIT = _Aim(
    BlockingUntilWaiting, AsyncUntilWaiting, lambda status: status.finished or status is WorkflowStatus.SUSPENDED
)


class Story:
    """Start or find, claim, execute, finish: on a session of either kind."""

    loss: ClassVar[str] = (
        "its lease ran out and another took over, or it was cancelled. What was committed before stands."
    )

    others: ClassVar[str] = " and wait for its result with a handle"
    """What a message adds where other processes see the workflow."""

    def __init__(self, session: Session | AsyncSession) -> None:
        self.session = session
        self.worker_id = uuid7()

    @property
    def sync_session(self) -> Session:
        """The session itself, or the one inside it."""
        return self.session.sync_session if isinstance(self.session, AsyncSession) else self.session

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
        return await in_session(self.session, read)

    async def _bring(self, definition: WorkflowDefinition, find: Callable[[Session], UUID], aim: _Aim) -> Outcome:
        self.require_usable()
        taken = await self.transact(lambda session: self._take(session, definition, find, aim))
        while isinstance(taken, Claimed):
            workflow_id = taken.fence.workflow_id
            again = partial(self._take_up, definition=definition, workflow_id=workflow_id, aim=aim)
            try:
                taken = await self._execute(definition, Attempt(taken), aim)
            except ContinuedAsNew:
                taken = await self.transact(again)
            except Suspended:
                taken = await self.transact(partial(_standing, workflow_id=workflow_id))
        return taken

    def _take_up(
        self, session: Session, definition: WorkflowDefinition, workflow_id: UUID, aim: _Aim
    ) -> Claimed | Outcome:
        """Claim a workflow that has begun anew."""
        return self._take(session, definition, lambda _: workflow_id, aim)

    def _take(
        self, session: Session, definition: WorkflowDefinition, find: Callable[[Session], UUID], aim: _Aim
    ) -> Claimed | Outcome:
        """Claim the workflow, or give the outcome that it has."""
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
        self.open_lease(session)
        claim = partial(claims.claim_one, session, workflow_id, worker_id=self.worker_id, token=uuid7())
        claimed = claim()
        if claimed is None and failures.fail_if_overdue(session, workflow_id):
            claimed = claim()  # to undo what it did
        if claimed is not None:
            return claims.with_histories(session, [claimed])[0]
        outcome = _standing(session, workflow_id)
        if not aim.is_reached(outcome.standing.status):
            raise _not_claimable(session, outcome.standing, self.others)
        self.close_lease(session)
        return outcome

    async def _execute(self, definition: WorkflowDefinition, attempt: Attempt, aim: _Aim) -> Outcome:
        runtime = (aim.on_loop if isinstance(self.session, AsyncSession) else aim.blocking)(self, attempt)
        try:
            running = run_workflow(runtime, definition, lambda given: runtime.body(definition, given))
            completion = await runtime.drive(running)
        except AttemptLost:
            raise AttemptLostError(
                f"workflow {attempt.name!r} {attempt.workflow_id} is no longer this executor's: {self.loss}",
                workflow_id=attempt.workflow_id,
            ) from None
        except Interrupted as interrupted:
            await self.hand_back(attempt)
            raise interrupted.error from None
        except BaseException:
            await self.hand_back(attempt)
            raise
        finally:
            attempt.stop(partial(AttemptLost, attempt.workflow_id))
            runtime.leave()
        return Outcome.of(attempt.name, completion)

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

    def transaction(self, *, isolation_level: str | None = None) -> StepTransaction:
        """Give a transaction that is not yet begun."""
        raise NotImplementedError

    def require_usable(self) -> None:
        """Refuse a session whose transaction cannot end as this story needs it to."""

    async def hand_back(self, attempt: Attempt) -> None:
        """Leave an attempt that ends without an outcome to others."""

    def refuse_waiting(self, key: str) -> None:
        """Refuse to wait for what others do, where they cannot see the workflow."""

    def open_lease(self, session: Session) -> None:
        """Own what is claimed in this transaction."""

    def close_lease(self, session: Session) -> None:
        """Own nothing any more."""

    def transaction_retry(self) -> TransactionRetry:
        """Return the policy for what undoes a transaction: a lost connection is the caller's to see."""
        return TransactionRetry(outages=False)

    def twin(self, session: Session) -> Story:
        """Give the same story on the `Session` inside an `AsyncSession`."""
        raise NotImplementedError


class CommittingStory(Story):
    """Commits per step, and extends its lease with the commits."""

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
    async def hand_back(self, attempt: Attempt) -> None:
        # If the database does not let us, the workflow is reclaimed when the lease has run out.
        with contextlib.suppress(Exception, Interrupted):
            await in_session(self.session, Session.rollback)
            await self.transact(lambda session: self._release(session, attempt))

    def _release(self, session: Session, attempt: Attempt) -> None:
        attempts.release(session, [attempt.fence])
        self.close_lease(session)

    def extend_lease(self, session: Session) -> None:
        """Extend the lease if a third of it has passed."""
        if self._beat_at and time.monotonic() - self._beat_at > self._lease.total_seconds() / 3:
            self.open_lease(session)

    @override
    def close_lease(self, session: Session) -> None:
        workers.end_lease(session, self.worker_id)
        self._beat_at = 0.0

    @override
    def twin(self, session: Session) -> Story:
        twin = CommittingStory(session, self._lease)
        twin.worker_id, twin._beat_at = self.worker_id, self._beat_at
        return twin


class JoinedStory(Story):
    """Sets a savepoint per step; needs no lease, because nobody else sees its rows."""

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

    @override
    def twin(self, session: Session) -> Story:
        return JoinedStory(session)


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
