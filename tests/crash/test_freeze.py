"""A frozen worker: another worker reclaims its workflows, and what the frozen one was doing never commits."""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from uuid import UUID

import pytest
from sqlalchemy import Engine, func, select, text
from sqlalchemy.orm import Session

from sqla_durable import Workflow, WorkflowStatus, models
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
        ids = ledger.start(engine, ["holding"] * count)
        races.wait_until(lambda: len(races.blocked_statements(engine)) == count, what="the steps being held")
        inside = races.blocked_statements(engine)
        assert frozen.pid is not None
        os.kill(frozen.pid, signal.SIGSTOP)
        with child.worker(database_url, queues=["default"], lease=timedelta(seconds=5)):
            races.wait_until(
                lambda: len(races.blocked_statements(engine).keys() - inside.keys()) == count, what="the reclaim"
            )
            gate.session.execute(text("SELECT pg_advisory_unlock_all()"))
            ledger.wait_until_finished(engine)
            os.kill(frozen.pid, signal.SIGCONT)
            # It goes on with new work, which nobody else takes.
            with Session(engine) as session:
                new = Workflow(name="holding", queue="mine", input={"account": "new"})
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


@pytest.mark.parametrize("name", ["holding_outside", "holding_outside_async"])
def test_a_worker_that_thaws_in_a_plain_step_records_neither_checkpoint_nor_outcome(
    database_url: str, engine: Engine, name: str
) -> None:
    """It has the step's result in its hands when it wakes up, and another worker has the workflow."""
    # behaviour: E7 R3
    with races.transaction(engine) as gate, child.worker(database_url, queues=["default", "mine"]) as frozen:
        gate.session.execute(text("SELECT pg_advisory_lock(:key)"), {"key": FROZEN})
        (workflow_id,) = ledger.start(engine, [name])
        races.wait_until(lambda: races.blocked_statements(engine), what="the step being held")
        old = _token(engine, workflow_id)
        assert frozen.pid is not None
        os.kill(frozen.pid, signal.SIGSTOP)
        with child.worker(database_url, queues=["default"], lease=timedelta(minutes=5)):
            races.wait_until(lambda: _token(engine, workflow_id) not in (old, None), what="the reclaim")
            races.wait_until(lambda: len(races.blocked_statements(engine)) == 2, what="both steps being held")
            new = _token(engine, workflow_id)
            os.kill(frozen.pid, signal.SIGCONT)
            races.wait_until(lambda: _has_a_lease(engine, 2), what="the frozen worker's new lease")
            gate.session.execute(text("SELECT pg_advisory_unlock_all()"))
            ledger.wait_until_finished(engine)
            (mine,) = _enqueue_mine(engine)
            races.wait_until(lambda: races.status_of(engine, mine) is WorkflowStatus.SUCCEEDED, what="new work")
    with Session(engine) as session:
        record = session.get_one(Workflow, workflow_id)
        assert (record.status, record.attempt, record.token) == (WorkflowStatus.SUCCEEDED, 2, new)
        assert [step.attempt for step in record.steps] == [2]


def _token(engine: Engine, workflow_id: UUID) -> UUID | None:
    with Session(engine) as session:
        return session.get_one(Workflow, workflow_id).token


def _has_a_lease(engine: Engine, count: int) -> bool:
    statement = select(func.count()).where(models.Worker.lease_expires_at > func.statement_timestamp())
    with Session(engine) as session:
        return session.scalars(statement).one() == count


def _enqueue_mine(engine: Engine) -> list[UUID]:
    with Session(engine) as session:
        return races.enqueue(session, name="small", queue="mine", input={"account": "new"})


def _in_transaction(engine: Engine, pids: set[int]) -> bool:
    statement = text("SELECT count(*) FROM pg_stat_activity WHERE pid = ANY(:pids) AND state LIKE '%in transaction%'")
    with engine.connect() as connection:
        return bool(connection.execute(statement, {"pids": list(pids)}).scalar_one() > 0)
