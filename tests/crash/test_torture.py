"""The torture with a fixed seed: every kind of fault, many transfers, and books that agree."""

from __future__ import annotations

import pytest

from sqla_durable.tools.torture.driver import Plan, Status, torture
from sqla_durable.tools.torture.recovery import DEADLINE
from sqla_durable.tools.torture.schedule import Fault

SEED = 20


@pytest.mark.timeout(400)
def test_nothing_is_lost_and_nothing_is_done_twice_whatever_goes_wrong() -> None:
    # behaviour: R1 R2 R3 E2 E8 T1 T2 T4 T5 T8
    told: list[Status] = []
    outcome = torture(Plan(seed=SEED, workers=4, seconds=45, outage=2), tell=told.append)
    assert outcome.violations == ()
    assert (outcome.lost, outcome.twice) == (0, 0)
    assert set(outcome.injected) == set(Fault)
    assert outcome.transfers > 200
    assert outcome.rolled_back > 0
    assert outcome.counts["takeovers"] > 0
    assert outcome.counts["steps tried again"] > 0
    assert told[-1].unfinished <= told[0].unfinished
    assert all(each.longest < DEADLINE for each in outcome.recovery.values())
    assert outcome.directory is None
