"""The workloads by name, and `bench`, which runs them: a new one is a function that yields its figures, and a line in
`WORKLOADS`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from statistics import median
from uuid import UUID

from sqlalchemy import create_engine, select, text
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Executor, Workflow, WorkflowStatus, embedded, send_signal
from sqla_durable.tools.bench import application, baselines
from sqla_durable.tools.bench.application import Entry
from sqla_durable.tools.bench.baselines import Pgbench, find_pgbench
from sqla_durable.tools.bench.meter import costs_between
from sqla_durable.tools.bench.queues import queues
from sqla_durable.tools.bench.report import (
    BenchError,
    BenchResult,
    BenchSettings,
    Figure,
    Reference,
    Status,
)
from sqla_durable.tools.bench.runs import Bench, RunResult, idle_costs
from sqla_durable.tools.bench.schema import (
    bench_schema,
    in_schema,
    insert_finished,
    insert_pending,
    insert_suspended,
    suspended_id,
)

_NAIVE_WORKFLOWS = 300


def steps(bench: Bench) -> Iterator[Figure]:
    """Measure queued workflows with one plain step each, `async def` and `def`."""
    references = bench.pgbench(baselines.one_step(batch=1, clients=16), baselines.one_step(batch=50, clients=4))
    compared = *references, bench.naive(min(_NAIVE_WORKFLOWS, bench.count(_NAIVE_WORKFLOWS)))

    def figure(what: str, result: RunResult) -> Figure:
        return Figure(
            workload="steps",
            what=what,
            value=result.rate,
            unit="workflows/s",
            references=compared,
            costs=result.costs,
        )

    yield figure("one plain step, async def", bench.plain_steps())
    bench.fill(application.one_step_in_thread.bind(number) for number in range(bench.count(10_000)))
    yield figure("one plain step, def", bench.run("one step each, def"))


def sequential(bench: Bench) -> Iterator[Figure]:
    """Measure workflows of many plain steps: one at a time, and twenty."""
    count = bench.count(2_000)
    for workflows, length in ((1, count), (20, max(1, count // 4))):
        references = bench.pgbench(baselines.checkpoint(clients=workflows))
        bench.fill(application.many_steps.bind(length) for _ in range(workflows))
        result = bench.run(f"{workflows} x {length} steps", each="step")
        yield Figure(
            workload="sequential",
            what=f"{workflows} workflow{'s' if workflows > 1 else ''} at a time",
            value=result.step_rate,
            unit="steps/s",
            references=references,
            costs=result.costs,
            each="step",
        )


_ROUNDS = 5


def transactional(bench: Bench) -> Iterator[Figure]:
    """Measure workflows of three transactional steps, one insert each, and what a checkpoint adds to a transaction."""
    references = bench.pgbench(baselines.three_entries(clients=16))
    bench.fill(application.three_entries.bind(number) for number in range(bench.count(3_000)))
    result = bench.run("three transactional steps each", steps_each=3)
    yield Figure(
        workload="transactional",
        what="three steps with an insert each",
        value=result.rate,
        unit="workflows/s",
        references=references,
        costs=result.costs,
    )
    yield _cost_of_a_checkpoint(bench, min(200, bench.count(200)))


def _cost_of_a_checkpoint(bench: Bench, count: int) -> Figure:
    """Compare the transaction with and without a checkpoint, in turns on one connection: the machine's load changes."""
    bench.show("one transactional step beside the same transaction without a checkpoint")
    bench.schema.clear()
    engine = create_engine(bench.schema.url, pool_size=1, max_overflow=0)
    sessions = sessionmaker(in_schema(engine, bench.schema.name))
    try:
        times = [(_time_without(sessions, each), _time_with(sessions, each)) for each in (1, *[count] * _ROUNDS)][1:]
    finally:
        engine.dispose()
    without, with_checkpoint = (1e6 * median(column) / count for column in zip(*times, strict=True))
    return Figure(
        workload="transactional",
        what="one step, one connection",
        value=with_checkpoint,
        unit="us",
        references=(Reference("the same ORM transaction without a checkpoint", without),),
    )


