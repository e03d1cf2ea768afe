"""Workflow functions: what `durable.workflow` returns, with what callers do with one.

Outside a workflow, and inside a step, a workflow function is the plain function that it was made of.
"""

from __future__ import annotations

import json
from collections.abc import Coroutine
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any, NoReturn, ParamSpec, Self, TypeVar, cast, overload
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable.api.callers import id_of, perform_in_either, require_session
from sqla_durable.api.calls import Call, require_workflow, visit
from sqla_durable.api.polling import AsyncHandle, Handle, PollingEngine, session_of
from sqla_durable.api.start import BoundWorkflow, StartOptions, bind, start
from sqla_durable.api.steps import DurableFunction
from sqla_durable.definitions.registry import WorkflowDefinition
from sqla_durable.errors import UsageError
from sqla_durable.models import Workflow
from sqla_durable.operations.workflow import continue_as_new
from sqla_durable.runtime.context import Context

P = ParamSpec("P")
R = TypeVar("R", covariant=True)


class AnyWorkflowFunction(DurableFunction[P, R]):
    """A workflow function of either kind."""

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
        """Return the workflow with options for its start, added to those that it has: see `StartOptions`.

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

    def _continue_as_new(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call[NoReturn]:
        restart = partial(continue_as_new, given=json.dumps(self.definition.encode(args, kwargs), ensure_ascii=False))

        def carry_out(given: Context | None) -> Any:
            context = require_workflow("continue_as_new", given)
            if context.attempt.name != self.name:
                raise UsageError(
                    f"{self.name}.continue_as_new() was called in workflow {context.attempt.name!r}, which continues "
                    "as itself: call its own."
                )
            return visit(context, "continue_as_new", restart)

        return Call("WorkflowFunction.continue_as_new", carry_out)

    def bind(self, *args: P.args, **kwargs: P.kwargs) -> BoundWorkflow:
        """Check the arguments and return them with the workflow, for `start_many` and its like.

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
        """Start the workflow in the caller's transaction and return its record.

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
        return perform_in_either(session, partial(start, bound=self.bind(*args, **kwargs)), rights="starter")

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
        """Return a handle that waits for the outcome, on the engine of the session or sessionmaker.

        The session itself is not used: the handle opens short transactions of its own.

        Raises:
            SessionError: this is no session or sessionmaker, or its engine is not PostgreSQL's.
        """
        found = id_of(workflow)
        opened = session_of(session, what="handle()")
        handle = AsyncHandle[R] if isinstance(opened, AsyncSession) else Handle[R]
        return handle(self.definition, PollingEngine.of(opened), found)


class WorkflowFunction(AnyWorkflowFunction[P, R]):
    """A workflow made of a `def`. Called directly it is the plain function; `start` makes it durable."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the plain function; inside another workflow its steps become that one's."""
        return cast("R", self.definition.fn(*args, **kwargs))

    def continue_as_new(self, *args: P.args, **kwargs: P.kwargs) -> NoReturn:
        """Continue the workflow as new, with these arguments and no history: for one that runs for months.

        ```python
        @durable.workflow
        def follow(customer: int, seen: int = 0) -> None:
            for _ in range(100):
                handle(wait_signal("event", Event))
                seen += 1
            follow.continue_as_new(customer, seen)
        ```

        In one statement its recorded steps are deleted and its input is replaced; its id, key, children, signals,
        events and streams stay. This attempt ends here, and a worker begins the next one. Branches that are still open
        are ended too.

        Raises:
            ArgumentError, EncodingError: an argument does not fit the annotations, or cannot be stored.
            UsageError: this is not the workflow's own code.
        """
        self._continue_as_new(args, kwargs).outcome()


class AsyncWorkflowFunction(AnyWorkflowFunction[P, R]):
    """A workflow made of an `async def`. Called directly it is the plain function; `start` makes it durable."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        """Call the plain function; inside another workflow its steps become that one's."""
        return cast("Coroutine[Any, Any, R]", self.definition.fn(*args, **kwargs))

    def continue_as_new(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, NoReturn]:
        """Continue the workflow as new with these arguments; await it. See `WorkflowFunction.continue_as_new`."""
        return self._continue_as_new(args, kwargs).coroutine()
