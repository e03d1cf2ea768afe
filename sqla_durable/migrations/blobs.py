"""The tables of blobs, as durable_0002 makes them, which has no room for them. Used by `versions` only."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql as pg

from sqla_durable.migrations import schema as schemas

_NOW = sa.text("pg_catalog.statement_timestamp()")
_CHECKS = {
    "step_key": "pg_catalog.octet_length(step_key) <= 2500",
    "stored": "stored_at IS NULL OR (size IS NOT NULL AND sha256 IS NOT NULL)",
    "counts": "size >= 0 AND try_number >= 1",
    "sha256": "sha256 ~ '^[0-9a-f]{64}$'",
    "texts": "pg_catalog.octet_length(media_type) <= 1000 AND pg_catalog.octet_length(url) <= 4000",
    "times": "least(created_at, stored_at, expires_at) >= timestamptz '0001-01-02 00:00:00Z' "
    "AND greatest(created_at, stored_at, expires_at) <= timestamptz '9999-12-30 00:00:00Z'",
}
_INDEXES = {
    "blob_workflow_id_idx": (["workflow_id", "step_key"], "workflow_id IS NOT NULL"),
    "blob_expires_at_idx": (["expires_at"], "workflow_id IS NULL"),
    "blob_unfinished_idx": (["workflow_id"], "stored_at IS NULL AND workflow_id IS NOT NULL"),
}


def create(schema: sa.quoted_name) -> None:
    """Create the tables."""
    op.create_table(
        "blob",
        sa.Column("id", pg.UUID(), nullable=False),
        sa.Column("workflow_id", pg.UUID()),
        sa.Column("step_key", sa.Text()),
        sa.Column("token", pg.UUID()),
        sa.Column("try_number", sa.Integer()),
        sa.Column("size", sa.BigInteger()),
        sa.Column("sha256", sa.Text()),
        sa.Column("media_type", sa.Text()),
        sa.Column("codecs", pg.ARRAY(sa.Text())),
        sa.Column("url", sa.Text()),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=_NOW, nullable=False),
        sa.Column("stored_at", sa.DateTime(timezone=True)),
        sa.Column("expires_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("id", name=op.f("blob_pkey")),
        _refers("blob", "workflow_id", f"{schema}.workflow.id", "SET NULL"),
        *(sa.CheckConstraint(check, name=op.f(f"blob_{name}_check")) for name, check in _CHECKS.items()),
        schema=schema,
    )
    for name, (columns, condition) in _INDEXES.items():
        op.create_index(op.f(name), "blob", columns, schema=schema, postgresql_where=sa.text(condition))
    op.create_table(
        "blob_chunk",
        sa.Column("blob_id", pg.UUID(), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("blob_id", "number", name=op.f("blob_chunk_pkey")),
        _refers("blob_chunk", "blob_id", f"{schema}.blob.id", "CASCADE"),
        sa.CheckConstraint("number >= 0", name=op.f("blob_chunk_number_check")),
        schema=schema,
    )
    schemas.execute(schema, "ALTER TABLE {schema}.blob_chunk ALTER COLUMN data SET STORAGE EXTERNAL")


def drop(schema: sa.quoted_name) -> None:
    """Drop the tables."""
    op.drop_table("blob_chunk", schema=schema)
    op.drop_table("blob", schema=schema)


def _refers(table: str, column: str, target: str, on_delete: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint([column], [target], name=op.f(f"{table}_{column}_fkey"), ondelete=on_delete)
