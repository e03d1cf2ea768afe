"""What a benchmark is asked for and what it reports, as values: settings, progress, figures, and the machine."""

from __future__ import annotations

from dataclasses import dataclass

from sqla_durable.errors import DurableError


class BenchError(DurableError):
    """The benchmark cannot measure: the schema is not its own, a worker ended, or no workflow succeeded."""


OWN_SCHEMA = "durable_bench"
PGBENCH_TRANSACTIONS = 8_000


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
        each: what `costs` is counted for: workflow or step.
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
