"""The ambient context of the code that a workflow executes, kept in a context variable.

Outside a workflow there is none, and decorated functions are plain functions. Log records say where they were logged.
"""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from sqla_durable.definitions.interceptors import Execution, StepExecution
from sqla_durable.definitions.log import NOWHERE, attributes, locate_by, one_line
from sqla_durable.errors import UsageError
from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.calls import StepCall
from sqla_durable.operations.runtime import Runtime, execution_of


class Context:
    """The ambient context of code that a workflow executes. To be treated as immutable.

    Attributes:
        runtime: executes the attempt, and performs the operations that the code calls.
        attempt: the attempt at the workflow; it knows in which branch the code is.
        step: the step whose function is being executed; calls in it are plain calls.
        is_workflow_code: whether the code is the workflow's own, in whichever task or thread: not that of a step, nor
            that of an operation. Tasks that an operation makes are no branches.
    """

    __slots__ = ("attempt", "is_workflow_code", "runtime", "step")

    def __init__(self, runtime: Runtime, *, step: StepCall | None = None, is_operating: bool = False) -> None:
        self.runtime = runtime
        self.attempt: Attempt = runtime.attempt
        self.step = step
        self.is_workflow_code = step is None and not is_operating

    @property
    def is_async(self) -> bool:
        """Whether the workflow's code is awaited."""
        return self.runtime.is_async

    @property
    def limit(self) -> int:
        """The largest payload in bytes."""
        return self.runtime.limit if self.step is None else self.step.definition.limit

    @contextmanager
    def entered(self) -> Generator[None]:
        """Make this the ambient context."""
        token = ACTIVE.set(self)
        try:
            yield
        finally:
            ACTIVE.reset(token)


ACTIVE: ContextVar[Context | None] = ContextVar("sqla_durable_context", default=None)
"""The ambient context; others than the runtimes ask `active`."""

ATTEMPT: ContextVar[Attempt | None] = ContextVar("sqla_durable_attempt", default=None)
"""The attempt that a worker's task executes, for what the worker itself logs about it."""


def active() -> Context | None:
    """Return the ambient context, or None outside a workflow."""
    return ACTIVE.get()


def active_in(context: contextvars.Context) -> Context | None:
    """Return the ambient context in a context of variables, with which a task may be made."""
    return context.get(ACTIVE)


def workflow_code(given: contextvars.Context | None = None) -> Context | None:
    """Return the context of the async workflow whose own code makes something now; None elsewhere.

    Args:
        given: the variables that what is made will have, instead of these: it is to be that workflow's code too.
    """
    context = ACTIVE.get()
    if context is None or not (context.is_workflow_code and context.runtime.is_async):
        return None
    inside = context if given is None else active_in(given)
    return context if inside is not None and inside.attempt is context.attempt else None


@contextmanager
def outside() -> Generator[None]:
    """Call a function of the user's that is no part of the workflow: what is durable does nothing or refuses there."""
    token, of_attempt = ACTIVE.set(None), ATTEMPT.set(None)
    try:
        yield
    finally:
        ACTIVE.reset(token)
        ATTEMPT.reset(of_attempt)


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


class WorkflowLogFilter(logging.Filter):
    """Adds to log records where they were logged: the attributes that those of this package have.

    ```python
    handler = logging.StreamHandler()
    handler.addFilter(WorkflowLogFilter())
    handler.setFormatter(logging.Formatter("%(levelname)s %(workflow)s %(workflow_id)s %(step)s %(message)s"))
    ```

    They are `workflow_id`, `workflow`, `attempt`, `step` (the key of the step), all None outside a workflow, and
    `worker`. Add it to handlers: a filter of a logger does not see the records of the loggers below it. It must be
    called in the thread that logs, so with a `QueueHandler` add it to that one. What a record already has, it keeps.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the attributes, and let every record pass."""
        present = vars(record)
        for name, value in attributes().items():
            present.setdefault(name, value)
        return True


def _place() -> Mapping[str, object]:
    """Return what identifies the workflow and step of the code that logs."""
    context = ACTIVE.get()
    attempt = ATTEMPT.get() if context is None else context.attempt
    if attempt is None:
        return NOWHERE
    step = None if context is None or context.step is None else one_line(context.step.position.shown)
    name = one_line(attempt.name)
    return {"workflow_id": attempt.workflow_id, "workflow": name, "attempt": attempt.number, "step": step}


locate_by(_place)
