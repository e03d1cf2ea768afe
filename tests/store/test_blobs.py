"""Blobs in the tables: written under the fence, replaced by the next try, and deleted when nothing needs them."""

from __future__ import annotations

from hashlib import sha256
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, delete, func, select, text, update
from sqlalchemy.orm import Session
from uuid_utils.compat import uuid7

from sqla_durable.models import BlobChunk, StoredBlob, Workflow
from sqla_durable.store import Fence, Origin, blobs
from sqla_durable.store.blobs import NewBlob
from sqla_durable.store.statements import Statement
from sqla_durable.store.steps import given_fence_parameters
from sqla_durable.unwinding import AttemptLost
from tests.store import races
from tests.store.plans import MODES, explain

STORE = "memory://documents"
HASH = sha256(b"").hexdigest()


def new(url: str | None = None) -> NewBlob:
    blob_id = uuid7()
    return NewBlob(blob_id, None, None, None if url is None else f"{url}/{blob_id}")


def origin_of(fence: Fence, try_number: int = 1) -> Origin:
    return Origin(fence, 1, "read", try_number)


def put(session: Session, origin: Origin | None, *, is_complete: bool = True, url: str | None = None) -> UUID:
    """Write a blob of two chunks."""
    blob = new(url)
    if origin is None:
        blobs.begin_outside(session, blob)
    else:
        blobs.begin(session, blob, origin=origin)
    assert all(
        blobs.write(session, blob.id, number, b"x", origin=origin)
        for number in ((0, 1) if origin is None else (0, 1, 1))
    )
    if is_complete:
        assert blobs.complete(session, blob.id, size=2, sha256=HASH, origin=origin)
    session.commit()
    return blob.id


def left(session: Session) -> tuple[set[UUID], int]:
    """Return the blobs that are there, and the number of all chunks."""
    chunks = session.scalar(select(func.count()).select_from(BlobChunk)) or 0
    return set(session.scalars(select(StoredBlob.id))), chunks


def swept(session: Session, store: str | None = None) -> set[UUID]:
    """Delete what is over, and return what that was."""
    found = blobs.condemn(session, store, limit=10)
    while not blobs.delete(session, list(found), limit=3):
        pass
    session.commit()
    return set(found)


