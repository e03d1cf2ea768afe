"""One run of the torture: a server, workers behind proxies, transfers without end, faults, and the check."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from sqla_durable import embedded
from sqla_durable.tools.torture.database import BankDatabase
from sqla_durable.tools.torture.faults import FaultInjector, recovery_times
from sqla_durable.tools.torture.invariants import ALWAYS, AT_THE_END, Violation, contradictions, lost, reappeared
from sqla_durable.tools.torture.processes import WorkerProcesses
from sqla_durable.tools.torture.proxy import Proxies
from sqla_durable.tools.torture.report import Status, TortureResult, TortureSettings
from sqla_durable.tools.torture.schedule import (
    CONCURRENCY,
    CONNECTIONS,
    schedule,
)
from sqla_durable.tools.torture.traffic import Traffic

ACCOUNTS = 60
_CHECK_EVERY = 5.0
_LONGEST_STANDSTILL = 180.0
_PAUSE = 0.25
_COUNT_UNAPPLIED = """
SELECT count(*) FROM torture_bank.transfer
WHERE (SELECT count(DISTINCT kind) FROM torture_bank.entry WHERE transfer_id = transfer.id) < 3
"""
_COUNT_TWICE = """
SELECT count(DISTINCT transfer_id)
FROM (SELECT transfer_id FROM torture_bank.entry GROUP BY transfer_id, kind HAVING count(*) > 1) AS repeated
"""
_COUNTS = """
SELECT jsonb_build_object(
    'reclaims', (SELECT coalesce(sum(attempt - 1), 0) FROM durable.workflow),
    'steps tried again', (SELECT count(*) FROM durable.step WHERE tries > 1),
    'calls repeated', (SELECT count(*) - count(DISTINCT key) FROM torture_bank.call),
    'checkpoints', (SELECT count(*) FROM durable.step)
)
"""
_BACKLOG_FACTOR = 2
"""How many unfinished transfers there are for each that can be executed at once: no worker is ever idle."""


def torture(
    settings: TortureSettings,
    *,
    on_progress: Callable[[Status], None] = lambda status: None,
    enough: threading.Event | None = None,
) -> TortureResult:
    """Run the bank, inject faults, and check that nothing was lost and nothing was done twice.

    Args:
        settings: how long, with how many workers, and with which faults.
        on_progress: called about once a second and after every fault.
        enough: when it is set, no more faults are injected; unfinished transfers are finished and checked.

    Raises:
        UsageError: the embedded server is not installed.
        DatabaseUnavailableError: it does not start.
    """
    directory = Path(tempfile.mkdtemp(prefix="sqla-durable-torture-"))
    directory.chmod(0o711)  # as root, the server's user must be able to enter it; the data inside are private
    server_settings = {
        "max_connections": str(settings.workers * CONNECTIONS + 50),
        "deadlock_timeout": "50ms",
        "autovacuum_naptime": "5s",
        "timezone": "UTC",
    }
    with embedded.server(directory, settings=server_settings) as server:
        result = _Torture(settings, server, on_progress, enough or threading.Event()).run()
    if result.directory is None:
        shutil.rmtree(directory, ignore_errors=True)
    return result


@dataclass(slots=True)
class _Clock:
    """When the run began, and when the invariants were checked last."""

    began: float = field(default_factory=time.monotonic)
    checked: float = field(default_factory=time.monotonic)


class _Torture:
    def __init__(
        self,
        settings: TortureSettings,
        server: embedded.EmbeddedServer,
        on_progress: Callable[[Status], None],
        enough: threading.Event,
    ) -> None:
        self._settings = settings
        self._server = server
        self._on_progress = on_progress
        self._enough = enough
        self._database = BankDatabase(server.url)
        self._clock = _Clock()
        self._violations: list[Violation] = []
        self._logs = server.directory / "logs"
        self._logs.mkdir(mode=0o700, exist_ok=True)

    def run(self) -> TortureResult:
        """Create the bank, inject faults, wait until all transfers are finished, and check the invariants."""
        self._database.create_bank(ACCOUNTS)
        backlog = _BACKLOG_FACTOR * CONCURRENCY * self._settings.workers
        traffic = Traffic(self._server.url, seed=self._settings.seed, accounts=ACCOUNTS, backlog=backlog)
        with (
            Proxies(self._server.socket_file) as proxies,
            WorkerProcesses(self._settings.workers, proxies=proxies, logs=self._logs) as workers,
        ):
            injector = FaultInjector(self._server, workers, self._database)
            traffic.begin()
            try:
                seconds = self._inject_faults(injector, workers, traffic)
            finally:
                traffic.end()
            self._drain(injector, workers)
            self._add_violations("a worker runs until it is stopped", [*injector.violations, *workers.stop()])
        self._check(traffic)
        try:
            return self._outcome(injector, traffic, seconds)
        finally:
            self._database.close()

    def _inject_faults(self, injector: FaultInjector, workers: WorkerProcesses, traffic: Traffic) -> float:
        """Inject fault after fault; stop early when something is wrong, while its traces are fresh."""
        injector.wait_until_working(workers)
        began = time.monotonic()
        injections = schedule(
            self._settings.seed,
            kinds=self._settings.faults,
            workers=self._settings.workers,
            outage=self._settings.outage,
        )
        for injection in injections:
            if self._is_over(began, injector) or self._has_violations(injector, workers, traffic):
                break
            self._enough.wait(injection.pause)
            self._report_progress(
                injector, f"{injection.kind} {_worker_names(injection.victims, self._settings.workers)}"
            )
            injector.inject(injection)
        return time.monotonic() - began

    def _is_over(self, began: float, injector: FaultInjector) -> bool:
        if self._enough.is_set():
            return True
        missing = set(self._settings.faults) - injector.injected.keys()
        return self._settings.seconds is not None and time.monotonic() - began >= self._settings.seconds and not missing

    def _has_violations(self, injector: FaultInjector, workers: WorkerProcesses, traffic: Traffic) -> bool:
        self._add_violations("a worker does not end by itself", workers.ended_by_themselves())
        if traffic.error is not None:
            self._add_violations("transfers can be started", [repr(traffic.error)])
        if time.monotonic() - self._clock.checked > _CHECK_EVERY:
            self._violations += contradictions(self._database, ALWAYS)
            self._clock.checked = time.monotonic()
        return bool(self._violations or injector.violations)

    def _drain(self, injector: FaultInjector, workers: WorkerProcesses) -> None:
        """Wait until everything is finished, or nothing has been finished for a long time."""
        last, changed = self._database.progress(), time.monotonic()
        while (
            last.unfinished and time.monotonic() - changed < _LONGEST_STANDSTILL and not workers.ended_by_themselves()
        ):
            time.sleep(_PAUSE)
            now = self._database.progress()
            if now != last:
                last, changed = now, time.monotonic()
            self._report_progress(injector, "finishing what was started")

    def _check(self, traffic: Traffic) -> None:
        self._violations += contradictions(self._database, {**ALWAYS, **AT_THE_END})
        self._violations += lost(self._database, traffic.committed)
        self._violations += reappeared(self._database, traffic.rolled_back)

    def _add_violations(self, invariant: str, descriptions: list[str]) -> None:
        self._violations += [Violation(invariant, each) for each in descriptions]

    def _report_progress(self, injector: FaultInjector, doing: str) -> None:
        progress = self._database.progress()
        status = Status(
            seconds=time.monotonic() - self._clock.began,
            succeeded=progress.succeeded,
            unfinished=progress.unfinished,
            injected=injector.injected,
            doing=doing,
        )
        self._on_progress(status)

    def _outcome(self, injector: FaultInjector, traffic: Traffic, seconds: float) -> TortureResult:
        return TortureResult(
            settings=self._settings,
            seconds=seconds,
            transfers=self._database.progress().succeeded,
            rolled_back=len(traffic.rolled_back),
            injected=dict(injector.injected),
            recovery=recovery_times(injector.samples),
            counts=self._counts(),
            lost=len(lost(self._database, traffic.committed)) + int(self._database.value(_COUNT_UNAPPLIED)),
            twice=int(self._database.value(_COUNT_TWICE)),
            violations=tuple(self._violations),
            directory=self._server.directory if self._violations else None,
        )

    def _counts(self) -> dict[str, int]:
        counted: dict[str, int] = self._database.value(_COUNTS)
        log = (self._server.directory / "data" / "server.log").read_text(errors="replace")
        return {"deadlocks": log.count("ERROR:  deadlock detected"), **counted}


def _worker_names(victims: tuple[int, ...], workers: int) -> str:
    if len(victims) == workers:
        return "all"
    return ", ".join(f"worker-{each + 1}" for each in victims)
