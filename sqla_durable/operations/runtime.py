"""The contract between operations and what executes them: a `Runtime` calls the user's code, a `Recorder` records.

An operation is written once, over these two. There are two runtimes, one for blocking code and one for asyncio; and a
recorder for each place where outcomes go: a worker's writer, the session of an executor, a history that is replayed.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any, ClassVar, TypeAlias, TypeVar

from sqla_durable.definitions.interceptors import Execution, StepExecution
from sqla_durable.definitions.json_values import DEFAULT_LIMIT
from sqla_durable.definitions.limits import Watch
from sqla_durable.definitions.registry import StepDefinition, WorkflowDefinition
from sqla_durable.errors import EncodingError, UsageError
from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.calls import Position, StepCall
from sqla_durable.operations.suspending import CHECK_EVERY, Suspension, Wait, Waker
from sqla_durable.operations.transaction import StepTransaction
from sqla_durable.operations.transaction_retries import TransactionRetry
from sqla_durable.store import Checkpoint, Completion, Connectable, streams, timers
from sqla_durable.store.streams import Append, Appended
from sqla_durable.unwinding import Suspended

T = TypeVar("T")


def execution_of(attempt: Attempt, step: StepCall | None = None) -> Execution:
    """Return the workflow and attempt that users' code is executed in, and the step if it is in one."""
    if step is None:
        return Execution(attempt.workflow_id, attempt.name, attempt.number, headers=attempt.headers)
    details = attempt.progress(step.position).details
    return StepExecution(
        attempt.workflow_id,
        attempt.name,
        attempt.number,
        details=None if details is None else json.loads(details),
        step=step.position.shown,
        try_number=step.tries.count,
        idempotency_key=attempt.idempotency_key(step.position),
        headers=attempt.headers,
    )


