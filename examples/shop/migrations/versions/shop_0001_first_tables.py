"""The tables of sqla-durable, and then the shop's own, which refer to them."""

from datetime import datetime

import sqlalchemy as sa
from alembic import op

from sqla_durable import migrations

revision = "shop_0001"
down_revision = None
branch_labels = None
depends_on = None

# Each of these says something about one order, and is found by its number.
FACTS: dict[str, list[sa.Column[int] | sa.Column[str]]] = {
    "payment": [sa.Column("pence", sa.Integer(), nullable=False), sa.Column("reference", sa.String(), nullable=False)],
    "refund": [sa.Column("pence", sa.Integer(), nullable=False), sa.Column("reference", sa.String(), nullable=False)],
    "shipment": [sa.Column("units", sa.Integer(), nullable=False)],
    "notification": [sa.Column("text", sa.String(), nullable=False)],
}


def upgrade() -> None:
    migrations.upgrade("durable_0002")
    _create_customers_and_products()
    _create_orders()
    _create_stock_movements()
    for name, columns in FACTS.items():
        _create_facts(name, columns)


def downgrade() -> None:
    for name in [*FACTS, "stock_movement", "order_line", "orders", "product", "customer"]:
        op.drop_table(name)
    migrations.downgrade("durable_0002")


def _create_customers_and_products() -> None:
    op.create_table(
        "customer",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("customer_pkey")),
    )
    op.create_table(
        "product",
        sa.Column("code", sa.String(), nullable=False),
        sa.Column("description", sa.String(), nullable=False),
        sa.Column("stock", sa.Integer(), nullable=False),
        sa.CheckConstraint("stock >= 0", name=op.f("product_stock_check")),
        sa.PrimaryKeyConstraint("code", name=op.f("product_pkey")),
    )


def _create_orders() -> None:
    op.create_table(
        "orders",
        sa.Column("number", sa.String(), nullable=False),
        sa.Column("customer_id", sa.Integer()),
        sa.Column("country", sa.String(), nullable=False),
        sa.Column("placed_at", sa.DateTime(), nullable=False),
        sa.Column("status", sa.String(32), nullable=False),
        sa.Column("objection", sa.String(32)),
        sa.Column("workflow_id", sa.UUID()),
        sa.ForeignKeyConstraint(["customer_id"], ["customer.id"], name=op.f("orders_customer_id_fkey")),
        sa.ForeignKeyConstraint(
            ["workflow_id"], ["durable.workflow.id"], name=op.f("orders_workflow_id_fkey"), ondelete="SET NULL"
        ),
        sa.PrimaryKeyConstraint("number", name=op.f("orders_pkey")),
        sa.UniqueConstraint("workflow_id", name=op.f("orders_workflow_id_key")),
    )
    op.create_index(op.f("orders_customer_id_idx"), "orders", ["customer_id"])
    op.create_table(
        "order_line",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("order_number", sa.String(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("product_code", sa.String(), nullable=False),
        sa.Column("quantity", sa.Integer(), nullable=False),
        sa.Column("unit_pence", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["order_number"], ["orders.number"], name=op.f("order_line_order_number_fkey")),
        sa.ForeignKeyConstraint(["product_code"], ["product.code"], name=op.f("order_line_product_code_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("order_line_pkey")),
    )
    op.create_index(op.f("order_line_order_number_idx"), "order_line", ["order_number"])


def _create_stock_movements() -> None:
    op.create_table(
        "stock_movement",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("line_id", sa.Integer(), nullable=False),
        sa.Column("quantity", sa.Integer(), nullable=False),
        _created_at(),
        sa.ForeignKeyConstraint(["line_id"], ["order_line.id"], name=op.f("stock_movement_line_id_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("stock_movement_pkey")),
    )
    op.create_index(op.f("stock_movement_line_id_idx"), "stock_movement", ["line_id"])


def _create_facts(name: str, columns: list[sa.Column[int] | sa.Column[str]]) -> None:
    op.create_table(
        name,
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("order_number", sa.String(), nullable=False),
        *columns,
        _created_at(),
        sa.ForeignKeyConstraint(["order_number"], ["orders.number"], name=op.f(f"{name}_order_number_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f(f"{name}_pkey")),
    )
    op.create_index(op.f(f"{name}_order_number_idx"), name, ["order_number"])


def _created_at() -> sa.Column[datetime]:
    return sa.Column(
        "created_at", sa.DateTime(timezone=True), server_default=sa.func.statement_timestamp(), nullable=False
    )
