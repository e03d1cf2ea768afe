"""What the application had before it met us."""

import sqlalchemy as sa
from alembic import op

revision = "app_0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "entry",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("cents", sa.BigInteger(), nullable=False),
        sa.Column("note", sa.String()),
        sa.PrimaryKeyConstraint("id", name=op.f("entry_pkey")),
    )
    op.create_index(op.f("entry_account_idx"), "entry", ["account"])


def downgrade() -> None:
    op.drop_table("entry")
