"""Do nothing."""

revision = "durable_0003"
down_revision = "durable_0002"


def upgrade(schema: str | None = None) -> None:
    raise NotImplementedError


def downgrade(schema: str | None = None) -> None:
    raise NotImplementedError
