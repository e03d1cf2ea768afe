"""What the verbs send to PostgreSQL, and how it is executed beside many other rows."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from sqla_durable import manage
from tests.manage import histories
from tests.manage.histories import FAILED, step
from tests.store import plans, races
from tests.support.statements import executed_on

Verb = Callable[[Session, UUID], Any]
VERBS: dict[str, Verb] = {
    "cancel": manage.cancel,
    "resume": manage.resume,
    "retry": manage.retry,
    "rewind": lambda session, workflow_id: manage.rewind(session, workflow_id, to_step="b"),
    "delete": manage.delete,
    "fork": lambda session, workflow_id: manage.fork(session, workflow_id, from_step="b", outcomes={"a": 1}),
}


OTHERS = {
    "step": (
        "key, name, position, status, output, attempt, started_at",
        "'x', 'x', 1, 'succeeded', '1', 1, statement_timestamp()",
    ),
    "event": ("key, value", "'x', '1'"),
    "stream_item": ("name, number, value, attempt", "'x', 0, '1', 1"),
    "signal": ("name", "'x'"),
}


def prepared(session: Session, name: str) -> UUID:
    """Make a workflow with a child, where the verb finds it."""
    fence = histories.claimed(session)
    histories.record(session, [step(fence, "a", 1), step(fence, "b", 2, FAILED)])
    histories.shown(session, fence.workflow_id, "a")
    child = histories.child(session, fence.workflow_id)
    if name != "cancel":
        manage.cancel(session, child)
        histories.fail(session, fence)
    if name == "resume":
        session.execute(text("UPDATE durable.workflow SET status = 'cancelled', error = NULL WHERE status = 'failed'"))
    session.commit()
    return fence.workflow_id


def sent(session: Session, verb: Verb, workflow_id: UUID) -> list[tuple[str, Any]]:
    """Execute a verb and give its statements with their parameters."""
    with executed_on(session.connection()) as found:
        assert verb(session, workflow_id)
    return [each for each in found if "durable." in each[0] and "to_regclass" not in each[0]]


@pytest.mark.parametrize("name", VERBS)
def test_rules_that_can_be_read_off_the_sql(session: Session, name: str) -> None:
    statements = sent(session, VERBS[name], prepared(session, name))
    assert statements
    for sql, _ in statements:
        assert not re.search(r"\b(now|clock_timestamp|current_timestamp|random|gen_random_uuid)\b", sql, re.IGNORECASE)
        # What is set may be a parameter; what is compared is not.
        compared = re.findall(r"status (?:=|<>|IN) (\S+)", re.sub(r"SET status=\S+", "", sql))
        assert all(each.strip("()").startswith("'") for each in compared), sql
        assert set(re.findall(r"FOR (?:NO KEY )?(?:UPDATE|SHARE)", sql)) <= {"FOR NO KEY UPDATE"}
        if "FOR NO KEY UPDATE" in sql:
            assert re.search(r"ORDER BY durable\.workflow\.id +FOR NO KEY UPDATE", sql), sql


def test_a_verb_for_one_workflow_reads_no_table_from_end_to_end(engine: Engine, session: Session) -> None:
    """Each of them on the same rows: making these takes longer."""
    races.enqueue(session)
    plans.fill(session)
    with engine.begin() as connection:
        connection.execute(text("UPDATE durable.workflow SET queue = 'other'"))
        for table, (columns, values) in OTHERS.items():
            connection.execute(
                text(f"INSERT INTO durable.{table} (workflow_id, {columns}) SELECT id, {values} FROM durable.workflow")
            )
        connection.execute(text("ANALYZE"))
    for name, verb in VERBS.items():
        statements = sent(session, verb, prepared(session, name))
        session.rollback()
        for sql, parameters in statements:
            cursor = session.connection().exec_driver_sql(f"EXPLAIN {sql}", parameters)
            plan = "\n".join(cursor.scalars())
            assert not re.search(r"Seq Scan on (workflow|step|event|stream_item|signal)\b", plan), f"{sql}\n{plan}"
        session.rollback()
