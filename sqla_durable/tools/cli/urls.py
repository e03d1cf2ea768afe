"""The URL of a database, as a command line names it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqla_durable.tools.cli.errors import CommandError

if TYPE_CHECKING:
    from sqlalchemy import URL

DATABASE_URL = "DATABASE_URL"
_DRIVER = "postgresql+psycopg"


def normalised(url: str) -> URL:
    """Return any form of a PostgreSQL URL as SQLAlchemy's, with the driver psycopg.

    Raises:
        CommandError: it is not a URL, or not one of PostgreSQL. The message never shows the URL: it may be a
            password that was pasted in the wrong place.
    """
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

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
    return parsed.set(drivername=_DRIVER)
