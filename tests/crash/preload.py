"""What the server of `processes` imports once, so that not every process does: the applications and the drivers."""

from __future__ import annotations

import gc

from sqlalchemy import create_engine

from tests.crash import child as child
from tests.crash import poison as poison
from tests.crash import survivors as survivors

for driver in ("psycopg", "asyncpg"):
    create_engine(f"postgresql+{driver}://").dispose()
gc.freeze()
