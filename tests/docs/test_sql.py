"""The SQL of docs/sql.md: each query is executed as psql does it, returns rows, and can use the indexes named there."""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, inspect, text
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable import (
    Event,
    Queue,
    Schedule,
    Signal,
    Step,
    StepStatus,
    StreamItem,
    Workflow,
    WorkflowStatus,
    metadata,
)
from sqla_durable.models import Audit, Worker
from sqla_durable.models.views import VIEWS
from tests.store.plans import Plan
from tests.support.databases import Databases
from tests.support.domain import Order
from tests.support.forged import forged

PAGE = Path(__file__).parents[2] / "docs" / "sql.md"
BLOCK = re.compile(r"(?P<before>[^\n]+)\n\n```sql\n(?P<query>.*?)\n```", re.S)
NOW = datetime.now(UTC)
HOUR = timedelta(hours=1)
SUSPENDED, FAILED = WorkflowStatus.SUSPENDED, WorkflowStatus.FAILED
ERROR = {"type": "builtins:ValueError", "message": "no", "traceback": "ValueError: no"}


@dataclass(frozen=True)
class Recipe:
    """A query of the page, with the sentence before it."""

    before: str
    query: str

    @property
    def indexes(self) -> list[str]:
        named = re.search(r"Index: (.*)$", self.before)
        return re.findall(r"`(\w+)`", named[1]) if named else []

    @property
    def sets_variables(self) -> bool:
        return self.query.endswith(r"\gset")

    @property
    def statement(self) -> Any:
        return text(re.sub(r":'(\w+)'", r"CAST(:\1 AS uuid)", self.query.removesuffix(r" \gset")))


RECIPES = [Recipe(each["before"], each["query"]) for each in BLOCK.finditer(PAGE.read_text())]


@pytest.fixture(scope="module")
def filled(databases: Databases) -> Generator[Engine]:
    with databases.migrated("durable") as url:
        engine = create_engine(url)
        try:
            with Session(engine) as session, forged(session):
                _fill(session)
                session.commit()
            yield engine
        finally:
            engine.dispose()


def test_each_query_returns_rows_by_the_indexes_that_the_page_names(filled: Engine) -> None:
    # behaviour: M4
    assert len(RECIPES) > 40
    variables: dict[str, Any] = {}
    with filled.connect() as connection:
        connection.execute(text("SET enable_seqscan = off"))  # the tables are small
        for each in RECIPES:
            rows = connection.execute(each.statement, _used(each, variables)).mappings().all()
            assert rows, each.query
            if each.sets_variables:
                variables |= rows[0]
            else:
                plan = _plan(connection, each, variables)
                unused = [index for index in each.indexes if not plan.uses(index)]
                assert not unused, (each.query, unused, plan)
                assert each.indexes or "Reads" in each.before, each.before
    assert set(variables) == {"since", "workflow"}


def _used(recipe: Recipe, variables: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in variables.items() if f":'{name}'" in recipe.query}


def _plan(connection: Connection, recipe: Recipe, variables: dict[str, Any]) -> Plan:
    explained = text(f"EXPLAIN (FORMAT JSON) {recipe.statement.text}")
    (plan,) = connection.execute(explained, _used(recipe, variables)).scalar_one()
    return Plan(plan["Plan"])


def test_the_page_lists_the_columns_of_each_view(filled: Engine) -> None:
    page = PAGE.read_text()
    for view in VIEWS:
        (described,) = re.findall(rf"^### `{view}`\n\n\| column \|.*?\n\| --- .*?\n(.*?)\n\n", page, re.M | re.S)
        named = [name for line in described.splitlines() for name in re.findall(r"`(\w+)`", line.split(" | ")[0])]
        found: list[str] = [each["name"] for each in inspect(filled).get_columns(view, schema="durable")]
        assert sorted(named) == sorted(found), view


def test_named_indexes_are_in_the_metadata() -> None:
    known = {str(index.name) for table in metadata.tables.values() for index in table.indexes}
    known |= {str(table.primary_key.name) for table in metadata.tables.values()}
    assert {index for each in RECIPES for index in each.indexes} <= known


def _fill(session: Session) -> None:
    """Add a workflow that waits and what belongs to it, and some of each other kind that the page asks for."""
    tagged = {"tags": {"tenant": "7"}, "version": "2"}
    worker = Worker(id=uuid7(), name="w", queues=["default"], slots=4, lease_expires_at=NOW + HOUR, heartbeat_at=NOW)
    session.add_all([worker, Queue(name="limited", per_key=1)])
    session.add(Schedule(name="nightly", workflow="report", cron=["0 3 * * *"]))
    session.flush()
    main = _workflow("checkout", key="order-1", status=SUSPENDED, awaits=[{"signal": "approved"}], **tagged)
    main.wake_at, main.deadline_at = NOW + HOUR / 2, NOW + HOUR
    old = NOW - 2 * HOUR
    main.created_at = main.enqueued_at = main.started_at = old
    main.steps = [
        _step("charge", 1, StepStatus.SUCCEEDED, tries=3, output=1, started_at=old, finished_at=old + HOUR / 60),
        _step("signal:approved", 2, StepStatus.WAITING, started_at=old, finished_at=old),
    ]
    main.signals = [Signal(name="more")]
    main.events = [Event(key="status", value="packing")]
    retried = _workflow("pay", status=SUSPENDED, wake_at=NOW + HOUR / 4, crashes=1)
    retried.steps = [_step("call", 1, StepStatus.RETRYING, tries=2, error=ERROR, wake_at=NOW + HOUR / 4)]
    running = _workflow(
        "mail", queue="limited", by="a", status=WorkflowStatus.RUNNING, token=uuid7(), schedule="nightly"
    )
    running.worker_id = worker.id
    running.steps = [_step("send", 1, StepStatus.RUNNING, details={"sent": 7})]
    pending = Workflow(name="mail", queue="limited", by="a")
    session.add_all([main, retried, running, pending])
    session.flush()
    fork = _workflow("checkout", status=FAILED, error=ERROR, forked_from=main.id, finished_at=NOW, **tagged)
    fork.former_key = "order-0"
    fork.steps = [_step("charge", 1, StepStatus.FAILED, error=ERROR)]
    child = _workflow("ship", parent_id=main.id, status=WorkflowStatus.SUCCEEDED, output=1, finished_at=NOW)
    child.steps = [_step("call", 1, StepStatus.FAILED, error=ERROR)]
    session.add_all([fork, child])
    session.flush()
    session.add(Workflow(name="ship", parent_id=fork.id, status=SUSPENDED))
    session.add(StreamItem(workflow_id=main.id, name="log", number=0, value="a", attempt=1))
    session.add(Audit(who="ada", verb="cancel", subject="checkout", workflow_id=main.id, reason="twice"))
    session.add(Order(id=1, customer="Bob", total_cents=1, workflow_id=main.id))


def _workflow(name: str, **columns: Any) -> Workflow:
    times = {"created_at": NOW, "enqueued_at": NOW, "started_at": NOW + HOUR / 3600}
    return Workflow(name=name, **times | columns)


def _step(name: str, position: int, status: StepStatus, **columns: Any) -> Step:
    times = {"started_at": NOW, "finished_at": NOW + HOUR / 3600}
    return Step(key=name, name=name, position=position, status=status, attempt=1, **times | columns)
