"""Injects faults one after another, and measures the recovery from each."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from threading import Timer

from sqla_durable.embedded import EmbeddedServer
from sqla_durable.tools.torture.books import Books
from sqla_durable.tools.torture.processes import Place, Places
from sqla_durable.tools.torture.recovery import (
    DEADLINE,
    Condition,
    Sample,
    committed_ever,
    committed_since,
    free_of,
    times_until,
)
from sqla_durable.tools.torture.schedule import Fault, Injection
from sqla_durable.tools.torture.settings import LEASE

_TERMINATE = """
SELECT count(pg_terminate_backend(pid)) FROM (
    SELECT pid FROM pg_stat_activity WHERE application_name = ANY(:names)
    ORDER BY state LIKE 'idle in transaction%' DESC, state = 'active' DESC, pid LIMIT CAST(:limit AS integer)
) AS backends
"""
_LEFT_SOMETHING = """
SELECT EXISTS (SELECT FROM durable.worker WHERE name = :name)
    OR EXISTS (SELECT FROM durable.workflow WHERE worker_id = :id AND status = 'running')
"""


class Faults:
    """Knows how to inflict each kind.

    Attributes:
        injected: how often each kind was injected.
        samples: what was measured.
        violations: what no worker may do: leave in bad order, keep what it should hand back, or not recover.
    """

    def __init__(self, server: EmbeddedServer, places: Places, books: Books) -> None:
        self.injected: Counter[Fault] = Counter()
        self.samples: list[Sample] = []
        self.violations: list[str] = []
        self._server = server
        self._places = places
        self._books = books
        self._inflict: Mapping[Fault, Callable[[Injection, list[Place]], None]] = {
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
        """Wait until the victims are at work, inflict the fault, and wait until they have recovered."""
        victims = [self._places[each] for each in injection.victims]
        self.wait_until_working(victims)
        self._inflict[injection.kind](injection, victims)
        self.injected[injection.kind] += 1

    def wait_until_working(self, places: Iterable[Place]) -> None:
        """Wait until each has committed something: a worker that is still starting is no victim."""
        working = committed_ever(self._books, (each.name for each in places))
        for name, seconds in times_until(working, began=time.monotonic()).items():
            if seconds is None:
                self.violations.append(f"{name} has not committed anything in its first {DEADLINE:.0f} s")

    def _kill(self, injection: Injection, victims: list[Place]) -> None:
        began = time.monotonic()
        for each in victims:
            each.kill()
        held = self._held_by(victims)
        for each in victims:
            each.fill()
        self._measure(injection.kind, held, began=began)

    def _freeze(self, injection: Injection, victims: list[Place]) -> None:
        """Freeze; the thaw comes by a timer, because what a frozen transaction has locked is free only then."""
        began = time.monotonic()
        for each in victims:
            each.freeze()
        thaws = [Timer(LEASE + injection.seconds, each.thaw) for each in victims]
        for thaw in thaws:
            thaw.start()
        self._measure(injection.kind, self._held_by(victims), began=began)
        for thaw in thaws:
            thaw.join()
        self._require_commits(victims)

    def _stop(self, _injection: Injection, victims: list[Place]) -> None:
        for each in victims:
            held, worker_id = self._held_by([each]), self._books.worker_id(each.name)
            began = time.monotonic()
            each.ask_to_stop()
            self._measure(Fault.STOP, held, began=began)
            code = each.wait_for_end()
            if code != 0:
                self.violations.append(f"{each.name} was stopped and left with exit code {code}")
            if self._books.one(_LEFT_SOMETHING, name=each.name, id=worker_id):
                self.violations.append(f"{each.name} was stopped and left its lease or running workflows behind")
            each.fill()

    def _terminate(self, injection: Injection, victims: list[Place]) -> None:
        names = [each.name for each in victims]
        began, committed = time.monotonic(), committed_since(self._books, names)
        self._books.ask(_TERMINATE, names=names, limit=1 if injection.one else 10_000)
        self._measure(Fault.TERMINATE, committed, began=began)

    def _interrupt(self, injection: Injection, victims: list[Place]) -> None:
        self._server.interrupt("fast" if injection.kind is Fault.RESTART else "immediate")
        try:
            time.sleep(injection.seconds)
        finally:
            self._server.proceed()
        self._measure_commits(injection.kind, victims)

    def _cut(self, _injection: Injection, victims: list[Place]) -> None:
        for each in victims:
            each.proxy.cut()
        self._measure_commits(Fault.CUT, victims)

    def _delay(self, injection: Injection, victims: list[Place]) -> None:
        for each in victims:
            each.proxy.delay(injection.delay)
        time.sleep(injection.seconds)
        for each in victims:
            each.proxy.delay(0.0)
        self._measure_commits(Fault.DELAY, victims)

    def _blackhole(self, injection: Injection, victims: list[Place]) -> None:
        for each in victims:
            each.proxy.swallow()
        time.sleep(injection.seconds)
        for each in victims:
            each.proxy.restore()
        self._measure_commits(Fault.BLACKHOLE, victims)

    def _refuse(self, injection: Injection, victims: list[Place]) -> None:
        for each in victims:
            each.proxy.refuse()
        time.sleep(injection.seconds)
        for each in victims:
            each.proxy.listen()
        self._measure_commits(Fault.REFUSE, victims)

    def _held_by(self, places: Iterable[Place]) -> dict[str, Condition]:
        free = {each.name: free_of(self._books, each.name) for each in places}
        return {name: condition for name, condition in free.items() if condition is not None}

    def _measure_commits(self, kind: Fault, places: Iterable[Place]) -> None:
        """Measure from now until each has committed again."""
        began = time.monotonic()
        self._measure(kind, committed_since(self._books, [each.name for each in places]), began=began)

    def _require_commits(self, places: Iterable[Place]) -> None:
        """Wait until each goes on with new work."""
        committed = committed_since(self._books, [each.name for each in places])
        self._complain("freeze", times_until(committed, began=time.monotonic()))

    def _measure(self, kind: Fault, conditions: Mapping[str, Condition], *, began: float) -> None:
        times = times_until(conditions, began=began)
        self.samples += [Sample(kind, name, seconds) for name, seconds in times.items()]
        self._complain(kind, times)

    def _complain(self, kind: str, times: Mapping[str, float | None]) -> None:
        late = [name for name, seconds in times.items() if seconds is None]
        self.violations += [f"{name} has not recovered {DEADLINE:.0f} s after {kind}" for name in late]