def _time_without(sessions: sessionmaker[Session], count: int) -> float:
    began = time.perf_counter()
    for number in range(count):
        with sessions.begin() as session:
            session.add(Entry(number=number))
    return time.perf_counter() - began


def _time_with(sessions: sessionmaker[Session], count: int) -> float:
    began = time.perf_counter()
    with sessions() as session:
        Executor(session).run(application.many_entries, count)
    return time.perf_counter() - began


_TIMEOUT = timedelta(seconds=30)
_LONGEST_PAUSE = 0.2


def latency(bench: Bench) -> Iterator[Figure]:
    """Measure workflows that are started one at a time, each after the result of the one before and a random pause.

    Measured are the time from the commit of a start to the first step and to the caller's result, and the time from
    the commit of a signal to the workflow that waits for it.
    """
    bench.schema.clear()
    with bench.workers(1) as workers:
        workers.begin_claiming()
        _sample(bench)  # the first one opens connections and compiles statements
        samples = list(_samples(bench))
        _signal_sample(bench)
        signals = list(_signal_samples(bench))
        workers.stop()
    first_steps, results = zip(*samples, strict=True)
    yield from _figures("start to first step", first_steps)
    yield from _figures("start to the caller's result", results)
    yield from _figures("signal to a waiting workflow", signals)


def _samples(bench: Bench) -> Iterator[tuple[float, float]]:
    for _ in _numbered(bench, "one workflow at a time"):
        yield _sample(bench)


def _signal_samples(bench: Bench) -> Iterator[float]:
    for _ in _numbered(bench, "one signal at a time"):
        yield _signal_sample(bench)


def _numbered(bench: Bench, what: str) -> Iterator[int]:
    """Count the samples, with random pauses so that they fall anywhere between two polls."""
    count = bench.count(100)
    deadline = time.monotonic() + bench.seconds(20)
    for number in range(count):
        bench.show(what, number, count)
        yield number
        if time.monotonic() > deadline:
            break
        time.sleep(random.uniform(0, _LONGEST_PAUSE))  # noqa: S311 (no secret)


def _sample(bench: Bench) -> tuple[float, float]:
    with bench.schema.sessions() as session:
        workflow = application.first_step_time.start(session)
        session.commit()
        committed = time.monotonic()
    begun = application.first_step_time.handle(bench.schema.sessions, workflow).result(_TIMEOUT)
    return begun - committed, time.monotonic() - committed


def _signal_sample(bench: Bench) -> float:
    """Signal a suspended workflow."""
    with bench.schema.sessions() as session:
        workflow = application.signal_time.start(session)
        session.flush()
        workflow_id = workflow.id
        session.commit()
        status = select(Workflow.status).where(Workflow.id == workflow_id)
        while session.scalar(status) is not WorkflowStatus.SUSPENDED:
            session.rollback()
    time.sleep(random.uniform(0, _LONGEST_PAUSE))  # noqa: S311 (no secret)
    return _signalled(bench, workflow_id)


def _signalled(bench: Bench, workflow_id: UUID) -> float:
    with bench.schema.sessions() as session:
        send_signal(session, workflow_id, "go")
        session.commit()
        committed = time.monotonic()
    return application.signal_time.handle(bench.schema.sessions, workflow_id).result(_TIMEOUT) - committed


def _figures(what: str, seconds: Sequence[float]) -> Iterator[Figure]:
    ordered = sorted(seconds)
    for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
        value = 1_000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]
        yield Figure(workload="latency", what=f"{what}, {name} of {len(ordered)}", value=value, unit="ms")


_PARTS = 4


def depth(bench: Bench) -> Iterator[Figure]:
    """Measure `steps` with many finished and many pending workflows in the tables."""
    plain = bench.plain_steps()
    bench.show(f"inserting {bench.settings.finished:,} finished and {bench.settings.pending:,} pending workflows")
    bench.schema.clear()
    insert_finished(bench.schema, bench.settings.finished)
    insert_pending(bench.schema, bench.settings.pending)
    enough = min(bench.count(20_000), bench.settings.pending)
    result = bench.run("one step each, in full tables", enough=enough)
    yield Figure(
        workload="depth",
        what=f"{_short(bench.settings.finished)} finished, {_short(bench.settings.pending)} pending before",
        value=result.rate,
        unit="workflows/s",
        references=(Reference("steps, in empty tables", plain.rate),),
        costs=result.costs,
    )


