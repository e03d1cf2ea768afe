"""The bank's tables, the auditor inside the database, and the queries of the process that drives the torture.

No table has a constraint against duplicates: what happens twice must be seen, and not be refused.
The auditor is a set of triggers that check at the COMMIT of each checkpoint which worker owns the workflow. The primary
key of checkpoints alone keeps a step from being applied twice; a worker that writes for a workflow which it has lost
shows only here. The triggers are deferred, because ownership must hold until the commit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar
from uuid import UUID

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import (
    BigInteger,
    Connection,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    MetaData,
    Row,
    Text,
    create_engine,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import UUID as PG_UUID
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.schema import CreateSchema

from sqla_durable import Workflow, migrations
from sqla_durable.models import REVISION

SCHEMA = "torture_bank"
OPENING_BALANCE = 1_000_000
"""The opening balance of every account, in cents."""


class Base(DeclarativeBase):
    """The declarative base of the bank's tables."""

    metadata = MetaData(schema=SCHEMA)
    type_annotation_map = {  # noqa: RUF012 (SQLAlchemy declares it as an instance attribute)
        datetime: DateTime(timezone=True),
        int: BigInteger,
        str: Text,
        UUID: PG_UUID(as_uuid=True),
    }


class Account(Base):
    """An account; `movements` counts the transfers that were journaled for it."""

    __tablename__ = "account"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    opened: Mapped[int] = mapped_column(default=OPENING_BALANCE)
    cents: Mapped[int] = mapped_column(default=OPENING_BALANCE)
    movements: Mapped[int] = mapped_column(default=0)


class Transfer(Base):
    """A requested transfer, inserted in the transaction that started its workflow."""

    __tablename__ = "transfer"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    workflow_id: Mapped[UUID] = mapped_column(ForeignKey(Workflow.id))
    source: Mapped[int]
    target: Mapped[int]
    cents: Mapped[int]


class Entry(Base):
    """A row that a transactional step wrote, and which worker wrote it: a debit, a credit, or a line of the journal."""

    __tablename__ = "entry"

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    transfer_id: Mapped[int]
    workflow_id: Mapped[UUID]
    step: Mapped[str]
    kind: Mapped[str]
    account: Mapped[int]
    cents: Mapped[int]
    attempt: Mapped[int]
    worker: Mapped[str]
    entered_at: Mapped[datetime] = mapped_column(server_default=func.pg_catalog.statement_timestamp())

    __table_args__ = (Index("entry_worker_idx", "worker", "id"), Index("entry_transfer_idx", "transfer_id", "kind"))


class Call(Base):
    """A call that the outside service received, in its own transaction; it may come again with the same key."""

    __tablename__ = "call"

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    transfer_id: Mapped[int]
    workflow_id: Mapped[UUID]
    step: Mapped[str]
    key: Mapped[str]
    worker: Mapped[str]
    called_at: Mapped[datetime] = mapped_column(server_default=func.pg_catalog.statement_timestamp())


_AUDITOR = (
    """
    CREATE TABLE torture_bank.foreign_write (
        workflow_id uuid NOT NULL, what text NOT NULL, noticed_at timestamptz NOT NULL DEFAULT clock_timestamp()
    )
    """,
    """
    CREATE FUNCTION torture_bank.audit_checkpoint() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE
        owner record;
    BEGIN
        SELECT attempt, status, worker.name INTO owner
        FROM durable.workflow LEFT JOIN durable.worker ON worker.id = worker_id WHERE workflow.id = NEW.workflow_id;
        IF owner.attempt <> NEW.attempt OR owner.status NOT IN ('running', 'succeeded')
            OR owner.name IS DISTINCT FROM current_setting('application_name')
        THEN
            INSERT INTO torture_bank.foreign_write (workflow_id, what) VALUES (NEW.workflow_id, format(
                '%s recorded %s in attempt %s; the workflow is %s in attempt %s of %s',
                current_setting('application_name'), NEW.key, NEW.attempt, owner.status, owner.attempt, owner.name
            ));
        END IF;
        RETURN NULL;
    END $$
    """,
    """
    CREATE CONSTRAINT TRIGGER torture_audit AFTER INSERT ON durable.step DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION torture_bank.audit_checkpoint()
    """,
    """
    CREATE FUNCTION torture_bank.audit_outcome() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE
        owner text;
    BEGIN
        SELECT name INTO owner FROM durable.worker WHERE id = NEW.worker_id;
        IF owner IS DISTINCT FROM current_setting('application_name') THEN
            INSERT INTO torture_bank.foreign_write (workflow_id, what) VALUES (NEW.id, format(
                '%s finished the workflow in attempt %s of %s', current_setting('application_name'), NEW.attempt, owner
            ));
        END IF;
        RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER torture_audit AFTER UPDATE ON durable.workflow
    FOR EACH ROW WHEN (NEW.status = 'succeeded') EXECUTE FUNCTION torture_bank.audit_outcome()
    """,
)


def install_auditor(connection: Connection) -> None:
    """Create the triggers of the auditor, in the caller's transaction."""
    for statement in _AUDITOR:
        connection.execute(text(statement))


T = TypeVar("T")

_PAUSE = 0.02


@dataclass(frozen=True, slots=True)
class Progress:
    """How many transfers are finished, and how many are not."""

    succeeded: int
    unfinished: int


class BankDatabase:
    """Queries the tables, past all proxies. A query that fails because the server restarts is repeated.

    Args:
        url: the server's own socket.
        patience: how many seconds the server may be unavailable.
    """

    def __init__(self, url: str, *, patience: float = 120.0) -> None:
        self.engine = create_engine(url, connect_args={"application_name": "torture"}, pool_pre_ping=True)
        self._patience = patience

    def close(self) -> None:
        """Close its connections."""
        self.engine.dispose()

    def create_bank(self, accounts: int) -> None:
        """Create the tables, those of the package by their migration, and the accounts."""
        with self.engine.begin() as connection:
            with Operations.context(MigrationContext.configure(connection)):
                migrations.upgrade(REVISION)
            connection.execute(CreateSchema(SCHEMA))
            Base.metadata.create_all(connection)
            install_auditor(connection)
            with Session(connection) as session:
                session.add_all(Account(id=number) for number in range(1, accounts + 1))
                session.commit()

    def query(self, statement: str, **parameters: Any) -> list[Row[Any]]:
        """Execute one statement in a transaction of its own."""
        return self._repeat(lambda connection: list(connection.execute(text(statement), parameters)))

    def value(self, statement: str, **parameters: Any) -> Any:
        """Return the only value that a query finds."""
        return self.query(statement, **parameters)[0][0]

    def progress(self) -> Progress:
        """Count the finished and the unfinished workflows."""
        row = self.query(
            "SELECT count(*) FILTER (WHERE status = 'succeeded') AS succeeded, "
            "count(*) FILTER (WHERE finished_at IS NULL) AS unfinished FROM durable.workflow"
        )[0]
        return Progress(succeeded=row.succeeded, unfinished=row.unfinished)

    def worker_id(self, name: str) -> UUID | None:
        """Return the id of the worker of this name; None if it has no lease yet."""
        rows = self.query("SELECT id FROM durable.worker WHERE name = :name", name=name)
        return rows[0].id if rows else None

    def _repeat(self, query: Callable[[Connection], T]) -> T:
        deadline = time.monotonic() + self._patience
        while True:
            try:
                with self.engine.begin() as connection:
                    return query(connection)
            except OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_PAUSE)
