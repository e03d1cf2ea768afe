"""How long it takes until work goes on after a fault, by one definition for each kind, and the figures of many.

- kill, kill-all, freeze, stall, stop: from the signal until none of the workflows that were running on the worker at
  that moment is still held by it.
- terminate, cut: from the fault until the worker has committed a step again.
- restart, crash, outage, delay, blackhole, refuse: from the return of the server, or of the way to it, until each
  worker that was affected has committed a step again.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from sqla_durable.tools.torture.books import Books
from sqla_durable.tools.torture.schedule import Fault

DEADLINE = 60.0
"""After so many seconds a worker counts as not recovered, which is a violation."""

_POLL = 0.02
_HELD = """
SELECT NOT EXISTS (
    SELECT FROM durable.workflow
    JOIN unnest(CAST(:ids AS uuid[]), CAST(:tokens AS uuid[])) AS held (id, token) USING (id, token)
    WHERE status = 'running'
)
"""
_RUNNING = """
SELECT workflow.id::text AS id, token::text AS token FROM durable.workflow JOIN durable.worker ON worker.id = worker_id
WHERE worker.name = :name AND status = 'running'
"""
_COMMITTED = "SELECT EXISTS (SELECT FROM torture_bank.entry WHERE worker = :name AND id > :last)"
_LAST = "SELECT last_value FROM torture_bank.entry_id_seq"

Condition = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Sample:
    """What one worker needed after one fault; None means that it did not recover before the deadline."""

    kind: Fault
    worker: str
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Figures:
    """The recovery times of one kind, in seconds."""

    count: int
    median: float
    longest: float


def free_of(books: Books, name: str) -> Condition | None:
    """Note what the worker of this name is executing; tell later whether none of it is held any more.

    None where it is executing nothing: then there is nothing to recover.
    """
    rows = books.ask(_RUNNING, name=name)
    ids, tokens = [row.id for row in rows], [row.token for row in rows]
    return (lambda: bool(books.one(_HELD, ids=ids, tokens=tokens))) if rows else None


def committed_since(books: Books, names: Iterable[str]) -> dict[str, Condition]:
    """Note this moment; tell later for each worker whether it has committed an entry that it began to write since."""
    return _committed(books, names, last=int(books.one(_LAST)))


def committed_ever(books: Books, names: Iterable[str]) -> dict[str, Condition]:
    """Tell for each worker whether it has committed any entry."""
    return _committed(books, names, last=0)


def times_until(conditions: Mapping[str, Condition], *, began: float) -> dict[str, float | None]:
    """Ask until all are true, and give for each the seconds since `began`, at most 0.02 too many.

    None for those that are not true before the deadline.
    """
    times: dict[str, float | None] = dict.fromkeys(conditions)
    while time.monotonic() < began + DEADLINE:
        for name, is_true in conditions.items():
            if times[name] is None and is_true():
                times[name] = time.monotonic() - began
        if None not in times.values():
            break
        time.sleep(_POLL)
    return times


def figures(samples: Iterable[Sample]) -> dict[Fault, Figures]:
    """Give the figures of each kind that was measured."""
    measured: dict[Fault, list[float]] = {}
    for each in samples:
        if each.seconds is not None:
            measured.setdefault(each.kind, []).append(each.seconds)
    return {kind: Figures(len(times), statistics.median(times), max(times)) for kind, times in measured.items()}


def _committed(books: Books, names: Iterable[str], *, last: int) -> dict[str, Condition]:
    def of(name: str) -> Condition:
        return lambda: bool(books.one(_COMMITTED, name=name, last=last))

    return {name: of(name) for name in names}