def horizon(bench: Bench) -> Iterator[Figure]:
    """Measure workflows while another transaction stays open, so that PostgreSQL cannot remove dead rows.

    First those of `steps`, then workflows that suspend: each of them is claimed twice, suspended and woken.
    """
    plain = Reference("steps, without it", bench.plain_steps().rate)
    bench.fill(application.one_step.bind(number) for number in range(bench.count(100_000)))
    yield from _during_a_snapshot(bench, "", plain)
    # Few enough to be finished in time: each is suspended by a commit of its own, and those that wake queue up behind.
    bench.fill(application.suspends_once.bind(number) for number in range(bench.count(5_000)))
    yield from _during_a_snapshot(bench, " that suspend", plain)


def _during_a_snapshot(bench: Bench, which: str, plain: Reference) -> Iterator[Figure]:
    with bench.schema.engine.connect().execution_options(isolation_level="REPEATABLE READ") as other:
        other.execute(text("SELECT 1"))  # takes the snapshot
        doing = f"one step each{which}, beside an open transaction"
        result = bench.run(doing, seconds=bench.seconds(30))
    first, last = _first_and_last(result)
    yield Figure(
        workload="horizon",
        what=f"{len(result.completions):,}{which} beside an open transaction",
        value=result.rate,
        unit="workflows/s",
        references=(plain,),
        costs=result.costs,
    )
    yield Figure(
        workload="horizon",
        what=f"in the last quarter of the time{which and ', of those'}{which}",
        value=last,
        unit="workflows/s",
        references=(Reference("in the first quarter", first),),
    )


def _first_and_last(result: RunResult) -> tuple[float, float]:
    """Return the rates in the first and in the last quarter of the time, from the first completion on."""
    began = result.completions[0]
    seconds = [each - began for each in result.completions]
    part = max(seconds[-1], 0.001) / _PARTS
    first = sum(each <= part for each in seconds)
    last = sum(each >= seconds[-1] - part for each in seconds)
    return first / part, last / part


