"""The workload `queues`: what each kind of limit costs, beside the same queue without one."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

from sqla_durable import manage
from sqla_durable.definitions.queues import QueueKeywords
from sqla_durable.tools.bench import application
from sqla_durable.tools.bench.report import Figure, Reference
from sqla_durable.tools.bench.runs import Bench, RunResult

_NEVER = 100_000  # a limit that is counted, and never reached
_SECOND = timedelta(seconds=1)
_KINDS: dict[str, QueueKeywords] = {
    "concurrency, not reached": {"concurrency": _NEVER},
    "concurrency of 20": {"concurrency": 20},
    "rate, not reached": {"rate": (_NEVER, _SECOND)},
    "one place for each of 100 keys": {"per_key": 1},
    "rate for each of 100 keys, not reached": {"key_rate": (_NEVER, _SECOND)},
    "100 keys by turns": {"fair": True},
    "100 keys, each in order": {"fifo": "skip"},
}
_KEYS, _MANY_KEYS = 100, 10_000


def queues(bench: Bench) -> Iterator[Figure]:
    """Measure queued workflows with one plain step each, on a queue with a limit and without, in turns."""
    count = bench.count(5_000)
    for what, settings in _KINDS.items():
        without = _run(bench, "no limit", {}, count=count, keys=_KEYS)
        yield _figure(what, _run(bench, what, settings, count=count, keys=_KEYS), without)
    waiting = bench.count(100_000)
    without = _run(bench, "no limit, many keys", {}, count=waiting, keys=_MANY_KEYS)
    what = f"one place for each of {_MANY_KEYS:,} keys, {waiting:,} waiting"
    yield _figure(what, _run(bench, what, {"per_key": 1}, count=waiting, keys=_MANY_KEYS), without)


def _run(bench: Bench, what: str, settings: QueueKeywords, *, count: int, keys: int) -> RunResult:
    bench.fill(application.one_step.options(by=f"key-{number % keys}").bind(number) for number in range(count))
    with bench.schema.sessions.begin() as session:
        manage.put_queue(session, "default", **settings)
    try:
        return bench.run(what)
    finally:
        bench.schema.execute("DELETE FROM {schema}.queue")


def _figure(what: str, result: RunResult, without: RunResult) -> Figure:
    return Figure(
        workload="queues",
        what=what,
        value=result.rate,
        unit="workflows/s",
        references=(Reference("the same without a limit", without.rate),),
        costs=result.costs,
    )
