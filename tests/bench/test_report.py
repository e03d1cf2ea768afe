"""What the user sees of the figures, and the shape of the JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO

from rich.console import Console

from sqla_durable.tools.bench.report import BenchResult, BenchSettings, Costs, Figure, Machine, Reference, as_json, show

COSTS = Costs(commits=0.02, statements=None, wal_bytes=1_212.4, worker_ms=0.3, server_ms=0.2, worker_peak_mb=73.4)
FIGURE = Figure(
    workload="steps",
    what="one plain step",
    value=2_000,
    unit="workflows/s",
    references=(Reference("SQL", 4_000), Reference("unknown", None)),
    costs=COSTS,
)
MACHINE = Machine(
    cores=2,
    system="Linux x86_64",
    python="3.11.7",
    package="0.1.0",
    server="18.4",
    database="shop",
    is_local=True,
    settings={"fsync": "on", "synchronous_commit": "off"},
)
OUTCOME = BenchResult(machine=MACHINE, settings=BenchSettings(), figures=(FIGURE,))


def printed(outcome: BenchResult) -> str:
    written = StringIO()
    show(Console(width=80, file=written), outcome)
    return " ".join(written.getvalue().split())


def test_figure_is_shown_with_what_stands_beside_it_and_its_costs() -> None:
    text = printed(OUTCOME)
    assert "one plain step (workflows/s) 2,000" in text
    assert "SQL 4,000 0.50" in text
    assert "unknown - -" in text
    assert "0.02 commits, 1,212 bytes of WAL" in text


def test_machine_and_durability_are_shown() -> None:
    assert "2 cores" in printed(OUTCOME)
    assert "PostgreSQL 18.4 on the same machine, database 'shop', fsync=on, synchronous_commit=off" in printed(OUTCOME)
    elsewhere = replace(OUTCOME, machine=replace(MACHINE, is_local=False))
    assert "PostgreSQL 18.4 elsewhere" in printed(elsewhere)


def test_missing_statements_are_explained_and_known_ones_shown() -> None:
    assert "pg_stat_statements is not in this database" in printed(OUTCOME)
    known = replace(OUTCOME, figures=(replace(FIGURE, costs=replace(COSTS, statements=0.07)),))
    assert "0.07 statements" in printed(known)
    assert "pg_stat_statements" not in printed(known)


def test_json_has_everything_and_the_ratios() -> None:
    found = json.loads(as_json(OUTCOME))
    assert found["machine"]["settings"]["fsync"] == "on"
    assert found["settings"]["concurrency"] == 100
    (figure,) = found["figures"]
    assert figure["value"] == 2_000
    assert figure["costs"]["wal_bytes"] == 1_212.4
    assert figure["references"] == [
        {"what": "SQL", "value": 4_000, "ratio": 0.5},
        {"what": "unknown", "value": None, "ratio": None},
    ]
