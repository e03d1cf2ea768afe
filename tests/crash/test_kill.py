"""SIGKILL on real workers, between steps and inside them; the ledger tells whether anything was lost or came twice."""

from __future__ import annotations

import random
import signal

import pytest
from sqlalchemy import Engine

from tests.crash import child, ledger
from tests.crash.application import POINTS

SEED = 20


@pytest.mark.timeout(180)
def test_workers_killed_at_every_point_lose_nothing_and_repeat_nothing(database_url: str, engine: Engine) -> None:
    """Twenty kills at chosen points, and ten wherever the process happens to be."""
    # behaviour: R1 E2 T1 T2
    chance = random.Random(SEED)
    plans = [child.Plan(point, visits) for point in POINTS for visits in (1, chance.randint(2, 6))]
    chance.shuffle(plans)
    deaths = 0
    for plan in plans:
        ledger.start(engine, ["sync", "async"] * 2)
        with child.worker(database_url, plan) as process:
            process.join(30)
            deaths += process.exitcode == -signal.SIGKILL
    for _ in range(10):
        ledger.start(engine, ["sync", "async"] * 20)
        with child.worker(database_url) as process:
            process.join(chance.uniform(0.1, 0.6))
            assert process.exitcode is None
            process.kill()
            process.join()
            deaths += 1
    with child.worker(database_url), child.worker(database_url):
        ledger.wait_until_finished(engine, seconds=60)
    assert deaths == len(plans) + 10 == 30
    workflows = ledger.check_transfers(engine)
    assert len(workflows) == 4 * len(plans) + 40 * 10
    assert max(each.attempt for each in workflows) > 1
