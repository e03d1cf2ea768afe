"""The torture with a fixed seed: every kind of fault, many transfers, and books that agree."""

from __future__ import annotations

import os

import pytest

from sqla_durable.tools.torture.faults import DEADLINE
from sqla_durable.tools.torture.report import Status, TortureSettings
from sqla_durable.tools.torture.run import torture
from sqla_durable.tools.torture.schedule import Fault

SEED = 33
FEW = (Fault.KILL, Fault.TERMINATE, Fault.CRASH, Fault.CUT)
"""A fault of each kind: of a worker, of its connections, of the server, of the network."""
SECONDS = os.environ.get("SQLA_DURABLE_TORTURE_SECONDS")


@pytest.mark.timeout(400 + float(SECONDS or 0))
def test_nothing_is_lost_and_nothing_is_done_twice_whatever_goes_wrong(thorough: bool) -> None:
    """Until each of a few faults has come; with `--all`, all of them, longer with SQLA_DURABLE_TORTURE_SECONDS."""
    # behaviour: R1 R2 R3 E2 E8 T1 T2 T4 T5 T8
    statuses: list[Status] = []
    seconds = float(SECONDS) if SECONDS else 45 if thorough else 0
    faults = tuple(Fault) if thorough or SECONDS else FEW
    workers = 4 if thorough else 2
    settings = TortureSettings(seed=SEED, workers=workers, seconds=seconds, outage=2 if thorough else 1, faults=faults)
    result = torture(settings, on_progress=statuses.append)
    assert result.violations == ()
    assert (result.lost, result.twice) == (0, 0)
    assert set(result.injected) == set(faults)
    assert result.transfers > (200 if thorough else 80)
    assert result.rolled_back > 0
    assert result.counts["reclaims"] > 0
    assert result.counts["steps tried again"] > 0
    assert statuses[-1].unfinished <= statuses[0].unfinished
    assert all(each.longest < DEADLINE for each in result.recovery.values())
    assert result.directory is None
