"""How a function of workflow code is carried out: in `def` code for its outcome, in `async def` code as a coroutine.

Each function is a `Call`, made once for both namespaces: `sqla_durable.sleep` asks it for its `outcome`,
`sqla_durable.asyncio.sleep` for its `coroutine`. What the operations do is in `operations`.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Generic, TypeVar, cast

from sqlalchemy.ext.asyncio import AsyncSession

from sqla_durable.api.sessions import AnySession
from sqla_durable.definitions.checks import require_key
from sqla_durable.definitions.codec import Codec
from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.definitions.inspection import SessionKind, require_name
from sqla_durable.errors import ArgumentError, UsageError
from sqla_durable.operations.calls import StepCall
from sqla_durable.operations.publishing import Publication, origin_of, publish_at_once, publish_once
from sqla_durable.operations.runtime import Operation
from sqla_durable.runtime.context import Context, active

T = TypeVar("T")

ANY: Any = Any
"""The type of a payload, where the caller names none."""


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """A call of a function that exists in both namespaces, its arguments checked.

    Attributes:
        function: its public name in `sqla_durable`.
        carry_out: carries it out in the ambient context, None outside a workflow. Returns the outcome, or where the
            code is `async def` perhaps a coroutine of it.
    """

    function: str
    carry_out: Callable[[Context | None], Any]

    def outcome(self) -> T:
        """Carry it out in `def` code.

        Raises:
            UsageError: the code is `async def`.
        """
        outcome = self.carry_out(in_sync_code(self.function))
        if inspect.iscoroutine(outcome):
            outcome.close()
            raise UsageError(
                f"sqla_durable.{self.function}() was given an AsyncSession: await "
                f"sqla_durable.asyncio.{_async_name(self.function)}(...)."
            )
        return cast("T", outcome)

    def coroutine(self) -> Coroutine[Any, Any, T]:
        """Call it in `async def` code; its place in the history is fixed now, it is carried out when awaited.

        Raises:
            UsageError: the code is `def`.
        """
        outcome = self.carry_out(in_async_code(self.function))
        return outcome if inspect.iscoroutine(outcome) else _returning(outcome)


def in_sync_code(function: str) -> Context | None:
    """Return the ambient context, None outside a workflow.

    Raises:
        UsageError: the code is that of an `async def` workflow or step.
    """
    context = active()
    if context is not None and _awaits_here(context) is True:
        raise UsageError(
            f"sqla_durable.{function}() is for def code and was called in {_where(context)}, which is async def: use "
            f"sqla_durable.asyncio.{_async_name(function)}(...)."
        )
    return context


def in_async_code(function: str) -> Context | None:
    """Return the ambient context, None outside a workflow.

    Raises:
        UsageError: the code is that of a `def` workflow or step.
    """
    context = active()
    if context is not None and _awaits_here(context) is False:
        raise UsageError(
            f"sqla_durable.asyncio.{_async_name(function)}() is for async def code and was called in "
            f"{_where(context)}, which is def: use sqla_durable.{function}(...)."
        )
    return context


def operation(function: str, name: str, operate: Operation, *, step_key: str | None = None) -> Call[Any]:
    """Return the call of a durable operation in workflow code.

    Args:
        function: the public name of the function.
        name: the operation's; with its occurrence it is the identity in the history.
        operate: what it does, on the workflow's runtime.
        step_key: an explicit identity instead.
    """
    return Call(function, partial(_operate, function, name, operate, step_key))


def _operate(function: str, name: str, operate: Operation, step_key: str | None, given: Context | None) -> Any:
    return visit(require_workflow(function, given), name, operate, step_key)


def visit(context: Context, name: str, operate: Operation, step_key: str | None = None) -> Any:
    """Carry out an operation under its identity, in the code of a workflow."""
    if step_key is not None:
        require_name(step_key, what=f"step_key of {name!r}")
    position = context.attempt.begin_call(name, ("sqla_durable", name), key=step_key)
    return context.runtime.perform_operation(position, operate)


def require_workflow(function: str, context: Context | None) -> Context:
    """Return the context of the workflow's own code.

    Raises:
        UsageError: this is none.
    """
    if context is None:
        raise UsageError(
            f"{function}() is for the code of a workflow, and was called outside of one: call it in a workflow's "
            "function, and start that with .start(session, ...) or execute it with an Executor."
        )
    if context.step is not None:
        raise UsageError(
            f"{function}() was called in step {context.step.position.shown!r}, which is executed as a whole: call it "
            f"in the code of workflow {context.attempt.name!r}, before or after the step."
        )
    return context


def require_sendable(value: str, *, what: str) -> None:
    """Refuse a name under which nothing can be sent.

    Raises:
        ArgumentError: it cannot be stored in the key of an operation, or is the engine's own.
    """
    require_key(value, what=what)
    if value.startswith("#"):
        raise ArgumentError(f"the {what} is {value!r}, which begins with '#': such names are the engine's own.")


def encode(value: object, *, what: str, limit: int) -> str:
    """Return the JSON text of a value, by its own type: its reader says which type is wanted.

    Raises:
        EncodingError: it cannot be stored.
        PayloadTooLargeError: it is larger than the limit.
    """
    return Codec.inferred(what=what, limit=limit).encode(value)


def sealed(value: object, context: Context, kind: str, key: str, *, what: str) -> str:
    """Return the text to store of a value of the workflow that is executed. Raises as `encode`."""
    return context.attempt.seal(encode(value, what=what, limit=context.limit), kind, key)


def publication(
    function: str, name: str, encoded: Callable[[Context], Publication], *, session: AnySession | None
) -> Call[None]:
    """Return the call of a function that publishes from a workflow's own code, or from one of its steps.

    Args:
        function: the public name of the function.
        name: that of the operation, in the workflow's own code.
        encoded: encodes what is published, in this context.
        session: that of a transactional step, if the caller passed one.
    """
    return Call(function, partial(_publish, function, name, encoded, session))


def _publish(
    function: str,
    name: str,
    encoded: Callable[[Context], Publication],
    session: AnySession | None,
    context: Context | None,
) -> Any:
    if context is None:
        return None  # nobody can read what belongs to no workflow
    if context.step is None:
        return _publish_between_steps(context, function, name, encoded, session)
    if context.step.definition.session is SessionKind.NONE:
        return _publish_in_plain_step(context, context.step, function, encoded, session)
    return _publish_in_transaction(context, context.step, function, encoded, session)


def _publish_between_steps(
    context: Context, function: str, name: str, encoded: Callable[[Context], Publication], session: AnySession | None
) -> Any:
    if session is not None:
        raise UsageError(
            f"{function}() was given a session in the code of workflow {context.attempt.name!r}, between steps: leave "
            "it out, or call it in a transactional step with that step's own."
        )
    context.attempt.branches.require_here(f"{function}()", workflow=context.attempt.name)
    position = context.attempt.begin_call(name, ("sqla_durable", function))
    within = partial(encoded, context)
    return context.runtime.perform_operation(position, lambda runtime, at: publish_once(runtime, at, within))


def _publish_in_plain_step(
    context: Context,
    step: StepCall,
    function: str,
    encoded: Callable[[Context], Publication],
    session: AnySession | None,
) -> Any:
    if session is not None:
        raise UsageError(
            f"{function}() was given a session in step {step.position.shown!r}, which is plain and writes at once: "
            "leave it out, or let the step take a Session, and pass that one."
        )
    within = partial(encoded, context)
    return context.runtime.perform_in_step(step.position, lambda runtime, _: publish_at_once(runtime, step, within))


def _publish_in_transaction(
    context: Context,
    step: StepCall,
    function: str,
    encoded: Callable[[Context], Publication],
    session: AnySession | None,
) -> Any:
    if session is None:
        raise UsageError(
            f"{function}() was called without the session of step {step.position.shown!r}, which is transactional: "
            "pass it, session=session, so that what is published commits with the step."
        )
    written, origin = encoded(context), origin_of(context.attempt, step)
    if isinstance(session, AsyncSession):
        return session.run_sync(written.write, origin)
    return written.write(session, origin)


def _awaits_here(context: Context) -> bool | None:
    """Return whether code in this place is `async def`; None if it may be of either kind."""
    if context.step is None or not context.is_async:
        return context.is_async
    match context.step.definition.session:
        case SessionKind.SYNC:
            return False
        case SessionKind.ASYNC:
            return None  # `run_sync` leads to `def` code
        case SessionKind.NONE:
            return _has_running_loop()  # a thread has none, that of a `def` step for example


def _has_running_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _async_name(function: str) -> str:
    """Return the name of a function's twin; that of a method, `Callback.result`, is in another class."""
    return f"Async{function}" if "." in function else function


def _where(context: Context) -> str:
    if context.step is None:
        return f"workflow {context.attempt.name!r}"
    return f"step {context.step.position.shown!r}"


async def _returning(value: T) -> T:
    return value
