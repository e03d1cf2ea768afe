"""Roles with the rights that `sqla-durable roles` grants, and what docs/security.md adds to them."""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import Session

from sqla_durable.store import rights

TASKS = tuple(rights.SETS)
DENIED, CHECKED, GENERATED = "42501", "23514", "428C9"
"""The SQLSTATE of a missing right, of a CHECK, and of a column that is always generated."""

_PAGE = Path(__file__).parents[2] / "docs" / "security.md"


def recipe(test: str, number: int = 0) -> str:
    """Return the SQL that the page shows under the name of a test file: the first of its blocks, or a later one."""
    blocks = re.findall(rf"<!-- tested in {re.escape(test)} -->\n```sql\n(.*?)```", _PAGE.read_text(), re.S)
    return str(blocks[number])


def sqlstate_of(error: DBAPIError) -> str:
    """Return the SQLSTATE of what the server answered; empty where it answered nothing."""
    return str(getattr(error.orig, "sqlstate", ""))


def refused(engine: Engine, statement: str, **parameters: Any) -> str:
    """Return the SQLSTATE with which a statement is refused, or an empty text; nothing is committed."""
    with engine.connect() as connection:
        try:
            connection.execute(text(statement), parameters)
        except DBAPIError as error:
            return sqlstate_of(error)
    return ""


class Roles:
    """Roles of one database, whose names begin with the database's; on the page they may begin with `durable_`.

    Args:
        engine: the superuser's.
        url: the database past PgBouncer, which refuses the option that gives a connection its role.
        names: without the prefix.
    """

    def __init__(self, engine: Engine, url: str, names: Sequence[str]) -> None:
        self.prefix = f"{engine.url.database}_"
        self._engine = engine
        self._url = url
        self._names = names
        self._engines: list[Engine] = []

    def create(self) -> None:
        """Make the roles, without any rights."""
        self.execute(*(f"CREATE ROLE {each}" for each in self._names))

    def drop(self) -> None:
        """Drop the roles and their rights."""
        for engine in self._engines:
            engine.dispose()
        for each in self._names:
            self.execute(f"REASSIGN OWNED BY {each} TO CURRENT_USER", f"DROP OWNED BY {each}", f"DROP ROLE {each}")

    def grant(self, *roles: str) -> None:
        """Grant what the command does, to roles with the names of its own."""
        with Session(self._engine) as session, session.begin():
            rights.grant(session, rights.statements(roles, prefix=self.prefix))

    def execute(self, *statements: str) -> None:
        """Execute statements of the page as the superuser."""
        with self._engine.begin() as connection:
            for each in statements:
                connection.execute(text(self._named(each).replace(":", r"\:")))

    def engine(self, name: str) -> Engine:
        """Return an engine whose connections have this role."""
        engine = create_engine(self._url, connect_args={"options": self.options(name)})
        self._engines.append(engine)
        return engine

    def async_engine(self, name: str) -> AsyncEngine:
        """Return the same for async code, to be disposed of."""
        return create_async_engine(self._url, connect_args={"options": self.options(name)})

    def options(self, name: str) -> str:
        """Return the options of a connection that has a role."""
        return f"-c role={self._named(name)}"

    def _named(self, statement: str) -> str:
        names = "|".join(self._names)
        return re.sub(
            rf"(?<![.\w])(?:durable_)?({names})\b(?!['.])", lambda found: f"{self.prefix}{found[1]}", statement
        )


@contextmanager
def roles(engine: Engine, url: str, *names: str, sql: str = "") -> Generator[Roles]:
    """Make roles in a database for a while, and execute SQL."""
    made = Roles(engine, url, names)
    made.create()
    try:
        made.execute(*filter(None, [sql]))
        yield made
    finally:
        made.drop()
