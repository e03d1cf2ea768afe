"""The definitions of workflows and steps, which the decorators create of functions, and the registry of them.

The options of each are declared here, checked once, and passed on whole. Codecs are created from annotations when they
are first needed, so that a function may name a class defined later.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field
from datetime import timedelta
from typing import Any, Literal, TypeAlias, TypedDict, get_args
from uuid import UUID

from sqla_durable.definitions.blobs import ObjectStore
from sqla_durable.definitions.checks import fault_in
from sqla_durable.definitions.codec import ArgumentsCodec, Codec
from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.definitions.declarations import Declarations
from sqla_durable.definitions.error_classes import KnownErrors
from sqla_durable.definitions.inspection import (
    SessionClass,
    SessionKind,
    hints_of,
    is_coroutine,
    name_of,
    place_of,
    refuse_generator,
    refuse_misread,
    session_class,
)
from sqla_durable.definitions.interceptors import Interceptors
from sqla_durable.definitions.json_values import DEFAULT_LIMIT
from sqla_durable.definitions.limits import TimeLimits
from sqla_durable.definitions.log import Log
from sqla_durable.definitions.payloads import PLAIN, Payloads
from sqla_durable.definitions.retry import RetryPolicy, RetryPredicate, StopPredicate, WaitFunction
from sqla_durable.errors import ArgumentError, DefinitionError, UsageError

IsolationLevel: TypeAlias = Literal["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]
ISOLATION_LEVELS: tuple[str, ...] = get_args(IsolationLevel)
"""The isolation levels that a transactional step may ask for, the weakest first."""

_SHORTEST_SECRET = 16


log = Log("sqla_durable.registry")
_START_OPTIONS = {"key", "queue", "by", "tags", "priority", "delay", "at", "detached", "timeout", "deadline"}


class StepKeywords(TypedDict, total=False):
    """The keyword arguments of `Durable.step`, for type checkers; its docstring describes each."""

    name: str | None
    retry: RetryPredicate | None
    stop: StopPredicate | None
    wait: WaitFunction | None
    isolation_level: IsolationLevel | None
    timeout: timedelta | None
    total_timeout: timedelta | None
    heartbeat_timeout: timedelta | None


@dataclass(frozen=True, slots=True)
class StepOptions:
    """The options of a step.

    Attributes:
        name: its name; None for that of its function.
        policy: when its function is tried again after an error; None for never.
        isolation_level: of a transactional step's transaction; None for the engine's.
        time_limits: how long it may take; None for any time.
    """

    name: str | None = None
    policy: RetryPolicy | None = None
    isolation_level: str | None = None
    time_limits: TimeLimits | None = None


@dataclass(frozen=True, slots=True)
class WorkflowOptions:
    """The options of a workflow.

    Attributes:
        name: its name; None for that of its function.
        queue: the queue that it is enqueued in by default.
        strict: whether it gets no outcome while its code does not visit what its history holds.
    """

    name: str | None = None
    queue: str = "default"
    strict: bool = False


@dataclass(frozen=True, slots=True)
class DurableOptions:
    """The options of a `Durable`, which all of its workflows and steps share.

    Attributes:
        payload_limit: the largest payload in bytes of UTF-8 JSON.
        version: the version of the code, which each start records.
        history_limit: how many operations one workflow may call; None for the default.
        errors: the exception classes that recorded errors may be rebuilt as.
        secrets: the secrets that tokens of callbacks are derived from, the newest first.
        interceptors: called around its workflows and steps.
        payloads: how values are stored.
        blobs: where the bytes of blobs are; None for the table.
    """

    payload_limit: int = DEFAULT_LIMIT
    version: str | None = None
    history_limit: int | None = None
    errors: KnownErrors = field(default_factory=KnownErrors)
    secrets: tuple[bytes, ...] = ()
    interceptors: Interceptors = field(default_factory=Interceptors)
    payloads: Payloads = PLAIN
    blobs: ObjectStore | None = None

    def __post_init__(self) -> None:
        fault = None if self.version is None else fault_in(self.version)
        if fault is not None:
            raise DefinitionError(f"version={self.version!r} {fault}: pass a text that is not blank, or leave it out.")
        if self.history_limit is not None and self.history_limit < 1:
            raise DefinitionError(f"history_limit must be at least 1, got {self.history_limit!r}.")


def encode_secrets(secret: str | list[str] | None) -> tuple[bytes, ...]:
    """Return the secrets of a `Durable` as bytes.

    Raises:
        DefinitionError: one of them is too short.
    """
    given = [] if secret is None else [secret] if isinstance(secret, str) else secret
    if any(len(each) < _SHORTEST_SECRET for each in given):
        raise DefinitionError(
            f"a secret must have at least {_SHORTEST_SECRET} characters: generate one with secrets.token_hex()."
        )
    return tuple(each.encode() for each in given)


@dataclass(frozen=True)
class StepDefinition:
    """A step: its name, its function, its options, and the session that the function takes."""

    name: str
    fn: Callable[..., Any]
    options: StepOptions
    is_async: bool
    session: SessionKind
    session_class: SessionClass | None
    limit: int

    @classmethod
    def of(
        cls, fn: Callable[..., Any], options: StepOptions | None = None, *, limit: int = DEFAULT_LIMIT
    ) -> StepDefinition:
        """Return the definition of a function, a bound method or any other callable.

        Its recorded result may have `limit` bytes.

        Raises:
            DefinitionError: it has no usable name, mixes a sync session with async code, or has an isolation level or a
                heartbeat timeout that does not fit.
        """
        options = options or StepOptions()
        name = name_of(fn, options.name, what="step")
        refuse_generator(fn, what=f"step {name!r}")
        refuse_misread(fn, what=f"step {name!r}")
        wanted = session_class(fn, what=f"step {name!r}")
        definition = cls(
            name=name,
            fn=fn,
            options=options,
            is_async=is_coroutine(fn),
            session=SessionKind.of(wanted),
            session_class=wanted,
            limit=limit,
        )
        _refuse_mixed(definition)
        _refuse_isolation(definition)
        _refuse_heartbeat(definition)
        return definition

    @functools.cached_property
    def place(self) -> tuple[str, str]:
        """Where the function is defined: module and qualified name."""
        return place_of(self.fn)

    @functools.cached_property
    def result(self) -> Codec:
        """The codec of the return annotation."""
        return self._result()

    def refuse_unstorable(self) -> None:
        """Refuse a return annotation that cannot be stored, if it can be resolved by now.

        Raises:
            DefinitionError: it cannot be stored.
        """
        _refuse_unstorable(self._result)

    def _result(self) -> Codec:
        what = f"result of step {self.name!r}"
        return Codec.of(hints_of(self.fn, what).get("return", Any), what=what, limit=self.limit)


@dataclass(frozen=True)
class WorkflowDefinition:
    """A workflow: its name, its function, its options, and those of the `Durable` that it belongs to."""

    name: str
    fn: Callable[..., Any]
    options: WorkflowOptions
    durable_options: DurableOptions
    is_async: bool

    @classmethod
    def of(
        cls, fn: Callable[..., Any], options: WorkflowOptions | None = None, durable: DurableOptions | None = None
    ) -> WorkflowDefinition:
        """Return the definition of a workflow function.

        Raises:
            DefinitionError: its arguments cannot be stored by name, or it takes a session.
        """
        options = options or WorkflowOptions()
        name = name_of(fn, options.name, what="workflow")
        refuse_generator(fn, what=f"workflow {name!r}")
        refuse_misread(fn, what=f"workflow {name!r}")
        definition = cls(name, fn, options, durable or DurableOptions(), is_coroutine(fn))
        if _takes_session(fn, name):
            raise DefinitionError(
                f"workflow {definition.name!r} takes a session: a workflow lives longer than any transaction. "
                "Take the session in its steps."
            )
        for parameter in definition.signature.parameters.values():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise DefinitionError(
                    f"workflow {definition.name!r} takes {parameter}: arguments are stored by parameter name, so "
                    "name each of them, or take one list or dict."
                )
        if not options.queue.strip():
            raise DefinitionError(
                f"workflow {definition.name!r} has the blank queue {options.queue!r}: name a queue, or leave it out."
            )
        return definition

    @functools.cached_property
    def signature(self) -> inspect.Signature:
        """The signature, for binding arguments to names."""
        return inspect.signature(self.fn)

    @functools.cached_property
    def arguments(self) -> ArgumentsCodec:
        """The codec of the arguments."""
        return self._arguments()

    @functools.cached_property
    def result(self) -> Codec:
        """The codec of the return annotation."""
        return self._result()

    def refuse_unstorable(self) -> None:
        """Refuse annotations that cannot be stored, if they can be resolved by now.

        Raises:
            DefinitionError: one of them cannot be stored.
        """
        _refuse_unstorable(self._arguments)
        _refuse_unstorable(self._result)

    def _arguments(self) -> ArgumentsCodec:
        hints = hints_of(self.fn, f"workflow {self.name!r}")
        parameters = self.signature.parameters
        return ArgumentsCodec.of(
            {name: hints.get(name, Any) for name in parameters},
            required=frozenset(name for name, each in parameters.items() if each.default is each.empty),
            workflow=self.name,
            limit=self.durable_options.payload_limit,
        )

    def _result(self) -> Codec:
        what = f"result of workflow {self.name!r}"
        return Codec.of(hints_of(self.fn, what).get("return", Any), what=what, limit=self.durable_options.payload_limit)

    def encode(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> str:
        """Return the JSON object of a call's arguments by parameter name, as text.

        Raises:
            ArgumentError: they do not fit the signature or the annotations.
            EncodingError: one of them cannot be stored.
        """
        positional, keywords, required = self._parameters
        arguments = dict(zip(positional, args))  # noqa: B905 (there may be fewer)
        arguments |= kwargs
        # Each argument has found its parameter, and each parameter without a default its argument.
        fits = len(arguments) == len(args) + len(kwargs) and kwargs.keys() <= keywords and required <= arguments.keys()
        return self.arguments.encode(arguments if fits else self._bind(args, kwargs))

    def _bind(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Mapping[str, object]:
        """Return the arguments by name: for the error of what does not fit, because it takes as long as all the rest.

        Raises:
            ArgumentError: they do not fit the signature.
        """
        try:
            return self.signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            hint = self._options_hint(kwargs)
            raise ArgumentError(
                f"workflow {self.name!r} takes {self.signature}: {error}.{hint} Nothing was started."
            ) from None

    @functools.cached_property
    def _parameters(self) -> tuple[tuple[str, ...], frozenset[str], frozenset[str]]:
        """The names of the parameters that take a positional argument, one by keyword, and that have no default."""
        every = self.signature.parameters.values()
        return (
            tuple(each.name for each in every if each.kind is not each.KEYWORD_ONLY),
            frozenset(each.name for each in every if each.kind is not each.POSITIONAL_ONLY),
            frozenset(each.name for each in every if each.default is each.empty),
        )

    def call(self, arguments: Mapping[str, object]) -> Any:
        """Call the function with arguments by name; an `async def` returns its coroutine."""
        if not self._has_positional_only:
            return self.fn(**arguments)
        bound = inspect.BoundArguments(self.signature, dict(arguments))
        return self.fn(*bound.args, **bound.kwargs)

    @functools.cached_property
    def _has_positional_only(self) -> bool:
        return any(each.kind is each.POSITIONAL_ONLY for each in self.signature.parameters.values())

    def require_record(self, name: str, workflow_id: UUID) -> None:
        """Refuse the record of another workflow.

        Raises:
            ArgumentError: the record has another name.
        """
        if name != self.name:
            raise ArgumentError(
                f"the record {workflow_id} is of workflow {name!r}, not of {self.name!r}: use the function that it was "
                "started with."
            )

    def _options_hint(self, kwargs: Mapping[str, object]) -> str:
        options = sorted(_START_OPTIONS & kwargs.keys() - self.signature.parameters.keys())
        if not options:
            return ""
        given = ", ".join(f"{name}=..." for name in options)
        return f" Options go before the call: {self.name}.options({given}).start(session, ...)."


class Registry(Declarations):
    """The workflows and the declarations of one `Durable`, by name."""

    def __init__(self) -> None:
        super().__init__()
        self._workflows: dict[str, WorkflowDefinition] = {}
        self._steps: dict[str, StepDefinition] = {}

    def add_workflow(self, definition: WorkflowDefinition) -> None:
        """Register a workflow.

        Raises:
            DefinitionError: another function has the name, or an annotation cannot be stored.
        """
        _refuse_other(self._workflows.get(definition.name), definition, what="workflow")
        definition.refuse_unstorable()
        self._workflows[definition.name] = definition

    def add_step(self, definition: StepDefinition) -> None:
        """Register a step under its name, so that no other function can have it.

        Raises:
            DefinitionError: another function has the name, or its result cannot be stored.
        """
        _refuse_other(self._steps.get(definition.name), definition, what="step")
        definition.refuse_unstorable()
        self._steps[definition.name] = definition

    def workflow(self, name: str) -> WorkflowDefinition:
        """Return the workflow of this name.

        Raises:
            UsageError: none is registered.
        """
        found = self._workflows.get(name)
        if found is None:
            near = difflib.get_close_matches(name, self._workflows, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"registered are {sorted(self._workflows)}."
            raise UsageError(f"no workflow named {name!r} is registered: {hint} Import the module that defines it.")
        return found

    def __iter__(self) -> Iterator[WorkflowDefinition]:
        return iter(self._workflows.values())

    def steps(self) -> Iterator[StepDefinition]:
        """Iterate over the registered steps."""
        return iter(self._steps.values())


def _takes_session(fn: Callable[..., Any], name: str) -> bool:
    try:
        return session_class(fn, what=f"workflow {name!r}") is not None
    except DefinitionError:  # it takes one in a way in which none would be injected into a step
        return True


def _refuse_unstorable(codec: Callable[[], object]) -> None:
    """Create a codec only for its error; a class that is not defined yet is no error here."""
    try:
        codec()
    except DefinitionError as error:
        cause = error.__cause__
        if isinstance(cause, NameError) or getattr(cause, "code", None) == "class-not-fully-defined":
            return
        raise
    except Exception:
        log.debug("an annotation cannot be resolved yet", exc_info=True)  # as in modules that import each other


def _refuse_mixed(definition: StepDefinition) -> None:
    if definition.session is SessionKind.SYNC and definition.is_async:
        raise DefinitionError(
            f"step {definition.name!r} is async def and takes a Session, whose calls would block the event loop: "
            "take an AsyncSession, or make it a plain def."
        )
    if definition.session is SessionKind.ASYNC and not definition.is_async:
        raise DefinitionError(
            f"step {definition.name!r} is def and takes an AsyncSession, which can only be awaited: "
            "make it async def, or take a Session."
        )


def _refuse_isolation(definition: StepDefinition) -> None:
    level = definition.options.isolation_level
    if level is None:
        return
    if level not in ISOLATION_LEVELS:
        raise DefinitionError(
            f"step {definition.name!r} asks for isolation_level={level!r}: it can have "
            f"{', '.join(map(repr, ISOLATION_LEVELS))}."
        )
    if definition.session is SessionKind.NONE:
        raise DefinitionError(
            f"step {definition.name!r} asks for isolation_level={level!r} and takes no session: "
            "only a step that takes a Session or an AsyncSession has a transaction."
        )


def _refuse_heartbeat(definition: StepDefinition) -> None:
    limits = definition.options.time_limits
    given = None if limits is None else limits.heartbeat_timeout
    if given is not None and definition.session is not SessionKind.NONE:
        raise DefinitionError(
            f"step {definition.name!r} has heartbeat_timeout={given!r} and takes a session: only a plain step sends "
            "heartbeats. Use timeout=... instead, or do what takes long in a step without a session."
        )


def _refuse_other(
    known: StepDefinition | WorkflowDefinition | None, new: StepDefinition | WorkflowDefinition, *, what: str
) -> None:
    if known is not None and place_of(known.fn) != place_of(new.fn):
        raise DefinitionError(
            f"two functions are named {what} {new.name!r}: {'.'.join(place_of(known.fn))} and "
            f"{'.'.join(place_of(new.fn))}. Records refer to it by name: rename one of them with name=..."
        )
