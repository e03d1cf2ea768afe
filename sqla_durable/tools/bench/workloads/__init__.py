"""The workloads by name: a new one is a module with a function that yields its figures, and a line here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from sqla_durable.tools.bench.figures import Figure
from sqla_durable.tools.bench.measuring import Bench
from sqla_durable.tools.bench.workloads.backlog import depth, horizon
from sqla_durable.tools.bench.workloads.latency import latency
from sqla_durable.tools.bench.workloads.starting import bulk, sleep
from sqla_durable.tools.bench.workloads.steps import sequential, steps
from sqla_durable.tools.bench.workloads.transactional import transactional

__all__ = ["WORKLOADS"]

WORKLOADS: Mapping[str, Callable[[Bench], Iterator[Figure]]] = {
    "steps": steps,
    "sequential": sequential,
    "transactional": transactional,
    "latency": latency,
    "depth": depth,
    "horizon": horizon,
    "sleep": sleep,
    "bulk": bulk,
}
"""In the order in which they are measured: `depth` and `horizon` compare themselves with `steps`."""
