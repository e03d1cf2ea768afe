"""How commands print: tables and lines for people, JSON lines for programs; and questions before what destroys."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import date, datetime, timedelta
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from sqla_durable.definitions.texts import duration_text, time_text
from sqla_durable.tools.cli.errors import CommandError

if TYPE_CHECKING:
    from rich.table import Table

_CLEAR = "\x1b[2J\x1b[H"
_WIDEST = 100_000
_LEAST_CUT = 20
_USUAL_WIDTH = 80
_GAP = 2  # between two columns

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, an object on each line.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only what was asked for, or ids.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def print_json(rows: Iterable[Mapping[str, Any]]) -> None:
    """Print an object on each line. What a terminal would obey is escaped, as JSON escapes it."""
    for row in rows:
        line = json.dumps(dict(row), default=_as_json, ensure_ascii=False)
        print(line if line.isprintable() else "".join(map(_escaped, line)))


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str | None = None, cut: str | None = None
) -> None:
    """Print a table; plain text without colours where the output is no terminal.

    Only the column `cut` is shortened to the width of the terminal, the others are whole.
    """
    from rich.console import Console

    is_terminal = sys.stdout.isatty()
    width = os.get_terminal_size(sys.stdout.fileno()).columns or _USUAL_WIDTH if is_terminal else None
    console = Console(force_terminal=is_terminal, width=_WIDEST, highlight=False)
    with console.capture() as captured:
        console.print(made_table(columns, rows, title=title, cut=cut, width=width))
    for line in captured.get().splitlines():
        print(line.rstrip())


def made_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    title: str | None = None,
    cut: str | None = None,
    width: int | None = None,
) -> Table:
    """Return a table as rich prints it; its column `cut` is shortened so that it has this width."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for each in columns:
        table.add_column(each, no_wrap=True, overflow="ignore")
    texts = [[Text(shown(each)) for each in row] for row in rows]
    if cut is not None and width is not None:
        place = list(columns).index(cut)
        others = [number for number in range(len(columns)) if number != place]
        taken = sum(max([len(columns[each]), *(row[each].cell_len for row in texts)]) + _GAP for each in others)
        for row in texts:
            row[place].truncate(max(width - taken, _LEAST_CUT), overflow="ellipsis")
    for row in texts:
        table.add_row(*row)
    return table


def shown(value: object) -> str:
    """Return a value in one line, as people read it: a duration as `1h 5m`, a time in UTC, nothing as an empty text.

    What is unprintable in it is escaped: names and errors are from elsewhere, and a terminal obeys control characters.
    """
    from sqla_durable.definitions.log import one_line

    text = _text_of(value)
    return one_line(text, limit=len(text))


def error_in_words(kind: str | None, message: str | None) -> str:
    """Return the class of a recorded error without its module, and its message; nothing if there is none."""
    if kind is None:
        return ""
    name = kind.rpartition(":")[2]
    return f"{name}: {message}" if message else name


def print_lines(text: str, *, indent: str = "  ") -> None:
    """Print a text of several lines, each escaped as `shown` does."""
    for line in text.splitlines():
        print(f"{indent}{shown(line)}")


def repeat(print_once: Callable[[], None], *, every: timedelta | None) -> None:
    """Print once, or again and again until Ctrl-C; where the output is a terminal, it is cleared first."""
    if every is None:
        print_once()
        return
    with suppress(KeyboardInterrupt):
        while True:
            if sys.stdout.isatty():
                print(_CLEAR, end="")
            print_once()
            sys.stdout.flush()
            time.sleep(every.total_seconds())


def _text_of(value: object) -> str:
    match value:
        case None:
            return ""
        case datetime():
            return time_text(value)
        case timedelta():
            return duration_text(value)
        case Enum():
            return str(value.value)
        case dict() | list():
            return json.dumps(value, default=_as_json, ensure_ascii=False)
        case _:
            return str(value)


def _escaped(character: str) -> str:
    return character if character.isprintable() else json.dumps(character)[1:-1]


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something is done; without a terminal to ask at, `--yes` must say it.

    Raises:
        CommandError: nobody can be asked.
        typer.Exit: the answer is no; the exit code is 1.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise CommandError(f"{question} There is no terminal to ask at: add --yes. Nothing was done.")
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
