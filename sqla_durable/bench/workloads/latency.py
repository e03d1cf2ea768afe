"""How long an idle worker takes: from the commit of a start to its first step, and to the caller's result."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta

from sqla_durable.bench import application
from sqla_durable.bench.figures import Figure
from sqla_durable.bench.measuring import Bench

_TIMEOUT = timedelta(seconds=30)
_LONGEST_PAUSE = 0.2


def latency(bench: Bench) -> Iterator[Figure]:
    """Workflows started one at a time, each when the one before has its result and a random pause is over."""
    bench.place.empty()
    with bench.crew(1) as crew:
        crew.go()
        _sample(bench)  # the first one opens connections and compiles statements
        samples = list(_samples(bench))
        crew.stop()
    begun, known = zip(*samples, strict=True)
    yield from _figures("start to first step", begun)
    yield from _figures("start to the caller's result", known)


def _samples(bench: Bench) -> Iterator[tuple[float, float]]:
    count = bench.count(100)
    deadline = time.monotonic() + bench.seconds(20)
    for number in range(count):
        bench.tell("one workflow at a time", number, count)
        yield _sample(bench)
        if time.monotonic() > deadline:
            break
        # So that starts come at any moment between two polls.
        time.sleep(random.uniform(0, _LONGEST_PAUSE))  # noqa: S311 (no secret)


def _sample(bench: Bench) -> tuple[float, float]:
    with bench.place.sessions() as session:
        workflow = application.timed.start(session)
        session.commit()
        committed = time.monotonic()
    begun = application.timed.handle(bench.place.sessions, workflow).result(_TIMEOUT)
    return begun - committed, time.monotonic() - committed


def _figures(what: str, seconds: Sequence[float]) -> Iterator[Figure]:
    ordered = sorted(seconds)
    for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
        value = 1_000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]
        yield Figure(workload="latency", what=f"{what}, {name} of {len(ordered)}", value=value, unit="ms")
