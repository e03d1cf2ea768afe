"""What is known of a function without calling it: its name, its annotations, and whether it takes a session."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import Enum
from typing import Any, TypeAlias, cast

from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from sqla_durable.definitions.checks import fault_in_key
from sqla_durable.errors import DefinitionError

SessionClass: TypeAlias = type[Session] | type[AsyncSession]

_SESSION_NAMES = {"session", "db_session", "async_session", "db"}
_SCOPED = (scoped_session, async_scoped_session)
_DEEPEST = 10  # nested annotations: `type SessionDep = Annotated["Session", ...]`
_UNKNOWN = object()


class SessionKind(Enum):
    """The kind of session that a step's first parameter takes."""

    NONE = "none"
    SYNC = "Session"
    ASYNC = "AsyncSession"

    @classmethod
    def of(cls, wanted: SessionClass | None) -> SessionKind:
        """Return the kind of a session class."""
        if wanted is None:
            return cls.NONE
        return cls.SYNC if issubclass(wanted, Session) else cls.ASYNC

    @property
    def type(self) -> type[Session] | type[AsyncSession] | None:
        """The class of the session that is injected into the step's function."""
        return {"Session": Session, "AsyncSession": AsyncSession}.get(self.value)


def name_of(fn: Callable[..., Any], given: str | None, *, what: str) -> str:
    """Return the given name, or else that of the function.

    Raises:
        DefinitionError: it has no usable name.
    """
    if isinstance(fn, (staticmethod, classmethod)):
        raise DefinitionError(_order_of(cast("Any", fn), what))
    if not callable(fn):
        raise DefinitionError(f"a {what} is made of a function, got {fn!r}.")
    name = given if given is not None else getattr(fn, "__name__", "")
    if given is None and name in ("", "<lambda>"):
        raise DefinitionError(f"{fn!r} has no name to record it by: name the {what} with name=...")
    require_name(name, what=f"{what} name")
    return name


def require_name(name: str, *, what: str) -> None:
    """Refuse what cannot be recorded as a name or a key.

    Raises:
        DefinitionError: it is not a text, is blank, is too long, or cannot be stored.
    """
    fault = fault_in_key(name)
    if fault is not None:
        raise DefinitionError(f"the {what} is {name!r}, which {fault}: pass another one.")


def function_of(fn: Callable[..., Any]) -> Any:
    """Return the function behind partials, decorators and callable objects."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    if inspect.isroutine(fn):
        return inspect.unwrap(fn)
    return type(fn).__call__ if not inspect.isclass(fn) else fn


def _called(fn: Callable[..., Any]) -> Any:
    """Return the function that is executed when `fn` is called."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return fn if inspect.isroutine(fn) or inspect.isclass(fn) else type(fn).__call__


def is_coroutine(fn: Callable[..., Any]) -> bool:
    """Return whether calling it returns a coroutine: the called function decides, not one that it wraps."""
    return inspect.iscoroutinefunction(_called(fn))


def refuse_misread(fn: Callable[..., Any], *, what: str) -> None:
    """Refuse a function for which it is unclear how to call it.

    Raises:
        DefinitionError: it is a method without its instance, or a `def` that wraps an `async def`.
    """
    if inspect.isfunction(fn) and (first := next(iter(_parameters(fn)), None)) and first.name in ("self", "cls"):
        raise DefinitionError(
            f"{what} is a method and takes {first.name!r}, which is not passed: make "
            f"the {what.partition(' ')[0]} of the bound method instead, {_way(what)}(instance.{fn.__name__}, "
            f"name={fn.__name__!r}). If it does not use {first.name!r}, write @staticmethod above the decorator."
        )
    if inspect.iscoroutinefunction(function_of(fn)) and not is_coroutine(fn):
        raise DefinitionError(
            f"{what} is a def that wraps an async def, so it is unclear whether calling it returns a value or a "
            "coroutine: write the wrapper as an `async def` that awaits what it wraps; or, if it returns a value, "
            "write a def that calls it, without functools.wraps."
        )


def refuse_generator(fn: Callable[..., Any], *, what: str) -> None:
    """Refuse a generator function: calling it executes nothing, and its iterator cannot be recorded.

    Raises:
        DefinitionError: it yields.
    """
    functions = _called(fn), function_of(fn)
    if any(inspect.isgeneratorfunction(each) or inspect.isasyncgenfunction(each) for each in functions):
        raise DefinitionError(
            f"{what} yields, and an iterator cannot be recorded: return a list, or publish each item with "
            "write_stream(...)."
        )


def hints_of(fn: Callable[..., Any], what: str) -> dict[str, Any]:
    """Return the resolved annotations of a function.

    Raises:
        DefinitionError: one of them cannot be resolved.
    """
    function = function_of(fn)
    if inspect.isclass(function):
        return {"return": function}
    try:
        return typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError) as error:
        raise DefinitionError(
            f"the annotations of {function.__qualname__!r} ({what}) cannot be resolved: {error}. "
            "Import the names at run time, not under TYPE_CHECKING, and define the classes at module level."
        ) from error


