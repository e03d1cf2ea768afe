"""What the user of the torture sees: a line of progress, a table at the end, violations with their rows, and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sqla_durable.tools.torture.driver import Outcome, Status
from sqla_durable.tools.torture.schedule import Fault


@contextmanager
def progress(console: Console) -> Generator[Callable[[Status], None]]:
    """Show one line that changes; gives the function to tell it."""
    with console.status("starting PostgreSQL and the workers …") as line:

        def tell(status: Status) -> None:
            line.update(escape(described(status)))

        yield tell


def described(status: Status) -> str:
    """Describe how far it is, in one line."""
    return (
        f"{status.seconds:4.0f} s · {status.succeeded} transfers · {status.unfinished} unfinished · "
        f"{sum(status.injected.values())} faults · {status.doing}"
    )


def show(console: Console, outcome: Outcome) -> None:
    """Print the table, the counts and what is wrong."""
    console.print(table(outcome))
    counts = ", ".join(f"{count} {name}" for name, count in outcome.counts.items())
    console.print(
        f"seed {outcome.plan.seed}, {outcome.plan.workers} workers, {outcome.seconds:.0f} s: "
        f"{outcome.transfers} transfers carried out, {outcome.rolled_back} starts rolled back; {counts}.",
        highlight=False,
    )
    for each in outcome.violations:
        console.print(f"VIOLATION: {each.invariant}: {each.what}", markup=False, style="bold red")
        if each.rows is not None:
            console.print(json.dumps(each.rows, indent=1, default=str), markup=False, highlight=False)
    if outcome.directory is not None:
        console.print(f"The data directory and the logs are kept in {outcome.directory}", markup=False)
        console.print(f"The same faults again: {outcome.plan.command()}", markup=False)


def table(outcome: Outcome) -> Table:
    """Give the faults, how often they were injected, and what recovery from them took.

    What was lost or applied twice is told for all faults together: the books cannot tell which fault it was.
    """
    shown = Table(show_footer=True)
    shown.add_column("fault", "all")
    for name, footer in (
        ("times", sum(outcome.injected.values())),
        ("lost", outcome.lost),
        ("applied twice", outcome.twice),
        ("recovery p50", ""),
        ("max", ""),
    ):
        shown.add_column(name, str(footer), justify="right")
    for kind in Fault:
        if kind in outcome.injected:
            shown.add_row(kind.value, *_cells(outcome, kind))
    return shown


def as_json(outcome: Outcome) -> str:
    """Give everything as JSON text."""
    return json.dumps(asdict(outcome), indent=2, default=str)


def _cells(outcome: Outcome, kind: Fault) -> list[str]:
    known = outcome.recovery.get(kind)
    times = [f"{known.median:.2f} s", f"{known.longest:.2f} s"] if known else ["-", "-"]
    unknown = "?" if outcome.lost or outcome.twice else "0"
    return [str(outcome.injected[kind]), unknown, unknown, *times]
