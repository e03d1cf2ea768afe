"""What can be told of a function by looking at it: its name, its annotations, whether it takes a session."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import Enum
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sqla_durable.checks import fault_in
from sqla_durable.errors import DefinitionError

MARKS = "#/"


class SessionKind(Enum):
    """Which session a step's first parameter asks for."""

    NONE = "none"
    SYNC = "Session"
    ASYNC = "AsyncSession"

    @property
    def type(self) -> type[Session] | type[AsyncSession] | None:
        """The class that the step's function gets an instance of."""
        return {"Session": Session, "AsyncSession": AsyncSession}.get(self.value)


def name_of(fn: Callable[..., Any], given: str | None, *, what: str) -> str:
    """Give the name of a function, or the one that is given.

    Raises:
        DefinitionError: it has no usable name.
    """
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


def function_of(fn: Callable[..., Any]) -> Any:
    """Give the function behind partials, decorators and callable objects."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    if inspect.isroutine(fn):
        return inspect.unwrap(fn)
    return type(fn).__call__ if not inspect.isclass(fn) else fn


def is_coroutine(fn: Callable[..., Any]) -> bool:
    """Tell whether calling it gives a coroutine."""
    return inspect.iscoroutinefunction(function_of(fn))


def refuse_generator(fn: Callable[..., Any], *, what: str) -> None:
    """Refuse a function that yields: calling it executes nothing, and what it gives cannot be recorded.

    Raises:
        DefinitionError: it yields.
    """
    function = function_of(fn)
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise DefinitionError(
            f"{what} yields, and an iterator cannot be recorded: return a list, or publish each item with "
            "write_stream(...)."
        )


def hints_of(fn: Callable[..., Any], what: str) -> dict[str, Any]:
    """Give its annotations, resolved.

    Raises:
        DefinitionError: one of them cannot be.
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


def session_kind(fn: Callable[..., Any]) -> SessionKind:
    """Tell which session its first parameter asks for."""
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
            annotation = _evaluated(annotation, function_of(fn))
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
    if not inspect.isfunction(function):
        return {}
    found: dict[str, Any] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # empty: the function refers to itself, and is not bound to its name yet
            found[name] = cell.cell_contents
    return found


def place_of(fn: Callable[..., Any]) -> tuple[str, str]:
    """Give where it is defined: module and qualified name."""
    function = function_of(fn)
    return function.__module__, function.__qualname__
