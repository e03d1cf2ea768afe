"""Steps: what `durable.step` returns, `run_step`, the heartbeat of a step, and which steps are being executed.

A step is typed as it is called in a workflow, where its session parameter is gone.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Concatenate, Generic, NoReturn, ParamSpec, Self, TypeVar, cast, overload
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sqla_durable.api.calls import Call, encode, in_async_code, in_sync_code
from sqla_durable.api.sessions import id_of, read
from sqla_durable.definitions.checks import require_duration
from sqla_durable.definitions.inspection import SessionKind, require_name
from sqla_durable.definitions.registry import StepDefinition, StepOptions
from sqla_durable.definitions.retry import Tries, WaitFunction, until_true
from sqla_durable.errors import (
    DefinitionError,
    SessionError,
    UsageError,
)
from sqla_durable.models import Workflow
from sqla_durable.operations.calls import StepCall
from sqla_durable.operations.step import HEARTBEAT_INTERVAL, send_heartbeat
from sqla_durable.runtime.context import Context, active
from sqla_durable.store import workers

P = ParamSpec("P")
R = TypeVar("R", covariant=True)
T = TypeVar("T")


def call_step(definition: StepDefinition, key: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a step in its own kind of code: as a step in a workflow, as the plain function elsewhere."""
    context = active()
    if context is None or context.step is not None:
        return _call_function(definition, args, kwargs)
    if definition.is_async is not context.runtime.is_async:
        _refuse_mismatch(context, definition)
    return _call_in_workflow(context, definition, key, args, kwargs)