def session_class(fn: Callable[..., Any], *, what: str) -> SessionClass | None:
    """Return the session class that annotates the first parameter, if it is one.

    Raises:
        DefinitionError: a parameter asks for a session in a way in which none is injected.
    """
    found: SessionClass | None = None
    for number, each in enumerate(_parameters(fn)):
        wanted = _class_of(each, fn, what)
        if number == 0 and each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD):
            found = wanted
            if wanted is None:
                _refuse_nameless(each, fn, what)
        elif wanted is not None and not isinstance(each.default, (Session, AsyncSession)):
            raise DefinitionError(
                f"{what} takes its {wanted.__name__} as {each}: a session is injected as the first parameter only, so "
                f"write def {_fn_name(fn)}(session: {wanted.__name__}, ...)."
            )
    return found


def _fn_name(fn: Callable[..., Any]) -> str:
    """Return the name of the function, for messages."""
    return getattr(function_of(fn), "__name__", "step")


def _parameters(fn: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):
        return []


def _class_of(parameter: inspect.Parameter, fn: Callable[..., Any], what: str) -> SessionClass | None:
    annotation = _resolved(parameter.annotation, fn)
    if isinstance(annotation, type):
        if issubclass(annotation, (Session, AsyncSession)):
            return annotation
        if issubclass(annotation, _SCOPED):
            raise DefinitionError(
                f"{what} takes {parameter}: a session is injected, not a registry of sessions. Annotate it as "
                "Session or AsyncSession."
            )
    if any(_is_session(_resolved(each, fn)) for each in _union_members(annotation)):
        raise DefinitionError(
            f"the parameter {parameter.name!r} of {what} is annotated {parameter.annotation!r}: a session is always "
            "injected, as the first parameter, so annotate it as Session or AsyncSession alone."
        )
    return None


def _refuse_nameless(parameter: inspect.Parameter, fn: Callable[..., Any], what: str) -> None:
    """Refuse a first parameter that has the name of a session, and no annotation as one."""
    if parameter.name not in _SESSION_NAMES:
        return
    if parameter.annotation is parameter.empty:
        raise DefinitionError(
            f"{what} takes {parameter.name!r} without an annotation, so that no session is injected: write "
            f"{parameter.name}: Session, or AsyncSession; if it is not a session, rename it or annotate it."
        )
    if _resolved(parameter.annotation, fn) is _UNKNOWN:
        raise DefinitionError(
            f"{what} takes {parameter.name!r}, whose annotation {parameter.annotation!r} cannot be resolved, so that "
            "no session is injected: import its names at run time, not under TYPE_CHECKING."
        )


def _is_session(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, (Session, AsyncSession))


def _resolved(annotation: Any, fn: Callable[..., Any]) -> Any:
    """Return the annotation behind an alias, `Annotated`, a string, or a bound type variable."""
    for _ in range(_DEEPEST):
        match annotation:
            case str():
                inner = _evaluated(annotation, function_of(fn))
            case typing.ForwardRef():
                inner = annotation.__forward_arg__
            case typing.TypeVar():
                inner = annotation.__bound__
            case _ if typing.get_origin(annotation) is typing.Annotated:
                inner = typing.get_args(annotation)[0]
            case _ if isinstance(typing.get_origin(annotation), type):
                inner = typing.get_origin(annotation)
            case _:  # of `type X = ...` and of a NewType
                inner = getattr(annotation, "__value__", getattr(annotation, "__supertype__", annotation))
        if inner is annotation or _union_members(annotation):
            break
        annotation = inner
    return annotation


def _union_members(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else ()


def _evaluated(annotation: str, function: Callable[..., Any]) -> Any:
    """Return the value of a string annotation; a session class imported under TYPE_CHECKING is known by its name."""
    names = {**getattr(function, "__globals__", {}), **_closure(function)}
    try:
        return eval(annotation, names)  # noqa: S307 (the module's own source, as typing.get_type_hints does)
    except Exception:
        return {"Session": Session, "AsyncSession": AsyncSession}.get(annotation.rpartition(".")[2], _UNKNOWN)


def _closure(function: Callable[..., Any]) -> Mapping[str, Any]:
    if not inspect.isfunction(function):
        return {}
    found: dict[str, Any] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # the cell is empty: the function refers to itself and is not bound to its name yet
            found[name] = cell.cell_contents
    return found


def place_of(fn: Callable[..., Any]) -> tuple[str, str]:
    """Return where a function is defined: its module and its qualified name."""
    function = function_of(fn)
    return function.__module__, function.__qualname__


def _order_of(fn: staticmethod[..., Any] | classmethod[Any, ..., Any], what: str) -> str:
    """Return how to decorate a static method or a class method in the right order."""
    name = fn.__name__
    if isinstance(fn, staticmethod):
        return f"{what} {name!r} is decorated above @staticmethod: write @staticmethod above @{_way(what)}."
    return (
        f"{what} {name!r} is decorated above @classmethod, before it has its class: make the {what} of the bound "
        f"method instead, {_way(what)}(TheClass.{name}, name={name!r})."
    )


def _way(what: str) -> str:
    return f"durable.{what.partition(' ')[0]}"
