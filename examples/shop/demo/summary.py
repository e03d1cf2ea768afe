"""What the demo prints at its end: a table of numbers, and one SQL query over both sets of tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from sqlalchemy.orm import Session

from shop.demo.actual import Recovery
from shop.demo.facts import Facts
from shop.demo.mishaps import Mishap
from shop.report import orders_with_steps


@dataclass(frozen=True, slots=True)
class Run:
    """The numbers of one run."""

    facts: Facts
    ledger: dict[str, Any]
    recovery: Recovery
    mishaps: Sequence[Mishap]
    kills: int
    seconds: float


def print_numbers(console: Console, run: Run) -> None:
    """Print the table."""
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in _numbers(run).items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else value)
    console.print(table)


def print_query(console: Console, session: Session, *, rows: int) -> None:
    """Print the query that joins orders with their workflows and steps, and its first rows."""
    statement = orders_with_steps(limit=rows)
    sql = statement.compile(session.get_bind(), compile_kwargs={"literal_binds": True})
    console.print(Syntax(str(sql), "sql", background_color="default", word_wrap=True))
    result = session.execute(statement)
    table = Table(*result.keys())
    for row in result:
        table.add_row(*map(str, row))
    console.print(table)


def _numbers(run: Run) -> dict[str, int | str]:
    facts, counts = run.facts, run.ledger["counts"]
    fates = {each.number: each.fate for each in run.mishaps}
    undone = Counter(fates[str(number)] for number, status, _ in facts["order"].elements() if status == "cancelled")
    too_late = sum(str(number) in fates and status == "shipped" for number, status, _ in facts["order"].elements())
    statuses = Counter(str(status) for _, status, _ in facts["order"].elements())
    objections = Counter(str(objection) for _, _, objection in facts["order"].elements() if objection)
    moved = Counter(quantity is not None and int(quantity) < 0 for _, _, quantity in facts["stock movement"].elements())
    return {
        "invoices": facts["order"].total() - len(fates),
        "orders that go wrong": len(fates),
        "orders shipped": statuses["shipped"],
        "returns taken back": statuses["returned"],
        **{f"rejected: {reason}": count for reason, count in sorted(objections.items())},
        **{f"cancelled: {fate}": count for fate, count in sorted(undone.items())},
        "called off too late, and shipped": too_late,
        "lines reserved": moved[True],
        "lines restocked": moved[False],
        "payments": facts["payment"].total(),
        "refunds": facts["refund"].total(),
        "steps recorded": sum(int(count or 0) for _, count in facts["steps"].elements()),
        "workers killed": run.kills,
        "workflows reclaimed": run.recovery.reclaimed,
        "steps replayed": run.recovery.replayed,
        "steps tried again": run.recovery.tried_again,
        "payment requests": counts.get("requests", 0),
        "… refused for now (503)": counts.get("unavailable", 0),
        "… booked, answer lost": counts.get("answers lost", 0),
        "… repeated, booked once": counts.get("repeated", 0),
        "seconds": f"{run.seconds:.1f}",
    }
