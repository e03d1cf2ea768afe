"""Whose function is called: with a schema of another role's first on the search_path, still PostgreSQL's own."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import ColumnElement, Engine, SelectBase, TextClause, UpdateBase, create_engine, event, select, text
from sqlalchemy.dialects.postgresql import asyncpg, psycopg
from sqlalchemy.exc import IntegrityError, ProgrammingError
from sqlalchemy.orm import Session, joinedload, selectinload, sessionmaker

from sqla_durable import (
    Durable,
    Executor,
    Saga,
    Step,
    Worker,
    Workflow,
    WorkflowStatus,
    complete_callback,
    create_callback,
    get_event,
    heartbeat,
    manage,
    migrations,
    models,
    read_stream,
    send_signal,
    send_update,
    set_event,
    sleep,
    start_child,
    start_many,
    start_with_signal,
    wait_signal,
    wait_update,
    write_stream,
)
from sqla_durable.testing import advance
from tests.store.test_statements import statements as kept
from tests.support import hostile
from tests.support.catalogue import schemas
from tests.support.databases import Databases, migrate


@pytest.fixture(scope="module")
def trapped(databases: Databases) -> Generator[Engine]:
    """An engine of a database with our tables, whose search_path begins with the traps."""
    with databases.migrated(models.SCHEMA, used=False) as url:
        engine = create_engine(url)
        with engine.begin() as connection:
            hostile.set_traps(connection)
            connection.exec_driver_sql(f"ALTER DATABASE {engine.url.database} SET search_path = hostile, public")
        engine.dispose()
        yield engine
        engine.dispose()


def test_a_trap_is_found_and_called_where_a_name_or_a_type_leads_to_it(trapped: Engine) -> None:
    """What the other tests of this module would say of a statement as SQLAlchemy makes it."""
    careless = select(text("concat(name, '!'::varchar)"), text("input -> '1'")).select_from(models.Workflow)
    with trapped.connect() as connection:
        found = hostile.traps_of(connection, careless.compile(dialect=psycopg.dialect()))
        assert found == ["function hostile.concat(text,character varying)", "operator hostile.->(jsonb,jsonb)"]
    with trapped.connect() as connection, pytest.raises(ProgrammingError, match=hostile.SPRUNG):
        connection.execute(text("SELECT concat('a'::text, '!'::varchar)"))
    with trapped.connect() as connection, pytest.raises(ProgrammingError, match=hostile.SPRUNG):
        connection.execute(text("SELECT 'a'::text = 'b'::varchar"))


@pytest.mark.parametrize("dialect", [psycopg.dialect(), asyncpg.dialect()], ids=["psycopg", "asyncpg"])
def test_no_statement_of_the_store_refers_to_a_trap(trapped: Engine, dialect: Any) -> None:
    found: dict[str, list[str]] = {}
    with trapped.connect() as connection:
        for name, statement in kept():
            if isinstance(statement, (TextClause, ColumnElement)):
                continue
            compiled = statement.compile(dialect=dialect, compile_kwargs={"render_postcompile": True})
            found[name] = hostile.traps_of(connection, compiled)
    assert len(found) > 90
    assert {name: traps for name, traps in found.items() if traps} == {}


def test_what_an_application_compares_with_our_columns_is_sent_as_text(trapped: Engine) -> None:
    wanted = [
        select(Workflow).where(Workflow.name == "checkout", Workflow.status == WorkflowStatus.FAILED),
        select(Workflow).where(Workflow.status.in_([WorkflowStatus.PENDING, WorkflowStatus.RUNNING])),
        select(Workflow).where(Workflow.key.in_(["a", "b"]), Workflow.queue != "mail", Workflow.version.is_(None)),
        select(Workflow).where(Workflow.key.startswith("order-"), Workflow.name.like("check%"), Workflow.key > "b"),
        select(Workflow).options(selectinload(Workflow.steps), joinedload(Workflow.parent)),
        select(Step).where(Step.key == "charge", Step.status == "succeeded").order_by(Step.position),
    ]
    with trapped.connect() as connection:
        for each in wanted:
            compiled = each.compile(dialect=psycopg.dialect(), compile_kwargs={"render_postcompile": True})
            assert hostile.traps_of(connection, compiled) == [], each


@pytest.mark.parametrize("route", ["migrations", "create_all"])
def test_tables_that_are_made_with_such_a_path_refer_to_no_trap(trapped: Engine, route: str) -> None:
    """Defaults, constraints and indexes are bound when they are made: they would call the trap for everybody."""
    with trapped.begin() as connection:
        migrations.lock(connection)
        if route == "migrations":
            migrate(connection, route)
        else:
            other = connection.execution_options(schema_translate_map={models.SCHEMA: route})
            models.metadata.create_all(other, checkfirst=False)
            connection.execution_options(schema_translate_map={})
        assert hostile.referring_to_traps(connection) == []
        connection.exec_driver_sql(f"INSERT INTO {route}.workflow (name, timeout) VALUES ('checkout', '1 day')")
        with pytest.raises(IntegrityError, match="got status 'pending'"), connection.begin_nested():
            connection.exec_driver_sql(f"INSERT INTO {route}.workflow (name, finished_at) VALUES ('checkout', now())")
        if route == "migrations":
            with Operations.context(MigrationContext.configure(connection)):
                migrations.downgrade(models.REVISION, schema=route)
            assert route not in schemas(connection)


def test_a_trap_in_a_table_is_found(trapped: Engine) -> None:
    with trapped.connect() as connection:
        connection.exec_driver_sql("CREATE TABLE careless (a text CHECK (a <> 'b'::varchar) DEFAULT concat('a'::text))")
        assert len(hostile.referring_to_traps(connection)) == 2


durable = Durable()


@durable.step
def price(item: str) -> int:
    heartbeat({"item": item})
    return len(item)


@durable.step
def refund(session: Session, item: str) -> None:
    set_event("refunded", item, session=session)


@durable.workflow
def deliver(item: str) -> str:
    return f"{item} delivered"


@durable.workflow
def buy(item: str) -> list[Any]:
    """Do one thing of each kind."""
    with Saga() as saga:
        saga.add(refund, item)
        cents = price(item)
        set_event("priced", cents)
        write_stream("log", item)
        child = start_child(deliver, item)
        sleep(timedelta(milliseconds=5))
        payment = create_callback(str)
        set_event("token", payment.token)
        paid = payment.result()
        request = wait_update("address", str)
        request.reply(f"to {request.payload}")
        return [cents, child.result(), paid, request.payload, wait_signal("go", str)]


@durable.workflow
def fail(item: str) -> None:
    with Saga() as saga:
        saga.add(refund, item)
        raise LookupError(item)


@contextmanager
def recorded(engine: Engine) -> Generator[dict[str, Any]]:
    """Record what is executed, once each."""
    statements: dict[str, Any] = {}

    def record(*args: Any) -> None:
        compiled = args[4].compiled
        if compiled is not None and isinstance(compiled.statement, (SelectBase, UpdateBase)):
            statements[args[2]] = compiled

    event.listen(engine, "before_cursor_execute", record)
    yield statements
    event.remove(engine, "before_cursor_execute", record)


def test_starters_workers_and_operators_call_no_trap(trapped: Engine) -> None:
    """All that is executed from a start to the deletion, with traps that raise, and each statement looked through."""
    factory = sessionmaker(trapped)
    with recorded(trapped) as statements:
        with factory.begin() as session:
            bought = buy.options(key="order-1").start(session, "book").id
            start_many(session, [buy.options(key=f"order-{n}", queue="later").bind("pen") for n in (1, 2, 3)])
            delayed = buy.options(delay=timedelta(days=1), timeout=timedelta(days=2)).start(session, "cup").id
        _work(factory, bought)
        _operate(factory, bought, delayed)
    assert len(statements) > 75  # without those that the driver gets as text: `kept` has them
    with trapped.connect() as connection:
        found = {text: hostile.traps_of(connection, each, text=text) for text, each in statements.items()}
    assert {text: traps for text, traps in found.items() if traps} == {}


def _work(factory: sessionmaker[Session], bought: UUID) -> None:
    with Worker(durable, sessionmaker=factory, poll_interval=timedelta(seconds=0.02)):
        token = get_event(factory, bought, "token", timeout=timedelta(seconds=30), kind=str)
        with factory.begin() as session:
            complete_callback(session, token, "paid")
            request = send_update(session, bought, "address", "home")
        assert request.result(timedelta(seconds=30)) == "to home"
        with factory.begin() as session:
            send_signal(session, bought, "go", "now", key="once")
        outcome = buy.handle(factory, bought).result(timeout=timedelta(seconds=30))
    assert outcome == [4, "book delivered", "paid", "home", "now"]
    assert [each.value for each in read_stream(factory, bought, "log")] == ["book"]


def _operate(factory: sessionmaker[Session], bought: UUID, delayed: UUID) -> None:
    """Use every verb: none of these workflows has a worker."""
    named = select(Workflow).where(Workflow.name == "buy", Workflow.key.startswith("order-"))
    with factory.begin() as session:
        advance(session, timedelta(hours=1))
        manage.resume(session, delayed)
        manage.cancel(session, select(Workflow).where(Workflow.queue == "later"))
        copy = manage.fork(session, bought, from_step="price", key="order-9").id
        manage.fork(session, [bought], from_step="price")
        manage.rewind(session, [bought], to_step="create_callback")
        manage.cancel(session, [copy])
        manage.retry(session, select(Workflow).where(Workflow.status == WorkflowStatus.CANCELLED))
        start_with_signal(session, deliver.options(key="cart").bind("pen"), "added", 1)
    with factory() as session, pytest.raises(LookupError):
        Executor(session).run(fail, "pen")
    with factory.begin() as session:
        manage.retry(session, select(Workflow).where(Workflow.status == WorkflowStatus.FAILED))
        manage.delete(session, named)
        manage.cancel(session, select(Workflow.id))
        manage.delete(session, select(Workflow))
