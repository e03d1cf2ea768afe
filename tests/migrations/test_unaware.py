"""An application whose autogenerate does not know our tables does not propose to drop them."""

from __future__ import annotations

from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine, text

from sqla_durable import migrations
from tests.support.domain import Base


def proposals(engine: Engine, **options: Any) -> list[Any]:
    with engine.connect() as connection:
        return list(compare_metadata(MigrationContext.configure(connection, opts=options), Base.metadata))


def test_unaware_application_proposes_nothing(engine: Engine) -> None:
    assert proposals(engine) == []


def test_application_that_includes_all_schemas_hides_ours(engine: Engine) -> None:
    assert proposals(engine, include_schemas=True, include_name=migrations.not_ours()) == []


def test_without_hiding_them_they_would_be_dropped(engine: Engine) -> None:
    dropped = {table.name for kind, table in proposals(engine, include_schemas=True) if kind == "remove_table"}
    ours = {
        "workflow",
        "step",
        "signal",
        "audit",
        "blob",
        "blob_chunk",
        "event",
        "stream_item",
        "queue",
        "queue_key",
        "queue_use",
        "worker",
        "schedule",
        "retention",
    }
    assert dropped == ours


@pytest.mark.parametrize("durable_schema", ["tenant_7"], indirect=True)
def test_other_tables_of_a_shared_schema_stay_visible(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE tenant_7.invoice (id int)"))
        connection.execute(text("CREATE TABLE public.step (id int)"))
    found = proposals(engine, include_schemas=True, include_name=migrations.not_ours("tenant_7"))
    removed = {f"{table.schema}.{table.name}" for kind, table in found if kind == "remove_table"}
    assert removed == {"tenant_7.invoice", "None.step"}
