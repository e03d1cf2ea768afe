"""How long an idle worker takes: from the commit of a start to its first step, and to the caller's result; and from
that of a signal to the workflow that waits for it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta

from sqlalchemy import select

from sqla_durable.api.signals import signal
from sqla_durable.models import Workflow
from sqla_durable.models.status import WorkflowStatus
from sqla_durable.tools.bench import application
from sqla_durable.tools.bench.figures import Figure
from sqla_durable.tools.bench.measuring import Bench

_TIMEOUT = timedelta(seconds=30)
_LONGEST_PAUSE = 0.2


def latency(bench: Bench) -> Iterator[Figure]:
    """Workflows started one at a time, each when the one before has its result and a random pause is over."""
    bench.place.empty()
    with bench.crew(1) as crew:
        crew.go()
        _sample(bench)  # the first one opens connections and compiles statements
        samples = list(_samples(bench))
        _signal_sample(bench)
        signals = list(_signal_samples(bench))
        crew.stop()
    begun, known = zip(*samples, strict=True)
    yield from _figures("start to first step", begun)
    yield from _figures("start to the caller's result", known)
    yield from _figures("signal to a waiting workflow", signals)


def _samples(bench: Bench) -> Iterator[tuple[float, float]]:
    for _ in _moments(bench, "one workflow at a time"):
        yield _sample(bench)


def _signal_samples(bench: Bench) -> Iterator[float]:
    for _ in _moments(bench, "one signal at a time"):
        yield _signal_sample(bench)


def _moments(bench: Bench, what: str) -> Iterator[int]:
    """Count samples, which come at any moment between two polls."""
    count = bench.count(100)
    deadline = time.monotonic() + bench.seconds(20)
    for number in range(count):
        bench.tell(what, number, count)
        yield number
        if time.monotonic() > deadline:
            break
        time.sleep(random.uniform(0, _LONGEST_PAUSE))  # noqa: S311 (no secret)


def _sample(bench: Bench) -> tuple[float, float]:
    with bench.place.sessions() as session:
        workflow = application.timed.start(session)
        session.commit()
        committed = time.monotonic()
    begun = application.timed.handle(bench.place.sessions, workflow).result(_TIMEOUT)
    return begun - committed, time.monotonic() - committed


def _signal_sample(bench: Bench) -> float:
    """Signal a workflow that waits as a row."""
    with bench.place.sessions() as session:
        workflow = application.signalled.start(session)
        session.flush()
        workflow_id = workflow.id
        session.commit()
        status = select(Workflow.status).where(Workflow.id == workflow_id)
        while session.scalar(status) is not WorkflowStatus.SUSPENDED:
            session.rollback()
    time.sleep(random.uniform(0, _LONGEST_PAUSE))  # noqa: S311 (no secret)
    with bench.place.sessions() as session:
        signal(session, workflow_id, "go")
        session.commit()
        committed = time.monotonic()
    return application.signalled.handle(bench.place.sessions, workflow_id).result(_TIMEOUT) - committed


def _figures(what: str, seconds: Sequence[float]) -> Iterator[Figure]:
    ordered = sorted(seconds)
    for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
        value = 1_000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]
        yield Figure(workload="latency", what=f"{what}, {name} of {len(ordered)}", value=value, unit="ms")
