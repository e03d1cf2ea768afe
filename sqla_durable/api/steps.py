"""What `durable.step` returns: typed as it is called in a workflow, where its session parameter is gone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from dataclasses import replace
from datetime import timedelta
from typing import Any, Concatenate, Generic, NoReturn, ParamSpec, Self, TypeVar, cast, overload

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sqla_durable.definitions.checks import require_duration
from sqla_durable.definitions.inspection import SessionKind, require_name
from sqla_durable.definitions.options import StepOptions
from sqla_durable.definitions.registry import StepDefinition
from sqla_durable.definitions.retry import Tries, WaitFunction, until_true
from sqla_durable.errors import DefinitionError, SessionError, UsageError
from sqla_durable.operations.runtime import StepCall
from sqla_durable.runtime.context import Context, active

P = ParamSpec("P")
R = TypeVar("R", covariant=True)
T = TypeVar("T")


def perform(definition: StepDefinition, key: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a step where the code is now: as a step in a workflow, as the plain function elsewhere."""
    context = active()
    if context is None or context.step is not None:
        _require_session(definition, args)
        return definition.fn(*args, **kwargs)
    _refuse_mismatch(context, definition, args)
    position = context.attempt.begin_call(definition.name, definition.place, key=key)
    return context.runtime.perform(StepCall(definition, position, args, kwargs, Tries()))


class DurableFunction(Generic[P, R]):
    """Shares the name and the documentation of the function that it is made of."""

    def __init__(self, fn: Callable[..., Any], name: str) -> None:
        functools.update_wrapper(cast("Any", self), fn, updated=())
        self.name = name

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"


class _Step(DurableFunction[P, R]):
    def __init__(self, definition: StepDefinition, key: str | None = None) -> None:
        super().__init__(definition.fn, definition.name)
        self.definition = definition
        self._key = key

    def __set_name__(self, owner: type, name: str) -> NoReturn:
        raise DefinitionError(
            f"{owner.__name__}.{name} is decorated in its class, where it has no instance: make the step of the bound "
            f"method instead, durable.step(instance.{name}, name={name!r}); or, if it needs none, write @staticmethod "
            "above the decorator."
        )

    def options(self, *, key: str) -> Self:
        """Give the step with an explicit key: its identity in the workflow, instead of name and occurrence.

        Raises:
            DefinitionError: the key is blank, too long, or cannot be stored.
        """
        require_name(key, what=f"key of step {self.name!r}")
        return type(self)(self.definition, key)

    def until(self, *, wait: WaitFunction | None = None, timeout: timedelta | None = None) -> Self:
        """Give the step as one that is executed again and again until its result is true.

        ```python
        paid = await is_paid.until(wait=tenacity.wait_exponential(max=3600), timeout=timedelta(days=2))(order_id)
        ```

        The waits between are timers: longer than a moment, the workflow is a row meanwhile. The step has one row,
        however often it is executed, and its own policy for errors.

        Args:
            wait: a tenacity object; by default that of the step, or exponential up to a minute.
            timeout: when to give up, from the first try on; then the last result stands, which is false.

        Raises:
            DefinitionError: `wait` is not a tenacity object.
            ArgumentError: the timeout is no timedelta.
        """
        if timeout is not None:
            require_duration(timeout, "timeout")
        definition = self.definition
        policy = until_true(definition.options.policy, wait=wait, timeout=timeout)
        return type(self)(replace(definition, options=replace(definition.options, policy=policy)), self._key)

    def _perform(self, *args: Any, **kwargs: Any) -> Any:
        return perform(self.definition, self._key, args, kwargs)


