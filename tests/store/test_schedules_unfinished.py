"""Which workflows a schedule counts as its own."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from sqla_durable import Durable, Workflow, WorkflowStatus, manage

durable = Durable()


@durable.workflow
def report() -> None: ...


@pytest.mark.parametrize("overlap", ["skip", "queue_one", "cancel_running"])
def test_unfinished_workflows_of_other_schedules_do_not_count(engine: Engine, overlap: Any) -> None:
    with Session(engine) as session:
        for name in ("one", "other"):
            manage.put_schedule(session, name, report.bind(), cron="0 3 * * *", overlap=overlap)
        assert [manage.run_schedule(session, name) for name in ("one", "other")] == [True, True]
        started = session.execute(select(Workflow.schedule, Workflow.status).order_by(Workflow.id)).all()
    assert [tuple(each) for each in started] == [("one", WorkflowStatus.PENDING), ("other", WorkflowStatus.PENDING)]
