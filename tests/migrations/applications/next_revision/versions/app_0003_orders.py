"""Add orders, each with its workflow."""

import sqlalchemy as sa
from alembic import op

revision = "app_0003"
down_revision = "app_0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "orders",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("customer", sa.String(), nullable=False),
        sa.Column("total_cents", sa.BigInteger(), nullable=False),
        sa.Column("workflow_id", sa.UUID()),
        sa.PrimaryKeyConstraint("id", name=op.f("orders_pkey")),
        sa.ForeignKeyConstraint(
            ["workflow_id"], ["durable.workflow.id"], name=op.f("orders_workflow_id_fkey"), ondelete="SET NULL"
        ),
    )
    op.create_index(op.f("orders_workflow_id_idx"), "orders", ["workflow_id"])


def downgrade() -> None:
    op.drop_table("orders")
