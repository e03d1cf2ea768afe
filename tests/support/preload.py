"""What the server of `processes` imports once, so that not every process does: applications, commands and drivers."""

from __future__ import annotations

import gc
import sys

from sqlalchemy import create_engine
from sqlalchemy.orm import configure_mappers

from sqla_durable.execution.worker import serving as serving
from sqla_durable.store.statements import Statement
from sqla_durable.tools.cli import application as command_line
from sqla_durable.tools.cli import target as target
from tests.crash import child as child
from tests.crash import poison as poison
from tests.crash import survivors as survivors
from tests.testing import application as application

__all__ = ["application", "child", "command_line", "poison", "serving", "survivors", "target"]

for driver in ("psycopg", "asyncpg"):
    create_engine(f"postgresql+{driver}://").dispose()
configure_mappers()
for name, module in list(sys.modules.items()):
    if name.startswith("sqla_durable.store."):
        for value in vars(module).values():
            if isinstance(value, Statement):
                assert value.made is not None
gc.collect()
gc.freeze()
gc.set_threshold(20_000, 20, 20)
