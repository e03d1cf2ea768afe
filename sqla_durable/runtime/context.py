"""Where the code is: the ambient context of a workflow's execution, kept in a context variable.

Outside a workflow there is none, and decorated functions are plain functions.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from sqla_durable.definitions.interceptors import Execution, StepExecution
from sqla_durable.definitions.jsonb import DEFAULT_LIMIT
from sqla_durable.errors import UsageError
from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.calls import Position
from sqla_durable.operations.runtime import Operation, StepCall, execution_of
from sqla_durable.store import Checkpoint


@dataclass(frozen=True, slots=True)
class Context:
    """What a decorated function finds when it is called in a workflow.

    Attributes:
        attempt: the attempt at the workflow; it knows in which branch the code is.
        perform: performs a step: gives its outcome in sync code, an awaitable of it in async code.
        operate: carries out another durable operation in the same way.
        is_async: whether the workflow is `async def`.
        note: records a checkpoint of the workflow's own code before its next effect, without awaiting it.
        fork: gives the context of a branch that is to be executed in another thread; None in async code.
        step: the step whose function is being executed; calls in it are plain calls.
        is_operating: whether the engine carries out an operation; tasks that it makes are no branches.
        limit: the largest payload in bytes.
    """

    attempt: Attempt
    perform: Callable[[StepCall], Any]
    operate: Callable[[Position, Operation], Any]
    note: Callable[[Checkpoint], None]
    is_async: bool
    fork: Callable[[], Fork] | None = None
    step: StepCall | None = None
    is_operating: bool = False
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
    def is_workflow_code(self) -> bool:
        """Whether the code is the workflow's own, in whichever task or thread: not a step's, nor the engine's."""
        return self.step is None and not self.is_operating

    def operating(self) -> AbstractContextManager[None]:
        """Mark that the engine carries out an operation: what it does meanwhile is not the workflow's own code."""
        return replace(self, is_operating=True).entered()


@dataclass(frozen=True, slots=True)
class Fork:
    """How a branch is executed in another thread.

    Attributes:
        context: the ambient context there.
        join: called in that thread at the branch's end: returns when everything that it has recorded is committed.
    """

    context: Context
    join: Callable[[], None]


_active: ContextVar[Context | None] = ContextVar("sqla_durable_context", default=None)


def active() -> Context | None:
    """Give the ambient context, or None outside a workflow."""
    return _active.get()


def active_in(context: contextvars.Context) -> Context | None:
    """Give the ambient context in a context of variables, which a task may be made with."""
    return context.get(_active)


def workflow_code(given: contextvars.Context | None = None) -> Context | None:
    """Return the context of the async workflow whose own code makes something now; None elsewhere.

    Args:
        given: the variables that what is made will have, instead of these: it is to be that workflow's code too.
    """
    context = active()
    if context is None or not (context.is_async and context.is_workflow_code):
        return None
    inside = context if given is None else active_in(given)
    return context if inside is not None and inside.attempt is context.attempt else None


@contextmanager
def outside() -> Generator[None]:
    """Call a function of the user's that is no part of the workflow: what is durable does nothing or refuses there."""
    token = _active.set(None)
    try:
        yield
    finally:
        _active.reset(token)


def current() -> Execution | None:
    """Return where the code is: in which workflow, attempt and step. None outside a workflow. See `current_step`.

    ```python
    execution = current()
    log.info("order %s is packed", order_id, extra={"workflow": execution.workflow_id if execution else None})
    ```
    """
    context = active()
    if context is None:
        return None
    return execution_of(context.attempt, context.step)


def current_step() -> StepExecution:
    """Return which step is being executed, in which try of it, and its idempotency key.

    ```python
    @durable.step
    def charge(order_id: int, cents: int) -> Receipt:
        return payments.charge(cents, idempotency_key=current_step().idempotency_key)
    ```

    Raises:
        UsageError: no step of a workflow is being executed.
    """
    found = current()
    if not isinstance(found, StepExecution):
        where = "outside a workflow" if found is None else f"in the own code of workflow {found.workflow!r}"
        raise UsageError(
            f"current_step() was called {where}, where no step is being executed: call it in a step's function, while "
            "a workflow executes that. current() does not raise."
        )
    return found
