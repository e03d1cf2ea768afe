"""What the examination of a database reads: nothing of what is finished, however much that is."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from sqla_durable.store import diagnosis
from sqla_durable.store.statements import Statement
from tests.store.plans import Plan
from tests.support.forged import forged

FINISHED = (
    "INSERT INTO durable.workflow (name, status, output, finished_at) "
    "SELECT 'checkout', 'succeeded', '1', statement_timestamp() FROM generate_series(1, 3000)"
)
UNFINISHED = (
    "INSERT INTO durable.workflow (name, by) SELECT 'checkout', 'a' FROM generate_series(1, 20)",
    "INSERT INTO durable.queue (name, fifo, paused_at) VALUES ('default', 'block', statement_timestamp())",
    "INSERT INTO durable.queue_key (queue, by, paused_at) VALUES ('default', 'a', statement_timestamp())",
)
STATEMENTS = {name: value for name, value in vars(diagnosis).items() if isinstance(value, Statement)}


@pytest.mark.new_database
def test_no_statement_reads_the_finished_workflows(engine: Engine) -> None:
    with Session(engine) as session:
        with forged(session):
            session.execute(text(FINISHED))
        for each in UNFINISHED:
            session.execute(text(each))
        session.execute(text("ANALYZE durable.workflow"))
        plans = {name: explained(session, each) for name, each in STATEMENTS.items()}
    assert len(plans) == 11
    assert {name: plan for name, plan in plans.items() if plan.scans("workflow") or plan.buffers() > 100} == {}


def explained(session: Session, statement: Statement) -> Plan:
    made: Any = statement.made
    compiled = made.compile(dialect=session.get_bind().dialect)
    given = {"patience": timedelta(0), "queues": ["default"]}
    parameters = {name: given[name] for name in compiled.params}
    sql = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {compiled}"
    return Plan(session.connection().exec_driver_sql(sql, parameters).scalar_one()[0]["Plan"])
