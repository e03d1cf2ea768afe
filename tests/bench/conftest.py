"""A place on the test server, and a bench of tiny numbers in it."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from sqla_durable.tools.bench.baselines import Pgbench, find_pgbench
from sqla_durable.tools.bench.report import BenchSettings, Status
from sqla_durable.tools.bench.runs import Bench
from sqla_durable.tools.bench.schema import BenchSchema, bench_schema

TINY = BenchSettings(count=20, seconds=30, finished=30, pending=25, pgbench_transactions=64)


@pytest.fixture
def schema(empty_database_url: str) -> Generator[BenchSchema]:
    with bench_schema(empty_database_url, "bench_here") as made:
        yield made


@pytest.fixture
def statuses() -> list[Status]:
    return []


@pytest.fixture
def bench(schema: BenchSchema, statuses: list[Status]) -> Bench:
    """A bench of few workflows, without floors: pgbench takes its time."""
    return Bench(schema, TINY, Pgbench(schema, transactions=TINY.pgbench_transactions, program=None), statuses.append)


@pytest.fixture
def pgbench(schema: BenchSchema) -> Pgbench:
    return Pgbench(schema, transactions=TINY.pgbench_transactions, program=find_pgbench())
