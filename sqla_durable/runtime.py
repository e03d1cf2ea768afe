"""The two shells: how sync and async code call the user's functions in the ambient context.

What a step means is in `operations`; where its outcome goes is decided by the executors and the worker, which derive
from these classes.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from sqla_durable.codec import DEFAULT_LIMIT
from sqla_durable.context import Context
from sqla_durable.errors import AttemptLost, UsageError
from sqla_durable.operations.attempt import Attempt, Position, Wait
from sqla_durable.operations.runtime import Operation, StepCall, run_blocking
from sqla_durable.operations.step import run_step
from sqla_durable.operations.transaction import StepTransaction
from sqla_durable.registry import SessionKind, StepDefinition, WorkflowDefinition
from sqla_durable.retry import TransientRetry
from sqla_durable.store import Checkpoint, Completion, Connectable, streams
from sqla_durable.store.streams import Append, Appended

T = TypeVar("T")


class BaseRuntime(ABC):
    """What both shells share; see `operations.runtime.Runtime` for what each method promises."""

    def __init__(self, attempt: Attempt) -> None:
        self.attempt = attempt

    @abstractmethod
    async def pause(self, seconds: float) -> None:
        """Wait a moment in memory."""

    @abstractmethod
    async def wait(self, position: Position, wait: Wait) -> None:
        """Wait until an operation goes on."""

    @abstractmethod
    async def settle(self) -> None:
        """Return when everything recorded so far is committed."""

    @abstractmethod
    async def record(self, checkpoint: Checkpoint) -> None:
        """Record a checkpoint."""

    @abstractmethod
    async def execute(self, statement: Callable[[Connectable], T]) -> T:
        """Call a store function of one statement, in a transaction of its own."""

    async def append(self, append: Append) -> Appended:
        """Append to a stream, in a transaction of its own."""
        return await self.execute(partial(streams.append, origin=append.origin, name=append.name, values=append.values))

    @abstractmethod
    async def begin(self, step: StepDefinition) -> StepTransaction:
        """Open the transaction of a step."""

    @abstractmethod
    async def finish(self, completion: Completion) -> None:
        """Record the workflow's outcome."""

    def transient_retry(self) -> TransientRetry:
        """Give the policy for transient database errors in a step's transaction."""
        return TransientRetry()


class BlockingRuntime(BaseRuntime):
    """The shell of `def` workflows: whatever waits blocks the thread."""

    def context(self, step: StepCall | None = None) -> Context:
        """Give the ambient context of the workflow's own code, or of a step's function."""
        whereabouts = threading.get_ident
        return Context(
            self.attempt,
            self.perform,
            self.operate,
            is_async=False,
            whereabouts=whereabouts,
            home=whereabouts(),
            step=step,
            limit=DEFAULT_LIMIT if step is None else step.definition.limit,
        )

    def perform(self, call: StepCall) -> Any:
        """Perform a step and give its outcome."""
        return run_blocking(run_step(self, call))

    def operate(self, operation: Operation) -> Any:
        """Carry out an operation and give its outcome."""
        return run_blocking(operation(self))

    async def call(self, call: StepCall, *injected: object) -> Any:
        """Call a step's function."""
        with self.context(call).entered():
            return call.definition.fn(*injected, *call.args, **call.kwargs)

    async def body(self, definition: WorkflowDefinition, arguments: dict[str, Any]) -> Any:
        """Call the workflow's function."""
        with replace(self.context(), limit=definition.result.limit).entered():
            return definition.call(arguments)


class AsyncRuntime(BaseRuntime):
    """The shell of `async def` workflows: sync steps are executed in threads."""

    def context(self, step: StepCall | None = None) -> Context:
        """Give the ambient context of the workflow's own code, or of a step's function."""
        whereabouts = asyncio.current_task
        return Context(
            self.attempt,
            self.perform,
            self.operate,
            is_async=True,
            whereabouts=whereabouts,
            home=whereabouts(),
            step=step,
            limit=DEFAULT_LIMIT if step is None else step.definition.limit,
        )

    async def perform(self, call: StepCall) -> Any:
        """Perform a step and give its outcome."""
        replayed = self.attempt.recorded(call.position) is not None
        if call.definition.session is SessionKind.SYNC and not replayed:
            return await self.perform_blocking(call)
        return await run_step(self, call)

    async def operate(self, operation: Operation) -> Any:
        """Carry out an operation and give its outcome."""
        return await operation(self)

    @abstractmethod
    async def perform_blocking(self, call: StepCall) -> Any:
        """Perform a step that takes a `Session`, without blocking the event loop."""

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Call a function in a thread, in a copy of the context."""
        return await asyncio.to_thread(function)

    async def call(self, call: StepCall, *injected: object) -> Any:
        """Call a step's function."""
        function = call.definition.fn
        with replace(self.context(call), operate=self._operate_from(asyncio.get_running_loop())).entered():
            if call.definition.is_async:
                return await function(*injected, *call.args, **call.kwargs)
            return await self.in_thread(lambda: _returned(lambda: function(*injected, *call.args, **call.kwargs)))

    def _operate_from(self, loop: asyncio.AbstractEventLoop) -> Callable[[Operation], Any]:
        """Give `operate` for a step's function, whose code may be in another thread: there it waits for the loop."""

        def operate(operation: Operation) -> Any:
            here = _running_loop()
            if here is loop:
                return self.operate(operation)
            future = _submit(self.operate(operation), loop)
            return _result(future) if here is None else asyncio.wrap_future(future)

        return operate

    async def body(self, definition: WorkflowDefinition, arguments: dict[str, Any]) -> Any:
        """Call the workflow's function."""
        with replace(self.context(), limit=definition.result.limit).entered():
            coroutine: Awaitable[Any] = definition.call(arguments)
            try:
                return await coroutine
            except asyncio.CancelledError as error:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                raise UsageError(f"workflow {definition.name!r} ended with a CancelledError of its own.") from error


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _submit(coroutine: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> concurrent.futures.Future[T]:
    try:
        return asyncio.run_coroutine_threadsafe(coroutine, loop)
    except RuntimeError as error:  # the loop is closed
        coroutine.close()
        raise AttemptLost from error


def _result(future: concurrent.futures.Future[T]) -> T:
    try:
        return future.result()
    except concurrent.futures.CancelledError as error:  # the loop ends
        raise AttemptLost from error


def _returned(function: Callable[[], T]) -> T:
    """Call a function in a thread; a StopIteration becomes what it becomes in a coroutine.

    A future does not take one, and an `await` of it would never end. Source: Python's PEP 479.
    """
    try:
        return function()
    except StopIteration as error:
        raise RuntimeError(f"the step raised {error!r}") from error
