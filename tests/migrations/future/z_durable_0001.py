"""Do nothing."""

revision = "durable_0001"
down_revision = None


def upgrade(schema: str | None = None) -> None:
    raise NotImplementedError


def downgrade(schema: str | None = None) -> None:
    raise NotImplementedError
