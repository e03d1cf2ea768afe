"""What the decorators return: durable functions, typed as their users call them.

A step's session parameter is gone from what a workflow calls. Outside a workflow, and inside a step, a durable
function is the plain function that it was made of.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any, NoReturn, ParamSpec, Self, TypeVar, cast, overload
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

import sqla_durable.api.polling as polling
from sqla_durable.api.callers import id_of, perform, require_session
from sqla_durable.api.children import AsyncChild, Child, map_children, start_child
from sqla_durable.api.handle import AsyncHandle, Handle
from sqla_durable.api.operate import operate, require_workflow
from sqla_durable.api.start import BoundWorkflow, StartOptions, bind, start
from sqla_durable.api.steps import DurableFunction
from sqla_durable.definitions.registry import WorkflowDefinition
from sqla_durable.errors import UsageError
from sqla_durable.models import Workflow
from sqla_durable.operations.workflow import continue_as_new
from sqla_durable.store import schema

P = ParamSpec("P")
R = TypeVar("R", covariant=True)


class _WorkflowFunction(DurableFunction[P, R]):
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

    def _continue_as_new(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        context = require_workflow("continue_as_new")
        if context.attempt.name != self.name:
            raise UsageError(
                f"{self.name}.continue_as_new() was called in workflow {context.attempt.name!r}, which begins anew as "
                "itself: call its own."
            )
        given = json.dumps(self.definition.encode(args, kwargs), ensure_ascii=False)
        return operate("continue_as_new", partial(continue_as_new, given=given))

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
        In REPEATABLE READ and SERIALIZABLE that wait ends with `KeyNotVisibleError` if the other one commits.
        In a step of another workflow the record is that one's child; see `start_child`.

        Args:
            session: the caller's session; with an `AsyncSession`, await the call.
            *args: the arguments of the workflow function.
            **kwargs: the same, by name.

        Returns:
            The record; for a known key the one that has it, whatever its status. Of that, name, queue, status and the
            times of its start are read; its payloads are loaded when they are asked for.

        Raises:
            ArgumentError: the arguments do not fit the annotations, or one is an ORM instance.
            EncodingError: one cannot be stored, or is too large.
            KeyNotVisibleError: the workflow that has the key cannot be seen.
            SchemaError, SessionError: the session's database does not hold the tables, or it is in AUTOCOMMIT.
        """
        require_session(session)
        return perform(session, partial(start, bound=self.bind(*args, **kwargs)), rights="starter")

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
            SessionError: this is no session or sessionmaker, or its engine is not PostgreSQL's.
        """
        found = id_of(workflow)
        opened = polling.session_of(session, what="handle()")
        if isinstance(opened, AsyncSession):
            return AsyncHandle(self.definition, schema.engine_of(opened.sync_session), found)
        return Handle(self.definition, schema.engine_of(opened), found)


class WorkflowFunction(_WorkflowFunction[P, R]):
    """A workflow made of a `def`. Called directly it is the plain function; `start` makes it durable."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the plain function; inside another workflow its steps become that one's."""
        return cast("R", self.definition.fn(*args, **kwargs))

    def continue_as_new(self, *args: P.args, **kwargs: P.kwargs) -> NoReturn:
        """Begin the workflow anew with these arguments and no history: for one that runs for months.

        ```python
        @durable.workflow
        def follow(customer: int, seen: int = 0) -> None:
            for _ in range(100):
                handle(wait_signal("event", Event))
                seen += 1
            follow.continue_as_new(customer, seen)
        ```

        In one statement its recorded steps are deleted and its input is replaced; its id, key, children, signals,
        events and streams stay. This attempt ends here, and a worker begins the next one. Nothing of it may go on:
        branches that are still open have lost the workflow.

        Raises:
            ArgumentError, EncodingError: an argument does not fit the annotations, or cannot be stored.
            UsageError: this is not the workflow's own code.
        """
        self._continue_as_new(args, kwargs)
        raise AssertionError("unreachable: the operation has unwound the workflow")

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

    def continue_as_new(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, NoReturn]:
        """Begin the workflow anew with these arguments; await it. See `WorkflowFunction.continue_as_new`."""
        return cast("Coroutine[Any, Any, NoReturn]", self._continue_as_new(args, kwargs))

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
