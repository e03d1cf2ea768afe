"""Do nothing."""

revision = "durable_0002"
down_revision = "durable_0001"


def upgrade(schema: str | None = None) -> None:
    raise NotImplementedError


def downgrade(schema: str | None = None) -> None:
    raise NotImplementedError
