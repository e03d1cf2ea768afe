"""What starts with a rule read: the rows that have the keys, by the index of keys, however many others there are."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.orm import Session

from sqla_durable.models import Workflow
from sqla_durable.store import conflicts
from sqla_durable.store.statements import Statement, batch_parameter
from tests.store.plans import explain, fill

STATEMENTS: dict[str, Statement] = {
    name: getattr(conflicts, name)
    for name in ("_HOLDERS", "_REPLACE", "_TAKE_KEY")  # they are the module's own
}


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
@pytest.mark.parametrize("count", [1, 50])
def test_each_statement_reads_the_rows_that_have_the_keys(engine: Engine, count: int, mode: str) -> None:
    with Session(engine) as session:
        fill(session)
        session.execute(text("UPDATE durable.workflow SET key = CAST(id AS text)"))
        session.execute(text("ANALYZE durable.workflow"))
        session.commit()
        known = session.execute(select(Workflow.id, Workflow.key).limit(count)).all()
        rows = [
            {
                "id": id_.hex,
                "holder": id_.hex,
                "name": "checkout",
                "key": key,
                "unique": "unfinished",
                "input": "{}",
                "queue": "default",
                "priority": 0,
                "detached": False,
            }
            for id_, key in known
        ]
        session.rollback()
        for name, statement in STATEMENTS.items():
            plan = explain(session, statement, batch_parameter("batch", rows), mode=mode)
            assert not plan.scans("workflow"), (name, plan)
            assert plan.uses("workflow_pkey" if name == "_TAKE_KEY" else "workflow_name_key_key"), (name, plan)
            assert plan.buffers() <= 8 * count, (name, plan)
