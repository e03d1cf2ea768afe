"""What the decorators return: durable functions, typed as their users call them.

A step's session parameter is gone from what a workflow calls. Outside a workflow, and inside a step, a durable
function is the plain function that it was made of.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Generic, NoReturn, ParamSpec, Self, TypeVar, cast, overload
from uuid import UUID

from sqlalchemy import inspect
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable.checks import require_duration, workflow_id
from sqla_durable.children import AsyncChild, Child, map_children, start_child
from sqla_durable.context import Context, active
from sqla_durable.errors import DefinitionError, SessionError, StepOutsideWorkflowError, SyncAsyncError
from sqla_durable.handle import AsyncHandle, Handle
from sqla_durable.inspection import SessionKind, require_name
from sqla_durable.models import Workflow
from sqla_durable.operations.runtime import StepCall
from sqla_durable.registry import StepDefinition, WorkflowDefinition
from sqla_durable.retry import Tries, WaitFunction, until_true
from sqla_durable.start import BoundWorkflow, StartOptions, bind, of_step, start
from sqla_durable.store import schema

P = ParamSpec("P")
R = TypeVar("R", covariant=True)


def perform(definition: StepDefinition, key: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a step where the code is now: as a step in a workflow, as the plain function elsewhere."""
    context = active()
    if context is None or context.step is not None:
        _require_session(definition, args)
        return definition.fn(*args, **kwargs)
    _refuse_mismatch(context, definition, args)
    position = context.attempt.visit(definition.name, definition.place, key=key)
    return context.perform(StepCall(definition, position, args, kwargs, Tries()))


class _Durable(Generic[P, R]):
    """Shares the name and the documentation of the function that it is made of."""

    def __init__(self, fn: Callable[..., Any], name: str) -> None:
        functools.update_wrapper(cast("Any", self), fn, updated=())
        self.name = name

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"


