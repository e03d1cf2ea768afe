"""SIGKILL on the worker of a parent that fails beside its map: the children that it held go on all the same."""

from __future__ import annotations

import signal

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from sqla_durable import Workflow, WorkflowStatus, send_signal
from tests.crash import child, ledger
from tests.store import races


def test_waiting_children_go_on_wherever_the_worker_of_their_parent_dies(database_url: str, engine: Engine) -> None:
    (parent_id,) = ledger.start(engine, ["gives_up"])

    def children() -> list[WorkflowStatus]:
        with Session(engine) as session:
            return list(session.scalars(select(Workflow.status).where(Workflow.parent_id == parent_id)))

    def parent() -> Workflow:
        with Session(engine) as session:
            return session.get_one(Workflow, parent_id)

    with child.worker(database_url, child.Plan("before the failure"), queues=["default"]) as process:
        races.wait_until(lambda: parent().awaits, what="the suspension")
        with Session(engine) as session, session.begin():
            send_signal(session, parent_id, "fail")
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
    with child.worker(database_url, queues=["default"]) as process:
        races.wait_until(lambda: parent().status is WorkflowStatus.FAILED, what="the parent's failure")
        process.kill()
    with child.worker(database_url, queues=["others"]):
        ledger.wait_until_finished(engine)
    assert children() == [WorkflowStatus.SUCCEEDED] * 3
