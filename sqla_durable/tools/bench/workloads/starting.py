"""Starts: in bulk, and of workflows that are all due at one moment."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta

from sqla_durable.tools.bench import application, shapes
from sqla_durable.tools.bench.figures import Figure, Reference
from sqla_durable.tools.bench.measuring import Bench
from sqla_durable.tools.bench.meter import costs

_AHEAD = timedelta(seconds=3)


def sleep(bench: Bench) -> Iterator[Figure]:
    """Delayed workflows that are all due at once, until the last is finished."""
    count = bench.count(5_000)
    (floor,) = bench.floors(shapes.one_step(batch=50, clients=4))
    bench.place.empty()
    with bench.crew() as crew:
        crew.go()
        due = bench.place.now() + _AHEAD
        sleeper = application.one_step.options(at=due)
        bench.place.fill(sleeper.bind(number) for number in range(count))
        before = bench.meter.read()
        seconds = _AHEAD.total_seconds() + bench.seconds(60)
        bench.wait(crew, "until all sleepers are done", enough=None, seconds=seconds)
        usages = crew.stop()
    completions, _, _ = bench.outcome(due)
    yield Figure(
        workload="sleep",
        what=f"{_of(len(completions), count)} due at once",
        value=completions[-1],
        unit="s",
        beside=(Reference(f"{floor.what}, as many", floor.value and len(completions) / floor.value),),
        costs=costs(before, bench.meter.read(), usages, units=len(completions)),
    )


def _of(done: int, count: int) -> str:
    return f"{count:,}" if done == count else f"{done:,} of {count:,}, when the time was up,"


def bulk(bench: Bench) -> Iterator[Figure]:
    """`start_many` in one transaction, from Python objects to the commit."""
    count = bench.count(20_000)
    floors = bench.floors(shapes.bulk(rows=1_000))
    bench.tell("start_many")
    bench.place.empty()
    began = time.perf_counter()
    bench.place.fill(application.one_step.bind(number) for number in range(count))
    yield Figure(
        workload="bulk",
        what=f"start_many of {count:,}",
        value=count / (time.perf_counter() - began),
        unit="workflows/s",
        beside=floors,
    )
