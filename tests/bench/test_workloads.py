"""Each workload in tiny numbers, with a worker process, to its figures."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy import event

from sqla_durable.tools.bench import application
from sqla_durable.tools.bench.baselines import NAIVE, NO_PGBENCH
from sqla_durable.tools.bench.report import BenchError, Figure, Status
from sqla_durable.tools.bench.runs import Bench
from sqla_durable.tools.bench.workloads import WORKLOADS
from tests.bench.conftest import TINY
from tests.support.sampling import thorough_cases

STEPS = [("one plain step, async def", "workflows/s"), ("one plain step, def", "workflows/s")]
EXPECTED = {
    "sequential": [("1 workflow at a time", "steps/s"), ("20 workflows at a time", "steps/s")],
    "transactional": [("three steps with an insert each", "workflows/s"), ("one step, one connection", "us")],
    "sleep": [("20 due at once", "s")],
    "bulk": [("start_many of 20", "workflows/s")],
    "queues": [
        ("concurrency, not reached", "workflows/s"),
        ("rate, not reached", "workflows/s"),
        ("one place for each of 100 keys", "workflows/s"),
        ("rate for each of 100 keys, not reached", "workflows/s"),
        ("100 keys by turns", "workflows/s"),
        ("100 keys, each in order", "workflows/s"),
        ("concurrency of 20", "workflows/s"),
        ("one place for each of 10,000 keys, 20 waiting", "workflows/s"),
        ("10 of one key behind 20 of another, by turns, 4 at once", "s"),
        ("an idle worker of one queue", "ms of CPU each second"),
        ("an idle worker of 100 queues with limits", "ms of CPU each second"),
    ],
}


def measured(bench: Bench, name: str) -> list[Figure]:
    bench.workload = name
    return list(WORKLOADS[name](bench))


def test_steps_are_measured_beside_the_naive_way_with_their_costs(bench: Bench, statuses: list[Status]) -> None:
    figures = measured(bench, "steps")
    assert [(each.what, each.unit) for each in figures] == STEPS
    for figure in figures:
        missing, naive = figure.references
        assert (missing.what, figure.ratio(missing)) == (NO_PGBENCH, None)
        assert naive.what == NAIVE
        assert (figure.ratio(naive) or 0) > 0
        costs = figure.costs
        assert costs is not None
        assert 0 < costs.commits < 3
        assert costs.wal_bytes > 100
        assert costs.worker_ms > 0
        assert 20 < costs.worker_peak_mb < 1_000
        assert costs.server_ms is None or costs.server_ms >= 0
    assert bench.plain_steps().rate == figures[0].value  # measured once
    progress = [each.done for each in statuses if each.doing == "one step each, def"]
    assert {each.workload for each in statuses} == {"steps"}
    assert progress == sorted(progress)


# Those under --all differ from others in the workflows that they start, not in how these are measured.
@pytest.mark.parametrize("name", ["bulk", *thorough_cases(["sequential", "sleep", "transactional", "queues"])])
def test_workload_gives_its_figures(bench: Bench, name: str) -> None:
    bench.settings = replace(TINY, seconds=5)  # in which a worker is idle, too
    figures = measured(bench, name)
    assert [(each.what, each.unit) for each in figures] == EXPECTED[name]
    assert {each.workload for each in figures} == {name}
    assert all(each.value > 0 for each in figures)


@pytest.mark.thorough
def test_an_idle_second_is_counted_beside_the_signals(bench: Bench) -> None:
    bench.settings = replace(TINY, seconds=3)
    few, many = measured(bench, "suspended")
    assert few.what == "signal to one of 2, p50 of 2"
    assert many.what == "signal to one of 20, p50 of 18"
    assert few.costs is not None
    assert many.costs is not None
    assert few.each == many.each == "second of an idle worker"
    assert 0 < few.costs.commits < 30
    assert 0 < few.costs.worker_ms < 1_000
    assert [each.value for each in many.references] == [few.value]


def test_every_workload_is_tested() -> None:
    assert {*EXPECTED, "steps", "depth", "horizon", "latency", "suspended"} == set(WORKLOADS)


@pytest.mark.thorough
def test_burdens_stand_beside_the_same_steps_without(bench: Bench) -> None:
    (deep,) = measured(bench, "depth")
    whole, last, suspending, last_suspending = measured(bench, "horizon")
    assert deep.what == "30 finished, 25 pending before"
    assert whole.what == "20 beside an open transaction"
    assert deep.references[0].value == whole.references[0].value == bench.plain_steps().rate
    assert last.what == "in the last quarter of the time"
    assert suspending.what == "20 that suspend beside an open transaction"
    assert last_suspending.what == "in the last quarter of the time, of those that suspend"
    assert all(each.value > 0 for each in (deep, whole, last, suspending, last_suspending))


def test_latency_is_reported_by_its_percentiles(bench: Bench) -> None:
    bench.settings = replace(TINY, count=4)
    figures = measured(bench, "latency")
    assert [each.what.split(",")[1].split()[0] for each in figures] == ["p50", "p99", "max"] * 3
    assert [each.value for each in figures[:3]] == sorted(each.value for each in figures[:3])
    assert 0 < figures[0].value < figures[3].value


def test_several_workers_share_the_work(bench: Bench) -> None:
    bench.fill(application.one_step.bind(number) for number in range(20))
    with bench.workers(2) as workers:
        workers.begin_claiming()
        bench.wait(workers, "with two", enough=None, seconds=30)
        assert len(workers.stop()) == 2
    assert bench.schema.count_unfinished() == 0


def test_failed_workflow_is_no_figure(bench: Bench) -> None:
    bench.schema.execute(
        "INSERT INTO {schema}.workflow (name) VALUES ('one_step')",
        "UPDATE {schema}.workflow SET status = 'failed', finished_at = statement_timestamp(), "
        'error = \'{{"type": "Mishap"}}\'',
    )
    with pytest.raises(BenchError, match=r"1 workflows of the benchmark have failed.*Mishap"):
        bench.completions_since(bench.schema.database_time() - timedelta(minutes=1))


def test_nothing_finished_is_no_figure(bench: Bench) -> None:
    bench.workload = "steps"
    with pytest.raises(BenchError, match=r"nothing of 'steps' was finished in time.*--seconds"):
        bench.completions_since(bench.schema.database_time())


def test_steps_of_an_unfinished_workflow_are_no_figure_of_workflows(bench: Bench) -> None:
    bench.fill([application.many_steps.bind(1_000_000)])
    with pytest.raises(BenchError, match=r"no workflow was finished in time \(too many steps\)"):
        bench.run("too many steps", seconds=1)


def test_worker_that_ends_by_itself_is_reported_with_its_log(bench: Bench) -> None:
    bench.fill([application.one_step.bind(1)])
    bench.schema.execute("DROP TABLE {schema}.worker CASCADE")
    with pytest.raises(BenchError, match=r"(?s)ended by itself.*worker"):
        bench.run("without a table")


def test_commits_of_the_bench_itself_do_not_count(bench: Bench) -> None:
    commits: list[object] = []
    event.listen(bench.schema.engine, "commit", commits.append)
    bench.schema.count_unfinished()
    bench.meter.read()
    assert commits == []
