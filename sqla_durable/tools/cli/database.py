"""Makes sessionmakers of a URL, for a `Durable` object that has none of its own."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import URL, create_engine, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable.api.durable import Durable
from sqla_durable.tools.cli.errors import CommandError

S = TypeVar("S", Session, AsyncSession)

ENVIRONMENT = "DATABASE_URL"
DRIVER = "postgresql+psycopg"

# Connections are kept: those that exceed a pool's size would be opened and closed for each step. They are not asked
# first whether they are sound: what meets a lost one is tried again.
_POOL = {"pool_size": 20, "max_overflow": 0}


@dataclass(frozen=True, slots=True)
class Sessionmakers:
    """Opens the sessions of a worker, of either kind."""

    sync: sessionmaker[Session] | None
    asynchronous: async_sessionmaker[AsyncSession] | None


def sessionmakers(durable: Durable, url: str | None) -> Sessionmakers:
    """Choose the sessionmakers: of the URL that was given, else the object's own, else of `DATABASE_URL`.

    Raises:
        CommandError: there is none of the three, or the URL is not one of PostgreSQL.
    """
    if url is None and (durable.sessionmaker is not None or durable.async_sessionmaker is not None):
        return Sessionmakers(durable.sessionmaker, durable.async_sessionmaker)
    wanted = url or os.environ.get(ENVIRONMENT)
    if not wanted:
        raise CommandError(
            f"there is no database: give the Durable object a sessionmaker, or this command --url, or set "
            f"{ENVIRONMENT}, such as postgresql://user@host/name."
        )
    return connect(durable, normalised(wanted))


def connect(durable: Durable, url: URL) -> Sessionmakers:
    """Make engines of a URL, a sync and an async one."""
    classes = [each.session_class for each in durable.registry.steps()]
    sync = sessionmaker(create_engine(url, **_POOL), class_=_narrowest(Session, classes))
    asynchronous = create_async_engine(url, **_POOL)
    return Sessionmakers(sync, async_sessionmaker(asynchronous, class_=_narrowest(AsyncSession, classes)))


def _narrowest(base: type[S], classes: Iterable[type[object] | None]) -> type[S]:
    """Return the class as which the steps take their sessions, such as SQLModel's; the worker checks that it fits."""
    found = base
    for each in classes:
        if each is not None and issubclass(each, found):
            found = each
    return found


def normalised(url: str) -> URL:
    """Give any form of a PostgreSQL URL as SQLAlchemy's, with the driver psycopg.

    Raises:
        CommandError: it is not a URL, or not one of PostgreSQL. The message never shows the URL: it may be a
            password that was pasted in the wrong place.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # ValueError: the port is not a number
        raise CommandError(
            "the database URL cannot be read: write postgresql://user:password@host:5432/name, with special "
            "characters in the password percent-encoded."
        ) from None
    if parsed.drivername.partition("+")[0] not in ("postgres", "postgresql"):
        raise CommandError(
            f"the database URL begins with {parsed.drivername!r}: durable workflows need PostgreSQL, "
            "postgresql://user:password@host:5432/name."
        )
    return parsed.set(drivername=DRIVER)
