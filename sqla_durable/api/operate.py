"""How the durable operations that are not steps are called in workflow code, in sync code and in async code."""

from __future__ import annotations

from typing import Any

from sqla_durable.definitions.checks import fault_in_key
from sqla_durable.definitions.inspection import require_name
from sqla_durable.errors import ArgumentError, UsageError
from sqla_durable.operations.runtime import Operation
from sqla_durable.runtime.context import Context, active


def operate(name: str, operation: Operation, *, key: str | None = None) -> Any:
    """Carry out an operation where the code is now: gives its outcome in `def` code, an awaitable in `async def` code.

    Args:
        name: its name; with its occurrence it is the identity in the history.
        operation: what it does, on the workflow's runtime.
        key: an explicit identity instead.

    Raises:
        UsageError: this is not a workflow's own code.
    """
    context = require_workflow(name)
    if key is not None:
        require_name(key, what=f"key of {name!r}")
    position = context.attempt.begin_call(name, ("sqla_durable", name), key=key)
    return context.runtime.operate(position, operation)


def require_workflow(name: str) -> Context:
    """Give the context of the workflow's own code.

    Raises:
        UsageError: this is none.
    """
    context = active()
    if context is None:
        raise UsageError(
            f"{name!r} is for the code of a workflow, and this is outside of one: call it in a workflow's function, "
            "and start that with .start(session, ...) or execute it with an Executor."
        )
    if context.step is not None:
        raise UsageError(
            f"{name!r} was called in step {context.step.position.shown!r}, which is executed as a whole: call it in "
            f"the code of workflow {context.attempt.name!r}, before or after the step."
        )
    return context


def require_sendable(value: str, *, what: str) -> None:
    """Refuse the name of a signal or an update that cannot be stored, or that only the engine uses.

    Raises:
        ArgumentError: it is no text, is blank, is too long, cannot be stored, or begins with `#`.
    """
    fault = fault_in_key(value)
    if fault is not None:
        raise ArgumentError(f"the {what} is {value!r}, which {fault}: pass another one.")
    if value.startswith("#"):
        raise ArgumentError(f"the {what} is {value!r}, which begins with '#': such names are the engine's own.")
