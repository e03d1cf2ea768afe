"""What is measured, as values: figures, what stands beside them, what they cost, and the machine they are of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reference:
    """What a figure is compared with: a floor by pgbench, the naive way, or another figure.

    Attributes:
        what: how it was measured.
        value: in the unit of the figure; None where it could not be measured.
    """

    what: str
    value: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What one workflow, or one step where steps are counted, costs; None where it cannot be seen.

    Attributes:
        commits: of the whole database, whoever made them.
        statements: those on the tables of the bench, from `pg_stat_statements`.
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
        beside: what it is compared with.
        costs: what it cost, where that was measured.
        each: what the costs are of, workflow or step.
    """

    workload: str
    what: str
    value: float
    unit: str
    beside: tuple[Reference, ...] = ()
    costs: Costs | None = None
    each: str = "workflow"

    def ratio(self, reference: Reference) -> float | None:
        """Give the figure as a multiple of a reference."""
        return self.value / reference.value if reference.value else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where it was measured.

    Attributes:
        cores: processors of the machine that the workers are on.
        system: its operating system and architecture.
        python: the version of Python.
        package: the version of this package.
        server: the version of PostgreSQL.
        database: the name of the database.
        is_local: whether the server is on the same machine.
        settings: what decides about the durability and the speed of its commits.
    """

    cores: int
    system: str
    python: str
    package: str
    server: str
    database: str
    is_local: bool
    settings: dict[str, str]
