"""Injects faults one after another, and measures how long it takes until work goes on after each of them.

The recovery times have one definition for each kind of fault:

- kill, kill-all, freeze, stall, stop: from the signal until none of the workflows that were running on the worker at
  that moment is still claimed by it.
- terminate, cut: from the fault until the worker has committed a step again.
- restart, crash, outage, delay, blackhole, refuse: from the return of the server, or of the way to it, until each
  worker that was affected has committed a step again.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from threading import Timer

from sqla_durable.embedded import EmbeddedServer
from sqla_durable.tools.torture.database import BankDatabase
from sqla_durable.tools.torture.processes import WorkerProcess, WorkerProcesses
from sqla_durable.tools.torture.schedule import (
    LEASE,
    Fault,
    Injection,
)

DEADLINE = 60.0
"""After how many seconds a worker counts as not recovered, which is a violation."""

_POLL = 0.02
_NONE_STILL_RUNNING = """
SELECT NOT EXISTS (
    SELECT FROM durable.workflow
    JOIN unnest(CAST(:ids AS uuid[]), CAST(:tokens AS uuid[])) AS before (id, token) USING (id, token)
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
    """How long one worker took to recover from one fault; None if it did not before the deadline."""

    kind: Fault
    worker: str
    seconds: float | None


@dataclass(frozen=True, slots=True)
class RecoveryTimes:
    """The recovery times of one kind of fault, in seconds."""

    count: int
    median: float
    longest: float


def released_by(database: BankDatabase, name: str) -> Condition | None:
    """Return a condition: the workflows that the worker is executing now are no longer claimed by it.

    None where it is executing nothing: then there is nothing to recover.
    """
    rows = database.query(_RUNNING, name=name)
    ids, tokens = [row.id for row in rows], [row.token for row in rows]
    return (lambda: bool(database.value(_NONE_STILL_RUNNING, ids=ids, tokens=tokens))) if rows else None


def committed_since(database: BankDatabase, names: Iterable[str]) -> dict[str, Condition]:
    """Return a condition for each worker: it has committed an entry that it began to write after this call."""
    return _committed(database, names, last=int(database.value(_LAST)))


def committed_ever(database: BankDatabase, names: Iterable[str]) -> dict[str, Condition]:
    """Return a condition for each worker: it has committed an entry at any time."""
    return _committed(database, names, last=0)


def times_until(conditions: Mapping[str, Condition], *, began: float) -> dict[str, float | None]:
    """Poll until all conditions are true; return for each the seconds since `began`, to 0.02 s.

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


def recovery_times(samples: Iterable[Sample]) -> dict[Fault, RecoveryTimes]:
    """Return the recovery times of each kind of fault that was measured."""
    measured: dict[Fault, list[float]] = {}
    for each in samples:
        if each.seconds is not None:
            measured.setdefault(each.kind, []).append(each.seconds)
    return {kind: RecoveryTimes(len(times), statistics.median(times), max(times)) for kind, times in measured.items()}


def _committed(database: BankDatabase, names: Iterable[str], *, last: int) -> dict[str, Condition]:
    def of(name: str) -> Condition:
        return lambda: bool(database.value(_COMMITTED, name=name, last=last))

    return {name: of(name) for name in names}


_TERMINATE = """
SELECT count(pg_terminate_backend(pid)) FROM (
    SELECT pid FROM pg_stat_activity WHERE application_name = ANY(:names)
    ORDER BY state LIKE 'idle in transaction%' DESC, state = 'active' DESC, pid LIMIT CAST(:limit AS integer)
) AS backends
"""
_HAS_LEASE_OR_WORKFLOWS = """
SELECT EXISTS (SELECT FROM durable.worker WHERE name = :name)
    OR EXISTS (SELECT FROM durable.workflow WHERE worker_id = :id AND status = 'running')
"""


class FaultInjector:
    """Injects faults of each kind, and measures the recovery.

    Attributes:
        injected: how often each kind was injected.
        samples: what was measured.
        violations: workers that did not stop in good order, did not release their workflows, or did not recover.
    """

    def __init__(self, server: EmbeddedServer, workers: WorkerProcesses, database: BankDatabase) -> None:
        self.injected: Counter[Fault] = Counter()
        self.samples: list[Sample] = []
        self.violations: list[str] = []
        self._server = server
        self._workers = workers
        self._database = database
        self._methods: Mapping[Fault, Callable[[Injection, list[WorkerProcess]], None]] = {
            Fault.KILL: self._kill,
            Fault.KILL_ALL: self._kill,
            Fault.FREEZE: self._freeze,
            Fault.STALL: self._freeze,
            Fault.STOP: self._stop,
            Fault.TERMINATE: self._terminate,
            Fault.RESTART: self._interrupt,
            Fault.CRASH: self._interrupt,
            Fault.OUTAGE: self._interrupt,
            Fault.CUT: self._cut,
            Fault.DELAY: self._delay,
            Fault.BLACKHOLE: self._blackhole,
            Fault.REFUSE: self._refuse,
        }

    def inject(self, injection: Injection) -> None:
        """Wait until the victims are at work, inject the fault, and wait until they have recovered."""
        victims = [self._workers[each] for each in injection.victims]
        self.wait_until_working(victims)
        self._methods[injection.kind](injection, victims)
        self.injected[injection.kind] += 1

    def wait_until_working(self, workers: Iterable[WorkerProcess]) -> None:
        """Wait until each has committed something: a worker that is still starting is not a victim."""
        working = committed_ever(self._database, (each.name for each in workers))
        for name, seconds in times_until(working, began=time.monotonic()).items():
            if seconds is None:
                self.violations.append(f"{name} has committed nothing in its first {DEADLINE:.0f} s")

    def _kill(self, injection: Injection, victims: list[WorkerProcess]) -> None:
        began = time.monotonic()
        for each in victims:
            each.kill()
        running = self._released_by(victims)
        for each in victims:
            each.start()
        self._measure(injection.kind, running, began=began)

    def _freeze(self, injection: Injection, victims: list[WorkerProcess]) -> None:
        """Freeze, and thaw by a timer: what a frozen transaction has locked may be released only then."""
        began = time.monotonic()
        for each in victims:
            each.freeze()
        thaws = [Timer(LEASE + injection.seconds, each.thaw) for each in victims]
        for thaw in thaws:
            thaw.start()
        self._measure(injection.kind, self._released_by(victims), began=began)
        for thaw in thaws:
            thaw.join()
        self._require_commits(victims)

    def _stop(self, _injection: Injection, victims: list[WorkerProcess]) -> None:
        for each in victims:
            running, worker_id = self._released_by([each]), self._database.worker_id(each.name)
            began = time.monotonic()
            each.ask_to_stop()
            self._measure(Fault.STOP, running, began=began)
            code = each.wait_for_end()
            if code != 0:
                self.violations.append(f"{each.name} was stopped and ended with exit code {code}")
            if self._database.value(_HAS_LEASE_OR_WORKFLOWS, name=each.name, id=worker_id):
                self.violations.append(f"{each.name} was stopped and left its lease or running workflows behind")
            each.start()

    def _terminate(self, injection: Injection, victims: list[WorkerProcess]) -> None:
        names = [each.name for each in victims]
        began, committed = time.monotonic(), committed_since(self._database, names)
        self._database.query(_TERMINATE, names=names, limit=1 if injection.one_backend else 10_000)
        self._measure(Fault.TERMINATE, committed, began=began)

    def _interrupt(self, injection: Injection, victims: list[WorkerProcess]) -> None:
        self._server.interrupt("fast" if injection.kind is Fault.RESTART else "immediate")
        try:
            time.sleep(injection.seconds)
        finally:
            self._server.proceed()
        self._measure_commits(injection.kind, victims)

    def _cut(self, _injection: Injection, victims: list[WorkerProcess]) -> None:
        for each in victims:
            each.proxy.cut()
        self._measure_commits(Fault.CUT, victims)

    def _delay(self, injection: Injection, victims: list[WorkerProcess]) -> None:
        for each in victims:
            each.proxy.delay(injection.delay)
        time.sleep(injection.seconds)
        for each in victims:
            each.proxy.delay(0.0)
        self._measure_commits(Fault.DELAY, victims)

    def _blackhole(self, injection: Injection, victims: list[WorkerProcess]) -> None:
        for each in victims:
            each.proxy.swallow()
        time.sleep(injection.seconds)
        for each in victims:
            each.proxy.restore()
        self._measure_commits(Fault.BLACKHOLE, victims)

    def _refuse(self, injection: Injection, victims: list[WorkerProcess]) -> None:
        for each in victims:
            each.proxy.refuse()
        time.sleep(injection.seconds)
        for each in victims:
            each.proxy.listen()
        self._measure_commits(Fault.REFUSE, victims)

    def _released_by(self, workers: Iterable[WorkerProcess]) -> dict[str, Condition]:
        conditions = {each.name: released_by(self._database, each.name) for each in workers}
        return {name: condition for name, condition in conditions.items() if condition is not None}

    def _measure_commits(self, kind: Fault, workers: Iterable[WorkerProcess]) -> None:
        """Measure from now until each has committed again."""
        began = time.monotonic()
        self._measure(kind, committed_since(self._database, [each.name for each in workers]), began=began)

    def _require_commits(self, workers: Iterable[WorkerProcess]) -> None:
        """Wait until each has committed new work."""
        committed = committed_since(self._database, [each.name for each in workers])
        self._require_recovery("freeze", times_until(committed, began=time.monotonic()))

    def _measure(self, kind: Fault, conditions: Mapping[str, Condition], *, began: float) -> None:
        times = times_until(conditions, began=began)
        self.samples += [Sample(kind, name, seconds) for name, seconds in times.items()]
        self._require_recovery(kind, times)

    def _require_recovery(self, kind: str, times: Mapping[str, float | None]) -> None:
        late = [name for name, seconds in times.items() if seconds is None]
        self.violations += [f"{name} has not recovered {DEADLINE:.0f} s after {kind}" for name in late]
