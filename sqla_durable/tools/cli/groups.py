"""Options that several commands have, as dataclasses: a command takes one, and its command line has the options."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any, get_type_hints


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take, in the place of each parameter that is a dataclass of options, the options themselves.

    The fields of such a dataclass are annotated as typer's options are, and have defaults. An option that can be
    repeated and was not is None.
    """
    own = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {
        each.name: each.annotation for each in own.parameters.values() if is_dataclass(each.annotation)
    }
    options = [option for group in groups.values() for option in _options_of(group)]
    kept = [each for each in own.parameters.values() if each.name not in groups]
    positional = [each for each in kept if each.kind is not inspect.Parameter.KEYWORD_ONLY]
    named = [each for each in kept if each.kind is inspect.Parameter.KEYWORD_ONLY]

    @wraps(command)
    def with_options(*args: Any, **given: Any) -> None:
        made = {name: _made(group, given) for name, group in groups.items()}
        command(*args, **made, **given)

    parameters = [*positional, *named, *options]
    with_options.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {each.name: each.annotation for each in parameters}
    return with_options


def _options_of(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=hints[each.name])
        for each in fields(group)
    ]


def _made(group: Any, given: dict[str, Any]) -> Any:
    """Return the dataclass, with what is taken from the given options."""
    taken = {each.name: given.pop(each.name) for each in fields(group)}
    return group(**{name: value if value != [] else None for name, value in taken.items()})