def test_the_next_try_replaces_what_the_one_before_has_left(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session:
        earlier = {put(session, origin_of(fence)), put(session, origin_of(fence), is_complete=False)}
        assert not swept(session)  # a try may write several
        later = put(session, origin_of(fence, 2))
        assert not blobs.write(session, min(earlier), 2, b"x", origin=origin_of(fence))
        assert not blobs.complete(session, min(earlier), size=1, sha256=HASH, origin=origin_of(fence))
        assert swept(session) == earlier
        assert left(session) == ({later}, 2)
        # What is written after the workflow has continued as new does not replace what was written before.
        session.execute(update(Workflow).values(continued_at=func.statement_timestamp()))
        last = put(session, origin_of(fence, 3))
        assert (swept(session), left(session)[0]) == (set(), {later, last})


def test_an_attempt_that_has_lost_its_workflow_writes_nothing(engine: Engine) -> None:
    # behaviour: C4
    (fence,) = races.claimed_fences(engine)
    zombie = origin_of(Fence(fence.workflow_id, uuid7()), 2)
    with Session(engine) as session:
        blob_id = put(session, origin_of(fence), is_complete=False)
        with pytest.raises(AttemptLost):
            blobs.begin(session, new(), origin=zombie)
        with pytest.raises(AttemptLost):
            blobs.write(session, blob_id, 0, b"zombie", origin=zombie)
        with pytest.raises(AttemptLost):
            blobs.complete(session, blob_id, size=1, sha256=HASH, origin=zombie)
        session.commit()
        assert (blobs.read(session, blob_id, 0), left(session)) == (b"x", ({blob_id}, 2))
        assert blobs.find(session, blob_id) is None


def test_a_write_waits_for_a_cancel_and_then_writes_nothing(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    with races.transaction(engine) as one, races.transaction(engine) as other:
        blob_id = put(other.session, origin_of(fence), is_complete=False)
        races.cancel(one.session, fence.workflow_id)
        other.pid = races.pid_of(other.session)
        waiting = other.begin_blocked(
            lambda session: blobs.write(session, blob_id, 2, b"late", origin=origin_of(fence))
        )
        one.session.commit()
        with pytest.raises(AttemptLost):
            waiting.result()


def test_what_nothing_needs_is_deleted_and_all_else_stays(engine: Engine) -> None:
    fences = races.claimed_fences(engine, 3)
    with Session(engine) as session:
        kept, unfinished, cancelled, gone = (
            put(session, origin_of(fences[0])),
            put(session, origin_of(fences[0]), is_complete=False),
            put(session, origin_of(fences[1]), is_complete=False),
            put(session, origin_of(fences[2])),
        )
        waiting, expired, adopted = (put(session, None) for _ in range(3))
        blobs.adopt(session, dict.fromkeys([adopted, gone, uuid7()], fences[0].workflow_id))
        session.execute(update(StoredBlob).where(StoredBlob.id == expired).values(expires_at=func.now()))
        races.cancel(session, fences[1].workflow_id)
        session.execute(delete(Workflow).where(Workflow.id == fences[2].workflow_id))
        session.commit()
        assert swept(session) == {cancelled, gone, expired}
        assert left(session) == ({kept, unfinished, waiting, adopted}, 8)
        session.execute(delete(Workflow))
        assert swept(session) == {kept, unfinished, adopted}


def test_what_is_condemned_can_neither_be_completed_nor_adopted(engine: Engine) -> None:
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session:
        blob_id = put(session, None, url=STORE)
        session.execute(update(StoredBlob).values(expires_at=func.now()))
        assert blobs.condemn(session, None, limit=10) == blobs.condemn(session, "memory://other", limit=10) == {}
        assert blobs.condemn(session, STORE, limit=10) == {blob_id: f"{STORE}/{blob_id}"}
        blobs.adopt(session, {blob_id: fence.workflow_id})
        assert not blobs.complete(session, blob_id, size=1, sha256=HASH, origin=None)
        assert not blobs.complete(session, blob_id, size=1, sha256=HASH, origin=origin_of(fence))
        assert not blobs.write(session, blob_id, 0, b"x", origin=None)
        assert swept(session, STORE) == {blob_id}


def test_sweeps_pass_over_what_others_lock(engine: Engine) -> None:
    with races.transaction(engine) as one, races.transaction(engine) as other:
        first, second = put(one.session, None), put(one.session, None)
        one.session.execute(update(StoredBlob).values(expires_at=func.now()))
        one.session.commit()
        one.session.execute(select(StoredBlob).where(StoredBlob.id == first).with_for_update())
        assert swept(other.session) == {second}


def test_sweeps_and_steps_read_what_they_need_however_many_blobs_there_are(engine: Engine) -> None:
    fill = (
        "INSERT INTO durable.workflow (name) SELECT 'checkout' FROM generate_series(1, 5000)",
        "INSERT INTO durable.blob (id, workflow_id, step_key, size, sha256, stored_at) "
        f"SELECT gen_random_uuid(), id, 'read', 2, '{HASH}', now() FROM durable.workflow",
        "INSERT INTO durable.blob_chunk SELECT id, number, '' FROM durable.blob, generate_series(2, 5) AS number",
        "ANALYZE durable.workflow, durable.blob, durable.blob_chunk",
    )
    (fence,) = races.claimed_fences(engine)
    with Session(engine) as session:
        over = [put(session, None), put(session, origin_of(fence), is_complete=False)]
        for each in fill:
            session.execute(text(each))
        session.execute(update(StoredBlob).where(StoredBlob.id == over[0]).values(expires_at=func.now()))
        session.commit()
        ids = {"ids": f"{{{over[0]},{over[1]}}}"}
        fenced = given_fence_parameters(fence, "read") | {"blob_id": over[1]}
        tries: list[tuple[Statement, dict[str, Any]]] = [
            (blobs._CONDEMN, {"store": STORE, "limit": 100}),  # pyright: ignore[reportPrivateUsage]
            (blobs._DELETE_CHUNKS, ids | {"limit": 100}),  # pyright: ignore[reportPrivateUsage]
            (blobs._DELETE, ids),  # pyright: ignore[reportPrivateUsage]
            (blobs._COMPLETE, fenced | {"new_size": 2, "new_sha256": HASH, "new_try": 1}),  # pyright: ignore[reportPrivateUsage]
        ]
        for statement, parameters in tries:
            for mode in MODES:
                plan = explain(session, statement, parameters, mode=mode)
                assert not any(plan.scans(each) for each in ("blob", "blob_chunk", "workflow")), plan
                assert plan.buffers() < 100, plan
