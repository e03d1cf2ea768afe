"""The env.py of an async application, as docs/fastapi.md shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import Engine

from sqla_durable.models import SCHEMA
from tests.migrations.application import Application, run_script
from tests.support.catalogue import Catalogue, catalogue
from tests.support.domain import Base

PAGE = Path(__file__).parents[2] / "docs" / "fastapi.md"
MODELS = f"from {Base.__module__} import Base\n"


@pytest.mark.parametrize("application", ["own_revision"], indirect=True)
def test_environment_of_the_page_leads_up_and_down_and_prints_the_same(
    application: Application, empty_database_url: str, empty_engine: Engine, expected: Catalogue
) -> None:
    shown = PAGE.read_text().split("test_async_environment.py -->\n```python\n")[1].split("```")[0]
    assert "from orders.models import Base\n" in shown
    (application.directory / "env.py").write_text(shown.replace("from orders.models import Base\n", MODELS))
    run_script(empty_database_url, application.upgrade_sql())
    with empty_engine.connect() as connection:
        assert catalogue(connection, SCHEMA) == expected
    application.downgrade()
    application.upgrade()
    with empty_engine.connect() as connection:
        assert catalogue(connection, SCHEMA) == expected
    application.downgrade()
