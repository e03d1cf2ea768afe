"""Writes docs/names.md: every public name with its parameters and the first sentence of its docstring.

.venv/bin/python docs/names.py
"""

from __future__ import annotations

import inspect
import re
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import sqla_durable
import sqla_durable.asyncio
from sqla_durable import errors, manage, models, testing

MADE_BY_USERS = {"AsyncExecutor", "Durable", "Executor", "Interceptor", "Saga", "StartOptions", "Worker"}
RECORDS = ["Workflow", "Step", "Signal", "Event", "StreamItem", "Queue", "Schedule", "Retention", "Worker"]
PAGE = Path(__file__).parent / "names.md"
HEAD = """# Every public name

What `sqla_durable` and `sqla_durable.asyncio` export, each with its parameters and what it does.
The docstrings say more; the [reference](reference.md) of the built documentation shows them whole.
Written by `docs/names.py`.
"""


def page() -> str:
    """Return the page's text."""
    sections = [
        _section("sqla_durable", sqla_durable, sqla_durable.__all__),
        _section("sqla_durable.asyncio", sqla_durable.asyncio, sqla_durable.asyncio.__all__),
        _section("sqla_durable.manage", manage, manage.__all__),
        _section("sqla_durable.asyncio.manage", sqla_durable.asyncio.manage, sqla_durable.asyncio.manage.__all__),
        _section("sqla_durable.models", models, RECORDS),
        _section("sqla_durable.testing", testing, testing.__all__),
        _section("sqla_durable.errors", errors, [name for name in vars(errors) if name.endswith("Error")]),
    ]
    return "\n".join([HEAD, *sections])


def _section(title: str, module: ModuleType, names: list[str]) -> str:
    rows = [row for name in names for row in _rows(name, getattr(module, name))]
    return "\n".join([f"## `{title}`", "", "| name | |", "| --- | --- |", *rows, ""])


def _rows(name: str, value: Any) -> list[str]:
    """Return a row for the name, and one for each method that a user calls."""
    if not isinstance(value, type):
        return [f"| `{name}{_parameters(value)}` | {_first_sentence(value)} |"]
    rows = [f"| `{name}{_parameters(value) if name in MADE_BY_USERS else ''}` | {_first_sentence(value)} |"]
    if issubclass(value, (Exception, Enum, models.Base)):
        return rows
    methods = {each: method for kind in reversed(value.__mro__) for each, method in vars(kind).items()}
    for each, method in methods.items():
        if not each.startswith("_") and inspect.isfunction(method) and inspect.getdoc(method):
            rows.append(f"| `{name}.{each}{_parameters(method)}` | {_first_sentence(method)} |")
    return rows


def _parameters(value: Any) -> str:
    if not inspect.isroutine(value) and not isinstance(value, type):
        return ""
    parameters = [each for each in inspect.signature(value).parameters.values() if each.name != "self"]
    shown = [_mark(each) for each in parameters]
    kinds = [each.kind for each in parameters]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        shown.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    return f"({', '.join(shown)})"


def _mark(parameter: inspect.Parameter) -> str:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    star = next((text for kind, text in stars.items() if kind is parameter.kind), "")
    has_default = parameter.default is not parameter.empty
    return f"{star}{parameter.name}{'=' if has_default else ''}"


def _first_sentence(value: Any) -> str:
    if not (inspect.isroutine(value) or isinstance(value, (type, ModuleType))):
        return ""
    text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
    sentence = re.split(r"(?<=\.)\s", text, maxsplit=1)[0]
    return sentence.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
