"""What the torture is asked for and what it reports, as values, and how its user sees it: progress, table and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sqla_durable.tools.torture.faults import RecoveryTimes
from sqla_durable.tools.torture.invariants import Violation
from sqla_durable.tools.torture.schedule import (
    Fault,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TortureSettings:
    """How long to inject faults, which ones, and into how many workers.

    Attributes:
        seed: decides the faults and the transfers.
        seconds: how long faults are injected at least; it goes on until each kind was injected once. None means until
            `enough` is set.
        workers: how many worker processes there are.
        faults: the kinds of faults.
        outage: how many seconds an outage of the server lasts.
    """

    seed: int
    seconds: float | None = 60.0
    workers: int = 8
    faults: tuple[Fault, ...] = tuple(Fault)
    outage: float = 4.0

    def command(self) -> str:
        """Return the command that repeats this run."""
        kinds = "" if self.faults == tuple(Fault) else f" --faults {','.join(self.faults)}"
        length = "--forever" if self.seconds is None else f"--seconds {self.seconds:g}"
        return (
            f"sqla-durable torture --seed {self.seed} {length} --workers {self.workers} --outage {self.outage:g}{kinds}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The progress of a run."""

    seconds: float
    succeeded: int
    unfinished: int
    injected: Mapping[Fault, int]
    doing: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TortureResult:
    """What was done and found.

    Attributes:
        settings: how the run was started.
        seconds: how long faults were injected.
        transfers: how many transfers were executed.
        rolled_back: how many starts were rolled back.
        injected: how often each kind of fault was injected.
        recovery: the recovery times of each kind.
        counts: how often what the faults should cause did happen: deadlocks, reclaims, repeated calls, repeated tries.
        lost: how many transfers were started and not applied.
        twice: how many were applied more than once.
        violations: what contradicts the invariants.
        directory: where the data directory and the logs are kept, if there are violations.
    """

    settings: TortureSettings
    seconds: float
    transfers: int
    rolled_back: int
    injected: Mapping[Fault, int]
    recovery: Mapping[Fault, RecoveryTimes]
    counts: Mapping[str, int]
    lost: int
    twice: int
    violations: tuple[Violation, ...]
    directory: Path | None


@contextmanager
def progress(console: Console) -> Generator[Callable[[Status], None]]:
    """Show one line that changes; yield the function that updates it."""
    with console.status("starting PostgreSQL and the workers …") as line:

        def update(status: Status) -> None:
            line.update(escape(described_status(status)))

        yield update


def described_status(status: Status) -> str:
    """Return one line about the progress."""
    return (
        f"{status.seconds:4.0f} s · {status.succeeded} transfers · {status.unfinished} unfinished · "
        f"{sum(status.injected.values())} faults · {status.doing}"
    )


def show(console: Console, result: TortureResult) -> None:
    """Print the table, the counts and the violations."""
    console.print(table(result))
    counts = ", ".join(f"{count} {name}" for name, count in result.counts.items())
    console.print(
        f"seed {result.settings.seed}, {result.settings.workers} workers, {result.seconds:.0f} s: "
        f"{result.transfers} transfers executed, {result.rolled_back} starts rolled back; {counts}.",
        highlight=False,
    )
    for each in result.violations:
        console.print(f"VIOLATION: {each.invariant}: {each.what}", markup=False, style="bold red")
        if each.rows is not None:
            console.print(json.dumps(each.rows, indent=1, default=str), markup=False, highlight=False)
    if result.directory is not None:
        console.print(f"The data directory and the logs are kept in {result.directory}", markup=False)
        console.print(f"The same faults again: {result.settings.command()}", markup=False)


def table(result: TortureResult) -> Table:
    """Return a table of the faults, how often they were injected, and how long recovery took.

    What was lost or applied twice is shown for all faults together: the tables do not show which fault it was.
    """
    shown = Table(show_footer=True)
    shown.add_column("fault", "all")
    for name, footer in (
        ("times", sum(result.injected.values())),
        ("lost", result.lost),
        ("applied twice", result.twice),
        ("recovery p50", ""),
        ("max", ""),
    ):
        shown.add_column(name, str(footer), justify="right")
    for kind in Fault:
        if kind in result.injected:
            shown.add_row(kind.value, *_cells(result, kind))
    return shown


def as_json(result: TortureResult) -> str:
    """Return everything as JSON text."""
    return json.dumps(asdict(result), indent=2, default=str)


def _cells(result: TortureResult, kind: Fault) -> list[str]:
    known = result.recovery.get(kind)
    times = [f"{known.median:.2f} s", f"{known.longest:.2f} s"] if known else ["-", "-"]
    unknown = "?" if result.lost or result.twice else "0"
    return [str(result.injected[kind]), unknown, unknown, *times]
