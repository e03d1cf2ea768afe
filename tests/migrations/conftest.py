from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest
from sqlalchemy import Engine, NullPool, create_engine

from sqla_durable import models
from tests.migrations.application import Application
from tests.support.catalogue import Catalogue, catalogue
from tests.support.databases import Databases


@pytest.fixture
def empty_engine(empty_database_url: str) -> Engine:
    """An engine of a database with nothing in it."""
    return create_engine(empty_database_url, poolclass=NullPool)


@pytest.fixture(scope="session")
def expected(databases: Databases) -> Generator[Catalogue]:
    """The catalogue as `metadata.create_all` makes it."""
    with databases.empty() as url, create_engine(url, poolclass=NullPool).begin() as connection:
        models.metadata.create_all(connection)
        yield catalogue(connection, models.SCHEMA)


@pytest.fixture
def application(
    request: pytest.FixtureRequest, tmp_path: Path, empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> Application:
    """An application that comes to our tables by the route given, with an empty database."""
    monkeypatch.setenv("DATABASE_URL", empty_database_url)
    application = Application(request.param, tmp_path)
    if application.route == "autogenerate":
        _add_durable(application)
    return application


def _add_durable(application: Application) -> None:
    """Do as docs/migrations.md says: autogenerate, then add by hand what Alembic does not make."""
    application.upgrade("app_0001")
    path = application.autogenerate("app_0002", "add durable")
    text = path.read_text()
    text = text.replace(
        "def upgrade() -> None:\n", 'def upgrade() -> None:\n    op.execute("CREATE SCHEMA IF NOT EXISTS durable")\n'
    )
    text = text.replace(
        "\n\ndef downgrade",
        "    for each in sqla_durable.storage.statements():\n        op.execute(each)\n\n\ndef downgrade",
    ).replace("from alembic import op\n", "from alembic import op\nimport sqla_durable\n")
    dropping = "    for each in sqla_durable.storage.drop_statements():\n        op.execute(each)\n"
    text = text.replace("def downgrade() -> None:\n", f"def downgrade() -> None:\n{dropping}")
    path.write_text(f'{text.rstrip()}\n    op.execute("DROP SCHEMA durable")\n')
    application.downgrade("base")
