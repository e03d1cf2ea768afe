"""What a benchmark is asked for and what it reports, as values, and how its user sees them: a table and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from sqla_durable.errors import DurableError

OWN_SCHEMA = "durable_bench"
PGBENCH_TRANSACTIONS = 8_000
_UNKNOWN = "-"


class BenchError(DurableError):
    """The benchmark cannot measure: the schema is not its own, a worker ended, or no workflow succeeded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """What to measure, and with how many workers and workflows.

    Attributes:
        schema: the schema that the benchmark creates and drops.
        count: how many workflows, or steps, a workload executes; None means the workload's own number.
        seconds: how long a workload runs at most; None means the workload's own time.
        workers: how many worker processes there are.
        concurrency: how many workflows each of them executes at once.
        finished: how many finished workflows `depth` inserts before it starts.
        pending: how many pending workflows it inserts.
        pgbench_transactions: about how many transactions pgbench makes for each script.
    """

    schema: str = OWN_SCHEMA
    count: int | None = None
    seconds: float | None = None
    workers: int = 1
    concurrency: int = 100
    finished: int = 1_000_000
    pending: int = 200_000
    pgbench_transactions: int = PGBENCH_TRANSACTIONS


@dataclass(frozen=True, slots=True)
class Reference:
    """What a figure is compared with: plain SQL by pgbench, naive ORM code, or another figure.

    Attributes:
        what: how it was measured.
        value: in the unit of the figure; None where it could not be measured.
    """

    what: str
    value: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What one workflow costs, or one step where steps are counted; None where it cannot be measured.

    Attributes:
        commits: of the whole database, whichever client made them.
        statements: those on the tables of the benchmark, from `pg_stat_statements`.
        wal_bytes: of the whole server.
        worker_ms: milliseconds of CPU of all worker processes.
        server_ms: milliseconds of CPU of the server.
        worker_peak_mb: the most memory that one worker process held, in MB of 1,000,000 bytes.
    """

    commits: float
    statements: float | None
    wal_bytes: float
    worker_ms: float
    server_ms: float | None
    worker_peak_mb: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured figure.

    Attributes:
        workload: the workload that it belongs to.
        what: what was measured.
        value: the figure.
        unit: its unit.
        references: what it is compared with.
        costs: what it cost, where that was measured.
        each: what `costs` is counted for: workflow, step, or second of an idle worker.
    """

    workload: str
    what: str
    value: float
    unit: str
    references: tuple[Reference, ...] = ()
    costs: Costs | None = None
    each: str = "workflow"

    def ratio(self, reference: Reference) -> float | None:
        """Return the figure divided by a reference; None where the reference has no value."""
        return self.value / reference.value if reference.value else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The machine and the server that were measured.

    Attributes:
        cores: processors of the machine that the workers are on.
        system: its operating system and architecture.
        python: the version of Python.
        package: the version of this package.
        server: the version of PostgreSQL.
        database: the name of the database.
        is_local: whether the server is on the same machine.
        settings: the parameters of the server that decide how durable and how fast its commits are.
    """

    cores: int
    system: str
    python: str
    package: str
    server: str
    database: str
    is_local: bool
    settings: dict[str, str]


@dataclass(frozen=True, slots=True)
class Status:
    """The progress of a workload.

    Attributes:
        workload: its name.
        doing: what is being done.
        done: how many workflows or samples are done.
        total: how many there are in all; 0 where that is not known.
    """

    workload: str
    doing: str
    done: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """What was measured, with which settings, and where; `ended_by` is what ended it early, if anything did."""

    machine: Machine
    settings: BenchSettings
    figures: tuple[Figure, ...]
    ended_by: KeyboardInterrupt | BenchError | None = None


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
