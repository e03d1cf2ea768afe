"""The demo's database: on a server from a wheel, or on the one that `DATABASE_URL` names, in a database of its own."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager

from sqlalchemy import URL, NullPool, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError

from shop.demo.errors import DemoError
from shop.settings import database_url
from sqla_durable import embedded


@contextmanager
def database(name: str) -> Generator[str]:
    """Give the URL of a fresh database of this name.

    On a server of its own it is gone afterwards; on the one of `DATABASE_URL` it stays, to be looked at.

    Raises:
        DemoError: the server cannot be reached, or does not let us create the database.
    """
    if os.environ.get("DATABASE_URL"):
        yield _recreate(database_url(), name)
        return
    with embedded.server() as server:
        yield _recreate(make_url(server.url), name)


def _recreate(server: URL, name: str) -> str:
    """Drop and create the database, by a connection to the one that the URL names."""
    if server.database == name:
        raise DemoError(f"DATABASE_URL names {name!r}, which the demo drops: name another one, such as postgres.")
    engine = create_engine(server, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    quoted = engine.dialect.identifier_preparer.quote(name)
    try:
        with engine.connect() as connection:
            connection.execute(text(f"DROP DATABASE IF EXISTS {quoted}"))
            connection.execute(text(f"CREATE DATABASE {quoted}"))
    except DBAPIError as error:
        shown = server.render_as_string(hide_password=True)
        if not _answered(error):
            raise DemoError(f"{shown} cannot be reached: {error.orig}") from error
        raise DemoError(
            f"the database {name!r} cannot be made anew on {shown}: {error.orig}. The demo needs a role that may "
            "create databases, and no other demo on the same database; without DATABASE_URL it brings its own server."
        ) from error
    return server.set(database=name).render_as_string(hide_password=False)


def _answered(error: DBAPIError) -> bool:
    """Tell whether the server itself refused: then its answer has a code."""
    return getattr(error.orig, "sqlstate", None) is not None