class Recorder(ABC):
    """Records what the operations of one attempt decide, and waits for them meanwhile."""

    suspends: bool = True
    """Whether a workflow that waits for long is suspended; otherwise it waits in memory."""

    def __init__(self, attempt: Attempt) -> None:
        self.attempt = attempt

    @property
    def commits(self) -> bool:
        """Whether what `execute` has written is committed when it returns, and not with the caller's transaction."""
        return True

    @property
    def slot_is_wanted(self) -> bool:
        """Whether a workflow that waits is to be suspended at once, because another one may need its slot."""
        return False

    @abstractmethod
    async def settle(self) -> None:
        """Return when everything recorded so far is committed.

        Raises:
            ControlFlow: the attempt is to end here.
        """

    @abstractmethod
    async def record(self, checkpoint: Checkpoint) -> None:
        """Record a checkpoint, durable at the latest when the next `settle` or `finish` returns."""

    @abstractmethod
    def note(self, checkpoint: Checkpoint) -> None:
        """Record a checkpoint without awaiting it, durable at the latest when the next `settle` or `finish` returns.

        Called by the workflow's own code only.
        """

    @abstractmethod
    async def execute(self, statement: Callable[[Connectable], T]) -> T:
        """Call a store function of one statement, in a transaction of its own that is committed when this returns.

        The statement is fenced, and may be executed twice: after a lost acknowledgement it is tried again.

        Raises:
            AttemptLost: where the function raises it.
        """

    async def execute_together(self, statements: Callable[[Connectable], T]) -> T:
        """Call a store function of several statements, as `execute` does: in one transaction.

        Raises:
            AttemptLost: where the function raises it.
        """
        return await self.execute(statements)

    async def append(self, append: Append) -> Appended:
        """Append to a stream as `streams.append` does, committed when this returns.

        Raises:
            AttemptLost: the attempt no longer owns the workflow.
        """
        return await self.execute(partial(streams.append, origin=append.origin, name=append.name, values=append.values))

    @abstractmethod
    async def begin(self, step: StepDefinition) -> StepTransaction:
        """Open the transaction of a step, with the kind of session and the isolation level that it asks for."""

    @abstractmethod
    async def finish(self, completion: Completion) -> None:
        """Record the workflow's outcome; durable when it returns.

        Raises:
            EncodingError: the database refuses it, or what was to be recorded before it; another outcome can be given.
            ControlFlow: the attempt no longer owns the workflow, or is to end without an outcome.
        """

    @abstractmethod
    async def suspend(self, suspension: Suspension, *, remember: Callable[[Connectable], None] | None = None) -> None:
        """Suspend the workflow; durable when it returns, with what was recorded before.

        Args:
            suspension: for how long.
            remember: a store function that is called first, whose row outlives the attempt.

        Raises:
            EncodingError: the database refuses what was to be recorded before.
        """

    @abstractmethod
    async def pause(self, seconds: float) -> None:
        """Wait in memory, or less if the attempt is to stop: call `Attempt.raise_if_stopped` afterwards."""

    async def wait_in_memory(self, position: Position, wait: Wait) -> None:
        """Wait for an operation to go on, where workflows are not suspended; of one that polls, until the next poll."""
        await self.pause(wait.seconds)

    @abstractmethod
    def waker(self) -> Waker:
        """Return what wakes an operation that waits here."""

    def transaction_retry(self) -> TransactionRetry:
        """Return the policy for what undoes a step's transaction."""
        return TransactionRetry()

    def fork(self) -> Recorder:
        """Return the recorder of a branch in another thread, whose writes follow everything recorded so far.

        Raises:
            UsageError: threads cannot use the session.
        """
        return self

    def join(self, branch: Recorder) -> None:
        """Return when everything that a branch in a thread has recorded is committed; called there, at its end."""
        del branch  # by default everything is committed when it is recorded

    async def in_session(self, work: Callable[[Recorder], T]) -> T:
        """Call a function where it may block and use a `Session`, with a recorder that records from there.

        Called by asyncio's runtime only.
        """
        raise NotImplementedError

    async def on_loop(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Await a coroutine on the event loop of the workflow, from where `in_session` has called a function."""
        return await coroutine

    async def pause_replay(self, seconds: float) -> None:
        """Wait before it is checked again whether a replay goes on."""
        await self.pause(seconds)

    async def due_timers(self) -> dict[str, float]:
        """Return the seconds until the asyncio timers are due that were stored with the suspension, by key."""
        due_at = self.attempt.timers_due_at
        if not due_at:
            return {}
        now = (await self.execute(timers.now)).timestamp()
        return {key: due - now for key, due in due_at.items()}


class Runtime(ABC):
    """Executes one attempt: calls the user's code in the ambient context, and performs the operations that it calls.

    Attributes:
        attempt: the attempt that is executed.
        recorder: where its outcomes go.
        limit: the largest payload of the workflow in bytes.
        is_async: whether the workflow's code is awaited.
    """

    is_async: ClassVar[bool]

    def __init__(self, attempt: Attempt, recorder: Recorder) -> None:
        self.attempt = attempt
        self.recorder = recorder
        self.limit = DEFAULT_LIMIT

    @abstractmethod
    def perform_step(self, call: StepCall) -> Any:
        """Perform a step: return its outcome in blocking code, an awaitable of it in async code."""

    @abstractmethod
    def perform_operation(self, position: Position, operation: Operation) -> Any:
        """Perform another durable operation of the workflow's own code, in the same way."""

    @abstractmethod
    def perform_in_step(self, position: Position, operation: Operation) -> Any:
        """Perform an operation of a step's function, which goes on after it, in the same way."""

    @abstractmethod
    async def call_workflow(self, definition: WorkflowDefinition, arguments: dict[str, Any]) -> Any:
        """Call the workflow's function."""

    @abstractmethod
    def call_step(self, call: StepCall, *injected: object, watch: Watch | None = None) -> Awaitable[Any]:
        """Call a step's function, sync or async, with the injected arguments first.

        Raises:
            StepTimeoutError: it is not done within its limits.
        """

    @abstractmethod
    def intercepted(self, step: StepCall | None = None) -> AbstractAsyncContextManager[None]:
        """Enter the interceptors around a workflow's function, or around a try of a step, in its ambient context."""

    @abstractmethod
    async def begin_suspension(self, wait: Wait) -> Suspension | None:
        """Stop the attempt if all of its code waits for long enough, and return how it is suspended; None: not now."""

    async def suspend(self, suspension: Suspension, position: Position) -> None:
        """Suspend the workflow at an operation, and return when that is committed."""
        await self.recorder.suspend(suspension)

    def close(self) -> None:  # noqa: B027 (the branches of blocking code have ended before)
        """Cancel what the workflow leaves behind at the attempt's end; nothing of it is recorded any more."""

    async def proceed(self) -> None:
        """Raise what ends the attempt, if it is to end; called by an operation that waits."""
        self.attempt.raise_if_stopped()

    async def wait(self, position: Position, wait: Wait) -> None:
        """Wait until an operation goes on: in memory, and as a row once all code of the workflow waits for long enough.

        In memory, it returns from time to time for an operation that awaits something, so that the caller can check.

        Raises:
            Suspended: the workflow is suspended, and what was recorded before is committed.
            ControlFlow: the attempt is to end here.
        """
        if not self.recorder.suspends:
            await self.recorder.wait_in_memory(position, wait)
            return
        attempt = self.attempt
        attempt.begin_wait(position, wait)
        try:
            while True:
                await self._suspend_if_idle(position, wait)
                if not wait.seconds:
                    return
                seconds = min(wait.seconds, CHECK_EVERY)
                if wait.waker is None:
                    await self.recorder.pause(seconds)
                else:
                    await wait.waker.wait(wait.seconds if wait.in_memory else seconds)
                await self.proceed()
                if wait.awaits:
                    return
        finally:
            attempt.end_wait(position)

    async def _suspend_if_idle(self, position: Position, wait: Wait) -> None:
        suspension = await self.begin_suspension(wait)
        if suspension is None:
            return
        try:
            await self.suspend(suspension, position)
        except EncodingError:  # the database refuses the try that was to be recorded with it
            self.attempt.undo_suspension()
            raise
        raise Suspended


Operation: TypeAlias = Callable[[Runtime, Position], Coroutine[Any, Any, Any]]
"""What an operation does, under its identity and on whatever runtime it has."""


def run_blocking(operation: Coroutine[Any, Any, T]) -> T:
    """Run an operation of a blocking runtime to its end, without an event loop.

    Raises:
        UsageError: something in it suspends, such as an async retry predicate in sync code.
    """
    try:
        operation.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    operation.close()
    raise UsageError(
        "async code was called from a sync workflow or step: make the workflow async def, or the callable sync."
    )
