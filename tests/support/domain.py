"""A small application of its own, with tables in the schema `public` that refer to workflows."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import BigInteger, ForeignKey, MetaData
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from sqla_durable.models import Workflow


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "pk": "%(table_name)s_pkey",
            "fk": "%(table_name)s_%(column_0_name)s_fkey",
            "ix": "%(table_name)s_%(column_0_name)s_idx",
        }
    )


class Order(Base):
    """What a customer ordered, with the workflow that carries it out."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str]
    total_cents: Mapped[int] = mapped_column(BigInteger)
    workflow_id: Mapped[UUID | None] = mapped_column(ForeignKey(Workflow.id, ondelete="SET NULL"), index=True)

    workflow: Mapped[Workflow | None] = relationship(Workflow)


class Entry(Base):
    """One line of a ledger: business data that a step writes."""

    __tablename__ = "entry"

    id: Mapped[int] = mapped_column(primary_key=True)
    account: Mapped[str] = mapped_column(index=True)
    cents: Mapped[int] = mapped_column(BigInteger)
    note: Mapped[str | None]
