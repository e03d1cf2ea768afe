"""`steps` under burdens: full tables before it, and a transaction left open beside it."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import text

from sqla_durable.api.functions import AsyncWorkflowFunction
from sqla_durable.tools.bench import application, seeds
from sqla_durable.tools.bench.figures import Figure, Reference
from sqla_durable.tools.bench.measuring import Bench, Measured

_PARTS = 4


def depth(bench: Bench) -> Iterator[Figure]:
    """`steps` with many finished and many pending workflows in the tables."""
    plain = bench.plain()
    bench.tell(f"inserting {bench.plan.finished:,} finished and {bench.plan.pending:,} pending workflows")
    bench.place.empty()
    seeds.finished(bench.place, bench.plan.finished)
    seeds.pending(bench.place, bench.plan.pending)
    enough = min(bench.count(20_000), bench.plan.pending)
    measured = bench.carry_out("one step each, in full tables", enough=enough)
    yield Figure(
        workload="depth",
        what=f"{_short(bench.plan.finished)} finished, {_short(bench.plan.pending)} pending before",
        value=measured.rate,
        unit="workflows/s",
        beside=(Reference("steps, in empty tables", plain.rate),),
        costs=measured.costs,
    )


def horizon(bench: Bench) -> Iterator[Figure]:
    """Workflows while somebody's transaction stays open, so that nothing that dies meanwhile can be removed.

    Those of `steps`, and others that wait as rows first: each is claimed twice, suspended and woken.
    """
    plain = Reference("steps, without it", bench.plain().rate)
    yield from _beside_a_snapshot(bench, application.one_step, "", plain)
    yield from _beside_a_snapshot(bench, application.suspended_once, " that suspend", plain)


def _beside_a_snapshot(
    bench: Bench, workflow: AsyncWorkflowFunction[[int], int], which: str, plain: Reference
) -> Iterator[Figure]:
    bench.fill(workflow.bind(number) for number in range(bench.count(100_000)))
    with bench.place.engine.connect().execution_options(isolation_level="REPEATABLE READ") as elsewhere:
        elsewhere.execute(text("SELECT 1"))  # takes the snapshot
        doing = f"one step each{which}, beside an open transaction"
        measured = bench.carry_out(doing, seconds=bench.seconds(30))
    first, last = _first_and_last(measured)
    yield Figure(
        workload="horizon",
        what=f"{len(measured.completions):,}{which} beside an open transaction",
        value=measured.rate,
        unit="workflows/s",
        beside=(plain,),
        costs=measured.costs,
    )
    yield Figure(
        workload="horizon",
        what=f"in the last quarter of the time{which and ', of those'}{which}",
        value=last,
        unit="workflows/s",
        beside=(Reference("in the first quarter", first),),
    )


def _first_and_last(measured: Measured) -> tuple[float, float]:
    """Return the rates in the first and in the last part of the time, from the first completion on."""
    began = measured.completions[0]
    seconds = [each - began for each in measured.completions]
    part = max(seconds[-1], 0.001) / _PARTS
    first = sum(each <= part for each in seconds)
    last = sum(each >= seconds[-1] - part for each in seconds)
    return first / part, last / part


def _short(count: int) -> str:
    for size, name in ((1_000_000, "M"), (1_000, "k")):
        if count >= size and count % (size // 10) == 0:
            return f"{count / size:g}{name}"
    return f"{count:,}"
