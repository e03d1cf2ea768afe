"""The env.py of an async application, as docs/fastapi.md shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import Engine

from sqla_durable.models import SCHEMA
from tests.migrations.application import Application
from tests.support.catalogue import Catalogue, catalogue
from tests.support.domain import Base

PAGE = Path(__file__).parents[2] / "docs" / "fastapi.md"
IMPORTS = f"""
import asyncio
import os

from alembic import context
from sqlalchemy import Connection, NullPool
from sqlalchemy.ext.asyncio import create_async_engine

from sqla_durable import migrations
from {Base.__module__} import Base

"""


@pytest.mark.parametrize("application", ["own_revision"], indirect=True)
def test_environment_of_the_page_leads_up_and_down(
    application: Application, empty_engine: Engine, expected: Catalogue
) -> None:
    shown = PAGE.read_text().split("test_async_environment.py -->\n```python\n")[1].split("```")[0]
    (application.directory / "env.py").write_text(IMPORTS + shown)
    application.upgrade()
    with empty_engine.connect() as connection:
        assert catalogue(connection, SCHEMA) == expected
    application.downgrade()
