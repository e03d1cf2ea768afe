"""The name of the schema is open: by argument, by option of env.py, by translation; and it is never ours to destroy."""

from __future__ import annotations

import io
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, Engine, MetaData, select, text
from sqlalchemy.exc import IntegrityError, InternalError, ProgrammingError
from sqlalchemy.orm import Session

from sqla_durable import migrations
from sqla_durable.errors import UsageError
from sqla_durable.models import REVISION, Workflow, metadata
from tests.migrations.application import run_script
from tests.support.catalogue import Catalogue, catalogue, schemas

Names = dict[str | None, str | None]


@contextmanager
def migrating(engine: Engine, *, names: Names | None = None, **options: Any) -> Generator[Connection]:
    """Open a transaction in which `migrations.upgrade` works, as an env.py does."""
    if names is not None:
        engine = engine.execution_options(schema_translate_map=names)
    with (
        engine.begin() as connection,
        Operations.context(MigrationContext.configure(connection, opts=options)),
    ):
        yield connection


def printed(migrate: Callable[[], None]) -> str:
    """Return what offline mode prints."""
    script = io.StringIO()
    context = MigrationContext.configure(
        dialect_name="postgresql",
        dialect_opts={"paramstyle": "named"},  # as Alembic's templates have it; else a percent sign comes twice
        opts={"as_sql": True, "output_buffer": script, "literal_binds": True},
    )
    with Operations.context(context):
        migrate()
    return script.getvalue()


@pytest.mark.parametrize(
    ("argument", "option", "names", "found"),
    [
        (None, None, None, "durable"),
        ("tenant_7", None, None, "tenant_7"),
        (None, "tenant_7", None, "tenant_7"),
        ("tenant_7", "tenant_8", None, "tenant_7"),
        ("durable", "tenant_8", None, "durable"),
        (None, None, {"durable": "tenant_7"}, "tenant_7"),
        ("durable", None, {"durable": "tenant_7"}, "tenant_7"),
        ("tenant_7", None, {"durable": "tenant_7"}, "tenant_7"),
        (None, "tenant_7", {"durable": "tenant_8"}, "tenant_7"),
        (None, None, {None: "tenant_7"}, "durable"),
        (None, None, {"durable": "tenant_7", "tenant_7": "tenant_8"}, "tenant_7"),
        ("tenant_7", None, {"durable": "tenant_7", "tenant_7": "tenant_8"}, "tenant_8"),
    ],
)
def test_schema_is_translated_exactly_once(
    empty_engine: Engine,
    expected: Catalogue,
    argument: str | None,
    option: str | None,
    names: Names | None,
    found: str,
) -> None:
    # SQLAlchemy does not distinguish what it has compiled for a map with None as a key: nothing is shared here.
    engine = empty_engine.execution_options(compiled_cache=None)
    with migrating(engine, names=names, durable_schema=option) as connection:
        migrations.upgrade(REVISION, schema=argument)
        assert (connection.get_execution_options().get("schema_translate_map") or None) == names
        assert schemas(connection) == {"public", found}
        assert catalogue(connection, found) == expected
    with migrating(engine, names=names, durable_schema=option) as connection:
        migrations.downgrade(REVISION, schema=argument)
        assert schemas(connection) == {"public"}


odd_names = pytest.mark.parametrize(
    "name", ["Tenant 7", 'ten"ant', "ten:ant", "o'brien", "50%", "ten.ant", "Tönant", "$sqla$", "back\\slash"]
)


@odd_names
def test_any_name_of_a_schema_works(empty_engine: Engine, expected: Catalogue, name: str) -> None:
    with migrating(empty_engine) as connection:
        migrations.upgrade(REVISION, schema=name)
        assert catalogue(connection, name) == expected
        migrations.downgrade(REVISION, schema=name)
        assert schemas(connection) == {"public"}


@odd_names
def test_create_all_and_drop_all_work_in_a_schema_of_any_name(
    empty_engine: Engine, expected: Catalogue, name: str
) -> None:
    with empty_engine.execution_options(schema_translate_map={"durable": name}).begin() as connection:
        metadata.create_all(connection)
        assert catalogue(connection, name) == expected
        metadata.drop_all(connection)
        assert not any(catalogue(connection, name).values())


