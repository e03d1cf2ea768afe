"""The whole of it: a server, a schema on it, one workload after another, and the schema dropped again."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from sqla_durable import embedded
from sqla_durable.tools.bench.errors import BenchError
from sqla_durable.tools.bench.figures import Figure, Machine
from sqla_durable.tools.bench.floors import Floors, pgbench
from sqla_durable.tools.bench.measuring import Bench, Status
from sqla_durable.tools.bench.place import place
from sqla_durable.tools.bench.plan import Plan
from sqla_durable.tools.bench.workloads import WORKLOADS

_EMBEDDED = {"fsync": "on", "synchronous_commit": "on", "max_connections": "200", "timezone": "UTC"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What was measured, of what plan, and where; and what ended it before all was."""

    machine: Machine
    plan: Plan
    figures: tuple[Figure, ...]
    ended_by: KeyboardInterrupt | BenchError | None = None


def bench(
    workloads: Sequence[str] = tuple(WORKLOADS),
    *,
    plan: Plan,
    url: str | None = None,
    tell: Callable[[Status], None] = lambda status: None,
) -> Outcome:
    """Measure workloads, and leave nothing behind on the server.

    An interrupt, or a workload that cannot be measured, ends it with the figures that there are.

    Args:
        workloads: their names, measured in the order of `WORKLOADS`.
        plan: how much of them.
        url: the database; None starts the embedded server for a while, with `fsync` and `synchronous_commit` on.
        tell: is told often how far it is.

    Raises:
        BenchError: the schema is not the bench's own.
        UsageError: there is no URL, and the embedded server is not installed.
    """
    figures: list[Figure] = []
    with _server(url) as found, place(found, plan.schema) as prepared:
        floors = Floors(prepared, transactions=plan.floor, program=pgbench())
        measuring = Bench(prepared, plan, floors, tell)
        machine = measuring.meter.machine()
        ended_by: KeyboardInterrupt | BenchError | None = None
        try:
            for name in (each for each in WORKLOADS if each in workloads):
                measuring.workload = name
                figures += WORKLOADS[name](measuring)
        except (KeyboardInterrupt, BenchError) as error:
            ended_by = error
        return Outcome(machine=machine, plan=plan, figures=tuple(figures), ended_by=ended_by)


@contextmanager
def _server(url: str | None) -> Generator[str]:
    if url is not None:
        yield url
        return
    with embedded.server(settings=_EMBEDDED) as server:
        yield server.url
