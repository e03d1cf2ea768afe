"""Hearing what is notified in a database, on a connection that nothing is between."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import psycopg
from psycopg import sql
from sqlalchemy import make_url

from sqla_durable.store import hints

PATIENCE = 20
"""Seconds after which something that should have come is not expected any more."""


class Ear:
    """A connection that listens for hints about the tables in one schema."""

    def __init__(self, connection: psycopg.Connection) -> None:
        self._connection = connection

    def hears(self, count: int = 1) -> list[str]:
        """Return the next payloads, as many as asked for, or fewer when no more come for long."""
        notifications = self._connection.notifies(timeout=PATIENCE, stop_after=count)
        return [each.payload for each in notifications]


@contextmanager
def ear(url: str, *, schema: str = "durable") -> Generator[Ear]:
    """Listen in a database for a while."""
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as connection:
        connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(hints.channel(schema))))
        yield Ear(connection)


def direct(database_url: str, server_url: str) -> str:
    """Return the URL of a test's database past PgBouncer, if one is in between."""
    database = make_url(database_url).database
    return make_url(server_url).set(database=database).render_as_string(hide_password=False)
