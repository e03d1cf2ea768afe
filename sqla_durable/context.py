"""Where the code is: the ambient context of a workflow's execution, kept in a context variable.

Outside a workflow there is none, and decorated functions are plain functions.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from sqla_durable.execution import Execution
from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.runtime import StepCall, execution_of


@dataclass(frozen=True, slots=True)
class Context:
    """What a decorated function finds when it is called in a workflow.

    Attributes:
        attempt: the attempt at the workflow.
        perform: performs a step: gives its outcome in sync code, an awaitable of it in async code.
        is_async: whether the workflow is `async def`.
        whereabouts: tells the task or thread that the code is in.
        home: the one that executes the workflow's own code. Steps that are called elsewhere would be counted in an
            order that depends on speed.
        step: the step whose function is being executed; calls in it are plain calls.
    """

    attempt: Attempt
    perform: Callable[[StepCall], Any]
    is_async: bool
    whereabouts: Callable[[], object]
    home: object
    step: StepCall | None = None

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
    return execution_of(context.attempt, context.step)
