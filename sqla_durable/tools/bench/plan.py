"""What is to be measured, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass

SCHEMA = "durable_bench"
FLOOR = 8_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How the workloads are measured.

    Attributes:
        schema: the schema that the bench makes and drops.
        count: how many workflows (or steps, where those are counted) a workload takes; None means its own number.
        seconds: after so many a workload ends even if not all is done; None means its own number.
        workers: how many worker processes there are.
        concurrency: how many workflows each of them executes at once.
        finished: how many finished workflows are there before, in `depth`.
        pending: how many pending ones.
        floor: how many transactions pgbench makes for each floor.
    """

    schema: str = SCHEMA
    count: int | None = None
    seconds: float | None = None
    workers: int = 1
    concurrency: int = 100
    finished: int = 1_000_000
    pending: int = 200_000
    floor: int = FLOOR
