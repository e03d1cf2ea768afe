"""`Durable`: the decorators that make functions durable, and the registry of an application's workflows."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Concatenate, ParamSpec, TypeVar, Unpack, overload

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable.api.batches import batched
from sqla_durable.api.schedules import declaration_of
from sqla_durable.api.steps import (
    AsyncStepFunction,
    AsyncTransactionalStep,
    StepFunction,
    TransactionalStep,
)
from sqla_durable.api.workflows import AnyWorkflowFunction, AsyncWorkflowFunction, WorkflowFunction
from sqla_durable.definitions.blobs import ObjectStore
from sqla_durable.definitions.checks import require_text
from sqla_durable.definitions.error_classes import KnownErrors
from sqla_durable.definitions.inspection import SessionKind, place_of
from sqla_durable.definitions.interceptors import Interceptor, Interceptors
from sqla_durable.definitions.json_values import DEFAULT_LIMIT
from sqla_durable.definitions.limits import TimeLimits
from sqla_durable.definitions.payloads import PayloadCodec, Payloads
from sqla_durable.definitions.queues import QueueDeclaration, QueueKeywords, QueueOptions, require_queue_name
from sqla_durable.definitions.registry import (
    DurableOptions,
    IsolationLevel,
    Registry,
    StepDefinition,
    StepKeywords,
    StepOptions,
    WorkflowDefinition,
    WorkflowOptions,
    encode_secrets,
)
from sqla_durable.definitions.retention import RetentionDeclaration, RetentionOptions, Statuses
from sqla_durable.definitions.retry import RetryPolicy, RetryPredicate, StopPredicate, WaitFunction
from sqla_durable.definitions.schedules import ScheduleOptions, TimingKeywords
from sqla_durable.errors import DefinitionError

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
W = TypeVar("W", bound=AnyWorkflowFunction[..., Any])
Async = Coroutine[Any, Any, R]


class Durable:
    """The durable functions of an application.

    ```python
    durable = Durable()

    @durable.step
    def reserve(session: Session, order_id: int) -> int:
        order = session.get_one(Order, order_id)
        ...

    @durable.workflow
    def checkout(order_id: int) -> int:
        return reserve(order_id)

    with SessionLocal.begin() as session:
        workflow = checkout.start(session, order_id)
    ```

    An ordinary object: a process may have several, for several databases.

    Args:
        sessionmaker: opens the `Session` of sync steps, and the worker's own statements.
        async_sessionmaker: the same for `AsyncSession`. A worker needs at least one of the two, here or of its own.
        payload_limit: the largest input, result or step result in bytes of JSON; 1 MiB by default.
        interceptors: what is around its workflows and their steps, the outermost first; see `Interceptor`.
        history_limit: how many operations one workflow may call; 50,000 by default. See `continue_as_new`.
        errors: classes of exceptions that recorded errors may come back as, subclasses included, besides the builtin
            ones and those that the application's own packages define. See docs, "Security".
        strict_errors: whether only the builtin ones, a short list of common ones, and `errors` come back as what they
            were; others are `StepFailedError` and `WorkflowFailedError`.
        error_details: whether what is recorded of errors shows the values of SQL statements and payloads.
        secret: makes the tokens of callbacks, so that the tables do not hold them: 16 characters or more, the same in
            every worker, and known to workers only. To change it, give a list, the new one first.
        payloads: how inputs, results and whatever else workflows store are encoded, in this order, instead of plain
            JSON: `[Zstandard(), Encryption({"2026-11": key})]`. See docs, "Payloads".
        blobs: where the bytes of `create_blob` are, a URL of fsspec: "s3://bucket/documents". By default they are in a
            table. See docs, "Blobs".
        version: the version of the code, which every start records. By itself it changes nothing: a worker with
            `versions=` claims those only. See docs, "Changing code".

    Raises:
        DefinitionError: an interceptor is none; or the version is blank, or cannot be stored; or the limit is no limit;
            or one of `errors` is no class of exceptions; or a secret is too short; or `blobs` is no URL of a store.
    """

    def __init__(
        self,
        *,
        sessionmaker: sessionmaker[Session] | None = None,
        async_sessionmaker: async_sessionmaker[AsyncSession] | None = None,
        payload_limit: int = DEFAULT_LIMIT,
        interceptors: Iterable[Interceptor] = (),
        version: str | None = None,
        history_limit: int | None = None,
        errors: Iterable[type[Exception]] = (),
        strict_errors: bool = False,
        error_details: bool = False,
        secret: str | list[str] | None = None,
        payloads: Iterable[PayloadCodec] = (),
        blobs: str | None = None,
    ) -> None:
        self.sessionmaker = sessionmaker
        self.async_sessionmaker = async_sessionmaker
        self.registry = Registry()
        self.options = DurableOptions(
            payload_limit=payload_limit,
            version=version,
            history_limit=history_limit,
            errors=KnownErrors(errors, strict=strict_errors, details=error_details),
            secrets=encode_secrets(secret),
            interceptors=Interceptors(interceptors),
            payloads=Payloads(payloads),
            blobs=None if blobs is None else ObjectStore(blobs),
        )

    def intercept(self, *interceptors: Interceptor) -> None:
        """Add interceptors inside those that are there: for what is only known when the application starts.

        They are around what is started and executed from now on.

        Raises:
            DefinitionError: one is no `Interceptor`.
        """
        self.options.interceptors.add(interceptors)

    def schedule(
        self,
        cron: str | Sequence[str] | None = None,
        /,
        *,
        name: str | None = None,
        arguments: Mapping[str, Any] | None = None,
        **options: Unpack[TimingKeywords],
    ) -> Callable[[W], W]:
        """Declare a schedule for a workflow, as a decorator above `@durable.workflow`.

        ```python
        @durable.schedule("0 9 * * 1-5", tz="Europe/Berlin")
        @durable.workflow
        async def report() -> None: ...
        ```

        A worker brings it into the table when it starts: there it is made, or changed to what the code says now. One
        that was declared once and is gone from the code is paused, never deleted. For other options of its workflows,
        decorate `report.options(queue="slow")`: queue, by, priority and timeout count.

        Args:
            cron: five fields (minute, hour, day, month, day of the week), or six with seconds first; several: the times
                of all. `L` and `#` are known.
            name: the name of the schedule; by default that of the workflow.
            arguments: what the workflow is called with, by name.
            **options: as described by `manage.put_schedule`.

        Raises:
            ArgumentError: an option is wrong.
            DefinitionError: this is no workflow, or another schedule has the name.
        """
        _require_object(self, "schedule")
        wanted = ScheduleOptions.of(**options) if cron is None else ScheduleOptions.of(cron=cron, **options)

        def declare(function: W) -> W:
            self.registry.add_schedule(declaration_of(function, name, arguments, wanted))
            return function

        return declare

    def queue(self, name: str, **options: Unpack[QueueKeywords]) -> None:
        """Declare the limits and turns of a queue.

        ```python
        durable.queue("mail", concurrency=10, key_rate=(100, timedelta(minutes=1)))

        with SessionLocal.begin() as session:
            mail.options(queue="mail", by=customer.name).start(session, customer.id)
        ```

        A worker brings the settings into the table when it starts, and running workers obey them from then on. Limits
        hold over all workers, and are never exceeded, whoever crashes. What is left out has no limit.

        Args:
            name: the queue.
            concurrency: how many of its workflows run at once, over all workers.
            per_worker: how many of them one worker runs at once.
            per_key: how many with the same `by` run at once.
            rate: so many are started in any period, `(100, timedelta(minutes=1))`. What was suspended goes on without.
            key_rate: the same for those with the same `by`.
            while_suspended: whether a workflow that is suspended keeps its place: "release" (by default) or "hold".
            fifo: of those with the same `by`, one at a time is executed to its end, in the order of their starts. One
                that fails is passed over, "skip", or keeps the others waiting until it is retried or deleted, "block".
            fair: whether the values of `by` take turns, also without a limit.
            weights: how many places a key gets in each turn; 1 by default. Left out, those in the table stay.
            aging: for each such time that it waits, a workflow counts as one priority higher.

        Raises:
            ArgumentError: a setting is wrong, or contradicts another.
            DefinitionError: the queue is declared with other settings already.
        """
        require_queue_name(name)
        self.registry.add_queue(QueueDeclaration(name, QueueOptions(**options)))

    def retention(self, name: str, *, keep: timedelta, workflow: str | None = None, status: Statuses = None) -> None:
        """Declare how long finished workflows are kept; workers delete them then, with their trees and histories.

        ```python
        durable.retention("all", keep=timedelta(days=90))
        durable.retention("failed payments", workflow="pay*", status="failed", keep=timedelta(days=365))
        ```

        A worker brings it into the table when it starts. Of several policies that fit a workflow the most specific one
        decides; see docs, "Retention". Without a policy, everything stays.

        Args:
            name: that of the policy.
            keep: how long after its end a workflow is kept.
            workflow: whose: a name, or a pattern in which `*` stands for any text; by default every one.
            status: with which end: "succeeded", "failed", "cancelled", or several; by default every one.

        Raises:
            ArgumentError: an option is wrong.
            DefinitionError: another policy has the name.
        """
        require_text(name, what="policy's name")
        wanted = RetentionOptions.of(workflow=workflow, status=status, keep=keep)
        self.registry.add_retention(RetentionDeclaration(name, wanted))

    # A coroutine function is a function too, and a session a first argument like any other: the overloads overlap,
    # and the first that fits decides.
    @overload
    def workflow(  # type: ignore[overload-overlap]
        self, fn: Callable[P, Async[R]], /, *, name: str | None = None, queue: str = "default", strict: bool = False
    ) -> AsyncWorkflowFunction[P, R]: ...

    @overload
    def workflow(
        self, fn: Callable[P, R], /, *, name: str | None = None, queue: str = "default", strict: bool = False
    ) -> WorkflowFunction[P, R]: ...

    @overload
    def workflow(
        self, /, *, name: str | None = None, queue: str = "default", strict: bool = False
    ) -> WorkflowDecorator: ...

    def workflow(
        self,
        fn: Callable[..., Any] | None = None,
        /,
        *,
        name: str | None = None,
        queue: str = "default",
        strict: bool = False,
    ) -> AsyncWorkflowFunction[..., Any] | WorkflowFunction[..., Any] | WorkflowDecorator:
        """Make a function a workflow, as a decorator with or without options.

        Its arguments and its result are stored as JSON by their annotations. It must call the
        same steps whenever they have the same outcomes: anything that may differ belongs in a step.

        Args:
            fn: the function, `def` or `async def`.
            name: the name of its records; by default the function's own.
            queue: where it is enqueued by default.
            strict: whether it has no outcome as long as the code does not visit what its history holds, in its order;
                by default that is a warning in the log. See docs, "Changing code".

        Raises:
            DefinitionError: the function cannot be a workflow, or another one has the name.
        """
        _require_object(self, "workflow")
        decorator = WorkflowDecorator(self, WorkflowOptions(name, queue, strict))
        return decorator if fn is None else decorator(fn)

    @overload
    def step(  # type: ignore[overload-overlap]  # pyright: ignore[reportOverlappingOverload]
        self,
        fn: Callable[Concatenate[AsyncSession, P], Async[R]],
        /,
        **options: Unpack[StepKeywords],
    ) -> AsyncTransactionalStep[P, R]: ...

    @overload
    def step(
        self, fn: Callable[Concatenate[Session, P], R], /, **options: Unpack[StepKeywords]
    ) -> TransactionalStep[P, R]: ...

    @overload
    def step(  # type: ignore[overload-overlap]
        self,
        fn: Callable[P, Async[R]],
        /,
        **options: Unpack[StepKeywords],
    ) -> AsyncStepFunction[P, R]: ...

    @overload
    def step(self, fn: Callable[P, R], /, **options: Unpack[StepKeywords]) -> StepFunction[P, R]: ...

    @overload
    def step(self, /, **options: Unpack[StepKeywords]) -> StepDecorator: ...

    def step(
        self,
        fn: Callable[..., Any] | None = None,
        /,
        *,
        name: str | None = None,
        retry: RetryPredicate | None = None,
        stop: StopPredicate | None = None,
        wait: WaitFunction | None = None,
        isolation_level: IsolationLevel | None = None,
        timeout: timedelta | None = None,
        total_timeout: timedelta | None = None,
        heartbeat_timeout: timedelta | None = None,
    ) -> Any:
        """Make a function a step, as a decorator with or without options, or at run time of any callable.

        With a first parameter annotated `Session` or `AsyncSession` it is transactional: the session is injected, and
        the step's writes and its checkpoint commit in one transaction, exactly once. Any other step is plain: its
        outcome is recorded, its effects happen at least once. Arguments may be anything; only the result is stored.

        Args:
            fn: the function, `def` or `async def`; or, with a name, a closure or a bound method.
            name: the step's identity in its workflow, with its occurrence; by default the function's own name.
            retry: a tenacity predicate: which outcomes call for another try. By default any `Exception`.
            stop: a tenacity stop: when to give up. By default never, once any of the three is given.
            wait: a tenacity wait: seconds before the next try. By default exponential with jitter, up to 60 s. Failed
                tries are recorded, and after a second of failing the workflow waits as a row; see docs, "Retries".
            isolation_level: of a transactional step's transaction; by default the engine's. Serialization failures
                and deadlocks are tried again in any case, the whole step each time.
            timeout: how long each try may take. What is `async def` is cancelled then; a `def` cannot be, and its try
                counts as failed when it comes back too late. The error is a `StepTimeoutError`, for the policy like
                any other; a transactional step is rolled back.
            total_timeout: how long all tries and the waits between them may take, from the beginning of the first, on
                whatever workers. Then, or when the next try would begin later, the outcome is a `StepTimeoutError`.
            heartbeat_timeout: of a plain step: how long each try may go on without calling `heartbeat`, from its
                beginning on. What is `async def` is cancelled then; in a `def` the next `heartbeat` raises, and what
                comes back without one has failed. The error is a `HeartbeatTimeoutError`, of which the same is true.

        Raises:
            DefinitionError: the function cannot be a step, or another one has the name.
        """
        _require_object(self, "step")
        options = StepOptions(
            name,
            RetryPolicy.of(retry=retry, stop=stop, wait=wait),
            isolation_level,
            TimeLimits.of(timeout=timeout, total_timeout=total_timeout, heartbeat_timeout=heartbeat_timeout),
        )
        decorator = StepDecorator(self, options)
        return decorator if fn is None else decorator(fn)

    def batch_step(
        self, *, size: int, within: timedelta = timedelta(milliseconds=50), **options: Unpack[StepKeywords]
    ) -> BatchDecorator:
        """Make a function of many items a step of one item, as a decorator: one call does what many workflows ask for.

        ```python
        @durable.batch_step(size=100, within=timedelta(milliseconds=200))
        async def embed(texts: list[str]) -> list[list[float]]:
            return await model.embed(texts)

        @durable.workflow
        async def index(document_id: int, text: str) -> None:
            vector = await embed(text)
            ...
        ```

        The calls of the workflows of one process that come within a time are done by one call of the function. Each is
        a plain step of its own workflow: its outcome is recorded there, and it is tried again by its own policy, with
        others. If the process dies, the workflows whose outcomes were not recorded call it again.

        Args:
            size: how many items one call is given at most.
            within: how long the first of them waits for others.
            **options: as those of `step`.

        Returns:
            A decorator for a `def` or `async def` that takes a list, and returns a list with a result for each item in
            their order; an exception in it is the outcome of its item. What it raises is that of all.

        Raises:
            DefinitionError: the function cannot be a step, takes a session, or another one has the name.
            ArgumentError: the size or the time is out of range.
        """
        _require_object(self, "batch_step")
        return BatchDecorator(self, options, size=size, within=within)


class BatchDecorator:
    """What `durable.batch_step(...)` gives."""

    def __init__(self, durable: Durable, options: StepKeywords, *, size: int, within: timedelta) -> None:
        self._durable = durable
        self._options = options
        self._size = size
        self._within = within

    @overload
    def __call__(self, fn: Callable[[list[T]], Async[Sequence[R]]], /) -> AsyncStepFunction[[T], R]: ...

    @overload
    def __call__(self, fn: Callable[[list[T]], Sequence[R]], /) -> StepFunction[[T], R]: ...

    def __call__(self, fn: Callable[..., Any], /) -> Any:
        """Make the function a batch step."""
        one = batched(fn, name=self._options.get("name"), size=self._size, within=self._within)
        return self._durable.step(one, **self._options)


class WorkflowDecorator:
    """What `durable.workflow(...)` gives when it has options only."""

    def __init__(self, durable: Durable, options: WorkflowOptions) -> None:
        self._durable = durable
        self._options = options

    @overload
    def __call__(  # type: ignore[overload-overlap]  # pyright: ignore[reportOverlappingOverload]
        self, fn: Callable[P, Async[R]], /
    ) -> AsyncWorkflowFunction[P, R]: ...

    @overload
    def __call__(self, fn: Callable[P, R], /) -> WorkflowFunction[P, R]: ...

    def __call__(self, fn: Callable[..., Any], /) -> AsyncWorkflowFunction[..., Any] | WorkflowFunction[..., Any]:
        """Make the function a workflow."""
        durable = self._durable
        definition = WorkflowDefinition.of(fn, self._options, durable.options)
        durable.registry.add_workflow(definition)
        durable.options.payloads.note_workflow(definition.name)
        durable.options.errors.add_module(place_of(definition.fn)[0])
        return AsyncWorkflowFunction(definition) if definition.is_async else WorkflowFunction(definition)


class StepDecorator:
    """What `durable.step(...)` gives when it has options only."""

    def __init__(self, durable: Durable, options: StepOptions) -> None:
        self._durable = durable
        self._options = options

    @overload
    def __call__(  # type: ignore[overload-overlap]  # pyright: ignore[reportOverlappingOverload]
        self, fn: Callable[Concatenate[AsyncSession, P], Async[R]], /
    ) -> AsyncTransactionalStep[P, R]: ...

    @overload
    def __call__(self, fn: Callable[Concatenate[Session, P], R], /) -> TransactionalStep[P, R]: ...

    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, fn: Callable[P, Async[R]], /
    ) -> AsyncStepFunction[P, R]: ...

    @overload
    def __call__(self, fn: Callable[P, R], /) -> StepFunction[P, R]: ...

    def __call__(self, fn: Callable[..., Any], /) -> Any:
        """Make the function a step."""
        durable = self._durable
        definition = StepDefinition.of(fn, self._options, limit=durable.options.payload_limit)
        durable.registry.add_step(definition)
        durable.options.errors.add_module(definition.place[0])
        return _STEP_CLASSES[definition.session, definition.is_async](definition)


def _require_object(durable: object, decorator: str) -> None:
    """Refuse a decorator of the class, which gets the function in place of the object."""
    if not isinstance(durable, Durable):
        raise DefinitionError(
            f"{decorator} is a method of a Durable object, and was called on the class, with {durable!r}: write "
            f"durable = Durable(), and @durable.{decorator}."
        )


_STEP_CLASSES: dict[tuple[SessionKind, bool], Callable[[StepDefinition], Any]] = {
    (SessionKind.NONE, False): StepFunction,
    (SessionKind.NONE, True): AsyncStepFunction,
    (SessionKind.SYNC, False): TransactionalStep,
    (SessionKind.ASYNC, True): AsyncTransactionalStep,
}
