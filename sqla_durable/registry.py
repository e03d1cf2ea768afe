"""What the decorators know about a function: its name, its signature, its annotations, and whether it takes a session.

Annotations become codecs when they are first needed, so that a function may name a class defined further down.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, TypeAlias, get_args
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sqla_durable.checks import fault_in
from sqla_durable.codec import DEFAULT_LIMIT, ArgumentsCodec, Codec
from sqla_durable.errors import ArgumentError, DefinitionError, UnknownWorkflowError
from sqla_durable.interceptors import NO_INTERCEPTORS, Interceptors
from sqla_durable.limits import TimeLimits
from sqla_durable.retry import RetryPolicy

MARKS = "#/"
_START_OPTIONS = {"key", "queue", "priority", "delay", "at", "detached", "timeout", "deadline"}
IsolationLevel: TypeAlias = Literal["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]
ISOLATION_LEVELS: tuple[str, ...] = get_args(IsolationLevel)
"""What a transactional step may ask for, the weakest first."""


class SessionKind(Enum):
    """Which session a step's first parameter asks for."""

    NONE = "none"
    SYNC = "Session"
    ASYNC = "AsyncSession"

    @property
    def type(self) -> type[Session] | type[AsyncSession] | None:
        """The class that the step's function gets an instance of."""
        return {"Session": Session, "AsyncSession": AsyncSession}.get(self.value)


@dataclass(frozen=True)
class StepDefinition:
    """A step: its name, its function, and how to try it again."""

    name: str
    fn: Callable[..., Any]
    is_async: bool
    session: SessionKind
    policy: RetryPolicy | None = None
    limit: int = DEFAULT_LIMIT
    isolation_level: str | None = None
    time_limits: TimeLimits | None = None

    @classmethod
    def of(
        cls,
        fn: Callable[..., Any],
        *,
        name: str | None = None,
        policy: RetryPolicy | None = None,
        limit: int = DEFAULT_LIMIT,
        isolation_level: str | None = None,
        time_limits: TimeLimits | None = None,
    ) -> StepDefinition:
        """Describe a function, a bound method or any other callable.

        Raises:
            DefinitionError: it has no usable name, mixes a sync session with async code, or asks for an isolation
                level that it cannot have.
        """
        definition = cls(
            name=_name_of(fn, name, what="step"),
            fn=fn,
            is_async=_is_async(fn),
            session=_session_kind(fn),
            policy=policy,
            limit=limit,
            isolation_level=isolation_level,
            time_limits=time_limits,
        )
        _refuse_mixed(definition)
        _refuse_isolation(definition)
        return definition

    @functools.cached_property
    def place(self) -> tuple[str, str]:
        """Where the function is defined: module and qualified name."""
        return _place(self.fn)

    @functools.cached_property
    def result(self) -> Codec:
        """The codec of the return annotation."""
        what = f"result of step {self.name!r}"
        return Codec.of(_annotations(self.fn, what).get("return", Any), what=what, limit=self.limit)