@odd_names
def test_any_name_of_a_schema_works_in_a_printed_script(
    empty_engine: Engine, empty_database_url: str, expected: Catalogue, name: str
) -> None:
    run_script(empty_database_url, printed(lambda: migrations.upgrade(REVISION, schema=name)))
    with empty_engine.begin() as connection:
        assert catalogue(connection, name) == expected
    run_script(empty_database_url, printed(lambda: migrations.downgrade(REVISION, schema=name)))
    with empty_engine.begin() as connection:
        assert schemas(connection) == {"public"}


def test_two_schemas_in_one_database_do_not_know_each_other(empty_engine: Engine, expected: Catalogue) -> None:
    with migrating(empty_engine):
        migrations.upgrade(REVISION)
        migrations.upgrade(REVISION, schema="tenant_7")
    tenant = empty_engine.execution_options(schema_translate_map={"durable": "tenant_7"})
    with Session(empty_engine) as session, Session(tenant) as tenants:
        session.add(Workflow(name="checkout", key="1"))
        tenants.add(Workflow(name="checkout", key="1"))
        session.commit()
        tenants.commit()
        assert session.scalars(select(Workflow.id)).one() != tenants.scalars(select(Workflow.id)).one()
    with migrating(empty_engine) as connection:
        migrations.downgrade(REVISION)
        assert schemas(connection) == {"public", "tenant_7"}
        assert catalogue(connection, "tenant_7") == expected


def test_failed_migration_leaves_the_translation_in_place(empty_engine: Engine) -> None:
    names: Names = {"durable": "tenant_7"}
    with migrating(empty_engine, names=names) as connection:
        connection.execute(text("CREATE SCHEMA tenant_7 CREATE TABLE worker (id int)"))
        with pytest.raises(ProgrammingError, match='relation "worker" already exists'):
            migrations.upgrade(REVISION)
        assert connection.get_execution_options()["schema_translate_map"] == names
        connection.rollback()


def test_translation_to_no_schema_is_refused(empty_engine: Engine) -> None:
    with (
        migrating(empty_engine, names={"durable": None}),
        pytest.raises(UsageError, match="gives 'durable' the name None: our tables need a schema with a name"),
    ):
        migrations.upgrade(REVISION)


def test_schema_that_was_there_before_stays(empty_engine: Engine) -> None:
    with migrating(empty_engine) as connection:
        connection.execute(text("CREATE SCHEMA durable"))
        migrations.upgrade(REVISION)
        migrations.downgrade(REVISION)
        assert schemas(connection) == {"public", "durable"}
        migrations.upgrade(REVISION, schema="public")
        migrations.downgrade(REVISION, schema="public")
        assert schemas(connection) == {"public", "durable"}


def test_schema_that_holds_something_else_stays(empty_engine: Engine) -> None:
    with migrating(empty_engine) as connection:
        migrations.upgrade(REVISION, schema="tenant_7")
        connection.execute(text("CREATE TABLE tenant_7.invoice (id int)"))
        migrations.downgrade(REVISION, schema="tenant_7")
        assert {row.relname for row in catalogue(connection, "tenant_7")["relations"]} == {"invoice"}


def test_downgrade_is_refused_while_the_application_refers_to_a_workflow(empty_engine: Engine) -> None:
    with migrating(empty_engine) as connection:
        migrations.upgrade(REVISION)
        connection.execute(text("CREATE TABLE orders (workflow_id uuid REFERENCES durable.workflow)"))
    with (
        pytest.raises((IntegrityError, InternalError), match="constraint orders_workflow_id_fkey on table orders"),
        migrating(empty_engine),
    ):
        migrations.downgrade(REVISION)


def test_naming_convention_of_the_application_is_not_put_on_top(empty_engine: Engine, expected: Catalogue) -> None:
    convention = {
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "pk": "pk_%(table_name)s",
        "ix": "ix_%(column_0_label)s",
    }
    with migrating(empty_engine, target_metadata=MetaData(naming_convention=convention)) as connection:
        migrations.upgrade(REVISION)
        assert catalogue(connection, "durable") == expected
