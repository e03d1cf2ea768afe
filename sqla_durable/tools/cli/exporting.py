"""The command `export`: workflows with their histories, a JSON object on each line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated
from uuid import UUID

import typer

from sqla_durable.tools.cli.acting import counted, warn
from sqla_durable.tools.cli.choosing import Choice, Ids, portions
from sqla_durable.tools.cli.database import App, Schema, Url, session_of
from sqla_durable.tools.cli.errors import FAILED, CommandError
from sqla_durable.tools.cli.filters import Filters
from sqla_durable.tools.cli.groups import grouped

_AT_ONCE = 50
"""How many histories are in memory."""


@grouped
def export(
    ids: Ids = None,
    *,
    filters: Filters,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to write; by default to stdout.")
    ] = None,
    url: Url = None,
    app: App = None,
    schema: Schema = None,
) -> None:
    """Write workflows with their steps, signals, events and stream items as JSON lines, the newest first.

    They hold the arguments of workflows and the results of steps: protect them like the database. A file that is
    written can be read by its owner only, and is there when it is complete. Without ids and options: all workflows.
    """
    from sqla_durable.store.histories import histories

    choice = Choice.of(ids, filters, everything=not ids and filters.is_empty)
    number, missing = 0, dict.fromkeys(choice.ids)
    with session_of(url, app, schema) as session, _opened(output) as file:
        for portion in portions(session, choice.select(), _AT_ONCE):
            for line in histories(session, portion):
                file.write(f"{line}\n")
                number += 1
                if missing:
                    missing.pop(UUID(json.loads(line)["workflow"]["id"]), None)
            session.rollback()
    if output is not None:
        typer.echo(f"{counted(number)} exported to {output}.", err=True)
    if missing:
        warn(f"no workflow {each} is visible here: it was not exported." for each in missing)
        raise typer.Exit(FAILED)


@contextmanager
def _opened(output: Path | None) -> Generator[IO[str]]:
    """Open a file for writing that takes its place when it is complete."""
    if output is None:
        yield sys.stdout
        return
    part = output.with_name(f"{output.name}.part")
    try:
        part.unlink(missing_ok=True)  # of a command that was killed; its mode would stay
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise CommandError(f"--output {output}: {error.strerror}.") from None
    try:
        with open(descriptor, "w", encoding="utf-8", newline="\n") as file:  # noqa: PTH123 (a descriptor)
            yield file
        part.replace(output)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
