"""The engines and sessionmakers of the shop, and its `Durable` object, which uses both kinds.

Importing this connects to nothing.
"""

from __future__ import annotations

from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from shop.settings import database_url
from sqla_durable import Durable

# A worker has many workflows in flight; their steps take turns on these connections, which stay open.
engine = create_engine(database_url(), pool_size=12, max_overflow=0)
async_engine = create_async_engine(database_url(), pool_size=12, max_overflow=0)

SessionLocal = sessionmaker(engine)
AsyncSessionLocal = async_sessionmaker(async_engine)

durable = Durable(sessionmaker=SessionLocal, async_sessionmaker=AsyncSessionLocal)
