"""Three ways into an existing application, each from its own history, up, down and up again."""

from __future__ import annotations

import pytest
from sqlalchemy import Connection, Engine, func, select, text
from sqlalchemy.orm import Session

from sqla_durable.models import Workflow
from tests.migrations.application import Application, run_script
from tests.support.catalogue import Catalogue, catalogue, schemas
from tests.support.domain import Order

VERSION_TABLE = {"alembic_version", "alembic_version_pkc"}

every_route = pytest.mark.parametrize(
    "application", ["own_revision", "next_revision", "branch", "autogenerate"], indirect=True
)


# behaviour: X1
@every_route
def test_route_leads_up_down_to_base_and_up_again(
    application: Application, empty_engine: Engine, expected: Catalogue
) -> None:
    application.upgrade()
    assert catalogue_of(empty_engine) == expected
    application.downgrade()
    with empty_engine.begin() as connection:
        assert schemas(connection) == {"public"}
        assert relations(connection) == VERSION_TABLE
    application.upgrade()
    assert catalogue_of(empty_engine) == expected


@every_route
def test_application_can_refer_to_a_workflow_after_its_migrations(
    application: Application, empty_engine: Engine
) -> None:
    application.upgrade()
    with Session(empty_engine) as session:
        session.add(Order(customer="Ada", total_cents=500, workflow=Workflow(name="checkout")))
        session.commit()
        assert session.scalar(select(func.count()).select_from(Order).join(Order.workflow)) == 1


@every_route
def test_autogenerate_has_nothing_to_propose_after_the_migrations(application: Application) -> None:
    application.upgrade()
    application.check()


@every_route
def test_printed_sql_runs_and_makes_the_same_tables(
    application: Application, empty_database_url: str, empty_engine: Engine, expected: Catalogue
) -> None:
    printed = application.upgrade_sql()
    empty_engine.dispose()
    run_script(empty_database_url, f"DROP TABLE IF EXISTS alembic_version; {printed}")
    assert catalogue_of(empty_engine) == expected
    application.check()


@pytest.mark.parametrize(
    ("application", "span"),
    [("own_revision", "app_0003:base"), ("autogenerate", "app_0002:base"), ("branch", "app_0002:base")],
    indirect=["application"],
)
def test_printed_sql_of_the_downgrade_runs(
    application: Application, span: str, empty_database_url: str, empty_engine: Engine
) -> None:
    application.upgrade()
    run_script(empty_database_url, application.downgrade_sql(span))
    with empty_engine.begin() as connection:
        assert schemas(connection) == {"public"}


@pytest.mark.parametrize("application", ["branch"], indirect=True)
def test_branch_goes_to_the_schema_that_the_environment_names(
    application: Application, empty_engine: Engine, expected: Catalogue
) -> None:
    application.upgrade("heads", "schema=tenant_7")
    with empty_engine.begin() as connection:
        assert catalogue(connection, "tenant_7") == expected
        assert schemas(connection) == {"public", "tenant_7"}
    application.downgrade("base", "schema=tenant_7")
    with empty_engine.begin() as connection:
        assert schemas(connection) == {"public"}


@pytest.mark.parametrize("application", ["branch"], indirect=True)
def test_branch_is_followed_by_each_tenant_for_itself(
    application: Application, empty_engine: Engine, expected: Catalogue
) -> None:
    application.edit_environment(("durable_schema=SCHEMA)", "durable_schema=SCHEMA, version_table_schema=SCHEMA)"))
    with empty_engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA tenant_7"))
        connection.execute(text("CREATE SCHEMA tenant_8"))
    for tenant in ("tenant_7", "tenant_8"):
        application.upgrade("sqla_durable@head", f"schema={tenant}")
    application.downgrade("sqla_durable@base", "schema=tenant_8")
    with empty_engine.begin() as connection:
        assert {row.relname for row in catalogue(connection, "tenant_8")["relations"]} == VERSION_TABLE
        connection.execute(text("DROP TABLE tenant_7.alembic_version"))
        assert catalogue(connection, "tenant_7") == expected


@pytest.mark.parametrize("application", ["branch"], indirect=True)
def test_branch_can_be_upgraded_and_downgraded_by_its_label(application: Application, empty_engine: Engine) -> None:
    application.upgrade("sqla_durable@head")
    with empty_engine.begin() as connection:
        assert schemas(connection) == {"public", "durable"}
        assert relations(connection) == VERSION_TABLE
    application.downgrade("sqla_durable@base")
    with empty_engine.begin() as connection:
        assert schemas(connection) == {"public"}


def catalogue_of(engine: Engine) -> Catalogue:
    with engine.begin() as connection:
        return catalogue(connection, "durable")


def relations(connection: Connection) -> set[str]:
    return {row.relname for row in catalogue(connection, "public")["relations"]}
