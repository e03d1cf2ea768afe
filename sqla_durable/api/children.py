"""Children in a workflow's code: start them, wait for one, for the first, for each as it ends, for all of a map."""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine, Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any, Generic, TypeVar, cast
from uuid import UUID

from sqla_durable.api.operate import operate, require_workflow
from sqla_durable.api.start import BoundWorkflow
from sqla_durable.definitions.checks import require_duration
from sqla_durable.definitions.error_classes import Find
from sqla_durable.definitions.registry import WorkflowDefinition
from sqla_durable.errors import ArgumentError
from sqla_durable.operations import children
from sqla_durable.operations.calls import Position
from sqla_durable.operations.runtime import Runtime
from sqla_durable.operations.workflow import Outcome

R = TypeVar("R", covariant=True)
H = TypeVar("H", bound="_BaseChild[Any]")

LARGEST_MAP = 100_000
"""How many children one `map` starts at most: it is one statement."""


class _BaseChild(Generic[R]):
    def __init__(self, definition: WorkflowDefinition, workflow_id: UUID) -> None:
        self._definition = definition
        self.workflow_id = workflow_id

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of workflow {self._definition.name!r} {self.workflow_id}>"

    def _result(self, timeout: timedelta | None) -> Any:
        if timeout is not None:
            require_duration(timeout, "timeout")
        operation = partial(_value, definition=self._definition, workflow_id=self.workflow_id, within=timeout)
        return operate(f"result:{self._definition.name}", operation)


class Child(_BaseChild[R]):
    """A workflow that a `def` workflow waits for.

    ```python
    child = ship.start_child(order_id)
    label = child.result()
    ```
    """

    def result(self, timeout: timedelta | None = None) -> R:
        """Wait until it has an outcome: return its result or raise its error, the same on every replay.

        Meanwhile the workflow is a row and nothing else. Its child tells when it ends; another workflow is looked for,
        at most every 30 seconds.

        Args:
            timeout: how long to wait at most; it is not cancelled by that.

        Raises:
            Exception: its own error, where its type is known and imported here.
            WorkflowFailedError: the same, where it is not.
            WorkflowCancelledError, MaxAttemptsError: it was cancelled, or its workers died too often.
            WorkflowTimeoutError: it was not finished at its deadline.
            WaitTimeoutError: it had no outcome in time.
            NotFoundError: it was deleted.
            DecodingError: its result does not fit the annotation that the code has now.
            UsageError: this is not a workflow's own code.
            ArgumentError: the timeout is no timedelta.
        """
        return cast("R", self._result(timeout))


class AsyncChild(_BaseChild[R]):
    """A workflow that an `async def` workflow waits for: await it.

    ```python
    child = await ship.start_child(order_id)
    label = await child
    ```
    """

    def result(self, timeout: timedelta | None = None) -> Coroutine[Any, Any, R]:
        """Wait until it has an outcome; see `Child.result`."""
        return cast("Coroutine[Any, Any, R]", self._result(timeout))

    def __await__(self) -> Generator[Any, None, R]:
        return self.result().__await__()


async def _value(
    runtime: Runtime,
    position: Position,
    *,
    definition: WorkflowDefinition,
    workflow_id: UUID,
    within: timedelta | None,
) -> Any:
    outcome: Outcome = await children.result(runtime, position, workflow_id, within=within)
    return outcome.value(definition, find=runtime.attempt.options.errors.inside)


class _WaitFirst:
    """`wait_first`, with its other face for type checkers."""

    def __call__(self, workflows: Iterable[H], *, timeout: timedelta | None = None) -> H:
        """Wait until the first of some workflows has an outcome, and give its handle; in `async def` code, await it.

        Which one it was is recorded: a replay finds the same.

        Args:
            workflows: what `start_child` gave.
            timeout: how long to wait at most; none is cancelled by that.

        Raises:
            WaitTimeoutError: none had an outcome in time.
            ArgumentError: there are none, or the timeout is no timedelta.
            UsageError: this is not a workflow's own code.
        """
        given = {each.workflow_id: each for each in workflows}
        if not given:
            raise ArgumentError("wait_first() was given no workflows: there is none to wait for.")
        if timeout is not None:
            require_duration(timeout, "timeout")

        async def find(runtime: Runtime, position: Position) -> H:
            return given[await children.first(runtime, position, sorted(given), within=timeout)]

        return cast("H", operate("first", find))

    def aio(self, workflows: Iterable[H], *, timeout: timedelta | None = None) -> Coroutine[Any, Any, H]:
        """The same in an `async def` workflow, for type checkers."""
        return cast("Coroutine[Any, Any, H]", self(workflows, timeout=timeout))


