"""A place on the test server, and a bench of tiny numbers in it."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from sqla_durable.tools.bench.floors import Floors, pgbench
from sqla_durable.tools.bench.measuring import Bench, Status
from sqla_durable.tools.bench.place import Place, place
from sqla_durable.tools.bench.plan import Plan

TINY = Plan(count=20, seconds=30, finished=30, pending=25, floor=64)


@pytest.fixture
def ground(empty_database_url: str) -> Generator[Place]:
    with place(empty_database_url, "bench_here") as made:
        yield made


@pytest.fixture
def told() -> list[Status]:
    return []


@pytest.fixture
def bench(ground: Place, told: list[Status]) -> Bench:
    """A bench of few workflows, without floors: pgbench takes its time."""
    return Bench(ground, TINY, Floors(ground, transactions=TINY.floor, program=None), told.append)


@pytest.fixture
def floors(ground: Place) -> Floors:
    return Floors(ground, transactions=TINY.floor, program=pgbench())
