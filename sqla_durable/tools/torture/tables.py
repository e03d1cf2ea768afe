"""The bank's own tables: accounts, transfers, the entries that steps wrote, and the calls that the outside world saw.

None of them has a constraint against duplicates: what happens twice must be seen, and not be refused.
"""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import BigInteger, DateTime, ForeignKey, Identity, Index, MetaData, Text, func
from sqlalchemy.dialects.postgresql import UUID as PG_UUID
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqla_durable.models import Workflow

SCHEMA = "torture_bank"
OPENED = 1_000_000
"""What every account holds at first, in cents."""


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
    opened: Mapped[int] = mapped_column(default=OPENED)
    cents: Mapped[int] = mapped_column(default=OPENED)
    movements: Mapped[int] = mapped_column(default=0)


class Transfer(Base):
    """What was asked for, inserted in the transaction that started its workflow."""

    __tablename__ = "transfer"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    workflow_id: Mapped[UUID] = mapped_column(ForeignKey(Workflow.id))
    source: Mapped[int]
    target: Mapped[int]
    cents: Mapped[int]


class Entry(Base):
    """What a transactional step wrote, and which worker wrote it: a debit, a credit, or a line of the journal."""

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
    """A call that the outside world has received, in a transaction of its own; it may come again with the same key."""

    __tablename__ = "call"

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    transfer_id: Mapped[int]
    workflow_id: Mapped[UUID]
    step: Mapped[str]
    key: Mapped[str]
    worker: Mapped[str]
    called_at: Mapped[datetime] = mapped_column(server_default=func.pg_catalog.statement_timestamp())
