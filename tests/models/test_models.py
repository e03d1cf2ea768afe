"""The database by itself: defaults, refusals, names, and what an application sees through relationships."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, Engine, ForeignKeyConstraint, create_engine, func, inspect, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, joinedload, selectinload, sessionmaker

from sqla_durable import manage, migrations
from sqla_durable.errors import SessionError, UsageError
from sqla_durable.models import REVISION, Queue, Step, Worker, Workflow, metadata
from sqla_durable.models.base import StepStatus, WorkflowStatus
from tests.support.domain import Order
from tests.support.forged import forged

every_schema = pytest.mark.parametrize("durable_schema", ["durable", "tenant_7"], indirect=True)

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def test_every_constraint_and_index_has_a_name() -> None:
    for table in metadata.tables.values():
        assert all(constraint.name for constraint in table.constraints), table
        assert all(index.name for index in table.indexes), table
        for constraint in table.constraints:
            if isinstance(constraint, ForeignKeyConstraint):
                assert constraint.ondelete


def test_names_in_the_database_are_those_of_the_metadata(engine: Engine) -> None:
    inspector = inspect(engine)
    for table in metadata.tables.values():
        found = {each["name"] for each in inspector.get_check_constraints(table.name, schema="durable")}
        found |= {each["name"] for each in inspector.get_foreign_keys(table.name, schema="durable")}
        found.add(inspector.get_pk_constraint(table.name, schema="durable")["name"])
        assert found == {str(constraint.name) for constraint in table.constraints}


def test_name_and_input_alone_are_a_pending_workflow(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(
            text("""INSERT INTO durable.workflow (name, input) VALUES ('checkout', '{"order_id": 1}')""")
        )
    with Session(engine) as session:
        workflow = session.scalars(select(Workflow)).one()
        now = session.scalars(select(func.now())).one()
    assert workflow.status is WorkflowStatus.PENDING
    assert (workflow.queue, workflow.priority, workflow.attempt) == ("default", 0, 1)
    assert workflow.input == {"order_id": 1}
    assert workflow.id.version == 7
    assert (
        manage.id_at(workflow.created_at) <= workflow.id < manage.id_at(workflow.created_at + timedelta(milliseconds=1))
    )
    assert workflow.created_at == workflow.enqueued_at <= now
    assert [workflow.key, workflow.token, workflow.worker_id, workflow.wake_at] == [None] * 4
    assert [workflow.output, workflow.error, workflow.started_at, workflow.finished_at] == [None] * 4


def test_name_alone_has_no_arguments(session_factory: sessionmaker[Session]) -> None:
    with session_factory.begin() as session:
        workflow = Workflow(name="checkout")
        session.add(workflow)
        session.flush()
        assert workflow.id.version == 7
        assert workflow.input == {}
        assert workflow.status is WorkflowStatus.PENDING


@pytest.mark.parametrize(
    ("constraint", "columns"),
    [
        ("workflow_name_check", {"name": ""}),
        ("workflow_name_check", {"name": " \t\n"}),
        ("workflow_key_check", {"key": ""}),
        ("workflow_key_check", {"key": "  "}),
        ("workflow_queue_check", {"queue": " "}),
        ("workflow_status_check", {"status": "reclaimed"}),
        ("workflow_input_check", {"input": "[1]"}),
        ("workflow_input_check", {"input": "null"}),
        ("workflow_headers_check", {"headers": "[1]"}),
        ("workflow_headers_check", {"headers": "null"}),
        ("workflow_headers_check", {"headers": '{"tenant": 1}'}),
        ("workflow_attempt_check", {"attempt": 0}),
        ("workflow_name_check", {"name": "n" * 1_001}),
        ("workflow_times_check", {"enqueued_at": "-infinity"}),
        ("workflow_times_check", {"deadline_at": "infinity"}),
        ("workflow_times_check", {"created_at": "0044-03-15 BC"}),
        ("workflow_times_check", {"status": "suspended", "wake_at": "10000-01-01"}),
        ("workflow_timeout_check", {"timeout": "293000 years"}),
        ("workflow_timeout_check", {"timeout": "-1 second"}),
        ("workflow_timeout_check", {"timeout": "71582788 months -2147483640 days"}),
        ("workflow_timeout_check", {"timeout": "-1000000 days 24000001 hours"}),
        ("workflow_awaits_check", {"status": "suspended", "awaits": "[1]"}),
        ("workflow_awaits_check", {"status": "suspended", "awaits": '[{"signal": 1}]'}),
        ("workflow_awaits_check", {"status": "suspended", "awaits": '[{"children": ["x"], "open": 0}]'}),
        ("workflow_awaits_check", {"status": "suspended", "awaits": '[{"children": [], "open": 1e20}]'}),
        ("workflow_error_check", {"status": "failed", "finished_at": NOW, "error": "null"}),
        ("workflow_error_check", {"status": "failed", "finished_at": NOW, "error": '"type"'}),
        ("workflow_error_check", {"status": "failed", "finished_at": NOW, "error": '["type"]'}),
        ("workflow_error_check", {"status": "failed", "finished_at": NOW, "error": '{"message": ""}'}),
        ("workflow_error_check", {"status": "cancelled", "finished_at": NOW, "error": "{}"}),
    ],
)
def test_illegal_workflow_is_refused_by_a_named_constraint(
    engine: Engine, constraint: str, columns: dict[str, Any]
) -> None:
    with engine.connect() as connection, pytest.raises(IntegrityError, match=constraint):
        insert(connection, "workflow", {"name": "checkout"} | columns)


@pytest.mark.parametrize(
    ("constraint", "columns"),
    [
        ("step_key_check", {"key": " "}),
        ("step_status_check", {"status": "suspended", "output": None}),
        ("step_error_check", {"status": "failed", "output": None, "error": '"type"'}),
        ("step_error_check", {"status": "failed", "output": None, "error": "{}"}),
        ("step_counts_check", {"position": 0}),
        ("step_counts_check", {"attempt": 0}),
        ("step_counts_check", {"tries": 0}),
        ("step_times_check", {"finished_at": datetime(2025, 1, 1, tzinfo=UTC)}),
        ("step_times_check", {"finished_at": "infinity"}),
        ("step_key_check", {"key": "k" * 2_501}),
        ("step_workflow_id_fkey", {"workflow_id": uuid4()}),
    ],
)
def test_illegal_step_is_refused_by_a_named_constraint(
    engine: Engine, constraint: str, columns: dict[str, Any]
) -> None:
    with engine.connect() as connection:
        step = new_step(connection) | {"status": "succeeded", "output": "{}"}
        with pytest.raises(IntegrityError, match=constraint):
            insert(connection, "step", step | columns)


def test_illegal_queue_and_worker_are_refused(engine: Engine) -> None:
    with engine.connect() as connection:
        assert not accepts(connection, "queue", {"name": " "})
        assert not accepts(connection, "queue", {"name": "mail", "paused_at": "infinity"})
        worker = {"id": uuid4(), "name": "a", "queues": ["default"], "heartbeat_at": NOW}
        assert not accepts(connection, "worker", worker | {"lease_expires_at": NOW})
        assert accepts(connection, "worker", worker | {"lease_expires_at": datetime(2026, 1, 2, tzinfo=UTC)})


def test_second_workflow_of_a_name_and_key_is_refused(engine: Engine) -> None:
    with engine.connect() as connection:
        insert(connection, "workflow", {"name": "checkout", "key": "1"})
        assert accepts(connection, "workflow", {"name": "refund", "key": "1"})
        assert accepts(connection, "workflow", {"name": "checkout", "key": None})
        assert accepts(connection, "workflow", {"name": "checkout", "key": None})
        with pytest.raises(IntegrityError, match="workflow_name_key_key"):
            insert(connection, "workflow", {"name": "checkout", "key": "1"})


# behaviour: E9
@pytest.mark.parametrize("attribute", ["name", "key", "queue"])
@pytest.mark.parametrize("value", ["", " ", "\t\n"])
def test_blank_name_key_or_queue_is_refused_before_it_reaches_the_database(attribute: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"a workflow's {attribute} must not be blank"):
        Workflow(**{"name": "checkout", attribute: value})


@every_schema
def test_orders_are_joined_to_workflows_and_steps(session_factory: sessionmaker[Session]) -> None:
    with session_factory.begin() as session:
        session.add(Order(customer="Ada", total_cents=500, workflow=checkout("reserve", "charge")))
        session.add(Order(customer="Bob", total_cents=100))
    with session_factory() as session:
        query = (
            select(Order.customer, Step.name)
            .join(Order.workflow)
            .join(Workflow.steps)
            .where(Workflow.status == WorkflowStatus.PENDING)
            .order_by(Step.position)
        )
        assert [tuple(row) for row in session.execute(query)] == [("Ada", "reserve"), ("Ada", "charge")]
        waiting = select(func.count()).select_from(Order).outerjoin(Order.workflow).where(Workflow.id.is_(None))
        assert session.scalar(waiting) == 1


@every_schema
@pytest.mark.parametrize("load", [selectinload, joinedload])
def test_orders_load_workflows_and_steps_eagerly(session_factory: sessionmaker[Session], load: Any) -> None:
    with session_factory.begin() as session:
        session.add(Order(customer="Ada", total_cents=500, workflow=checkout("reserve", "charge")))
    with session_factory() as session:
        query = select(Order).options(load(Order.workflow).options(load(Workflow.steps)))
        order = session.scalars(query).unique().one()
    assert order.workflow is not None
    assert [step.name for step in order.workflow.steps] == ["reserve", "charge"]


@every_schema
def test_deleted_workflow_takes_its_steps_along_and_leaves_the_order(session_factory: sessionmaker[Session]) -> None:
    with session_factory.begin() as session:
        session.add(Order(customer="Ada", total_cents=500, workflow=checkout("reserve")))
    with session_factory.begin() as session:
        session.delete(session.scalars(select(Workflow)).one())
    with session_factory() as session:
        assert session.scalar(select(func.count()).select_from(Step)) == 0
        assert session.scalars(select(Order)).one().workflow_id is None


def test_running_workflow_knows_its_worker_and_the_worker_its_workflows(
    session_factory: sessionmaker[Session],
) -> None:
    with session_factory.begin() as session:
        worker = Worker(name="a", queues=["default"], lease_expires_at=datetime(2999, 1, 1, tzinfo=UTC))
        session.add_all([worker, Workflow(name="checkout"), Workflow(name="idle")])
        session.flush()
        session.execute(
            update(Workflow)
            .where(Workflow.name == "checkout")
            .values(status=WorkflowStatus.RUNNING, token=uuid4(), worker_id=worker.id, started_at=NOW)
        )
    with session_factory() as session:
        worker = session.scalars(select(Worker).options(selectinload(Worker.workflows))).one()
        assert [workflow.name for workflow in worker.workflows] == ["checkout"]
        assert worker.workflows[0].worker is worker
        idle = session.scalars(select(Workflow).options(joinedload(Workflow.worker)).filter_by(name="idle")).one()
        assert idle.worker is None


def test_records_show_what_they_are() -> None:
    workflow = checkout("reserve")
    assert repr(workflow) == "<Workflow 'checkout'>"
    assert repr(workflow.steps[0]) == "<Step 'reserve' succeeded>"
    assert repr(Queue(name="mail")) == "<Queue 'mail'>"
    assert repr(Queue(name="mail", paused_at=NOW)) == f"<Queue 'mail' {NOW}>"
    assert repr(Worker(name="a")) == "<Worker 'a'>"


def checkout(*steps: str) -> Workflow:
    return Workflow(
        name="checkout",
        steps=[
            Step(
                key=name,
                name=name,
                position=position,
                status=StepStatus.SUCCEEDED,
                output={},
                attempt=1,
                started_at=NOW,
            )
            for position, name in enumerate(steps, start=1)
        ],
    )


def new_step(connection: Connection) -> dict[str, Any]:
    """Return the columns of a step of a new workflow, but for its outcome."""
    workflow_id = uuid4()
    insert(connection, "workflow", {"id": workflow_id, "name": "checkout"})
    return {
        "workflow_id": workflow_id,
        "key": "charge",
        "name": "charge",
        "position": 1,
        "attempt": 1,
        "started_at": NOW,
        "finished_at": NOW,
    }


def accepts(connection: Connection, table: str, row: dict[str, Any]) -> bool:
    """Return whether the database would take the row; it does not keep it."""
    savepoint = connection.begin_nested()
    try:
        insert(connection, table, row)
    except IntegrityError:
        return False
    finally:
        savepoint.rollback()
    return True


def insert(connection: Connection, table: str, row: dict[str, Any]) -> None:
    """Insert by SQL, as any language would."""
    columns = ", ".join(json.dumps(name) for name in row)
    values = ", ".join(f":{name}" for name in row)
    with forged(connection, row if table == "workflow" else ()):
        connection.execute(text(f"INSERT INTO durable.{table} ({columns}) VALUES ({values})"), row)


async def test_relationship_is_awaited_in_async_code(database_url: str) -> None:
    engine = create_async_engine(database_url)
    async with AsyncSession(engine) as session:
        workflow = Workflow(name="w")
        session.add(workflow)
        await session.flush()
        await session.refresh(workflow)
        assert await workflow.awaitable_attrs.steps == []
    await engine.dispose()


def test_tables_are_not_made_in_another_database() -> None:
    engine = create_engine("sqlite://")
    with pytest.raises(SessionError, match="cannot be made in sqlite: durable workflows need PostgreSQL"):
        metadata.create_all(engine)
    with (
        engine.connect() as connection,
        Operations.context(MigrationContext.configure(connection)),
        pytest.raises(UsageError, match="this database is sqlite"),
    ):
        migrations.upgrade(REVISION)
    engine.dispose()
