"""The statements on blobs: begin one, write a chunk, complete it, read, make it a workflow's, and delete what is over.

What a step writes is written under the fence, as everything of an attempt. A blob without a workflow and without a time
is over: nothing can complete it or make it a workflow's, so its object can be deleted before its row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY

from sqla_durable.definitions.blobs import blobs_in
from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.models import SCHEMA, Base
from sqla_durable.models.base import Text
from sqla_durable.store.records import Origin
from sqla_durable.store.statements import (
    LIMIT,
    WORKFLOW,
    Columns,
    Condition,
    Connectable,
    Expression,
    Statement,
    as_uuid,
    batch_parameter,
    batch_table,
    execute,
    insert_select,
    is_among,
    materialized,
    parameter,
    pg,
    scalar,
    text_literal,
)
from sqla_durable.store.steps import GIVEN, given_fence_parameters, is_owned
from sqla_durable.unwinding import AttemptLost

BLOB = Base.metadata.tables[f"{SCHEMA}.blob"]
CHUNK = Base.metadata.tables[f"{SCHEMA}.blob_chunk"]

MOST_CHUNKS = 200
"""How many chunks one statement deletes."""

_ADOPTED: Columns = {"id": sa.UUID(), "workflow_id": sa.UUID()}
_KEPT = sa.text("interval '1 day'")
_DETACHED: Mapping[str, Any] = dict.fromkeys(("workflow_id", "step_key", "stored_at", "expires_at"), sa.null())


@dataclass(frozen=True, slots=True)
class NewBlob:
    """A blob that is to be written.

    Attributes:
        id: its id.
        media_type: what it is.
        codecs: the names of those that its chunks are sealed by; None if they are plain.
        url: where its object is; None if its chunks are in the table.
    """

    id: UUID
    media_type: str | None
    codecs: Sequence[str] | None
    url: str | None

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters of the statements that insert it."""
        codecs = None if self.codecs is None else list(self.codecs)
        return {"blob_id": self.id, "new_media_type": self.media_type, "new_codecs": codecs, "new_url": self.url}


@dataclass(frozen=True, slots=True)
class Found:
    """A blob that can be read.

    Attributes:
        is_sealed: whether its chunks were sealed.
        url: where its object is; None if its chunks are in the table.
    """

    is_sealed: bool
    url: str | None


def begin(connectable: Connectable, new: NewBlob, *, origin: Origin) -> None:
    """Insert a blob that a step writes, and detach those that earlier tries of the step have left.

    Waits for the lock of the workflow's row.

    Raises:
        AttemptLost: the attempt no longer owns the workflow; nothing was written.
    """
    if scalar(connectable, _BEGIN, new.parameters | _origin_parameters(origin)) is None:
        raise AttemptLost(origin.fence.workflow_id)


def begin_outside(connectable: Connectable, new: NewBlob) -> None:
    """Insert a blob without a workflow, which is deleted in a day."""
    execute(connectable, _BEGIN_OUTSIDE, new.parameters)


def write(connectable: Connectable, blob_id: UUID, number: int, data: bytes, *, origin: Origin | None) -> bool:
    """Write a chunk, in a step once however often it is executed; false if the blob is not there to be written.

    Args:
        blob_id: the blob.
        number: that of the chunk, from 0.
        data: its bytes.
        origin: the try that writes it; None outside a workflow.

    Raises:
        AttemptLost: the attempt no longer owns the workflow; nothing was written.
    """
    parameters = {"blob_id": blob_id, "new_number": number, "new_data": data}
    return _carried_out(connectable, _WRITE if origin else _WRITE_OUTSIDE, parameters, origin)


def complete(connectable: Connectable, blob_id: UUID, *, size: int, sha256: str, origin: Origin | None) -> bool:
    """Complete a blob; false if it is not there to be completed. One that was begun outside becomes the workflow's.

    Raises:
        AttemptLost: the attempt no longer owns the workflow; nothing was written.
    """
    parameters = {"blob_id": blob_id, "new_size": size, "new_sha256": sha256}
    return _carried_out(connectable, _COMPLETE if origin else _COMPLETE_OUTSIDE, parameters, origin)


def adopt(connectable: Connectable, owners: Mapping[UUID, UUID]) -> None:
    """Make blobs without a workflow those of workflows, by their ids; others stay as they are."""
    if owners:
        rows = [{"id": each.hex, "workflow_id": owners[each].hex} for each in sorted(owners)]
        execute(connectable, _ADOPT, batch_parameter("adopted", rows))


def adopt_in(connectable: Connectable, text: str, workflow_id: UUID) -> None:
    """Make the blobs of a value, from its JSON text, those of the workflow that gets it."""
    adopt(connectable, dict.fromkeys(blobs_in(text), workflow_id))


