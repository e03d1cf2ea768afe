"""SIGKILL on real workers, between steps and inside them; the ledger shows whether anything was lost or came twice."""

from __future__ import annotations

import random
import signal

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from sqla_durable import Workflow, WorkflowStatus
from sqla_durable.operations.history import FIRED
from tests.crash import child, ledger
from tests.crash.application import POINTS
from tests.support.domain import Entry

SEED = 20


@pytest.mark.timeout(180)
def test_workers_killed_at_every_point_lose_nothing_and_repeat_nothing(
    database_url: str, engine: Engine, thorough: bool
) -> None:
    """With `--all`, twenty kills at chosen points and ten wherever the process happens to be; by default, fewer."""
    # behaviour: R1 E2 T1 T2
    chance = random.Random(SEED)
    plans = [child.Plan(point, visits) for point in POINTS for visits in (1, chance.randint(2, 6))]
    if not thorough:  # each point once, on the first visit and on a later one by turns
        plans = [each for number, each in enumerate(plans) if number % 4 in (0, 3)]
    chance.shuffle(plans)
    anywhere = 10 if thorough else 3
    deaths = 0
    for plan in plans:
        ledger.start(engine, ["sync", "async"] * 2)
        with child.worker(database_url, plan) as process:
            process.join(30)
            deaths += process.exitcode == -signal.SIGKILL
    for _ in range(anywhere):
        ledger.start(engine, ["sync", "async"] * 20)
        with child.worker(database_url) as process:
            process.join(chance.uniform(0.1, 0.6))
            assert process.exitcode is None
            process.kill()
            process.join()
            deaths += 1
    with child.worker(database_url), child.worker(database_url):
        ledger.wait_until_finished(engine, seconds=60)
    assert {each.place for each in plans} == set(POINTS)
    assert deaths == len(plans) + anywhere
    workflows = ledger.check_transfers(engine)
    assert len(workflows) == 4 * len(plans) + 40 * anywhere
    assert max(each.attempt for each in workflows) > 1


# behaviour: A1 A2
def test_what_was_called_off_is_not_shipped_after_a_kill(database_url: str, engine: Engine) -> None:
    (workflow_id,) = ledger.start(engine, ["called_off"])
    with child.worker(database_url, child.Plan("async plain before")) as process:
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
    with child.worker(database_url):
        ledger.wait_until_finished(engine)
    with Session(engine) as session:
        written = session.scalars(select(Entry.account).where(Entry.note.is_(None))).all()
        workflow = session.get_one(Workflow, workflow_id)
        assert (workflow.status, workflow.attempt) == (WorkflowStatus.SUCCEEDED, 2)
        assert [(each.key, str(each.status)) for each in workflow.steps if each.name != FIRED] == [
            ("ship", "failed"),
            ("credit_async", "succeeded"),
            ("call_async", "succeeded"),
        ]
    assert list(written) == [f"{workflow_id}/called off"]
