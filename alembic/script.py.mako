"""${message}.

Made by: alembic revision --rev-id durable_0002 -m "..."
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

from sqla_durable.migrations import schema as schemas
${imports if imports else ""}

revision = ${repr(up_revision).replace("'", '"')}
down_revision = ${repr(down_revision).replace("'", '"')}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade(schema: str | None = None) -> None:
    with schemas.resolved(schema) as name:
        # Pass schema=name to every operation, op.f(...) to every constraint's name, and set the version marker:
        # op.create_table_comment("workflow", "sqla-durable ${up_revision}", schema=name)
        ${upgrades.replace("\n    ", "\n        ") if upgrades else "pass"}


def downgrade(schema: str | None = None) -> None:
    with schemas.resolved(schema) as name:
        ${downgrades.replace("\n    ", "\n        ") if downgrades else "pass"}
