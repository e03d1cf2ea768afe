"""The server goes away and comes back: no worker dies, nothing is lost or done twice, and work goes on."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from tests.crash import accounts, survivors
from tests.crash.survivors import FORMS, GATED_CALL, GATED_CREDIT, Kind
from tests.store import races
from tests.support.clusters import Cluster, StopMode
from tests.support.sampling import thorough_cases

SHORT: dict[str, Any] = {"lease": timedelta(seconds=2), "poll_interval": timedelta(seconds=0.05), "concurrency": 20}
DEFAULTS: dict[str, Any] = {}
SOON = 60.0
"""How many seconds after the server's return the tests are content with; measured were 0.2 to 8."""


class Outage:
    """Workers of one kind, their server, and how long it takes them to go on after its return."""

    def __init__(self, cluster: Cluster, own: Engine, outside: Engine, gate: Path) -> None:
        self._cluster = cluster
        self._own = own
        self._outside = outside
        self._gate = gate

    def live_through(self, kind: Kind, mode: StopMode, *, seconds: float, options: dict[str, Any]) -> accounts.Verdict:
        """Take the server away from two workers in the middle of steps of every form; give what came of it.

        Half an outage later the steps end, with nowhere to record it.
        """
        with ExitStack() as stack:
            workers = [stack.enter_context(survivors.worker(kind, self._cluster.text, **options)) for _ in range(2)]
            self._begin_steps(FORMS[kind])
            self._cluster.stop(mode)
            elapse(seconds / 2)
            self._gate.touch()
            elapse(seconds / 2)
            self._cluster.start()
            self._wait_for_the_end(FORMS[kind])
            assert [each.exitcode for each in workers] == [None, None], "a worker process has ended"
        return accounts.check(self._own, self._outside)

    def _begin_steps(self, forms: tuple[str, ...]) -> None:
        accounts.wait_for_workers(self._own, 2)
        for account in (GATED_CREDIT, GATED_CALL):
            accounts.start(self._own, forms * (8 // len(forms)), account=account)
        accounts.wait_for_arrivals(self._outside, 16)
        accounts.start(self._own, forms * (100 // len(forms)))

    def _wait_for_the_end(self, forms: tuple[str, ...]) -> None:
        back = time.monotonic()
        (new,) = accounts.start(self._own, forms[:1])
        races.wait_until(lambda: accounts.finished(self._own, new), what="a new workflow's end", seconds=SOON)
        first = time.monotonic() - back
        races.wait_until(lambda: accounts.unfinished(self._own) == 0, what="the end of all", seconds=SOON)
        print(f"after the return: the first workflow {first:.1f} s, all {time.monotonic() - back:.1f} s")


@pytest.fixture
def outage(cluster: Cluster, own: Engine, outside: Engine, gate: Path) -> Outage:
    return Outage(cluster, own, outside, gate)


def elapse(seconds: float) -> None:
    """Let time go by: how long an outage lasts is the subject here, nothing is awaited."""
    threading.Event().wait(seconds)


@pytest.mark.thorough  # what comes back of itself is in the next two tests too
@pytest.mark.parametrize(("kind", "mode"), [("sync", "immediate"), ("asyncpg", "fast")])
def test_workers_live_through_an_outage_that_is_longer_than_their_lease(
    outage: Outage, kind: Kind, mode: StopMode
) -> None:
    # behaviour: R1 T4 E8
    verdict = outage.live_through(kind, mode, seconds=6, options=SHORT)
    print(verdict)
    assert verdict.workflows == 117


@pytest.mark.parametrize(
    ("kind", "mode"), [("asyncpg", "fast"), *thorough_cases([("sync", "fast"), ("psycopg", "immediate")])]
)
def test_workers_that_lived_through_an_outage_reclaim_nothing_from_each_other(
    outage: Outage, kind: Kind, mode: StopMode
) -> None:
    # behaviour: R3
    verdict = outage.live_through(kind, mode, seconds=6, options=SHORT)
    print(verdict)
    assert (verdict.workflows, verdict.reclaimed, verdict.repeated) == (117, 0, 0)


@pytest.mark.timeout(120)
def test_workers_with_default_settings_live_through_an_outage_(outage: Outage, thorough: bool) -> None:
    """Of thirty seconds, with `--all`."""
    verdict = outage.live_through("psycopg", "immediate", seconds=30 if thorough else 8, options=DEFAULTS)
    print(verdict)
    assert verdict.workflows == 117


@pytest.mark.parametrize(
    ("count", "kind"),
    [(0, "asyncpg"), (4, "sync"), *thorough_cases([(0, "sync"), (4, "asyncpg")])],
)
def test_a_stop_in_the_middle_of_an_outage_ends_the_process(
    cluster: Cluster, own: Engine, outside: Engine, gate: Path, kind: Kind, count: int
) -> None:
    """Idle, or with the outcomes of steps that it cannot record; another worker does them again."""
    forms = FORMS[kind]
    with survivors.worker(kind, cluster.text, **SHORT, grace=timedelta(seconds=1)) as process:
        accounts.wait_for_workers(own, 1)
        accounts.start(own, (forms * count)[:count], account=GATED_CALL)
        accounts.wait_for_arrivals(outside, count)
        cluster.stop("fast")
        gate.touch()
        elapse(1)
        assert process.pid is not None
        began = time.monotonic()
        process.terminate()
        process.join(10)
        print(f"SIGTERM to exit: {time.monotonic() - began:.1f} s, status {process.exitcode}")
        assert process.exitcode not in (None, -signal.SIGKILL)
    cluster.start()
    with survivors.worker(kind, cluster.text, **SHORT):
        races.wait_until(lambda: accounts.unfinished(own) == 0, what="the end of all", seconds=SOON)
    assert accounts.check(own, outside).workflows == count
