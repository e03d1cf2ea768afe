"""What the user of the benchmark sees: a line of progress, a table, and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from sqla_durable.tools.bench.figures import (
    BenchResult,
    Figure,
    Machine,
    Reference,
    Status,
)

_UNKNOWN = "-"


@contextmanager
def progress(console: Console) -> Generator[Callable[[Status], None]]:
    """Show one line with a bar; yield the function that updates it."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as shown:
        line = shown.add_task("starting", total=None)

        def update(status: Status) -> None:
            described = f"{status.workload}: {status.doing}"
            shown.update(line, description=described, completed=status.done, total=status.total or None)

        yield update


def show(console: Console, result: BenchResult) -> None:
    """Print the machine and the table."""
    console.print(described_machine(result.machine), highlight=False)
    console.print(table(result.figures))
    if any(each.costs is not None and each.costs.statements is None for each in result.figures):
        console.print("statements: pg_stat_statements is not in this database.", highlight=False)


def described_machine(machine: Machine) -> str:
    """Return one line about the machine and the server."""
    where = "on the same machine" if machine.is_local else "elsewhere"
    settings = ", ".join(f"{name}={machine.settings.get(name, '?')}" for name in ("fsync", "synchronous_commit"))
    return (
        f"{machine.cores} cores, {machine.system}, Python {machine.python}, sqla-durable {machine.package}; "
        f"PostgreSQL {machine.server} {where}, database {machine.database!r}, {settings}"
    )


def table(figures: Iterable[Figure]) -> Table:
    """Return a table of the figures, each with what it is compared with and what one workflow or step cost."""
    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    shown.add_column("workload", no_wrap=True)
    shown.add_column("measured")
    shown.add_column("figure", justify="right", no_wrap=True)
    shown.add_column("ratio", justify="right", no_wrap=True)
    for workload, several in groupby(figures, key=lambda figure: figure.workload):
        for number, figure in enumerate(several):
            what = f"{figure.what} ({figure.unit})"
            shown.add_row("" if number else workload, what, _number(figure.value), style="bold")
            for each in figure.references:
                shown.add_row("", f"  {each.what}", *_reference(figure, each))
            if figure.costs is not None:
                shown.add_row("", f"  {described_costs(figure)}", style="dim")
        shown.add_section()
    return shown


def described_costs(figure: Figure) -> str:
    """Return one line about what one workflow or step cost."""
    if figure.costs is None:
        return ""
    cost = figure.costs
    statements = "" if cost.statements is None else f"{_number(cost.statements)} statements, "
    server = "" if cost.server_ms is None else f", {_number(cost.server_ms)} ms of the server's"
    return (
        f"each {figure.each}: {_number(cost.commits)} commits, {statements}{_number(cost.wal_bytes)} bytes of WAL, "
        f"{_number(cost.worker_ms)} ms of the worker's CPU{server}; worker at most {cost.worker_peak_mb:.0f} MB"
    )


def as_json(result: BenchResult) -> str:
    """Return everything as JSON text, with the ratios."""
    found = {
        "machine": asdict(result.machine),
        "settings": asdict(result.settings),
        "complete": result.ended_by is None,
        "figures": [_as_json(each) for each in result.figures],
    }
    return json.dumps(found, indent=2)


def _as_json(figure: Figure) -> dict[str, Any]:
    references = [{**asdict(each), "ratio": figure.ratio(each)} for each in figure.references]
    return {**asdict(figure), "references": references}


def _reference(figure: Figure, reference: Reference) -> tuple[str, str]:
    ratio = figure.ratio(reference)
    if ratio is None or reference.value is None:
        return _UNKNOWN, _UNKNOWN
    return _number(reference.value), f"{ratio:.2f}"


def _number(value: float) -> str:
    """Return the number with three significant digits, or with all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
