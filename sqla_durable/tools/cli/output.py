"""How commands print: tables and lines for people, JSON lines for programs; and questions before what destroys."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from enum import Enum
from typing import Annotated, Any
from uuid import UUID

import typer

from sqla_durable.tools.cli.errors import CommandError

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, an object on each line.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only what was asked for, or ids.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def print_json(rows: Iterable[Mapping[str, Any]]) -> None:
    """Print an object on each line."""
    for row in rows:
        print(json.dumps(dict(row), default=_as_json, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str | None = None) -> None:
    """Print a table; plain text without colours where the output is no terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(Text(shown(each)) for each in row))
    width = None if sys.stdout.isatty() else 10_000
    Console(width=width, highlight=False).print(table)


def shown(value: object) -> str:
    """Return a value as people read it: a duration as `1h 5m`, a time in UTC, nothing as an empty text."""
    match value:
        case None:
            return ""
        case datetime():
            return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"
        case timedelta():
            return duration(value)
        case Enum():
            return str(value.value)
        case dict() | list():
            return json.dumps(value, default=_as_json, ensure_ascii=False)
        case _:
            return str(value)


def duration(value: timedelta) -> str:
    """Return a duration in its two largest units: `2d 3h`, `5m 1s`, `0.25s`."""
    seconds = value.total_seconds()
    if abs(seconds) < 60:
        return f"{seconds:.3g}s"
    parts = [f"{seconds:.0f}s"]
    for size, unit, smaller in ((86_400, "d", 3_600), (3_600, "h", 60), (60, "m", 1)):
        if abs(seconds) >= size:
            whole, rest = divmod(abs(seconds), size)
            small = {3_600: "h", 60: "m", 1: "s"}[smaller]
            parts = [f"{'-' if seconds < 0 else ''}{whole:.0f}{unit}", f"{rest // smaller:.0f}{small}"]
            break
    return " ".join(each for each in parts if not each.startswith("0"))


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something is done; without a terminal to ask at, `--yes` must say it.

    Raises:
        CommandError: nobody can be asked.
        typer.Exit: the answer is no; the exit code is 1.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise CommandError(f"{question} Nobody can be asked here: add --yes to do it. Nothing was done.")
    if not typer.confirm(question):
        typer.echo("Nothing was done.", err=True)
        raise typer.Exit(1)


def _as_json(value: object) -> object:
    match value:
        case datetime() | date():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case UUID():
            return str(value)
        case Enum():
            return value.value
        case _:
            return str(value)
