"""Transactional steps: three in a workflow, and one beside the same transaction without a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median

from sqlalchemy import create_engine
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable.execution import Executor
from sqla_durable.tools.bench import application, shapes
from sqla_durable.tools.bench.application import Entry
from sqla_durable.tools.bench.figures import Figure, Reference
from sqla_durable.tools.bench.measuring import Bench
from sqla_durable.tools.bench.place import in_schema

_ROUNDS = 5


def transactional(bench: Bench) -> Iterator[Figure]:
    """Workflows of three transactional steps, one insert each; and what the checkpoint adds to a transaction."""
    floors = bench.floors(shapes.three_entries(clients=16))
    bench.fill(application.three_entries.bind(number) for number in range(bench.count(3_000)))
    measured = bench.carry_out("three transactional steps each", steps_each=3)
    yield Figure(
        workload="transactional",
        what="three steps with an insert each",
        value=measured.rate,
        unit="workflows/s",
        beside=floors,
        costs=measured.costs,
    )
    yield _checkpointed(bench, min(200, bench.count(200)))


def _checkpointed(bench: Bench, count: int) -> Figure:
    """Compare on one connection, in turns, so that both see the same machine."""
    bench.tell("one transactional step beside the same transaction without a checkpoint")
    bench.place.empty()
    engine = create_engine(bench.place.url, pool_size=1, max_overflow=0)
    sessions = sessionmaker(in_schema(engine, bench.place.schema))
    try:
        times = [(_without(sessions, each), _with(sessions, each)) for each in (1, *[count] * _ROUNDS)][1:]
    finally:
        engine.dispose()
    without, with_checkpoint = (1e6 * median(column) / count for column in zip(*times, strict=True))
    return Figure(
        workload="transactional",
        what="one step, one connection",
        value=with_checkpoint,
        unit="us",
        beside=(Reference("the same ORM transaction without a checkpoint", without),),
    )


def _without(sessions: sessionmaker[Session], count: int) -> float:
    began = time.perf_counter()
    for number in range(count):
        with sessions.begin() as session:
            session.add(Entry(number=number))
    return time.perf_counter() - began


def _with(sessions: sessionmaker[Session], count: int) -> float:
    began = time.perf_counter()
    with sessions() as session:
        Executor(session).run(application.many_entries, count)
    return time.perf_counter() - began
