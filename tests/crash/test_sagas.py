"""SIGKILL among the compensations of a workflow whose deadline has come: each is carried out once all the same."""

from __future__ import annotations

import signal

from sqlalchemy import Engine, func, select, update
from sqlalchemy.orm import Session

from sqla_durable import Workflow, WorkflowStatus
from tests.crash import child, ledger
from tests.store import races
from tests.support.domain import Entry


def test_worker_killed_among_the_compensations_of_an_overdue_workflow_is_followed_by_one_that_goes_on(
    database_url: str, engine: Engine
) -> None:
    (workflow_id,) = ledger.start(engine, ["trip"])

    def record() -> Workflow:
        with Session(engine) as session:
            return session.get_one(Workflow, workflow_id)

    with child.worker(database_url, child.Plan("compensation after", 2)) as process:
        races.wait_until(lambda: record().awaits, what="the suspension")
        with Session(engine) as session, session.begin():
            session.execute(update(Workflow).values(deadline_at=func.statement_timestamp()))
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
    assert record().cancellation == "overdue"
    assert record().finished_at is None
    with child.worker(database_url):
        ledger.wait_until_finished(engine)
    assert (record().status, (record().error or {})["type"]) == (
        WorkflowStatus.FAILED,
        "sqla_durable.errors:WorkflowTimeoutError",
    )
    with Session(engine) as session:
        booked = session.execute(select(Entry.account, Entry.cents).order_by(Entry.id)).all()
    account = str(workflow_id)
    assert [(name.removeprefix(account), cents) for name, cents in booked] == [
        ("/0", 1),
        ("/1", 1),
        ("/1", -1),
        ("/0", -1),
    ]
