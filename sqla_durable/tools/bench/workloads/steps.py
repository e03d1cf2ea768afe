"""Plain steps: queued workflows of one step each, and workflows of many steps."""

from __future__ import annotations

from collections.abc import Iterator

from sqla_durable.tools.bench import application, shapes
from sqla_durable.tools.bench.figures import Figure
from sqla_durable.tools.bench.measuring import Bench, Measured

_NAIVE = 300


def steps(bench: Bench) -> Iterator[Figure]:
    """Queued workflows with one plain step each, `async def` and `def`."""
    floors = bench.floors(shapes.one_step(batch=1, clients=16), shapes.one_step(batch=50, clients=4))
    beside = *floors, bench.naive(min(_NAIVE, bench.count(_NAIVE)))

    def figure(what: str, measured: Measured) -> Figure:
        return Figure(
            workload="steps",
            what=what,
            value=measured.rate,
            unit="workflows/s",
            beside=beside,
            costs=measured.costs,
        )

    yield figure("one plain step, async def", bench.plain())
    bench.fill(application.one_step_in_thread.bind(number) for number in range(bench.count(10_000)))
    yield figure("one plain step, def", bench.carry_out("one step each, def"))


def sequential(bench: Bench) -> Iterator[Figure]:
    """Workflows of many plain steps: one at a time, and twenty."""
    count = bench.count(2_000)
    for workflows, length in ((1, count), (20, max(1, count // 4))):
        floors = bench.floors(shapes.checkpoint(clients=workflows))
        bench.fill(application.many_steps.bind(length) for _ in range(workflows))
        measured = bench.carry_out(f"{workflows} x {length} steps", each="step")
        yield Figure(
            workload="sequential",
            what=f"{workflows} workflow{'s' if workflows > 1 else ''} at a time",
            value=measured.step_rate,
            unit="steps/s",
            beside=floors,
            costs=measured.costs,
            each="step",
        )
