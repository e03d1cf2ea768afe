"""The workload `queues`: what each kind of limit costs, beside the same queue without one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

from sqla_durable import manage
from sqla_durable.tools.bench import application
from sqla_durable.tools.bench.report import Figure, Reference
from sqla_durable.tools.bench.runs import Bench, RunResult, idle_costs

_NEVER = 100_000  # a limit that is counted, and never reached
_SECOND = timedelta(seconds=1)
_KINDS: dict[str, Mapping[str, Any]] = {
    "concurrency, not reached": {"concurrency": _NEVER},
    "rate, not reached": {"rate": (_NEVER, _SECOND)},
    "one place for each of 100 keys": {"per_key": 1},
    "rate for each of 100 keys, not reached": {"key_rate": (_NEVER, _SECOND)},
    "100 keys by turns": {"fair": True},
    "100 keys, each in order": {"fifo": "skip"},
}
_KEYS, _MANY_KEYS = 100, 10_000
_QUEUES = 100
_PLACES = 20  # of a limit that is always reached, for each worker
_FEW, _AT_ONCE, _WAIT = 10, 4, 0.1
_UNFINISHED_FEW = "SELECT count(*) FROM {schema}.workflow WHERE by = 'few' AND finished_at IS NULL"
_HAS_BEGUN = "SELECT 1 FROM {schema}.workflow WHERE status = 'succeeded' LIMIT 1"
_TOOK = "SELECT extract(epoch FROM max(finished_at) - min(created_at)) FROM {schema}.workflow WHERE by = 'few'"


def queues(bench: Bench) -> Iterator[Figure]:
    """Measure queued workflows with one plain step each, on a queue with a limit and without, in turns."""
    count = bench.count(5_000)
    for what, settings in _KINDS.items():
        without = _run(bench, "no limit", {}, count=count, keys=_KEYS)
        yield _figure(what, _run(bench, what, settings, count=count, keys=_KEYS), without)
    slots = bench.settings.workers * _PLACES
    without = _run(bench, "no limit, few slots", {}, count=count, keys=_KEYS, concurrency=_PLACES)
    limited = _run(bench, f"concurrency of {slots}", {"concurrency": slots}, count=count, keys=_KEYS)
    yield _figure(f"concurrency of {slots}", limited, without, reference=f"without a limit, in {slots} slots")
    waiting = bench.count(100_000)
    without = _run(bench, "no limit, many keys", {}, count=waiting, keys=_MANY_KEYS)
    what = f"one place for each of {_MANY_KEYS:,} keys, {waiting:,} waiting"
    yield _figure(what, _run(bench, what, {"per_key": 1}, count=waiting, keys=_MANY_KEYS), without)
    alone, behind = _seconds_of_few(bench, 0), _seconds_of_few(bench, waiting)
    reference = Reference("the same alone", alone)
    what = f"{_FEW} of one key behind {waiting:,} of another, by turns, {_AT_ONCE} at once"
    yield Figure(workload="queues", what=what, value=behind, unit="s", references=(reference,))

    yield from _idle(bench)


def _idle(bench: Bench) -> Iterator[Figure]:
    """Compare an idle worker with many queues that have limits with one of a queue that has none."""
    names = [f"limited-{number}" for number in range(_QUEUES)]
    with bench.schema.sessions.begin() as session:
        for name in names:
            manage.put_queue(session, name, concurrency=1)
    try:
        for what, given in (("one queue", ["default"]), (f"{_QUEUES} queues with limits", names)):
            bench.schema.clear()
            with bench.workers(1, queues=given) as workers:
                workers.begin_claiming()
                costs = idle_costs(bench, workers)
                workers.stop()
            value = costs.worker_ms
            yield Figure(
                workload="queues",
                what=f"an idle worker of {what}",
                value=value,
                unit="ms of CPU each second",
                costs=costs,
                each="second of an idle worker",
            )
    finally:
        bench.schema.execute("DELETE FROM {schema}.queue")


def _seconds_of_few(bench: Bench, others: int) -> float:
    """Return how long some workflows of one key take behind those of another."""
    bench.fill(application.one_wait.options(by="many").bind(_WAIT) for _ in range(others))
    with bench.schema.sessions.begin() as session:
        manage.put_queue(session, "default", fair=True, concurrency=_AT_ONCE)
    try:
        with bench.workers(1) as workers:
            workers.begin_claiming()
            while others and not bench.schema.query(_HAS_BEGUN):
                time.sleep(_WAIT)
            bench.schema.start(application.one_wait.options(by="few").bind(_WAIT) for _ in range(_FEW))
            bench.show("those of one key behind those of another")
            while bench.schema.query(_UNFINISHED_FEW)[0][0]:
                workers.require_alive()
                time.sleep(_WAIT)
            workers.stop()
        return float(bench.schema.query(_TOOK)[0][0])
    finally:
        bench.schema.execute("DELETE FROM {schema}.queue")


def _run(
    bench: Bench, what: str, settings: Mapping[str, Any], *, count: int, keys: int, concurrency: int | None = None
) -> RunResult:
    bench.fill(application.one_step.options(by=f"key-{number % keys}").bind(number) for number in range(count))
    with bench.schema.sessions.begin() as session:
        manage.put_queue(session, "default", **settings)
    try:
        return bench.run(what, concurrency=concurrency)
    finally:
        bench.schema.execute("DELETE FROM {schema}.queue")


def _figure(what: str, result: RunResult, without: RunResult, *, reference: str = "the same without a limit") -> Figure:
    return Figure(
        workload="queues",
        what=what,
        value=result.rate,
        unit="workflows/s",
        references=(Reference(reference, without.rate),),
        costs=result.costs,
    )
