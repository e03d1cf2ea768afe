"""The whole of it: a server, workers behind proxies, transfers without an end, one fault after another, the check."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sqla_durable import embedded
from sqla_durable.tools.torture.books import Books
from sqla_durable.tools.torture.faults import Faults
from sqla_durable.tools.torture.invariants import ALWAYS, AT_THE_END, Violation, contradictions, lost, revenants
from sqla_durable.tools.torture.processes import Places
from sqla_durable.tools.torture.proxy import Proxies
from sqla_durable.tools.torture.recovery import Figures, figures
from sqla_durable.tools.torture.schedule import Fault, schedule
from sqla_durable.tools.torture.settings import CONCURRENCY, CONNECTIONS
from sqla_durable.tools.torture.traffic import Traffic

ACCOUNTS = 60
_CHECK_EVERY = 5.0
_DRAIN_DEADLINE = 180.0
_PAUSE = 0.25
_UNAPPLIED = """
SELECT count(*) FROM torture_bank.transfer
WHERE (SELECT count(DISTINCT kind) FROM torture_bank.entry WHERE transfer_id = transfer.id) < 3
"""
_TWICE = """
SELECT count(DISTINCT transfer_id)
FROM (SELECT transfer_id FROM torture_bank.entry GROUP BY transfer_id, kind HAVING count(*) > 1) AS repeated
"""
_COUNTS = """
SELECT jsonb_build_object(
    'takeovers', (SELECT coalesce(sum(attempt - 1), 0) FROM durable.workflow),
    'steps tried again', (SELECT count(*) FROM durable.step WHERE attempts > 1),
    'calls repeated', (SELECT count(*) - count(DISTINCT key) FROM torture_bank.call),
    'checkpoints', (SELECT count(*) FROM durable.step)
)
"""
_BACKLOG = 2
"""So many unfinished transfers for each that can be executed at once: nobody is ever without work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be done to whom.

    Attributes:
        seed: decides the faults and the transfers.
        seconds: how long faults are injected, and until each kind has come at least once; None means until `torture`
            is told to end.
        workers: how many worker processes there are.
        faults: the kinds of faults.
        outage: how many seconds an outage of the server lasts.
    """

    seed: int
    seconds: float | None = 60.0
    workers: int = 8
    faults: tuple[Fault, ...] = tuple(Fault)
    outage: float = 4.0

    def command(self) -> str:
        """Give the command that does the same again."""
        kinds = "" if self.faults == tuple(Fault) else f" --faults {','.join(self.faults)}"
        length = "--forever" if self.seconds is None else f"--seconds {self.seconds:g}"
        return (
            f"sqla-durable torture --seed {self.seed} {length} --workers {self.workers} --outage {self.outage:g}{kinds}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How far it is."""

    seconds: float
    succeeded: int
    unfinished: int
    injected: Mapping[Fault, int]
    doing: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of it.

    Attributes:
        plan: what was to be done.
        seconds: how long faults were injected.
        transfers: how many transfers were carried out.
        rolled_back: how many starts were rolled back.
        injected: how often each kind of fault was injected.
        recovery: the recovery times of each kind.
        counts: how often what was meant to happen has happened: deadlocks, takeovers, repeated calls, repeated tries.
        lost: how many transfers were started and not applied.
        twice: how many were applied more than once.
        violations: what must not be.
        directory: where the data directory and the logs are kept, if there are violations.
    """

    plan: Plan
    seconds: float
    transfers: int
    rolled_back: int
    injected: Mapping[Fault, int]
    recovery: Mapping[Fault, Figures]
    counts: Mapping[str, int]
    lost: int
    twice: int
    violations: tuple[Violation, ...]
    directory: Path | None


def torture(
    plan: Plan, *, tell: Callable[[Status], None] = lambda status: None, enough: threading.Event | None = None
) -> Outcome:
    """Do it.

    Args:
        plan: what is to be done.
        tell: called about once a second and after every fault.
        enough: when it is set, no more faults are injected, and what is on its way is finished and checked.

    Raises:
        UsageError: the embedded server is not installed.
        DatabaseUnavailableError: it does not start.
    """
    directory = Path(tempfile.mkdtemp(prefix="sqla-durable-torture-"))
    directory.chmod(0o711)  # as root, the server's user must get through to the data, which are private
    settings = {
        "max_connections": str(plan.workers * CONNECTIONS + 50),
        "deadlock_timeout": "50ms",
        "autovacuum_naptime": "5s",
        "timezone": "UTC",
    }
    with embedded.server(directory, settings=settings) as server:
        outcome = _Torture(plan, server, tell, enough or threading.Event()).run()
    if outcome.directory is None:
        shutil.rmtree(directory, ignore_errors=True)
    return outcome


@dataclass(slots=True)
class _Clock:
    """When what was done last."""

    began: float = field(default_factory=time.monotonic)
    told: float = 0.0
    checked: float = field(default_factory=time.monotonic)


class _Torture:
    def __init__(
        self, plan: Plan, server: embedded.EmbeddedServer, tell: Callable[[Status], None], enough: threading.Event
    ) -> None:
        self._plan = plan
        self._server = server
        self._tell = tell
        self._enough = enough
        self._books = Books(server.url)
        self._clock = _Clock()
        self._violations: list[Violation] = []
        self._logs = server.directory / "logs"
        self._logs.mkdir(mode=0o700, exist_ok=True)

    def run(self) -> Outcome:
        """Open the bank, torture, drain, check."""
        self._books.open_bank(ACCOUNTS)
        backlog = _BACKLOG * CONCURRENCY * self._plan.workers
        traffic = Traffic(self._server.url, seed=self._plan.seed, accounts=ACCOUNTS, backlog=backlog)
        with (
            Proxies(self._server.socket_file) as proxies,
            Places(self._plan.workers, proxies=proxies, logs=self._logs) as places,
        ):
            faults = Faults(self._server, places, self._books)
            traffic.begin()
            try:
                seconds = self._torture(faults, places, traffic)
            finally:
                traffic.end()
            self._drain(faults, places)
            self._note("a worker stays until it is told to leave", [*faults.violations, *places.stop()])
        self._check(traffic)
        try:
            return self._outcome(faults, traffic, seconds)
        finally:
            self._books.close()

    def _torture(self, faults: Faults, places: Places, traffic: Traffic) -> float:
        """Inject fault after fault; stop early when something is wrong, so that its traces are fresh."""
        faults.wait_until_working(places)
        began = time.monotonic()
        injections = schedule(
            self._plan.seed, kinds=self._plan.faults, workers=self._plan.workers, outage=self._plan.outage
        )
        for injection in injections:
            if self._is_over(began, faults) or self._is_wrong(faults, places, traffic):
                break
            self._enough.wait(injection.gap)
            self._show(faults, f"{injection.kind} {_named(injection.victims, self._plan.workers)}")
            faults.inject(injection)
        return time.monotonic() - began

    def _is_over(self, began: float, faults: Faults) -> bool:
        if self._enough.is_set():
            return True
        missing = set(self._plan.faults) - faults.injected.keys()
        return self._plan.seconds is not None and time.monotonic() - began >= self._plan.seconds and not missing

    def _is_wrong(self, faults: Faults, places: Places, traffic: Traffic) -> bool:
        self._note("a worker does not end by itself", places.deserters())
        if traffic.error is not None:
            self._note("transfers can be started", [repr(traffic.error)])
        if time.monotonic() - self._clock.checked > _CHECK_EVERY:
            self._violations += contradictions(self._books, ALWAYS)
            self._clock.checked = time.monotonic()
        return bool(self._violations or faults.violations)

    def _drain(self, faults: Faults, places: Places) -> None:
        """Wait until everything is finished; give up when nothing has been finished for a long time."""
        last, changed = self._books.progress(), time.monotonic()
        while last.unfinished and time.monotonic() - changed < _DRAIN_DEADLINE and not places.deserters():
            time.sleep(_PAUSE)
            now = self._books.progress()
            if now != last:
                last, changed = now, time.monotonic()
            self._show(faults, "finishing what was started")

    def _check(self, traffic: Traffic) -> None:
        self._violations += contradictions(self._books, {**ALWAYS, **AT_THE_END})
        self._violations += lost(self._books, traffic.committed)
        self._violations += revenants(self._books, traffic.rolled_back)

    def _note(self, invariant: str, complaints: list[str]) -> None:
        self._violations += [Violation(invariant, each) for each in complaints]

    def _show(self, faults: Faults, doing: str) -> None:
        progress = self._books.progress()
        status = Status(
            seconds=time.monotonic() - self._clock.began,
            succeeded=progress.succeeded,
            unfinished=progress.unfinished,
            injected=faults.injected,
            doing=doing,
        )
        self._tell(status)

    def _outcome(self, faults: Faults, traffic: Traffic, seconds: float) -> Outcome:
        return Outcome(
            plan=self._plan,
            seconds=seconds,
            transfers=self._books.progress().succeeded,
            rolled_back=len(traffic.rolled_back),
            injected=dict(faults.injected),
            recovery=figures(faults.samples),
            counts=self._counts(),
            lost=len(lost(self._books, traffic.committed)) + int(self._books.one(_UNAPPLIED)),
            twice=int(self._books.one(_TWICE)),
            violations=tuple(self._violations),
            directory=self._server.directory if self._violations else None,
        )

    def _counts(self) -> dict[str, int]:
        counted: dict[str, int] = self._books.one(_COUNTS)
        log = (self._server.directory / "data" / "server.log").read_text(errors="replace")
        return {"deadlocks": log.count("ERROR:  deadlock detected"), **counted}


def _named(victims: tuple[int, ...], workers: int) -> str:
    if len(victims) == workers:
        return "all"
    return ", ".join(f"worker-{each + 1}" for each in victims)
