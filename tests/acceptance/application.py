"""An application whose durable functions are written once and become sync or async ones.

A story writes its workflows as coroutines and its steps as plain functions. In the sync form, a workflow is a `def`
that drives the coroutine without an event loop: awaiting a step there calls the sync step at once. In the async form,
it is the coroutine function itself, and a transactional step leads its function into the `AsyncSession`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from enum import StrEnum
from typing import Any, Concatenate, Generic, ParamSpec, TypeAlias, TypeVar, cast, get_type_hints

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sqla_durable import Durable, StepFunction, TransactionalStep, WorkflowFunction
from sqla_durable.asyncio import AsyncStepFunction, AsyncTransactionalStep, AsyncWorkflowFunction

P = ParamSpec("P")
R = TypeVar("R")
AnyStep: TypeAlias = (
    StepFunction[P, R] | AsyncStepFunction[P, R] | TransactionalStep[P, R] | AsyncTransactionalStep[P, R]
)
AnyWorkflow: TypeAlias = WorkflowFunction[P, R] | AsyncWorkflowFunction[P, R]


class Form(StrEnum):
    """How the durable functions of an application are written."""

    SYNC = "def"
    ASYNC = "async def"


class Called(Generic[P, R]):
    """A step of either form; a story awaits its calls."""

    def __init__(self, step: AnyStep[P, R]) -> None:
        self.step = step

    async def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        outcome: Any = self.step(*args, **kwargs)
        return cast("R", await outcome if inspect.isawaitable(outcome) else outcome)

    def options(self, *, step_key: str) -> Called[P, R]:
        return Called(self.step.options(step_key=step_key))

    def until(self, **options: Any) -> Called[P, R]:
        return Called(self.step.until(**options))


class Application:
    """A `Durable` and the functions that a story gives it."""

    def __init__(self, form: Form, durable: Durable | None = None) -> None:
        self.form = form
        self.durable = durable or Durable()

    def workflow(
        self,
        fn: Callable[P, Coroutine[Any, Any, R]],
        *,
        name: str | None = None,
        queue: str = "default",
        strict: bool = False,
    ) -> AnyWorkflow[P, R]:
        """Make a workflow of a coroutine function."""
        if self.form is Form.ASYNC:
            return self.durable.workflow(fn, name=name, queue=queue, strict=strict)

        def driven(*args: P.args, **kwargs: P.kwargs) -> R:
            return drive(fn(*args, **kwargs))

        return self.durable.workflow(_like(driven, fn), name=name, queue=queue, strict=strict)

    def plain(self, fn: Callable[P, R], **policy: Any) -> Called[P, R]:
        """Make a plain step of a function."""
        if self.form is Form.SYNC:
            return Called(self.durable.step(fn, **policy))

        async def awaited(*args: P.args, **kwargs: P.kwargs) -> R:
            return fn(*args, **kwargs)

        return Called(self.durable.step(_like(awaited, fn), **policy))

    def publishing(self, fn: Callable[P, Coroutine[Any, Any, R]], **policy: Any) -> Called[P, R]:
        """Make a plain step of a coroutine function, which awaits what steps call of the engine."""
        if self.form is Form.ASYNC:
            return Called(self.durable.step(fn, **policy))

        def driven(*args: P.args, **kwargs: P.kwargs) -> R:
            return drive(fn(*args, **kwargs))

        return Called(self.durable.step(_like(driven, fn), **policy))

    def transactional(self, fn: Callable[Concatenate[Session, P], R], **policy: Any) -> Called[P, R]:
        """Make a transactional step of a function of a `Session`."""
        if self.form is Form.SYNC:
            return Called(self.durable.step(fn, **policy))

        async def awaited(session: AsyncSession, *args: P.args, **kwargs: P.kwargs) -> R:
            return await session.run_sync(fn, *args, **kwargs)

        return Called(self.durable.step(_like(awaited, fn), **policy))


def drive(coroutine: Coroutine[Any, Any, R]) -> R:
    """Execute a coroutine that never suspends."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return cast("R", done.value)
    coroutine.close()
    raise AssertionError("a story in its sync form suspended")


F = TypeVar("F", bound=Callable[..., Any])


def _like(fn: F, model: Callable[..., Any]) -> F:
    """Copy the name and the resolved annotations of another function, but keep the kind of session."""
    signature = inspect.signature(model, eval_str=True)
    hints = get_type_hints(model)
    if inspect.iscoroutinefunction(fn):
        hints = {name: AsyncSession if hint is Session else hint for name, hint in hints.items()}
    parameters = [each.replace(annotation=hints.get(name, Any)) for name, each in signature.parameters.items()]
    fn.__name__, fn.__qualname__, fn.__module__ = model.__name__, model.__qualname__, model.__module__
    fn.__annotations__ = hints
    fn.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return fn
