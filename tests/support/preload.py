"""What the server of `processes` imports once, so that not every process does: applications, commands and drivers."""

from __future__ import annotations

import gc

from sqlalchemy import create_engine
from sqlalchemy.orm import configure_mappers

from sqla_durable.tools.cli import application as command_line
from tests.crash import child as child
from tests.crash import poison as poison
from tests.crash import survivors as survivors

__all__ = ["child", "command_line", "poison", "survivors"]

for driver in ("psycopg", "asyncpg"):
    create_engine(f"postgresql+{driver}://").dispose()
configure_mappers()
gc.collect()
gc.freeze()
