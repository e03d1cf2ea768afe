"""Add sqla-durable."""

from sqla_durable import migrations

revision = "app_0002"
down_revision = "app_0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    migrations.upgrade("durable_0002")


def downgrade() -> None:
    migrations.downgrade("durable_0002")
