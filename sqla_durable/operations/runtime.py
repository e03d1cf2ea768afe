"""What an operation needs of its surroundings: a protocol, implemented by the executors and by the worker."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar

from sqla_durable.definitions.interceptors import Execution, StepExecution
from sqla_durable.definitions.limits import Watch
from sqla_durable.definitions.registry import StepDefinition
from sqla_durable.definitions.retry import Tries
from sqla_durable.errors import UsageError
from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.calls import Position, Wait
from sqla_durable.operations.transaction import StepTransaction
from sqla_durable.operations.transaction_retries import TransactionRetry
from sqla_durable.store import Checkpoint, Completion, Connectable
from sqla_durable.store.streams import Append, Appended

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StepCall:
    """One call of a step in a workflow; `tries` counts its executions, those of earlier attempts included."""

    definition: StepDefinition
    position: Position
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tries: Tries


def execution_of(attempt: Attempt, step: StepCall | None = None) -> Execution:
    """Return where users' code is: in which workflow, attempt and step; of a step, a `StepExecution`."""
    if step is None:
        return Execution(attempt.workflow_id, attempt.name, attempt.number, headers=attempt.headers)
    details = attempt.progress(step.position).details
    return StepExecution(
        attempt.workflow_id,
        attempt.name,
        attempt.number,
        details=None if details is None else json.loads(details),
        step=step.position.shown,
        step_attempt=step.tries.count,
        idempotency_key=attempt.idempotency_key(step.position),
        headers=attempt.headers,
    )


class Runtime(Protocol):
    """How one attempt waits, calls and records."""

    @property
    def attempt(self) -> Attempt:
        """The attempt that this runtime carries."""
        ...

    async def call(self, call: StepCall, *injected: object, watch: Watch | None = None) -> Any:
        """Call the step's function, sync or async, with the injected arguments first.

        Raises:
            StepTimeoutError: it is not done within its limits.
        """

    def intercepted(self, step: StepCall | None = None) -> AbstractAsyncContextManager[None]:
        """Enter the interceptors around a workflow's function, or around a try of a step, in its ambient context."""
        ...

    async def pause(self, seconds: float) -> None:
        """Wait a moment in memory; may end early when the attempt is told to stop."""

    async def wait(self, position: Position, wait: Wait) -> None:
        """Wait until an operation goes on: in memory, or as a row.

        Raises:
            Suspended: the workflow is parked, and what was recorded before is committed.
            ControlFlow: the attempt is to end here.
        """

    async def settle(self) -> None:
        """Return when everything recorded so far is committed.

        Raises:
            ControlFlow: the attempt is to end here.
        """

    async def record(self, checkpoint: Checkpoint) -> None:
        """Record a checkpoint, durable at the latest when the next `settle` or `finish` returns."""

    def note(self, checkpoint: Checkpoint) -> None:
        """Record a checkpoint without awaiting it, durable at the latest when the next `settle` or `finish` returns.

        Called by the workflow's own code only.
        """

    async def execute(self, statement: Callable[[Connectable], T]) -> T:
        """Call a store function of one statement, in a transaction of its own that is committed when this returns.

        The statement is fenced, and may be carried out twice: after a lost acknowledgement it is tried again.

        Raises:
            AttemptLost: where the function raises it.
        """
        ...

    async def append(self, append: Append) -> Appended:
        """Append to a stream as `streams.append` does, committed when this returns, with what others append perhaps.

        Raises:
            AttemptLost: the attempt no longer owns the workflow.
        """
        ...

    async def begin(self, step: StepDefinition) -> StepTransaction:
        """Open the transaction of a step, with the kind of session and the isolation level that it asks for."""
        ...

    async def finish(self, completion: Completion) -> None:
        """Record the workflow's outcome; durable when it returns.

        Raises:
            EncodingError: the database refuses it, or what was to be recorded before it; another outcome can be given.
            ControlFlow: the attempt no longer owns the workflow, or is to end without an outcome.
        """

    def transaction_retry(self) -> TransactionRetry:
        """Return the policy for what undoes a step's transaction."""
        ...


Operation: TypeAlias = Callable[[Runtime, Position], Coroutine[Any, Any, Any]]
"""What an operation does, under its identity and on whatever runtime it has."""


def run_blocking(operation: Coroutine[Any, Any, T]) -> T:
    """Drive an operation over a blocking runtime to its end, without an event loop.

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
