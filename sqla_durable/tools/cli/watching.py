"""The commands `tail` and `top`: what happens now. What they read is found in `recent`."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sqla_durable.definitions.texts import duration_text
from sqla_durable.tools.cli.database import App, Schema, Url, session_of
from sqla_durable.tools.cli.errors import CommandError
from sqla_durable.tools.cli.output import (
    AsJson,
    error_in_words,
    made_table,
    print_json,
    print_table,
    shown,
)
from sqla_durable.tools.cli.times import duration_option

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement
    from sqlalchemy.orm import Session

    from sqla_durable.tools.cli.recent import Happening, Picture, Rates

_BETWEEN_POLLS, _BETWEEN_PICTURES = timedelta(seconds=1), timedelta(seconds=2)
_WINDOW, _STARTED_WITHIN = timedelta(minutes=1), timedelta(minutes=10)
_RATES = "finished/s", "failed", "p50", "p95"
_WHAT = "started", "succeeded", "failed", "cancelled"


def tail(
    *,
    name: Annotated[list[str] | None, typer.Option("--name", help="The workflow's name; repeatable.")] = None,
    queue: Annotated[list[str] | None, typer.Option("--queue", help="Their queue; repeatable.")] = None,
    status: Annotated[
        list[str] | None, typer.Option("--status", help=f"What to print: {', '.join(_WHAT)}; repeatable.")
    ] = None,
    interval: Annotated[
        timedelta,
        duration_option("--interval", help="How long to wait between two polls.", default=_BETWEEN_POLLS, least="50ms"),
    ] = _BETWEEN_POLLS,
    length: Annotated[timedelta | None, duration_option("--for", help="For how long; by default until Ctrl-C.")] = None,
    as_json: AsJson = False,
    url: Url = None,
    app: App = None,
    schema: Schema = None,
) -> None:
    """Follow what happens: print a line for each workflow that starts, and one when it has come to its end.

    Polls by indexes, however many are finished. Up to 10,000 unfinished workflows are looked up at each poll; of any
    others only their starts and failures are printed. A start whose transaction was open for longer than ten seconds
    may be left out. Ctrl-C ends it, with exit code 0.
    """
    for each in status or ():
        if each not in _WHAT:
            raise CommandError(f"--status {each!r} is none of {', '.join(_WHAT)}.")
    with session_of(url, app, schema) as session, suppress(KeyboardInterrupt):
        end = None if length is None else time.monotonic() + length.total_seconds()
        pause = interval.total_seconds()
        _follow(session, _conditions(name, queue), set(status or _WHAT), pause=pause, end=end, as_json=as_json)


def _conditions(name: Sequence[str] | None, queue: Sequence[str] | None) -> list[ColumnElement[bool]]:
    from sqla_durable import Workflow

    given = ((Workflow.name, name), (Workflow.queue, queue))
    return [column.in_(values) for column, values in given if values]


def _follow(
    session: Session,
    conditions: Sequence[ColumnElement[bool]],
    wanted: set[str],
    *,
    pause: float,
    end: float | None,
    as_json: bool,
) -> None:
    """Poll and print until the end; what has happened before it is printed."""
    from sqla_durable.tools.cli.recent import MOST_WATCHED, Follower

    follower = Follower(session, conditions)
    is_warned = False
    while True:
        left = float("inf") if end is None else end - time.monotonic()
        time.sleep(max(0, min(pause, left)))
        found = [each for each in follower.poll() if each.what in wanted]
        if as_json:
            print_json({"at": each.at, "what": each.what, **each.workflow} for each in found)
        else:
            for each in found:
                print(_line(each))
        sys.stdout.flush()
        if follower.is_full and not is_warned:
            is_warned = True
            typer.echo(
                f"More than {MOST_WATCHED:,} workflows are unfinished: of some only starts and failures are printed.",
                err=True,
            )
        if left <= pause:
            return


def _line(happening: Happening) -> str:
    at, what, row = happening
    named = f"{shown(at)} {what:<9} {shown(row['name'])} {row['id']}"
    if what == "started":
        keys = "".join(f", {each} {row[each]}" for each in ("key", "by") if row[each] is not None)
        return f"{named} in queue {shown(row['queue'])}{shown(keys)}"
    took = at - (row["started_at"] or row["created_at"])
    error = error_in_words(row["error_type"], row["error_message"])
    return f"{named} after {duration_text(took)}{f': {shown(error)}' if error else ''}"


def top(
    *,
    window: Annotated[
        timedelta, duration_option("--window", help="The time that is counted.", default=_WINDOW, least="1s")
    ] = _WINDOW,
    started_within: Annotated[
        timedelta,
        duration_option(
            "--started-within",
            help="Count workflows that started at most so long ago.",
            default=_STARTED_WITHIN,
            least="1s",
        ),
    ] = _STARTED_WITHIN,
    interval: Annotated[
        timedelta,
        duration_option(
            "--interval", help="How long to wait between two pictures.", default=_BETWEEN_PICTURES, least="200ms"
        ),
    ] = _BETWEEN_PICTURES,
    once: Annotated[bool, typer.Option("--once", help="Print one picture and end, as without a terminal.")] = False,
    url: Url = None,
    app: App = None,
    schema: Schema = None,
) -> None:
    """Show what happens now, by queue, worker and workflow name: how many finish, fail and wait, and how long it takes.

    What has failed in the window is all counted. Of what has finished otherwise, only what was started within
    --started-within: its rows are read for each picture, and those of all that is pending.
    """
    lengths = {"window": window, "started_within": started_within}
    with session_of(url, app, schema) as session:
        if once or not sys.stdout.isatty():
            from sqla_durable.tools.cli.recent import picture

            for title, columns, rows in _tables(picture(session, **lengths)):
                print(f"\n{title}")
                print_table(columns, rows)
        else:
            _live(session, lengths, pause=interval.total_seconds())


def _live(session: Session, lengths: Mapping[str, Any], *, pause: float) -> None:
    from rich.console import Console, Group
    from rich.live import Live

    from sqla_durable.tools.cli.recent import picture

    console = Console(highlight=False)
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            tables = _tables(picture(session, **lengths))
            live.update(Group(*(made_table(columns, rows, title=title) for title, columns, rows in tables)))
            live.refresh()
            time.sleep(pause)


def _tables(found: Picture) -> list[tuple[str, tuple[str, ...], list[list[Any]]]]:
    """Return titles, columns and rows of a picture."""
    waiting = "pending", "oldest"
    return [
        (
            f"Queues, the last {duration_text(timedelta(seconds=found.seconds))}",
            ("queue", *waiting, "running", *_RATES),
            [
                [each["queue"], *_waiting(each), each["running"], *_of(each["rates"], found.seconds)]
                for each in found.queues
            ],
        ),
        (
            "Workers",
            ("worker", "executing", "slots", *_RATES),
            [
                [
                    each["name"] if each["is_alive"] else f"{each['name']} (dead)",
                    each["executing"],
                    each["slots"],
                    *_of(each["rates"], found.seconds),
                ]
                for each in found.workers
            ],
        ),
        (
            "Workflows",
            ("workflow", *waiting, *_RATES),
            [[each["name"], *_waiting(each), *_of(each["rates"], found.seconds)] for each in found.names],
        ),
    ]


def _waiting(row: Mapping[str, Any]) -> tuple[Any, ...]:
    since = row["pending_since"]
    return row["pending"], None if since is None else row["read_at"] - since


def _of(rates: Rates, seconds: float) -> tuple[Any, ...]:
    return f"{rates.finished / seconds:.3g}", rates.failed, rates.p50, rates.p95
