"""The driver's own look into the database, past all proxies, and through every restart of the server."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import UUID

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, Row, create_engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from sqlalchemy.schema import CreateSchema

from sqla_durable import migrations
from sqla_durable.models import REVISION
from sqla_durable.tools.torture import audit
from sqla_durable.tools.torture.tables import SCHEMA, Account, Base

T = TypeVar("T")

_PAUSE = 0.02


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the bank is."""

    succeeded: int
    unfinished: int


class Books:
    """Asks the tables. A question that meets a restart of the server is asked again.

    Args:
        url: the server's own socket.
        patience: how many seconds a server may be away.
    """

    def __init__(self, url: str, *, patience: float = 120.0) -> None:
        self.engine = create_engine(url, connect_args={"application_name": "torture"}, pool_pre_ping=True)
        self._patience = patience

    def close(self) -> None:
        """Close its connections."""
        self.engine.dispose()

    def open_bank(self, accounts: int) -> None:
        """Make the tables, ours by their migration, and the accounts."""
        with self.engine.begin() as connection:
            with Operations.context(MigrationContext.configure(connection)):
                migrations.upgrade(REVISION)
            connection.execute(CreateSchema(SCHEMA))
            Base.metadata.create_all(connection)
            audit.install(connection)
            with Session(connection) as session:
                session.add_all(Account(id=number) for number in range(1, accounts + 1))
                session.commit()

    def ask(self, question: str, **parameters: Any) -> list[Row[Any]]:
        """Execute one statement in a transaction of its own."""
        return self._persistently(lambda connection: list(connection.execute(text(question), parameters)))

    def one(self, question: str, **parameters: Any) -> Any:
        """Give the only value of the answer."""
        return self.ask(question, **parameters)[0][0]

    def progress(self) -> Progress:
        """Count what is finished and what is not."""
        row = self.ask(
            "SELECT count(*) FILTER (WHERE status = 'succeeded') AS succeeded, "
            "count(*) FILTER (WHERE finished_at IS NULL) AS unfinished FROM durable.workflow"
        )[0]
        return Progress(succeeded=row.succeeded, unfinished=row.unfinished)

    def worker_id(self, name: str) -> UUID | None:
        """Give the id of the worker of this name, if it has begun its lease."""
        rows = self.ask("SELECT id FROM durable.worker WHERE name = :name", name=name)
        return rows[0].id if rows else None

    def _persistently(self, question: Callable[[Connection], T]) -> T:
        deadline = time.monotonic() + self._patience
        while True:
            try:
                with self.engine.begin() as connection:
                    return question(connection)
            except OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_PAUSE)
