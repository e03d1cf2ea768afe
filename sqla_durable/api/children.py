"""Children in a workflow's code: start one or many, wait for one, for the first, for each as it ends, or for all."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Generic, ParamSpec, TypeVar, overload
from uuid import UUID

from sqla_durable.api.calls import Call, operation, require_workflow, visit
from sqla_durable.api.workflows import AnyWorkflowFunction, BoundWorkflow, bind_without_headers, with_headers, with_id
from sqla_durable.definitions.checks import require_duration
from sqla_durable.definitions.error_classes import Find
from sqla_durable.definitions.registry import WorkflowDefinition
from sqla_durable.errors import ArgumentError, PayloadKeyError
from sqla_durable.operations import children
from sqla_durable.operations.calls import Position
from sqla_durable.operations.runtime import Runtime
from sqla_durable.operations.workflow import WorkflowOutcome
from sqla_durable.runtime.context import Context
from sqla_durable.store import NewWorkflow

P = ParamSpec("P")
C = TypeVar("C")
R = TypeVar("R", covariant=True)
H = TypeVar("H", bound="_BaseChild[Any]")

LARGEST_MAP = 100_000
"""How many children one `map_children` starts at most: it is one statement."""


class _BaseChild(Generic[R]):
    def __init__(self, definition: WorkflowDefinition, workflow_id: UUID) -> None:
        self._definition = definition
        self.workflow_id = workflow_id

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of workflow {self._definition.name!r} {self.workflow_id}>"

    def _result(self, timeout: timedelta | None, step_key: str | None) -> Call[R]:
        if timeout is not None:
            require_duration(timeout, "timeout")
        read = partial(_value, definition=self._definition, workflow_id=self.workflow_id, within=timeout)
        return operation("Child.result", f"result:{self._definition.name}", read, step_key=step_key)


class Child(_BaseChild[R]):
    """A workflow that a `def` workflow waits for.

    ```python
    child = start_child(ship, order_id)
    label = child.result()
    ```
    """

    def result(self, timeout: timedelta | None = None, *, step_key: str | None = None) -> R:
        """Wait until it has an outcome: return its result or raise its error, the same on every replay.

        Meanwhile the workflow is suspended and needs a row and nothing else. A child wakes its parent when it ends;
        another workflow is polled, at most every 30 seconds.

        Args:
            timeout: how long to wait at most; the workflow is not cancelled by that.
            step_key: an explicit identity in the history, instead of `result:NAME` and its occurrence.

        Raises:
            Exception: its own error, where its type is known and imported here.
            WorkflowFailedError: the same, where it is not.
            WorkflowCancelledError, MaxAttemptsError: it was cancelled, or its workers died too often.
            WorkflowTimeoutError: it was not finished at its deadline.
            WaitTimeoutError: it had no outcome in time.
            NotFoundError: it was deleted.
            DecodingError: its result does not fit the annotation that the code has now.
            UsageError: this is not a workflow's own code.
            UsageError: the workflow is `async def`.
            ArgumentError: the timeout is no timedelta.
        """
        return self._result(timeout, step_key).outcome()


class AsyncChild(_BaseChild[R]):
    """A workflow that an `async def` workflow waits for: await it.

    ```python
    child = await start_child(ship, order_id)
    label = await child
    ```
    """

    def result(self, timeout: timedelta | None = None, *, step_key: str | None = None) -> Coroutine[Any, Any, R]:
        """Wait until it has an outcome; see `Child.result`."""
        return self._result(timeout, step_key).coroutine()

    def __await__(self) -> Generator[Any, None, R]:
        return self.result().__await__()


def start_child(workflow: AnyWorkflowFunction[P, R], *args: P.args, **kwargs: P.kwargs) -> Child[R]:
    """Start a child in the code of a workflow.

    ```python
    children = [start_child(ship, order_id) for order_id in order_ids]
    labels = [child.result() for child in children]
    ```

    The child's record and the parent's checkpoint are one commit: on a replay it is the same child. With a key,
    `ship.options(key=...)`, it is the workflow that has the key, unless more options say otherwise. It is cancelled
    with its parent unless `options(detached=True)`, inherits its deadline, and goes on if the parent ends before.
    Several are started one after the other; see `map_children` for many.

    Args:
        workflow: the workflow function, `def` or `async def`.
        *args: its arguments.
        **kwargs: the same, by name.

    Raises:
        ArgumentError, EncodingError: an argument does not fit the annotations, or cannot be stored.
        KeyNotVisibleError: the workflow that has its key cannot be seen.
        KeyTakenError: its key is taken, and its options refuse that.
        UsageError: this is not a workflow's own code, or the child has the name and key of the workflow itself.
        UsageError: the parent is `async def`.
    """
    bound = bind_without_headers(workflow, args, kwargs)
    return start_child_call(Child[R], workflow.definition, bound).outcome()


@overload
def map_children(
    workflow: AnyWorkflowFunction[..., R], items: Iterable[Any], *, max_concurrency: int | None = None
) -> list[R]: ...


@overload
def map_children(
    workflow: AnyWorkflowFunction[..., R], items: Iterable[Any], *, max_concurrency: int | None = None, tolerate: int
) -> list[R | Exception]: ...


def map_children(
    workflow: AnyWorkflowFunction[..., R],
    items: Iterable[Any],
    *,
    max_concurrency: int | None = None,
    tolerate: int = 0,
) -> Any:
    """Start a child for each item, in the code of a workflow, wait for all, and return their results in order.

    ```python
    labels = map_children(ship, order_ids, max_concurrency=100)
    ```

    All children are started in one commit. The parent is suspended, is looked at now and then while they end, and
    records their results together when all have.

    Args:
        workflow: the workflow function, `def` or `async def`, with its options.
        items: the only argument of each child, or what `workflow.bind(...)` returned.
        max_concurrency: how many are executed or wait in their queue at once; by default all.
        tolerate: how many may fail. Where one of these has failed, its error is in the list instead of a result.

    Raises:
        ChildrenFailedError: more than that failed. Those that were not finished are cancelled.
        ArgumentError: an argument does not fit, there are too many items, or a child has a key or a delay.
        PayloadTooLargeError: all the results together are too large to be recorded.
        UsageError: this is not a workflow's own code.
        UsageError: the parent is `async def`.
    """
    return map_children_call(workflow, items, max_concurrency, tolerate).outcome()


def wait_first(workflows: Iterable[H], *, timeout: timedelta | None = None, step_key: str | None = None) -> H:
    """Wait in a workflow's code until the first of some workflows has an outcome, and return that one.

    Which one it was is recorded: a replay finds the same.

    Args:
        workflows: what `start_child` returned.
        timeout: how long to wait at most; none is cancelled by that.
        step_key: an explicit identity in the history, instead of `first` and its occurrence.

    Raises:
        WaitTimeoutError: none had an outcome in time.
        ArgumentError: there are none, or the timeout is no timedelta.
        UsageError: this is not a workflow's own code.
        UsageError: the workflow is `async def`.
    """
    return wait_first_call(workflows, timeout, step_key).outcome()


def as_completed(workflows: Iterable[H]) -> Iterator[H]:
    """Yield workflows as each of them has its outcome, in a workflow's code.

    ```python
    for child in as_completed(children):
        label = child.result()
    ```

    Raises:
        UsageError: this is not a workflow's own code.
        UsageError: the workflow is `async def`.
    """
    left = list(workflows)
    while left:
        first = wait_first(left)
        left.remove(first)
        yield first


def start_child_call(
    child: Callable[[WorkflowDefinition, UUID], C], definition: WorkflowDefinition, bound: BoundWorkflow
) -> Call[C]:
    """Return the call of `start_child`, which returns a child of this class."""

    async def begin(runtime: Runtime, position: Position) -> C:
        prepare = partial(with_headers, definition)
        (workflow_id,) = await children.start(runtime, position, [bound.new], rule=bound.rule, prepare=prepare)
        return child(definition, workflow_id)

    return operation("start_child", f"start:{definition.name}", begin)


def wait_first_call(workflows: Iterable[H], timeout: timedelta | None, step_key: str | None) -> Call[H]:
    """Return the call of `wait_first`."""
    given = {each.workflow_id: each for each in workflows}
    if not given:
        raise ArgumentError("wait_first() was given no workflows: there is none to wait for.")
    if timeout is not None:
        require_duration(timeout, "timeout")

    async def find(runtime: Runtime, position: Position) -> H:
        return given[await children.first(runtime, position, sorted(given), within=timeout)]

    return operation("wait_first", "first", find, step_key=step_key)


def map_children_call(
    workflow: AnyWorkflowFunction[..., Any], items: Iterable[Any], max_concurrency: int | None, tolerate: int
) -> Call[Any]:
    """Return the call of `map_children`."""
    given = list(items)
    if len(given) > LARGEST_MAP:
        raise ArgumentError(
            f"map_children() starts at most {LARGEST_MAP:,} children, got {len(given):,}: call it for parts of them."
        )
    are_bound = [isinstance(each, BoundWorkflow) for each in given]
    bound = [each if isinstance(each, BoundWorkflow) else bind_without_headers(workflow, (each,), {}) for each in given]
    _refuse_map(bound, max_concurrency, tolerate)
    mapping = _Mapping(workflow.definition, bound, are_bound, max_concurrency, tolerate)
    return Call("map_children", mapping.carry_out)


def _refuse_map(bound: Sequence[BoundWorkflow], max_concurrency: int | None, tolerate: int) -> None:
    if max_concurrency is not None and max_concurrency < 1:
        raise ArgumentError(f"max_concurrency must be at least 1, got {max_concurrency!r}.")
    if tolerate < 0:
        raise ArgumentError(f"tolerate must be at least 0, got {tolerate!r}.")
    if any(each.new.key is not None or each.new.delay is not None or each.new.wake_at is not None for each in bound):
        raise ArgumentError("the children of a map have no key= and no delay: start such ones one by one.")


@dataclass(frozen=True, slots=True)
class _Mapping:
    """A call of `map_children`, its arguments checked."""

    definition: WorkflowDefinition
    bound: Sequence[BoundWorkflow]
    are_bound: Sequence[bool]
    max_concurrency: int | None
    tolerate: int

    def carry_out(self, given: Context | None) -> Any:
        """Call the operation that starts the children, and the one that waits for them."""
        context, name = require_workflow("map_children", given), f"map:{self.definition.name}"
        if not self.bound:
            return visit(context, name, _nothing)
        attempt, beginning = context.attempt, f"start:{self.definition.name}"
        start_at = attempt.begin_call(beginning, ("sqla_durable", beginning))
        if self.max_concurrency is not None and self.max_concurrency < len(self.bound):
            attempt.note_limiting_map(start_at)
        attempt.end_call(start_at)  # part of the map, which is what ends, and may be cancelled before it begins
        return visit(context, name, partial(self._all_of, start_at=start_at))

    async def _all_of(self, runtime: Runtime, position: Position, *, start_at: Position) -> list[Any]:
        definition = self.definition
        new = self._ordered()
        unprepared = {each.id for each, is_bound in zip(new, self.are_bound, strict=True) if not is_bound}

        def prepare(each: NewWorkflow) -> NewWorkflow:
            return with_headers(definition, each) if each.id in unprepared else each

        ids = await children.start(runtime, start_at, new, active=self.max_concurrency, prepare=prepare)
        outcomes = await children.join(
            runtime,
            position,
            children.Started(definition.name, start_at.key, ids),
            active=self.max_concurrency,
            tolerate=self.tolerate,
            limit=definition.durable_options.payload_limit,
        )
        return [_value_or_error(each, definition, runtime.attempt.options.errors.inside) for each in outcomes]

    def _ordered(self) -> list[NewWorkflow]:
        """Return the children in the order of the items, with ids in that order: so their outcomes are read."""
        ids = sorted(each.new.id for each in self.bound)
        return [with_id(each.new, ids[number]) for number, each in enumerate(self.bound)]


async def _value(
    runtime: Runtime,
    position: Position,
    *,
    definition: WorkflowDefinition,
    workflow_id: UUID,
    within: timedelta | None,
) -> Any:
    outcome: WorkflowOutcome = await children.result(runtime, position, workflow_id, within=within)
    return outcome.value(definition, find=runtime.attempt.options.errors.inside)


async def _nothing(runtime: Runtime, position: Position) -> list[Any]:
    runtime.attempt.end_call(position)
    return []


def _value_or_error(outcome: WorkflowOutcome, definition: WorkflowDefinition, find: Find) -> Any:
    try:
        return outcome.value(definition, find=find)
    except PayloadKeyError:  # another process may have the key
        raise
    except Exception as error:
        return error