def find(connectable: Connectable, blob_id: UUID) -> Found | None:
    """Find a blob that is complete. Takes no lock."""
    row = execute(connectable, _FIND, {"blob_id": blob_id}).one_or_none()
    return None if row is None else Found(row.is_sealed, row.url)


def read(connectable: Connectable, blob_id: UUID, number: int) -> bytes | None:
    """Read a chunk; None if there is none. Takes no lock."""
    data = scalar(connectable, _READ, {"blob_id": blob_id, "new_number": number})
    return None if data is None else bytes(data)


def condemn(connectable: Connectable, store: str | None, *, limit: int) -> dict[UUID, str | None]:
    """Detach blobs that are over from everything that could still use them; return them with the URLs of their objects.

    Those are over whose workflow is gone or whose time has come, which a later try has replaced, and unfinished ones of
    finished workflows. What another transaction locks is passed over.

    Args:
        store: the URL of the store whose objects can be deleted here; those of others are left alone.
        limit: how many.
    """
    rows = execute(connectable, _CONDEMN, {"store": store, "limit": limit})
    return {as_uuid(row.id): row.url for row in rows}


def delete(connectable: Connectable, ids: Sequence[UUID], *, limit: int = MOST_CHUNKS) -> bool:
    """Delete condemned blobs, a bounded number of their chunks at a time; return whether all are deleted."""
    done = cast("sa.CursorResult[Any]", execute(connectable, _DELETE_CHUNKS, {"ids": list(ids), "limit": limit}))
    if done.rowcount == limit:
        return False
    execute(connectable, _DELETE, {"ids": list(ids)})
    return True


def _carried_out(
    connectable: Connectable, statement: Statement, parameters: dict[str, Any], origin: Origin | None
) -> bool:
    if origin is None:
        return scalar(connectable, statement, parameters) is not None
    row = execute(connectable, statement, parameters | _origin_parameters(origin)).one()
    if not row.owned:
        raise AttemptLost(origin.fence.workflow_id)
    return bool(row.done)


def _origin_parameters(origin: Origin) -> dict[str, Any]:
    return given_fence_parameters(origin.fence, origin.step_key) | {"new_try": origin.try_number}


def _owned() -> sa.CTE:
    locked = sa.select(WORKFLOW.c.id, WORKFLOW.c.continued_at).where(*is_owned())
    return materialized(locked.with_for_update(key_share=True, of=WORKFLOW), "owned")


def _begin_statement() -> Any:
    owned = _owned()
    mine = sa.and_(BLOB.c.token == GIVEN["token"], BLOB.c.try_number == _TRY)
    earlier = (
        sa.update(BLOB)
        .where(
            BLOB.c.workflow_id == owned.c.id,
            BLOB.c.step_key == GIVEN["key"],
            mine.is_not(sa.true()),
            # What was written before the workflow continued as new may be among its arguments now.
            sa.or_(owned.c.continued_at.is_(None), BLOB.c.created_at >= owned.c.continued_at),
        )
        .values(_DETACHED)
        .returning(BLOB.c.id)
        .cte("earlier")
    )
    columns = {**_NEW, "workflow_id": owned.c.id, **_writer()}
    inserted = insert_select(BLOB, columns, sa.select(*columns.values())).on_conflict_do_nothing()
    begun = inserted.returning(BLOB.c.id).cte("begun")
    return sa.select(owned.c.id).add_cte(earlier, begun)


def _begin_outside_statement() -> Any:
    columns = {**_NEW, "expires_at": pg.statement_timestamp() + _KEPT}
    return insert_select(BLOB, columns, sa.select(*columns.values()))


def _writer() -> dict[str, Expression]:
    return {"step_key": GIVEN["key"], "token": GIVEN["token"], "try_number": _TRY}


def _fenced(owned: sa.CTE, done: Any) -> Any:
    return sa.select(
        sa.select(owned.c.id).exists().label("owned"), sa.select(done.cte("done").c.id).exists().label("done")
    )


def _insert_chunk(source: Any) -> Any:
    values = [BLOB.c.id, _NUMBER, parameter("new_data", sa.LargeBinary())]
    wanted = source.with_only_columns(*values)
    return insert_select(CHUNK, ["blob_id", "number", "data"], wanted).returning(CHUNK.c.blob_id.label("id"))


def _write_statement() -> Any:
    owned = _owned()
    theirs = sa.select(BLOB.c.id).join_from(BLOB, owned, BLOB.c.workflow_id == owned.c.id).where(BLOB.c.id == _ID)
    written = _insert_chunk(theirs)
    # An update, and not nothing, so that the row comes back the second time too.
    again = written.on_conflict_do_update(index_elements=["blob_id", "number"], set_={"data": written.excluded.data})
    return _fenced(owned, again)