class _Step(_Durable[P, R]):
    def __init__(self, definition: StepDefinition, key: str | None = None) -> None:
        super().__init__(definition.fn, definition.name)
        self.definition = definition
        self._key = key

    def __set_name__(self, owner: type, name: str) -> NoReturn:
        raise DefinitionError(
            f"{owner.__name__}.{name} is decorated in its class, where it has no instance: make the step of the bound "
            f"method instead, durable.step(instance.{name}, name={name!r})."
        )

    def options(self, *, key: str) -> Self:
        """Give the step with an explicit key: its identity in the workflow, instead of name and occurrence.

        Raises:
            DefinitionError: the key is blank, or contains one of the marks of occurrences.
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
        policy = until_true(self.definition.policy, wait=wait, timeout=timeout)
        return type(self)(replace(self.definition, policy=policy), self._key)

    def _perform(self, *args: Any, **kwargs: Any) -> Any:
        return perform(self.definition, self._key, args, kwargs)


class _SyncStep(_Step[P, R]):
    def aio(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        """Call the step in an `async def` workflow; it is executed in a thread.

        The same as calling it, for type checkers: they cannot see that the call gives an awaitable there.

        Raises:
            SyncAsyncError: this is not an `async def` workflow.
        """
        context = active()
        if context is None or context.step is not None or not context.is_async:
            raise SyncAsyncError(f"{self.name}.aio() is for async def workflows: call {self.name}(...) here.")
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


class _WorkflowFunction(_Durable[P, R]):
    def __init__(self, definition: WorkflowDefinition, options: StartOptions | None = None) -> None:
        super().__init__(definition.fn, definition.name)
        self.definition = definition
        self.start_options = options or StartOptions()

    def options(
        self,
        *,
        key: str | None = None,
        queue: str | None = None,
        priority: int | None = None,
        delay: timedelta | None = None,
        at: datetime | None = None,
        detached: bool | None = None,
        timeout: timedelta | None = None,
        deadline: timedelta | datetime | None = None,
    ) -> Self:
        """Give the workflow with options for its start, added to those that it has: see `StartOptions`.

        ```python
        checkout.options(key=f"order-{order.id}", priority=-1).start(session, order.id)
        ```

        Raises:
            ArgumentError: an option is blank, out of range, or contradicts another.
        """
        given = {"key": key, "queue": queue, "priority": priority, "delay": delay, "at": at, "detached": detached}
        given |= {"timeout": timeout, "deadline": deadline}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return type(self)(self.definition, replace(self.start_options, **changes))

    def bind(self, *args: P.args, **kwargs: P.kwargs) -> BoundWorkflow:
        """Check and keep the arguments, for `start_many`.

        Raises:
            ArgumentError: they do not fit the annotations, or one is an ORM instance.
            EncodingError: one cannot be stored.
        """
        return bind(self.definition, self.start_options, args, kwargs)

    @overload
    def start(self, session: Session, *args: P.args, **kwargs: P.kwargs) -> Workflow: ...

    @overload
    def start(self, session: AsyncSession, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, Workflow]: ...

    def start(
        self, session: Session | AsyncSession, *args: P.args, **kwargs: P.kwargs
    ) -> Workflow | Coroutine[Any, Any, Workflow]:
        """Start the workflow in the caller's transaction and give its record.

        Never commits: the workflow is there when the caller commits, and is not when it rolls back. Without a key
        the record is added to the session like any other object and inserted with its next flush, so it can be
        assigned to a relationship before. With a key one INSERT is executed now; it waits for another transaction
        that is inserting the same key, takes its record if it commits, and leaves the caller's transaction usable.
        In REPEATABLE READ and SERIALIZABLE that wait can end in a serialization failure (40001), as any INSERT can.
        In a step of another workflow the record is that one's child; see `start_child`.

        Args:
            session: the caller's session; with an `AsyncSession`, await the call.
            *args: the arguments of the workflow function.
            **kwargs: the same, by name.

        Returns:
            The record; for a known key the one that has it, whatever its status.

        Raises:
            ArgumentError: the arguments do not fit the annotations, or one is an ORM instance.
            EncodingError: one cannot be stored, or is too large.
            SchemaError, SessionError: the session's database does not hold the tables.
        """
        if not isinstance(session, (Session, AsyncSession)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SessionError(
                f"{self.name}.start() takes the caller's Session or AsyncSession first, got {session!r}. A scoped "
                "session is called to give one."
            )
        bound = of_step(self.bind(*args, **kwargs))
        if isinstance(session, AsyncSession):
            return session.run_sync(start, bound)
        return start(session, bound)

    def _start_child(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return start_child(self.definition, self.bind(*args, **kwargs))

    def _map(self, items: Iterable[Any], *, max_concurrency: int | None, tolerate: int) -> Any:
        bind: Callable[..., BoundWorkflow] = self.bind
        bound = [each if isinstance(each, BoundWorkflow) else bind(each) for each in items]
        return map_children(self.definition, bound, max_concurrency=max_concurrency, tolerate=tolerate)

    @overload
    def handle(self, session: Session | sessionmaker[Session], workflow: Workflow | UUID) -> Handle[R]: ...

    @overload
    def handle(
        self, session: AsyncSession | async_sessionmaker[AsyncSession], workflow: Workflow | UUID
    ) -> AsyncHandle[R]: ...

    def handle(
        self,
        session: Session | sessionmaker[Session] | AsyncSession | async_sessionmaker[AsyncSession],
        workflow: Workflow | UUID,
    ) -> Handle[R] | AsyncHandle[R]:
        """Give a handle that waits for the outcome, on the engine of the session or sessionmaker.

        The session itself is not used: the handle opens short transactions of its own.

        Raises:
            SessionError: there is no PostgreSQL engine.
        """
        found = id_of(workflow)
        opened = session if isinstance(session, (Session, AsyncSession)) else session()
        if isinstance(opened, AsyncSession):
            return AsyncHandle(self.definition, schema.engine_of(opened.sync_session), found)
        return Handle(self.definition, schema.engine_of(opened), found)


class WorkflowFunction(_WorkflowFunction[P, R]):
    """A workflow made of a `def`. Called directly it is the plain function; `start` makes it durable."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the plain function; inside another workflow its steps become that one's."""
        return cast("R", self.definition.fn(*args, **kwargs))

    def start_child(self, *args: P.args, **kwargs: P.kwargs) -> Child[R]:
        """Start a child in the code of a workflow, and give its handle.

        ```python
        children = [ship.start_child(order_id) for order_id in order_ids]
        labels = [child.result() for child in children]
        ```

        The child's record and the parent's checkpoint are one commit: on a replay it is the same child. With a key, the
        workflow that has the key. It is cancelled with its parent unless `options(detached=True)`, inherits its
        deadline, and goes on if the parent ends before. Several are started one after the other; see `map` for many.

        Raises:
            ArgumentError, EncodingError: an argument does not fit the annotations, or cannot be stored.
            UsageError: this is not a workflow's own code, or the child has the name and key of the workflow itself.
        """
        return cast("Child[R]", self._start_child(args, kwargs))

    def start_child_aio(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, AsyncChild[R]]:
        """Start a child in an `async def` workflow; the same as `start_child`, for type checkers."""
        return cast("Coroutine[Any, Any, AsyncChild[R]]", self._start_child(args, kwargs))

    @overload
    def map(self, items: Iterable[Any], *, max_concurrency: int | None = None) -> list[R]: ...

    @overload
    def map(
        self, items: Iterable[Any], *, max_concurrency: int | None = None, tolerate: int
    ) -> list[R | Exception]: ...

    def map(self, items: Iterable[Any], *, max_concurrency: int | None = None, tolerate: int = 0) -> Any:
        """Start a child for each item, in the code of a workflow, and wait for all; give their results in order.

        ```python
        labels = ship.map(order_ids, max_concurrency=100)
        ```

        All children are started in one commit. The parent waits as a row, is looked at now and then while they end,
        and records their results together when all have.

        Args:
            items: the only argument of each child, or what `bind(...)` gives.
            max_concurrency: how many are executed or wait in their queue at once; by default all.
            tolerate: how many may fail. Where one of these has failed, its error is in the list instead of a result.

        Raises:
            ChildrenFailedError: more than that failed. Those that were not finished are cancelled.
            ArgumentError: an argument does not fit, there are too many items, or a child has a key or a delay.
            PayloadTooLargeError: all the results together are too large to be recorded.
            UsageError: this is not a workflow's own code.
        """
        return self._map(items, max_concurrency=max_concurrency, tolerate=tolerate)


