"""The shop's tables. An order refers to the workflow that carries it out by class, like to any other model."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated
from uuid import UUID

from sqlalchemy import CheckConstraint, DateTime, Enum, ForeignKey, MetaData, func
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from sqla_durable import Workflow


class OrderStatus(StrEnum):
    """What has become of an order."""

    PLACED = "placed"
    ACCEPTED = "accepted"
    REJECTED = "rejected"
    SHIPPED = "shipped"
    RETURNED = "returned"
    CANCELLED = "cancelled"


class Objection(StrEnum):
    """Why an invoice cannot be an order."""

    NO_CUSTOMER = "no customer"
    STOCK_CORRECTION = "stock correction"
    PRICE_OF_ZERO = "price of zero"


def _text_of(kind: type[StrEnum]) -> Enum:
    """Store a member's value as plain text."""
    return Enum(kind, native_enum=False, length=32, values_callable=_values)


def _values(kind: type[StrEnum]) -> list[str]:
    return [each.value for each in kind]


OrderNumber = Annotated[str, mapped_column(ForeignKey("orders.number"), index=True)]
CreatedAt = Annotated[datetime, mapped_column(DateTime(timezone=True), server_default=func.statement_timestamp())]


class Base(DeclarativeBase):
    """The shop's own declarative base, in the default schema."""

    metadata = MetaData(
        naming_convention={
            "pk": "%(table_name)s_pkey",
            "fk": "%(table_name)s_%(column_0_name)s_fkey",
            "uq": "%(table_name)s_%(column_0_name)s_key",
            "ix": "%(table_name)s_%(column_0_name)s_idx",
            "ck": "%(table_name)s_%(constraint_name)s_check",
        }
    )
    type_annotation_map = {  # noqa: RUF012 (SQLAlchemy declares it as an instance attribute)
        OrderStatus: _text_of(OrderStatus),
        Objection: _text_of(Objection),
    }


class Customer(Base):
    """Who orders."""

    __tablename__ = "customer"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)

    orders: Mapped[list[Order]] = relationship(back_populates="customer")


class Product(Base):
    """What is sold, and how much of it is on the shelf."""

    __tablename__ = "product"

    code: Mapped[str] = mapped_column(primary_key=True)
    description: Mapped[str]
    stock: Mapped[int]

    __table_args__ = (CheckConstraint("stock >= 0", name="stock"),)


class Order(Base):
    """An invoice: an order, or a return if its number begins with C."""

    __tablename__ = "orders"

    number: Mapped[str] = mapped_column(primary_key=True)
    customer_id: Mapped[int | None] = mapped_column(ForeignKey(Customer.id), index=True)
    country: Mapped[str]
    placed_at: Mapped[datetime] = mapped_column(DateTime)  # the shop's local time, as in the file
    status: Mapped[OrderStatus] = mapped_column(default=OrderStatus.PLACED)
    objection: Mapped[Objection | None]
    # Finished workflows may be deleted one day; the order stays.
    workflow_id: Mapped[UUID | None] = mapped_column(ForeignKey(Workflow.id, ondelete="SET NULL"), unique=True)

    workflow: Mapped[Workflow | None] = relationship(Workflow)
    customer: Mapped[Customer | None] = relationship(back_populates="orders")
    lines: Mapped[list[OrderLine]] = relationship(back_populates="order", order_by="OrderLine.position")
    payments: Mapped[list[Payment]] = relationship(back_populates="order")
    refunds: Mapped[list[Refund]] = relationship(back_populates="order")
    shipments: Mapped[list[Shipment]] = relationship(back_populates="order")
    notifications: Mapped[list[Notification]] = relationship(back_populates="order")


class OrderLine(Base):
    """One line of an invoice."""

    __tablename__ = "order_line"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_number: Mapped[OrderNumber]
    position: Mapped[int]
    product_code: Mapped[str] = mapped_column(ForeignKey(Product.code))
    quantity: Mapped[int]
    unit_pence: Mapped[int]

    order: Mapped[Order] = relationship(back_populates="lines")
    product: Mapped[Product] = relationship()


class StockMovement(Base):
    """Goods that left the shelf or came back to it, for one line of an invoice."""

    __tablename__ = "stock_movement"

    id: Mapped[int] = mapped_column(primary_key=True)
    line_id: Mapped[int] = mapped_column(ForeignKey(OrderLine.id), index=True)
    quantity: Mapped[int]
    created_at: Mapped[CreatedAt]

    line: Mapped[OrderLine] = relationship()


class Payment(Base):
    """Money that the payment service has taken."""

    __tablename__ = "payment"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_number: Mapped[OrderNumber]
    pence: Mapped[int]
    reference: Mapped[str]
    created_at: Mapped[CreatedAt]

    order: Mapped[Order] = relationship(back_populates="payments")


class Refund(Base):
    """Money that the payment service has given back."""

    __tablename__ = "refund"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_number: Mapped[OrderNumber]
    pence: Mapped[int]
    reference: Mapped[str]
    created_at: Mapped[CreatedAt]

    order: Mapped[Order] = relationship(back_populates="refunds")


class Shipment(Base):
    """A parcel on its way to a customer."""

    __tablename__ = "shipment"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_number: Mapped[OrderNumber]
    units: Mapped[int]
    created_at: Mapped[CreatedAt]

    order: Mapped[Order] = relationship(back_populates="shipments")


class Notification(Base):
    """A message to a customer, for the mail program to send."""

    __tablename__ = "notification"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_number: Mapped[OrderNumber]
    text: Mapped[str]
    created_at: Mapped[CreatedAt]

    order: Mapped[Order] = relationship(back_populates="notifications")
