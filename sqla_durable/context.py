"""Where the code is: the ambient context of a workflow's execution, kept in a context variable.

Outside a workflow there is none, and decorated functions are plain functions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqla_durable.codec import DEFAULT_LIMIT
from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.runtime import Operation, StepCall


@dataclass(frozen=True, slots=True)
class Execution:
    """Where the code is.

    Attributes:
        workflow_id: the id of the workflow's record.
        workflow: the workflow's name.
        attempt: the workflow's attempt, from 1; it counts up when a worker died, and when it is resumed.
        step: the key of the step that is being executed; None between steps.
        step_attempt: the try of that step, from 1, those of earlier attempts included; None between steps.
        idempotency_key: for the system that the step calls: the same on every execution of this step, and of no
            other; None between steps.
        details: what the step has last reported by `heartbeat`, in this try or in one before; None if nothing.
    """

    workflow_id: UUID
    workflow: str
    attempt: int
    step: str | None = None
    step_attempt: int | None = None
    idempotency_key: str | None = None
    details: Any = None


@dataclass(frozen=True, slots=True)
class Context:
    """What a decorated function finds when it is called in a workflow.

    Attributes:
        attempt: the attempt at the workflow.
        perform: performs a step: gives its outcome in sync code, an awaitable of it in async code.
        operate: carries out another durable operation in the same way.
        is_async: whether the workflow is `async def`.
        whereabouts: tells the task or thread that the code is in.
        home: the one that executes the workflow's own code. Steps that are called elsewhere would be counted in an
            order that depends on speed.
        step: the step whose function is being executed; calls in it are plain calls.
        limit: the largest payload in bytes.
    """

    attempt: Attempt
    perform: Callable[[StepCall], Any]
    operate: Callable[[Operation], Any]
    is_async: bool
    whereabouts: Callable[[], object]
    home: object
    step: StepCall | None = None
    limit: int = DEFAULT_LIMIT

    @contextmanager
    def entered(self) -> Generator[None]:
        """Make this the ambient context."""
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)

    @property
    def at_home(self) -> bool:
        """Whether the code is in the workflow's own task or thread."""
        return self.whereabouts() == self.home


_active: ContextVar[Context | None] = ContextVar("sqla_durable_context", default=None)


def active() -> Context | None:
    """Give the ambient context, or None outside a workflow."""
    return _active.get()


def current() -> Execution | None:
    """Tell where the code is: in which workflow, attempt and step. None outside a workflow.

    ```python
    @durable.step
    def charge(order_id: int) -> str:
        execution = current()
        headers = {"Idempotency-Key": execution.idempotency_key} if execution else {}
        ...
    ```
    """
    context = active()
    if context is None:
        return None
    attempt, step = context.attempt, context.step
    if step is None:
        return Execution(attempt.workflow_id, attempt.name, attempt.number)
    details = attempt.progress(step.position).details
    return Execution(
        attempt.workflow_id,
        attempt.name,
        attempt.number,
        step=step.position.key,
        step_attempt=step.tries.count,
        idempotency_key=attempt.idempotency_key(step.position),
        details=None if details is None else json.loads(details),
    )