class _SyncStep(_Step[P, R]):
    def aio(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        """Call the step in an `async def` workflow; it is executed in a thread.

        The same as calling it, for type checkers: they cannot see that the call gives an awaitable there.

        Raises:
            UsageError: this is not an `async def` workflow.
        """
        context = active()
        if context is None or context.step is not None or not context.is_async:
            raise UsageError(f"{self.name}.aio() is for async def workflows: call {self.name}(...) here.")
        return cast("Coroutine[Any, Any, R]", self._perform(*args, **kwargs))


class StepFunction(_SyncStep[P, R]):
    """A plain step made of a `def`: its outcome is recorded, its effects happen at least once."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Execute the step, or return what it returned before; in an `async def` workflow, await the call."""
        return cast("R", self._perform(*args, **kwargs))


class AsyncStepFunction(_Step[P, R]):
    """A plain step made of an `async def`: its outcome is recorded, its effects happen at least once."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        """Execute the step, or return what it returned before."""
        return cast("Coroutine[Any, Any, R]", self._perform(*args, **kwargs))


class TransactionalStep(_SyncStep[P, R]):
    """A step that takes a `Session`: its writes and its checkpoint commit in one transaction, exactly once."""

    @overload
    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R: ...

    @overload
    def __call__(self, session: Session, /, *args: P.args, **kwargs: P.kwargs) -> R: ...

    def __call__(self, /, *args: Any, **kwargs: Any) -> R:
        """Execute the step, or return what it returned before; outside a workflow, pass a session first."""
        return cast("R", self._perform(*args, **kwargs))


class AsyncTransactionalStep(_Step[P, R]):
    """A step that takes an `AsyncSession`: its writes and its checkpoint commit in one transaction, exactly once."""

    @overload
    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]: ...

    @overload
    def __call__(self, session: AsyncSession, /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]: ...

    def __call__(self, /, *args: Any, **kwargs: Any) -> Coroutine[Any, Any, R]:
        """Execute the step, or return what it returned before; outside a workflow, pass a session first."""
        return cast("Coroutine[Any, Any, R]", self._perform(*args, **kwargs))


def _require_session(definition: StepDefinition, args: tuple[Any, ...]) -> None:
    wanted = definition.session.type
    if wanted is not None and not (args and isinstance(args[0], wanted)):
        raise UsageError(
            f"step {definition.name!r} takes {_a(wanted)}, which only a workflow injects, and was called outside a "
            f"workflow's own code: pass one, {definition.name}(session, ...), or call it in a workflow."
        )


def _refuse_mismatch(context: Context, definition: StepDefinition, args: tuple[Any, ...]) -> None:
    context.attempt.branches.require_here(f"step {definition.name!r}", workflow=context.attempt.name)
    if definition.is_async and not context.is_async:
        raise UsageError(
            f"step {definition.name!r} is async def and workflow {context.attempt.name!r} is def, which cannot await "
            "it: make the workflow async def, or the step a def."
        )
    if definition.session is not SessionKind.NONE and args and isinstance(args[0], (Session, AsyncSession)):
        raise SessionError(
            f"step {definition.name!r} was given {args[0]!r} in workflow {context.attempt.name!r}: its session is "
            f"injected there, so that its checkpoint commits with its writes. Call {definition.name}(...) without."
        )


def _a(kind: type) -> str:
    return f"a{'n' if kind.__name__[0] in 'AEIOU' else ''} {kind.__name__}"


@overload
def run_step(
    name: str, fn: Callable[Concatenate[AsyncSession, P], Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs
) -> Coroutine[Any, Any, T]: ...


@overload
def run_step(name: str, fn: Callable[Concatenate[Session, P], T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...


@overload
def run_step(
    name: str, fn: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs
) -> Coroutine[Any, Any, T]: ...


@overload
def run_step(name: str, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...


def run_step(name: str, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call any function as a step of the workflow that the code is in, under this name.

    ```python
    answer = await run_step("ask", client.complete, prompt)
    ```

    Guarantees what a step of `durable.step` does; outside a workflow it is a plain call. In an `async def` workflow
    await the call, of a sync function too.

    Args:
        name: the step's identity in the workflow, with its occurrence.
        fn: a function, closure or bound method; a first parameter annotated as a session gets it injected.
        *args: its arguments, which are not stored.
        **kwargs: the same, by name.

    Raises:
        DefinitionError: the function cannot be a step.
        UsageError: another function has the name in this workflow.
        Exception: the step's own error.
    """
    return perform(StepDefinition.of(fn, StepOptions(name)), None, args, kwargs)
