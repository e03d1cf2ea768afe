"""Follow a release of sqla-durable that has new tables."""

from sqla_durable import migrations

revision = "app_0004"
down_revision = "app_0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    migrations.upgrade("durable_0002", since="durable_0001")


def downgrade() -> None:
    migrations.downgrade("durable_0002", since="durable_0001")