wait_first = _WaitFirst()
"""Wait for the first of some children in a workflow's code."""


class as_completed(Generic[H]):  # noqa: N801 (used as a function, as in asyncio and concurrent.futures)
    """Iterate over workflows as each of them has its outcome; in `async def` code by `async for`.

    ```python
    async for child in as_completed(children):
        label = await child
    ```

    Raises:
        UsageError: this is not a workflow's own code.
    """

    def __init__(self, workflows: Iterable[H]) -> None:
        self._left = list(workflows)

    def __iter__(self) -> Iterator[H]:
        while self._left:
            yield self._taken(wait_first(self._left))

    async def __aiter__(self) -> AsyncIterator[H]:
        while self._left:
            yield self._taken(await wait_first.aio(self._left))

    def _taken(self, found: H) -> H:
        self._left.remove(found)
        return found


def start_child(definition: WorkflowDefinition, bound: BoundWorkflow) -> Any:
    """Start a child of the workflow whose code this is; see `WorkflowFunction.start_child`."""

    kind: type[AsyncChild[Any]] | type[Child[Any]] = AsyncChild if require_workflow(definition.name).is_async else Child

    async def begin(runtime: Runtime, position: Position) -> _BaseChild[Any]:
        (workflow_id,) = await children.start(runtime, position, [bound.new])
        return kind(definition, workflow_id)

    return operate(f"start:{definition.name}", begin)


def map_children(
    definition: WorkflowDefinition,
    bound: Sequence[BoundWorkflow],
    *,
    max_concurrency: int | None,
    tolerate: int,
) -> Any:
    """Start a child for each, and wait for all; see `WorkflowFunction.map`."""
    if len(bound) > LARGEST_MAP:
        raise ArgumentError(f"a map of {len(bound):,} children is over the limit of {LARGEST_MAP:,}: map parts of it.")
    if max_concurrency is not None and max_concurrency < 1:
        raise ArgumentError(f"max_concurrency={max_concurrency!r} lets no child be executed: give at least 1.")
    if tolerate < 0:
        raise ArgumentError(f"tolerate={tolerate!r} is less than none: give 0 or more.")
    if any(each.new.key is not None or each.new.delay is not None or each.new.wake_at is not None for each in bound):
        raise ArgumentError("the children of a map have no key= and no delay: start such ones one by one.")
    ids = sorted(each.new.id for each in bound)
    # Their outcomes come in the order of their ids: the smallest id goes to the first of them.
    ordered = [replace(each.new, id=ids[number]) for number, each in enumerate(bound)]
    if not bound:
        return operate(f"map:{definition.name}", _nothing)
    beginning = f"start:{definition.name}"
    attempt = require_workflow(beginning).attempt
    start_at = attempt.begin_call(beginning, ("sqla_durable", beginning))
    if max_concurrency is not None and max_concurrency < len(bound):
        attempt.holding_maps.add(start_at.key)
    # It is part of the map, which is the one to be finished, and may be cancelled before it begins.
    attempt.end_call(start_at)

    async def all_of(runtime: Runtime, position: Position) -> list[Any]:
        ids = await children.start(runtime, start_at, ordered, active=max_concurrency)
        outcomes = await children.join(
            runtime,
            position,
            children.Started(definition.name, start_at.key, ids),
            active=max_concurrency,
            tolerate=tolerate,
            limit=definition.durable.payload_limit,
        )
        return [_value_or_error(each, definition, runtime.attempt.options.errors.inside) for each in outcomes]

    return operate(f"map:{definition.name}", all_of)


async def _nothing(runtime: Runtime, position: Position) -> list[Any]:
    runtime.attempt.end_call(position)
    return []


def _value_or_error(outcome: Outcome, definition: WorkflowDefinition, find: Find) -> Any:
    try:
        return outcome.value(definition, find=find)
    except Exception as error:
        return error
