"""The tables of blobs: documents that pass through workflows by reference, and their bytes in chunks."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, Integer, LargeBinary, func, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Mapped, mapped_column

from sqla_durable.models.base import LONGEST_KEY, SCHEMA, Base, Text, shown, times_check
from sqla_durable.models.tables import Workflow


class StoredBlob(Base):
    """A document that a `Blob` refers to, from the first byte on; it is complete from `stored_at` on.

    It belongs to the workflow whose step has written it, or that was started with it. One without a workflow is deleted
    at `expires_at`; without that either, its workflow is gone, or a later try has replaced it, and workers delete it
    soon. `step_key`, `token` and `try_number` identify the try that writes it. `url` is where its bytes are, outside of
    the database; without one they are in `blob_chunk`. `codecs` are the names of those that its chunks were sealed by.
    """

    __tablename__ = "blob"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    workflow_id: Mapped[UUID | None] = mapped_column(ForeignKey(Workflow.id, ondelete="SET NULL"))
    step_key: Mapped[str | None]
    token: Mapped[UUID | None]
    try_number: Mapped[int | None] = mapped_column(Integer)
    size: Mapped[int | None] = mapped_column(BigInteger)
    sha256: Mapped[str | None]
    media_type: Mapped[str | None]
    codecs: Mapped[list[str] | None] = mapped_column(ARRAY(Text))
    url: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.pg_catalog.statement_timestamp())
    stored_at: Mapped[datetime | None]
    expires_at: Mapped[datetime | None]

    __table_args__ = (
        CheckConstraint(f"pg_catalog.octet_length(step_key) <= {LONGEST_KEY}", name="step_key"),
        CheckConstraint("stored_at IS NULL OR (size IS NOT NULL AND sha256 IS NOT NULL)", name="stored"),
        CheckConstraint("size >= 0 AND try_number >= 1", name="counts"),
        CheckConstraint("sha256 ~ '^[0-9a-f]{64}$'", name="sha256"),
        CheckConstraint(
            "pg_catalog.octet_length(media_type) <= 1000 AND pg_catalog.octet_length(url) <= 4000", name="texts"
        ),
        times_check("created_at", "stored_at", "expires_at"),
        # Those of a workflow, and of one of its steps.
        Index("blob_workflow_id_idx", "workflow_id", "step_key", postgresql_where=text("workflow_id IS NOT NULL")),
        # What is to be deleted: at a time, or because its workflow is gone.
        Index("blob_expires_at_idx", "expires_at", postgresql_where=text("workflow_id IS NULL")),
        # What is being written, or was left in the middle of it.
        Index(
            "blob_unfinished_idx",
            "workflow_id",
            postgresql_where=text("stored_at IS NULL AND workflow_id IS NOT NULL"),
        ),
    )

    def __repr__(self) -> str:
        return shown(self, "id", "size", "workflow_id")


class BlobChunk(Base):
    """A part of a blob's bytes; all but the last are equally long before they are sealed."""

    __tablename__ = "blob_chunk"

    blob_id: Mapped[UUID] = mapped_column(
        ForeignKey(f"{SCHEMA}.{StoredBlob.__tablename__}.id", ondelete="CASCADE"), primary_key=True
    )
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    data: Mapped[bytes] = mapped_column(LargeBinary)

    __table_args__ = (CheckConstraint("number >= 0", name="number"),)