def _short(count: int) -> str:
    for size, name in ((1_000_000, "M"), (1_000, "k")):
        if count >= size and count % (size // 10) == 0:
            return f"{count / size:g}{name}"
    return f"{count:,}"


_DELAY = timedelta(seconds=3)


def delayed(bench: Bench) -> Iterator[Figure]:
    """Measure delayed workflows that are all due at once, until the last is finished."""
    count = bench.count(5_000)
    (reference,) = bench.pgbench(baselines.one_step(batch=50, clients=4))
    bench.schema.clear()
    with bench.workers() as workers:
        workers.begin_claiming()
        due = bench.schema.database_time() + _DELAY
        delayed_workflow = application.one_step.options(at=due)
        bench.schema.start(delayed_workflow.bind(number) for number in range(count))
        before = bench.meter.read()
        seconds = _DELAY.total_seconds() + bench.seconds(60)
        bench.wait(workers, "until all delayed workflows are finished", enough=None, seconds=seconds)
        usages = workers.stop()
    completions, _, _ = bench.completions_since(due)
    yield Figure(
        workload="sleep",
        what=f"{_of(len(completions), count)} due at once",
        value=completions[-1],
        unit="s",
        references=(Reference(f"{reference.what}, as many", reference.value and len(completions) / reference.value),),
        costs=costs_between(before, bench.meter.read(), usages, units=len(completions)),
    )


def _of(done: int, count: int) -> str:
    return f"{count:,}" if done == count else f"{done:,} of {count:,}, when the time was up,"


_FEW = 1_000
_WOKEN = 50


def suspended(bench: Bench) -> Iterator[Figure]:
    """Measure an idle worker, and signals to single workflows, beside few suspended workflows and beside many."""
    few: float | None = None
    many = bench.count(100_000)
    fewer = max(1, min(_FEW, many // 10))
    for count in (fewer, many):
        bench.show(f"inserting {count:,} suspended workflows")
        bench.schema.clear()
        insert_suspended(bench.schema, count)
        with bench.workers(1) as workers:
            workers.begin_claiming()
            costs = idle_costs(bench, workers)
            signals = sorted(_woken_samples(bench, count))
            workers.stop()
        value = 1_000 * median(signals)
        yield Figure(
            workload="suspended",
            what=f"signal to one of {_short(count)}, p50 of {len(signals)}",
            value=value,
            unit="ms",
            references=() if few is None else (Reference(f"of {_short(fewer)}", few),),
            costs=costs,
            each="second of an idle worker",
        )
        few = value


def _woken_samples(bench: Bench, count: int) -> Iterator[float]:
    """Signal workflows from all over the table; the first signals only let connections be opened."""
    samples = min(_WOKEN, count)
    for number in range(1, samples + 1):
        bench.show("one signal at a time", number, samples)
        seconds = _signalled(bench, suspended_id(number * count // samples))
        if number > samples // 10:
            yield seconds
        time.sleep(random.uniform(0, _LONGEST_PAUSE))  # noqa: S311 (no secret)


def bulk(bench: Bench) -> Iterator[Figure]:
    """Measure `start_many` in one transaction, from Python objects to the commit."""
    count = bench.count(20_000)
    references = bench.pgbench(baselines.bulk(rows=1_000))
    bench.show("start_many")
    bench.schema.clear()
    began = time.perf_counter()
    bench.schema.start(application.one_step.bind(number) for number in range(count))
    yield Figure(
        workload="bulk",
        what=f"start_many of {count:,}",
        value=count / (time.perf_counter() - began),
        unit="workflows/s",
        references=references,
    )


WORKLOADS: Mapping[str, Callable[[Bench], Iterator[Figure]]] = {
    "steps": steps,
    "sequential": sequential,
    "transactional": transactional,
    "latency": latency,
    "depth": depth,
    "horizon": horizon,
    "sleep": delayed,
    "suspended": suspended,
    "bulk": bulk,
    "queues": queues,
}
"""By name, in the order in which they are measured: `depth` and `horizon` compare themselves with `steps`."""


_SERVER_SETTINGS = {"fsync": "on", "synchronous_commit": "on", "max_connections": "200", "timezone": "UTC"}


def measure(
    workloads: Sequence[str] = tuple(WORKLOADS),
    *,
    settings: BenchSettings,
    url: str | None = None,
    on_progress: Callable[[Status], None] = lambda status: None,
) -> BenchResult:
    """Measure workloads, and leave nothing behind on the server.

    An interrupt, or a workload that cannot be measured, ends it; the result has the figures measured before.

    Args:
        workloads: their names, measured in the order of `WORKLOADS`.
        settings: how much to measure, and with how many workers.
        url: the database; None starts the embedded server for a while, with `fsync` and `synchronous_commit` on.
        on_progress: called often, with the progress.

    Raises:
        BenchError: the schema was not created by a benchmark, or another one is using it.
        UsageError: there is no URL, and the embedded server is not installed.
    """
    figures: list[Figure] = []
    with _server(url) as database, bench_schema(database, settings.schema) as schema:
        pgbench = Pgbench(schema, transactions=settings.pgbench_transactions, program=find_pgbench())
        bench = Bench(schema, settings, pgbench, on_progress)
        machine = bench.meter.machine()
        ended_by: KeyboardInterrupt | BenchError | None = None
        try:
            for name in (each for each in WORKLOADS if each in workloads):
                bench.workload = name
                figures += WORKLOADS[name](bench)
        except (KeyboardInterrupt, BenchError) as error:
            ended_by = error
        return BenchResult(machine=machine, settings=settings, figures=tuple(figures), ended_by=ended_by)


@contextmanager
def _server(url: str | None) -> Generator[str]:
    if url is not None:
        yield url
        return
    with embedded.server(settings=_SERVER_SETTINGS) as server:
        yield server.url
