"""One run of a workload: fill the tables, let workers execute until enough is done, and measure time and costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from sqla_durable import (
    BoundWorkflow,
)
from sqla_durable.tools.bench import application
from sqla_durable.tools.bench.baselines import Pgbench, PgbenchScript, measure_naive
from sqla_durable.tools.bench.meter import Meter, costs_between
from sqla_durable.tools.bench.processes import WorkerProcesses
from sqla_durable.tools.bench.report import (
    BenchError,
    BenchSettings,
    Costs,
    Reference,
    Status,
)
from sqla_durable.tools.bench.schema import (
    BenchSchema,
)

_PAUSE = 0.05
_SHARE_OF_COUNTING = 0.05  # of the time that passes may go into counting what is finished
_COMPLETIONS = """
SELECT extract(epoch FROM finished_at - :began)::float AS seconds, status, error::text FROM {schema}.workflow
WHERE finished_at > :began ORDER BY finished_at
"""
_STEPS = """
SELECT count(*) AS recorded, coalesce(extract(epoch FROM max(finished_at) - :began), 0)::float AS seconds
FROM {schema}.step WHERE finished_at > :began
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What one run measured.

    Attributes:
        completions: seconds from the beginning at which workflows were finished, in order.
        steps: how many steps were recorded.
        seconds: from the beginning to the last completion or step.
        costs: what each workflow, or each step, cost.
    """

    completions: list[float]
    steps: int
    seconds: float
    costs: Costs

    @property
    def rate(self) -> float:
        """Workflows per second, up to the last completion."""
        return len(self.completions) / self.completions[-1]

    @property
    def step_rate(self) -> float:
        """Steps per second."""
        return self.steps / self.seconds


class Bench:
    """What a workload is given: the schema, the settings, and what runs and measures workflows.

    Args:
        schema: the schema in which everything happens.
        settings: how much to measure.
        pgbench: measures the same work as plain SQL.
        on_progress: called with the progress.

    Attributes:
        workload: the name of the workload that is being measured.
    """

    def __init__(
        self, schema: BenchSchema, settings: BenchSettings, pgbench: Pgbench, on_progress: Callable[[Status], None]
    ) -> None:
        self.schema = schema
        self.settings = settings
        self.workload = ""
        self.meter = Meter(schema)
        self._pgbench = pgbench
        self._on_progress = on_progress
        self._plain_steps: RunResult | None = None

    def count(self, default: int) -> int:
        """Return how many workflows or steps a workload executes: the setting, else its default."""
        return default if self.settings.count is None else self.settings.count

    def seconds(self, default: float = 10.0) -> float:
        """Return how many seconds a workload runs at most: the setting, else its default."""
        return default if self.settings.seconds is None else self.settings.seconds

    def show(self, doing: str, done: int = 0, total: int = 0) -> None:
        """Show the progress to the user."""
        self._on_progress(Status(self.workload, doing, done, total))

    def pgbench(self, *scripts: PgbenchScript) -> tuple[Reference, ...]:
        """Measure the same work as plain SQL."""
        self.show("the same work in SQL, by pgbench")
        return self._pgbench.measure(*scripts)

    def naive(self, count: int) -> Reference:
        """Measure the same work as naive ORM code."""
        self.show("the same work in naive ORM code")
        return measure_naive(self.schema, count)

    def plain_steps(self) -> RunResult:
        """Return the result of `steps` for `async def` workflows, measured once for all workloads that refer to it."""
        if self._plain_steps is None:
            self.fill(application.one_step.bind(number) for number in range(self.count(20_000)))
            self._plain_steps = self.run("one step each, async def")
        return self._plain_steps

    def fill(self, bound: Iterable[BoundWorkflow]) -> None:
        """Replace what is in the tables by these workflows."""
        self.show("filling the tables")
        self.schema.clear()
        self.schema.start(bound)

    def workers(
        self, count: int | None = None, *, queues: Sequence[str] = ("default",), concurrency: int | None = None
    ) -> WorkerProcesses:
        """Return worker processes of these queues, as a context manager."""
        return WorkerProcesses(
            self.schema.url,
            self.schema.name,
            count=count or self.settings.workers,
            concurrency=concurrency or self.settings.concurrency,
            queues=queues,
        )

    def run(
        self,
        doing: str,
        *,
        enough: int | None = None,
        seconds: float | None = None,
        each: str = "workflow",
        steps_each: int | None = None,
        concurrency: int | None = None,
    ) -> RunResult:
        """Let the workers execute what is in the tables, and measure it.

        Args:
            doing: the description that the user sees.
            enough: after how many finished workflows to end; by default after all.
            seconds: after how many seconds to end at the latest.
            each: what the costs are divided by, workflow or step.
            steps_each: how many steps a workflow has, where the time may be up before all are finished: unfinished
                workflows cost something too.
            concurrency: how many workflows each worker executes at once, if not what the settings say.

        Raises:
            BenchError: a worker ended by itself, a workflow failed, or nothing was finished.
        """
        with self.workers(concurrency=concurrency) as workers:
            before = self.meter.read()
            began = self.schema.database_time()
            workers.begin_claiming()
            self.wait(workers, doing, enough=enough, seconds=seconds or self.seconds())
            usages = workers.stop()
        after = self.meter.read()
        completions, steps, ended = self.completions_since(began)
        units = steps if each == "step" else steps / steps_each if steps_each else len(completions)
        if not units:
            raise BenchError(f"no {each} was finished in time ({doing}): allow more time, --seconds N.")
        costs = costs_between(before, after, usages, units=units)
        return RunResult(completions=completions, steps=steps, seconds=ended, costs=costs)

    def wait(self, workers: WorkerProcesses, doing: str, *, enough: int | None, seconds: float) -> None:
        """Wait until enough workflows are finished or the time is up, and show the progress."""
        deadline = time.monotonic() + seconds
        before = unfinished = self.schema.count_unfinished()
        total = enough or before
        while (done := before - unfinished) < total and time.monotonic() < deadline:
            self.show(doing, done, total)
            workers.require_alive()
            counted_at = time.monotonic()
            unfinished = self.schema.count_unfinished()
            time.sleep(max(_PAUSE, (time.monotonic() - counted_at) / _SHARE_OF_COUNTING))

    def completions_since(self, began: datetime) -> tuple[list[float], int, float]:
        """Return the seconds at which workflows finished since then, the number of steps, and the seconds to the last.

        Raises:
            BenchError: a workflow failed, or nothing was finished.
        """
        rows = self.schema.query(_COMPLETIONS, began=began)
        failed = [row for row in rows if row.status != "succeeded"]
        if failed:
            raise BenchError(f"{len(failed)} workflows of the benchmark have {failed[0].status}: {failed[0].error}")
        steps = self.schema.query(_STEPS, began=began)[0]
        if not rows and not steps.recorded:
            raise BenchError(f"nothing of {self.workload!r} was finished in time: allow more time, --seconds N.")
        completions = [row.seconds for row in rows]
        return completions, steps.recorded, max([*completions, steps.seconds])


_SETTLING = 2.0  # seconds after a worker's first claim until it is idle


def idle_costs(bench: Bench, workers: WorkerProcesses) -> Costs:
    """Return what a worker and the server use for each second in which nothing is to be done."""
    bench.show("an idle worker")
    time.sleep(_SETTLING)
    before, (used_before,) = bench.meter.read(), workers.usages()
    began = time.monotonic()
    time.sleep(bench.seconds())
    seconds = time.monotonic() - began
    after, (used,) = bench.meter.read(), workers.usages()
    return costs_between(before, after, [replace(used, cpu=used.cpu - used_before.cpu)], units=seconds)