def call_step_async(
    definition: StepDefinition, key: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Coroutine[Any, Any, Any]:
    """Call a step of either kind in `async def` code; a `def` function is executed in a thread.

    Raises:
        UsageError: the workflow is `def`.
    """
    context = active()
    if context is not None and context.step is None:
        return cast("Coroutine[Any, Any, Any]", _call_in_workflow(context, definition, key, args, kwargs))
    if definition.is_async:
        return cast("Coroutine[Any, Any, Any]", _call_function(definition, args, kwargs))
    return asyncio.to_thread(_call_function, definition, args, kwargs)


def _call_function(definition: StepDefinition, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    _require_session(definition, args)
    return definition.fn(*args, **kwargs)


def _call_in_workflow(
    context: Context, definition: StepDefinition, key: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if definition.session is not SessionKind.NONE:
        _refuse_session(context, definition, args)
    position = context.attempt.begin_call(definition.name, definition.place, key=key)
    return context.runtime.perform_step(StepCall(definition, position, args, kwargs, Tries()))


class DurableFunction(Generic[P, R]):
    """A function with the name and the documentation of the one that it is made of."""

    def __init__(self, fn: Callable[..., Any], name: str) -> None:
        functools.update_wrapper(cast("Any", self), fn, updated=())
        self.name = name

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"


class _Step(DurableFunction[P, R]):
    def __init__(self, definition: StepDefinition, step_key: str | None = None) -> None:
        super().__init__(definition.fn, definition.name)
        self.definition = definition
        self.step_key = step_key

    def __set_name__(self, owner: type, name: str) -> NoReturn:
        raise DefinitionError(
            f"{owner.__name__}.{name} is decorated in its class, where it has no instance: make the step of the bound "
            f"method instead, durable.step(instance.{name}, name={name!r}); or, if it needs none, write @staticmethod "
            "above the decorator."
        )

    def options(self, *, step_key: str) -> Self:
        """Return the step with an explicit key: its identity in the workflow, instead of name and occurrence.

        Raises:
            DefinitionError: the key is blank, too long, or cannot be stored.
        """
        require_name(step_key, what=f"step_key of step {self.name!r}")
        return type(self)(self.definition, step_key)

    def until(self, *, wait: WaitFunction | None = None, timeout: timedelta | None = None) -> Self:
        """Return the step as one that is executed again and again until its result is true.

        ```python
        paid = await is_paid.until(wait=tenacity.wait_exponential(max=3600), timeout=timedelta(days=2))(order_id)
        ```

        The waits between are timers: longer than a moment, the workflow is suspended meanwhile. The step has one row,
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
        return type(self)(replace(definition, options=replace(definition.options, policy=policy)), self.step_key)


class SyncStep(_Step[P, R]):
    """A step made of a `def`; an `async def` workflow calls it by `sqla_durable.asyncio.to_thread`."""


class StepFunction(SyncStep[P, R]):
    """A plain step made of a `def`: its outcome is recorded, its effects happen at least once."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Execute the step, or return what it returned before."""
        return cast("R", call_step(self.definition, self.step_key, args, kwargs))


class AsyncStepFunction(_Step[P, R]):
    """A plain step made of an `async def`: its outcome is recorded, its effects happen at least once."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        """Execute the step, or return what it returned before."""
        return cast("Coroutine[Any, Any, R]", call_step(self.definition, self.step_key, args, kwargs))


class TransactionalStep(SyncStep[P, R]):
    """A step that takes a `Session`: its writes and its checkpoint commit in one transaction, exactly once."""

    @overload
    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R: ...

    @overload
    def __call__(self, session: Session, /, *args: P.args, **kwargs: P.kwargs) -> R: ...

    def __call__(self, /, *args: Any, **kwargs: Any) -> R:
        """Execute the step, or return what it returned before; outside a workflow, pass a session first."""
        return cast("R", call_step(self.definition, self.step_key, args, kwargs))


class AsyncTransactionalStep(_Step[P, R]):
    """A step that takes an `AsyncSession`: its writes and its checkpoint commit in one transaction, exactly once."""

    @overload
    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]: ...

    @overload
    def __call__(self, session: AsyncSession, /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]: ...

    def __call__(self, /, *args: Any, **kwargs: Any) -> Coroutine[Any, Any, R]:
        """Execute the step, or return what it returned before; outside a workflow, pass a session first."""
        return cast("Coroutine[Any, Any, R]", call_step(self.definition, self.step_key, args, kwargs))


def _require_session(definition: StepDefinition, args: tuple[Any, ...]) -> None:
    wanted = definition.session.type
    if wanted is not None and not (args and isinstance(args[0], wanted)):
        raise UsageError(
            f"step {definition.name!r} takes {_a(wanted)}, which only a workflow injects, and was called outside a "
            f"workflow's own code: pass one, {definition.name}(session, ...), or call it in a workflow."
        )


def _refuse_mismatch(context: Context, definition: StepDefinition) -> NoReturn:
    if definition.is_async:
        raise UsageError(
            f"step {definition.name!r} is async def and workflow {context.attempt.name!r} is def, which cannot await "
            "it: make the workflow async def, or the step a def."
        )
    raise UsageError(
        f"step {definition.name!r} is def and was called in workflow {context.attempt.name!r}, which is async def: "
        f"await sqla_durable.asyncio.to_thread({definition.name}, ...)."
    )


def _refuse_session(context: Context, definition: StepDefinition, args: tuple[Any, ...]) -> None:
    if args and isinstance(args[0], (Session, AsyncSession)):
        raise SessionError(
            f"step {definition.name!r} was given {args[0]!r} in workflow {context.attempt.name!r}: its session is "
            f"injected there, so that its checkpoint commits with its writes. Call {definition.name}(...) without."
        )


def _a(kind: type) -> str:
    return f"a{'n' if kind.__name__[0] in 'AEIOU' else ''} {kind.__name__}"


@overload
def run_step(name: str, fn: Callable[Concatenate[Session, P], T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...


@overload
def run_step(name: str, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...


def run_step(name: str, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call any function as a step of the workflow whose code this is, under this name.

    ```python
    answer = run_step("ask", client.complete, prompt)
    ```

    Guarantees what a step of `durable.step` does; outside a workflow it is a plain call.

    Args:
        name: the step's identity in the workflow, with its occurrence; see `step_scope` to number a library's apart.
        fn: a function, closure or bound method; a first parameter annotated as a session gets it injected.
        *args: its arguments, which are not stored.
        **kwargs: the same, by name.

    Raises:
        DefinitionError: the function cannot be a step.
        UsageError: another function has the name in this workflow.
        UsageError: the code is `async def`, or the function is.
        Exception: the step's own error.
    """
    in_sync_code("run_step")
    return call_step(StepDefinition.of(fn, StepOptions(name)), None, args, kwargs)


def run_step_async(
    name: str, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Coroutine[Any, Any, Any]:
    """Call any function as a step of an `async def` workflow; see `sqla_durable.asyncio.run_step`."""
    in_async_code("run_step")
    return call_step_async(StepDefinition.of(fn, StepOptions(name)), None, args, kwargs)


def heartbeat(details: object = None) -> None:
    """Report from a plain step that it is alive, and how far it has come.

    ```python
    @durable.step
    def import_file(path: str) -> int:
        done = current_step().details or 0
        for number, line in enumerate(lines_of(path, after=done), done + 1):
            ...
            heartbeat(number)
        return number
    ```

    The last details stand in the step's record, `Step.details`, and stay there; the next try of the step finds them in
    `current_step().details`, whichever worker executes it. The first call is committed when it returns; after that
    there is at most one statement a second: details that come sooner wait for the next call after it, or for the end of
    the try, and a worker that dies before loses them. Refused to an attempt that no longer owns its workflow: the step
    of a cancelled workflow ends here. With `heartbeat_timeout=` a step has failed that does not call this for so
    long; a `def` one ends here then, and likewise when its `timeout` is over. Outside a workflow nothing happens.

    Args:
        details: of any type that can be stored as JSON, and read as what JSON knows; None leaves those that are there.

    Raises:
        EncodingError, PayloadTooLargeError: they cannot be stored, or are too large.
        HeartbeatTimeoutError: the step has been silent for longer than its `heartbeat_timeout`; nothing is reported.
        StepTimeoutError: the time of the try is over; likewise.
        UsageError: this is not a plain step.
    """
    heartbeat_call(details).outcome()


def heartbeat_call(details: object) -> Call[None]:
    """Return the call of `heartbeat`."""
    return Call("heartbeat", partial(_heartbeat, details))


def _heartbeat(details: object, context: Context | None) -> Any:
    if context is None:
        return None
    step = context.step
    if step is None or step.definition.session is not SessionKind.NONE:
        where = "between steps" if step is None else f"in step {step.position.shown!r}, which is transactional"
        raise UsageError(
            f"heartbeat() was called {where} in workflow {context.attempt.name!r}: only a plain step has one. What "
            "others are to see of the rest, set_event() publishes."
        )
    what = f"details of step {step.position.shown!r}"
    text = None if details is None else encode(details, what=what, limit=context.limit)
    if not context.attempt.progress(step.position).report(text, interval=HEARTBEAT_INTERVAL):
        return None
    return context.runtime.perform_in_step(step.position, lambda runtime, _: send_heartbeat(runtime, step))


@dataclass(frozen=True, slots=True)
class RunningStep:
    """A step that was being executed when its worker's last heartbeat was written.

    Attributes:
        step: its key.
        try_number: which try of it, from 1.
        since: when that try began, on the database's clock.
        worker: the name of the worker.
        seen_at: the time of that heartbeat. The next ones come within a third of the lease, while the worker lives.
        lease_expires_at: if the worker is dead, another one reclaims the workflow then.
    """

    step: str
    try_number: int
    since: datetime
    worker: str
    seen_at: datetime
    lease_expires_at: datetime


def running_steps(session: Session, workflow: Workflow | UUID) -> list[RunningStep]:
    """Return the steps of a workflow that a worker is executing, the oldest first.

    ```python
    for step in running_steps(session, order.checkout):
        print(f"{step.step} is being executed since {step.since}, seen at {step.seen_at} on {step.worker}")
    ```

    A worker writes them with its heartbeat, three times in a lease, and only those that are executed for longer than
    the time between two: what is shorter is in the records of the steps before that. Executors have no heartbeat.

    Raises:
        ArgumentError: this is no workflow.
        SchemaError, SessionError: the session's database does not hold the tables.
    """
    return read(session, partial(_running_steps, workflow_id=id_of(workflow)), name="running_steps")


def _running_steps(session: Session, workflow_id: UUID) -> list[RunningStep]:
    found = workers.running_steps(session, workflow_id)
    if found is None:
        return []
    steps = [
        RunningStep(
            step=key,
            try_number=count,
            since=found.heartbeat_at - timedelta(seconds=seconds),
            worker=found.name,
            seen_at=found.heartbeat_at,
            lease_expires_at=found.lease_expires_at,
        )
        for key, (count, seconds) in found.steps.items()
    ]
    return sorted(steps, key=lambda each: each.since)
