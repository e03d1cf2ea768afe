"""A frozen worker: another takes over, and what the frozen one was doing never commits."""

from __future__ import annotations

import os
import signal
from datetime import timedelta

import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.orm import Session

from sqla_durable import Workflow, WorkflowStatus
from tests.crash import child, ledger
from tests.crash.application import FROZEN
from tests.store import races
from tests.support.domain import Entry


@pytest.mark.parametrize("count", [1, 5])
def test_a_worker_that_thaws_after_its_lease_commits_nothing_of_what_it_lost(
    database_url: str, engine: Engine, count: int
) -> None:
    # behaviour: E7 R1 R3 T5
    with races.transaction(engine) as gate, child.worker(database_url, queues=["default", "mine"]) as frozen:
        gate.session.execute(text("SELECT pg_advisory_lock(:key)"), {"key": FROZEN})
        ids = ledger.start(engine, ["held"] * count)
        races.wait_until(lambda: len(races.blocked_statements(engine)) == count, what="the steps being held")
        inside = races.blocked_statements(engine)
        assert frozen.pid is not None
        os.kill(frozen.pid, signal.SIGSTOP)
        with child.worker(database_url, queues=["default"], lease=timedelta(seconds=5)):
            races.wait_until(
                lambda: len(races.blocked_statements(engine).keys() - inside.keys()) == count, what="the takeover"
            )
            gate.session.execute(text("SELECT pg_advisory_unlock_all()"))
            ledger.wait_until_finished(engine)
            os.kill(frozen.pid, signal.SIGCONT)
            # It goes on with new work, which nobody else takes.
            with Session(engine) as session:
                new = Workflow(name="held", queue="mine", input={"account": "new"})
                session.add(new)
                session.commit()
                new_id = new.id
            races.wait_until(lambda: races.status_of(engine, new_id) is WorkflowStatus.SUCCEEDED)
            races.wait_until(lambda: not _in_transaction(engine, set(inside)), what="the old steps' end")
    with Session(engine) as session:
        accounts = sorted(session.scalars(select(Entry.account)))
        records = session.scalars(select(Workflow).where(Workflow.id.in_(ids))).all()
        assert accounts == sorted([f"{each}/{number}" for each in ids for number in (0, 1)] + ["new/0", "new/1"])
        for each in records:
            assert (each.status, each.attempt) == (WorkflowStatus.SUCCEEDED, 2)
            assert [(step.key, step.attempt) for step in each.steps] == [("hold", 2), ("credit", 2)]


def _in_transaction(engine: Engine, pids: set[int]) -> bool:
    statement = text("SELECT count(*) FROM pg_stat_activity WHERE pid = ANY(:pids) AND state LIKE '%in transaction%'")
    with engine.connect() as connection:
        return bool(connection.execute(statement, {"pids": list(pids)}).scalar_one() > 0)
