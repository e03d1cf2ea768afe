"""What every workload needs: tables filled, workers at work until enough is done, and what that took and cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime

from sqla_durable.api.start import BoundWorkflow
from sqla_durable.tools.bench import application, naive
from sqla_durable.tools.bench.errors import BenchError
from sqla_durable.tools.bench.figures import Costs, Reference
from sqla_durable.tools.bench.floors import Floors
from sqla_durable.tools.bench.meter import Meter, costs
from sqla_durable.tools.bench.place import Place
from sqla_durable.tools.bench.plan import Plan
from sqla_durable.tools.bench.processes import Crew
from sqla_durable.tools.bench.shapes import Shape

_PAUSE = 0.05
_COST_OF_LOOKING = 0.05
_DONE = """
SELECT extract(epoch FROM finished_at - :began)::float AS seconds, status, error::text FROM {schema}.workflow
WHERE finished_at > :began ORDER BY finished_at
"""
_STEPS = """
SELECT count(*) AS recorded, coalesce(extract(epoch FROM max(finished_at) - :began), 0)::float AS seconds
FROM {schema}.step WHERE finished_at > :began
"""


@dataclass(frozen=True, slots=True)
class Status:
    """How far a workload is.

    Attributes:
        workload: which one.
        doing: what is being done.
        done: how much of it.
        total: of how much; 0 where that is not known.
    """

    workload: str
    doing: str
    done: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What came of it.

    Attributes:
        completions: seconds from the beginning at which workflows were finished, in order.
        steps: how many steps were recorded.
        seconds: until the last of both.
        costs: what each of them cost.
    """

    completions: list[float]
    steps: int
    seconds: float
    costs: Costs

    @property
    def rate(self) -> float:
        """Workflows a second, until the last that was finished."""
        return len(self.completions) / self.completions[-1]

    @property
    def step_rate(self) -> float:
        """Steps a second."""
        return self.steps / self.seconds


class Bench:
    """A place, what measures there, and the plan: what a workload is given.

    Args:
        place: where everything happens.
        plan: how much of it.
        floors: measures the floors.
        tell: is told how far it is.

    Attributes:
        workload: the name of the one that is measured now.
    """

    def __init__(self, place: Place, plan: Plan, floors: Floors, tell: Callable[[Status], None]) -> None:
        self.place = place
        self.plan = plan
        self.workload = ""
        self.meter = Meter(place)
        self._floors = floors
        self._tell = tell
        self._plain: Measured | None = None

    def count(self, default: int) -> int:
        """Give how many workflows or steps a workload takes."""
        return default if self.plan.count is None else self.plan.count

    def seconds(self, default: float = 10.0) -> float:
        """Give after how many seconds a workload ends even if not all is done."""
        return default if self.plan.seconds is None else self.plan.seconds

    def tell(self, doing: str, done: int = 0, total: int = 0) -> None:
        """Tell how far it is."""
        self._tell(Status(self.workload, doing, done, total))

    def floors(self, *shapes: Shape) -> tuple[Reference, ...]:
        """Measure what pgbench makes of the same work."""
        self.tell("the SQL floor, by pgbench")
        return self._floors.measure(*shapes)

    def naive(self, count: int) -> Reference:
        """Measure the naive way."""
        self.tell("the naive way")
        return naive.naive(self.place, count)

    def plain(self) -> Measured:
        """Give what `steps` makes of `async def` workflows, measured once for all that compare themselves with it."""
        if self._plain is None:
            self.fill(application.one_step.bind(number) for number in range(self.count(20_000)))
            self._plain = self.carry_out("one step each, async def")
        return self._plain

    def fill(self, bound: Iterable[BoundWorkflow]) -> None:
        """Have these workflows and nothing else in the tables."""
        self.tell("filling the tables")
        self.place.empty()
        self.place.fill(bound)

    def crew(self, workers: int | None = None) -> Crew:
        """Give worker processes, as a context manager."""
        workers = workers or self.plan.workers
        return Crew(self.place.url, self.place.schema, workers=workers, concurrency=self.plan.concurrency)

    def carry_out(
        self,
        doing: str,
        *,
        enough: int | None = None,
        seconds: float | None = None,
        each: str = "workflow",
        steps_each: int | None = None,
    ) -> Measured:
        """Let the workers carry out what is in the tables.

        Args:
            doing: what the user is told.
            enough: how many workflows are enough; by default all.
            seconds: when to end at the latest.
            each: what the costs are divided by, workflow or step.
            steps_each: how many steps a workflow has, where the time may be up before all are finished: those that are
                on their way cost something too.

        Raises:
            BenchError: a worker ended by itself, a workflow failed, or nothing was finished.
        """
        with self.crew() as crew:
            before = self.meter.read()
            began = self.place.now()
            crew.go()
            self.wait(crew, doing, enough=enough, seconds=seconds or self.seconds())
            usages = crew.stop()
        after = self.meter.read()
        completions, steps, ended = self.outcome(began)
        units = steps if each == "step" else steps / steps_each if steps_each else len(completions)
        if not units:
            raise BenchError(f"no {each} was finished in time ({doing}): give it more of it, --seconds N.")
        cost = costs(before, after, usages, units=units)
        return Measured(completions=completions, steps=steps, seconds=ended, costs=cost)

    def wait(self, crew: Crew, doing: str, *, enough: int | None, seconds: float) -> None:
        """Wait until enough workflows are finished, or the time is up."""
        deadline = time.monotonic() + seconds
        before = unfinished = self.place.unfinished()
        total = enough or before
        while (done := before - unfinished) < total and time.monotonic() < deadline:
            self.tell(doing, done, total)
            crew.require_all()
            asked = time.monotonic()
            unfinished = self.place.unfinished()
            time.sleep(max(_PAUSE, (time.monotonic() - asked) / _COST_OF_LOOKING))

    def outcome(self, began: datetime) -> tuple[list[float], int, float]:
        """Give the seconds at which workflows were finished since then, the steps recorded, and the last of both.

        Raises:
            BenchError: a workflow failed, or nothing was finished.
        """
        rows = self.place.ask(_DONE, began=began)
        failed = [row for row in rows if row.status != "succeeded"]
        if failed:
            raise BenchError(f"{len(failed)} workflows of the bench have {failed[0].status}: {failed[0].error}")
        steps = self.place.ask(_STEPS, began=began)[0]
        if not rows and not steps.recorded:
            raise BenchError(f"nothing of {self.workload!r} was finished in time: give it more of it, --seconds N.")
        completions = [row.seconds for row in rows]
        return completions, steps.recorded, max([*completions, steps.seconds])