class AsyncWorkflowFunction(_WorkflowFunction[P, R]):
    """A workflow made of an `async def`. Called directly it is the plain function; `start` makes it durable."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        """Call the plain function; inside another workflow its steps become that one's."""
        return cast("Coroutine[Any, Any, R]", self.definition.fn(*args, **kwargs))

    def start_child(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, AsyncChild[R]]:
        """Start a child in the code of a workflow, and give its handle; see `WorkflowFunction.start_child`."""
        return cast("Coroutine[Any, Any, AsyncChild[R]]", self._start_child(args, kwargs))

    @overload
    def map(self, items: Iterable[Any], *, max_concurrency: int | None = None) -> Coroutine[Any, Any, list[R]]: ...

    @overload
    def map(
        self, items: Iterable[Any], *, max_concurrency: int | None = None, tolerate: int
    ) -> Coroutine[Any, Any, list[R | Exception]]: ...

    def map(self, items: Iterable[Any], *, max_concurrency: int | None = None, tolerate: int = 0) -> Any:
        """Start a child for each item and wait for all; see `WorkflowFunction.map`."""
        return self._map(items, max_concurrency=max_concurrency, tolerate=tolerate)


def id_of(workflow: Workflow | UUID) -> UUID:
    """Give a workflow's id; of a record also when its attributes are expired and its session is closed."""
    if not isinstance(workflow, Workflow):
        return workflow_id(workflow)
    identity = inspect(workflow).identity
    return workflow.id if identity is None else UUID(str(identity[0]))


def _require_session(definition: StepDefinition, args: tuple[Any, ...]) -> None:
    wanted = definition.session.type
    if wanted is not None and not (args and isinstance(args[0], wanted)):
        raise StepOutsideWorkflowError(
            f"step {definition.name!r} takes {_a(wanted)}, which only a workflow injects, and was called outside a "
            f"workflow's own code: pass one, {definition.name}(session, ...), or call it in a workflow."
        )


def _refuse_mismatch(context: Context, definition: StepDefinition, args: tuple[Any, ...]) -> None:
    context.attempt.branches.require_here(f"step {definition.name!r}", workflow=context.attempt.name)
    if definition.is_async and not context.is_async:
        raise SyncAsyncError(
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