@dataclass(frozen=True)
class WorkflowDefinition:
    """A workflow: its name, its function, its default queue, and how its code may change.

    `version` is what a start records; `strict` holds the outcome back where the history was not visited.
    """

    name: str
    fn: Callable[..., Any]
    is_async: bool
    queue: str = "default"
    limit: int = DEFAULT_LIMIT
    interceptors: Interceptors = NO_INTERCEPTORS
    version: str | None = None
    strict: bool = False

    @classmethod
    def of(
        cls,
        fn: Callable[..., Any],
        *,
        name: str | None = None,
        queue: str = "default",
        limit: int = DEFAULT_LIMIT,
        interceptors: Interceptors = NO_INTERCEPTORS,
        version: str | None = None,
        strict: bool = False,
    ) -> WorkflowDefinition:
        """Describe a workflow function.

        Raises:
            DefinitionError: its arguments cannot be stored by name, or it takes a session.
        """
        name = _name_of(fn, name, what="workflow")
        definition = cls(name, fn, _is_async(fn), queue, limit, interceptors, version, strict)
        for parameter in definition.signature.parameters.values():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise DefinitionError(
                    f"workflow {definition.name!r} takes {parameter}: arguments are stored by parameter name, so "
                    "name each of them, or take one list or dict."
                )
        if _session_kind(fn) is not SessionKind.NONE:
            raise DefinitionError(
                f"workflow {definition.name!r} takes a session: a workflow lives longer than any transaction. "
                "Take the session in its steps."
            )
        if not queue.strip():
            raise DefinitionError(f"workflow {definition.name!r} has the blank queue {queue!r}: name one.")
        return definition

    @functools.cached_property
    def signature(self) -> inspect.Signature:
        """The signature, for binding arguments to names."""
        return inspect.signature(self.fn)

    @functools.cached_property
    def arguments(self) -> ArgumentsCodec:
        """The codec of the arguments."""
        hints = _annotations(self.fn, f"workflow {self.name!r}")
        parameters = self.signature.parameters
        return ArgumentsCodec.of(
            {name: hints.get(name, Any) for name in parameters},
            required=frozenset(name for name, each in parameters.items() if each.default is each.empty),
            workflow=self.name,
            limit=self.limit,
        )

    @functools.cached_property
    def result(self) -> Codec:
        """The codec of the return annotation."""
        what = f"result of workflow {self.name!r}"
        return Codec.of(_annotations(self.fn, what).get("return", Any), what=what, limit=self.limit)

    def encode(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> dict[str, Any]:
        """Give the JSON object of a call's arguments by parameter name.

        Raises:
            ArgumentError: they do not fit the signature or the annotations.
            EncodingError: one of them cannot be stored.
        """
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            hint = self._options_hint(kwargs)
            raise ArgumentError(
                f"workflow {self.name!r} takes {self.signature}: {error}.{hint} Nothing was started."
            ) from None
        return self.arguments.encode(bound.arguments)

    def call(self, arguments: Mapping[str, object]) -> Any:
        """Call the function with arguments by name; for `async def` this gives the coroutine."""
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


class Registry:
    """The workflows of one `Durable`, by name."""

    def __init__(self) -> None:
        self._workflows: dict[str, WorkflowDefinition] = {}
        self._steps: dict[str, StepDefinition] = {}

    def add_workflow(self, definition: WorkflowDefinition) -> None:
        """Register a workflow.

        Raises:
            DefinitionError: another function has the name.
        """
        _refuse_other(self._workflows.get(definition.name), definition, what="workflow")
        self._workflows[definition.name] = definition

    def add_step(self, definition: StepDefinition) -> None:
        """Register a step under its function's own name, so that two of them cannot be taken for each other.

        Raises:
            DefinitionError: another function has the name.
        """
        _refuse_other(self._steps.get(definition.name), definition, what="step")
        self._steps[definition.name] = definition

    def workflow(self, name: str) -> WorkflowDefinition:
        """Give the workflow of this name.

        Raises:
            UnknownWorkflowError: there is none.
        """
        found = self._workflows.get(name)
        if found is None:
            near = difflib.get_close_matches(name, self._workflows, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"registered are {sorted(self._workflows)}."
            raise UnknownWorkflowError(
                f"no workflow named {name!r} is registered: {hint} Import the module that defines it.",
                name=name,
            )
        return found

    def __iter__(self) -> Iterator[WorkflowDefinition]:
        return iter(self._workflows.values())

    def steps(self) -> Iterator[StepDefinition]:
        """Iterate over the registered steps."""
        return iter(self._steps.values())


def _name_of(fn: Callable[..., Any], given: str | None, *, what: str) -> str:
    if not callable(fn):
        raise DefinitionError(f"a {what} is made of a function, got {fn!r}.")
    name = given if given is not None else getattr(fn, "__name__", "")
    if given is None and name in ("", "<lambda>"):
        raise DefinitionError(f"{fn!r} has no name to record it by: give the {what} one with name=...")
    require_name(name, what=f"{what} name")
    return name


def require_name(name: str, *, what: str) -> None:
    """Refuse what cannot be recorded as a name, or could be taken for an occurrence of another.

    Raises:
        DefinitionError: it is not a text, is blank, cannot be stored, or contains one of the marks of occurrences.
    """
    fault = fault_in(name)
    if fault is not None:
        raise DefinitionError(f"the {what} is {name!r}, which {fault}: give it a name of its own.")
    if any(character in name for character in MARKS):
        raise DefinitionError(f"the {what} {name!r} contains one of {MARKS!r}, which mark occurrences.")


def _function_of(fn: Callable[..., Any]) -> Any:
    while isinstance(fn, functools.partial):
        fn = fn.func
    if inspect.isroutine(fn):
        return inspect.unwrap(fn)
    return type(fn).__call__ if not inspect.isclass(fn) else fn


def _is_async(fn: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(_function_of(fn))


def _annotations(fn: Callable[..., Any], what: str) -> dict[str, Any]:
    function = _function_of(fn)
    if inspect.isclass(function):
        return {"return": function}
    try:
        return typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError) as error:
        raise DefinitionError(
            f"the annotations of {function.__qualname__!r} ({what}) cannot be resolved: {error}. "
            "Import the names at run time, not under TYPE_CHECKING, and define the classes at module level."
        ) from error


def _session_kind(fn: Callable[..., Any]) -> SessionKind:
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):
        return SessionKind.NONE
    if not parameters or parameters[0].kind in (
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.KEYWORD_ONLY,
    ):
        return SessionKind.NONE
    return _kind_of(parameters[0].annotation, fn)


def _kind_of(annotation: Any, fn: Callable[..., Any]) -> SessionKind:
    for _ in range(2):  # a quoted annotation under `from __future__ import annotations` is quoted twice
        if isinstance(annotation, str):
            annotation = _evaluated(annotation, _function_of(fn))
    if isinstance(annotation, type) and issubclass(annotation, Session):
        return SessionKind.SYNC
    if isinstance(annotation, type) and issubclass(annotation, AsyncSession):
        return SessionKind.ASYNC
    if any(_kind_of(each, fn) is not SessionKind.NONE for each in _union_members(annotation)):
        raise DefinitionError(
            f"the first parameter of {fn!r} is annotated {annotation!r}: a session is injected always, so "
            "annotate it as Session or AsyncSession alone."
        )
    return SessionKind.NONE


def _union_members(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else ()


def _evaluated(annotation: str, function: Callable[..., Any]) -> Any:
    """Evaluate a postponed annotation; a session class imported under TYPE_CHECKING is known by its name."""
    names = {**getattr(function, "__globals__", {}), **_closure(function)}
    try:
        return eval(annotation, names)  # noqa: S307 (the module's own source, as typing.get_type_hints does)
    except Exception:
        return {"Session": Session, "AsyncSession": AsyncSession}.get(annotation.rpartition(".")[2])


def _closure(function: Callable[..., Any]) -> Mapping[str, Any]:
    return inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}


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
    if definition.isolation_level is None:
        return
    if definition.isolation_level not in ISOLATION_LEVELS:
        raise DefinitionError(
            f"step {definition.name!r} asks for isolation_level={definition.isolation_level!r}: it can have "
            f"{', '.join(map(repr, ISOLATION_LEVELS))}."
        )
    if definition.session is SessionKind.NONE:
        raise DefinitionError(
            f"step {definition.name!r} asks for isolation_level={definition.isolation_level!r} and takes no session: "
            "only a step that takes a Session or an AsyncSession has a transaction."
        )


def _refuse_other(
    known: StepDefinition | WorkflowDefinition | None, new: StepDefinition | WorkflowDefinition, *, what: str
) -> None:
    if known is not None and _place(known.fn) != _place(new.fn):
        raise DefinitionError(
            f"two functions are named {what} {new.name!r}: {'.'.join(_place(known.fn))} and "
            f"{'.'.join(_place(new.fn))}. Records refer to it by name: give one of them another with name=..."
        )


def _place(fn: Callable[..., Any]) -> tuple[str, str]:
    function = _function_of(fn)
    return function.__module__, function.__qualname__