def _complete_statement() -> Any:
    owned = _owned()
    mine = sa.or_(BLOB.c.workflow_id == owned.c.id, _is_waiting())
    values = {**_STORED, "workflow_id": owned.c.id, **_writer(), "expires_at": sa.null()}
    return _fenced(owned, sa.update(BLOB).where(BLOB.c.id == _ID, mine).values(values).returning(BLOB.c.id))


def _is_waiting() -> Condition:
    """Return whether a blob has no workflow yet."""
    return sa.and_(BLOB.c.workflow_id.is_(None), BLOB.c.expires_at.is_not(None))


def _adopt_statement() -> Any:
    adopted = batch_table("adopted", _ADOPTED)
    values = {"workflow_id": adopted.c.workflow_id, "expires_at": sa.null()}
    return sa.update(BLOB).where(BLOB.c.id == adopted.c.id, _is_waiting(), BLOB.c.stored_at.is_not(None)).values(values)


def _condemn_statement() -> Any:
    is_there = sa.and_(_STORE.is_not(None), BLOB.c.url == pg.concat(_STORE, text_literal("/"), BLOB.c.id))
    is_ours = sa.or_(BLOB.c.url.is_(None), is_there)
    now = pg.statement_timestamp()
    gone = sa.select(BLOB.c.id).where(
        is_ours, BLOB.c.workflow_id.is_(None), sa.or_(BLOB.c.expires_at.is_(None), BLOB.c.expires_at <= now)
    )
    left = (
        sa.select(BLOB.c.id)
        .join_from(BLOB, WORKFLOW, WORKFLOW.c.id == BLOB.c.workflow_id)
        .where(is_ours, BLOB.c.stored_at.is_(None), WORKFLOW.c.finished_at.is_not(None))
    )
    both = [
        materialized(each.limit(LIMIT).with_for_update(key_share=True, skip_locked=True, of=BLOB), name)
        for name, each in (("gone", gone), ("left_over", left))
    ]
    every = sa.union_all(*(sa.select(each.c.id) for each in both))
    return sa.update(BLOB).where(BLOB.c.id.in_(every)).values(_DETACHED).returning(BLOB.c.id, BLOB.c.url)


def _is_condemned() -> Condition:
    return sa.and_(is_among(BLOB.c.id), BLOB.c.workflow_id.is_(None), BLOB.c.expires_at.is_(None))


def _delete_chunks_statement() -> Any:
    some = sa.select(CHUNK.c.blob_id, CHUNK.c.number).join(BLOB, BLOB.c.id == CHUNK.c.blob_id).where(_is_condemned())
    return sa.delete(CHUNK).where(sa.tuple_(CHUNK.c.blob_id, CHUNK.c.number).in_(some.limit(LIMIT)))


_ID = parameter("blob_id", sa.UUID())
_TRY = parameter("new_try", sa.Integer())
_NUMBER = parameter("new_number", sa.Integer())
_STORE = parameter("store", Text())
_STORED = {
    "size": parameter("new_size", sa.BigInteger()),
    "sha256": parameter("new_sha256", Text()),
    "stored_at": pg.statement_timestamp(),
}
_NEW: dict[str, Expression] = {
    "id": _ID,
    "media_type": parameter("new_media_type", Text()),
    "codecs": parameter("new_codecs", ARRAY(Text())),
    "url": parameter("new_url", Text()),
}
_IS_BLOB = BLOB.c.id == _ID
_BEGIN = Statement(_begin_statement)
_BEGIN_OUTSIDE = Statement(_begin_outside_statement)
_WRITE = Statement(_write_statement)
_WRITE_OUTSIDE = Statement(lambda: _insert_chunk(sa.select(BLOB.c.id).where(_IS_BLOB, _is_waiting())))
_COMPLETE = Statement(_complete_statement)
_COMPLETE_OUTSIDE = Statement(
    lambda: (
        sa.update(BLOB)
        .where(_IS_BLOB, _is_waiting())
        .values({**_STORED, "expires_at": pg.statement_timestamp() + _KEPT})
        .returning(BLOB.c.id)
    )
)
_ADOPT = Statement(_adopt_statement)
_FIND = Statement(
    lambda: sa.select(BLOB.c.codecs.is_not(None).label("is_sealed"), BLOB.c.url).where(
        _IS_BLOB, BLOB.c.stored_at.is_not(None)
    )
)
_READ = Statement(lambda: sa.select(CHUNK.c.data).where(CHUNK.c.blob_id == _ID, CHUNK.c.number == _NUMBER))
_CONDEMN = Statement(_condemn_statement)
_DELETE_CHUNKS = Statement(_delete_chunks_statement)
_DELETE = Statement(lambda: sa.delete(BLOB).where(_is_condemned()))
