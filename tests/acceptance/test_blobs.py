"""Blobs: documents that pass through workflows by reference, in the table and in a store outside the database."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, func, select, text, update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker
from uuid_utils.compat import uuid7

import sqla_durable.asyncio as aio
from sqla_durable import (
    Blob,
    Durable,
    Encryption,
    Executor,
    Worker,
    Workflow,
    WorkflowFunction,
    Zstandard,
    create_blob,
    manage,
    open_blob,
    send_signal,
    start_many,
    wait_signal,
)
from sqla_durable.asyncio import AsyncExecutor
from sqla_durable.definitions.blobs import CHUNK, blobs_in
from sqla_durable.errors import (
    ArgumentError,
    AttemptLostError,
    DecodingError,
    DefinitionError,
    NotFoundError,
    UsageError,
    WorkflowCancelledError,
)
from sqla_durable.execution.worker import blobs as worker_blobs
from sqla_durable.execution.worker.blobs import Blobs
from sqla_durable.execution.worker.database import open_databases
from sqla_durable.models import BlobChunk, StoredBlob
from tests.store import races

TICK = timedelta(milliseconds=20)
SOON = timedelta(seconds=20)
DOCUMENT = bytes(range(256)) * 5 * 1024  # three chunks, the last of them shorter

Sessions = sessionmaker[Session]
AsyncSessions = async_sessionmaker[AsyncSession]


@pytest.fixture(params=["table", "store"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    return None if request.param == "table" else f"file://{tmp_path}/documents"


def parts(data: bytes = DOCUMENT) -> Iterator[bytes]:
    for first in range(0, len(data), 300_000):
        yield data[first : first + 300_000]


def written(data: bytes = DOCUMENT, **options: Any) -> Blob:
    with create_blob(**options) as writer:
        for part in parts(data):
            writer.write(part)
    return writer.blob


def objects(tmp_path: Path) -> list[str]:
    return sorted(each.name for each in tmp_path.rglob("*") if each.is_file())


def stored(sessions: Sessions) -> list[UUID]:
    with sessions() as session:
        return list(session.scalars(select(StoredBlob.id).order_by(StoredBlob.id)))


def sweep(engine: Engine, durable: Durable) -> int:
    """Do once what a worker does each minute."""

    async def swept() -> int:
        database = open_databases(engine, hold=0, limit=10, beat_limit=10).shared
        try:
            return await Blobs(database, durable.options.blobs).sweep()
        finally:
            await database.close()

    return asyncio.run(swept())


def converting(
    durable: Durable, session_factory: Sessions
) -> WorkflowFunction[[dict[str, list[Blob]]], tuple[Blob, Blob]]:
    @durable.step
    def reverse(source: Blob) -> Blob:
        with open_blob(session_factory, source) as reader, create_blob(media_type="text/plain") as writer:
            writer.write(reader.read()[::-1])
            with pytest.raises(UsageError, match=r"take writer\.blob after it"):
                _ = writer.blob
        return writer.blob

    @durable.step
    def shorten(session: Session, source: Blob) -> Blob:
        with open_blob(session, source) as reader:
            assert [len(each) for each in reader] == [CHUNK, CHUNK, len(DOCUMENT) - 2 * CHUNK]
        blob = written(b"short", session=session)
        assert open_blob(session, blob).read() == b"short"
        return blob

    @durable.workflow
    def convert(documents: dict[str, list[Blob]]) -> tuple[Blob, Blob]:
        (source,) = documents["all"]
        made = reverse(source)
        return made, shorten(made)

    return convert


def test_a_document_passes_from_the_caller_through_steps_to_the_caller(
    engine: Engine, session_factory: Sessions, url: str | None, tmp_path: Path
) -> None:
    durable = Durable(sessionmaker=session_factory, blobs=url, payloads=[Zstandard(), Encryption({"new": "k" * 32})])

    convert = converting(durable, session_factory)
    with session_factory.begin() as session:
        source = written(session=session, durable=durable)
        workflow = convert.start(session, {"all": [source]}).id
    with Worker(durable, poll_interval=TICK):
        made, short = convert.handle(session_factory, workflow).result(SOON)

    assert (made.size, made.sha256, made.media_type) == (
        len(DOCUMENT),
        hashlib.sha256(DOCUMENT[::-1]).hexdigest(),
        "text/plain",
    )
    reader = open_blob(session_factory, made)
    assert reader.read(10) + b"".join(reader) == DOCUMENT[::-1]
    assert (reader.read(), open_blob(session_factory, short).read()) == (b"", b"short")
    every = sorted([source.id, made.id, short.id])
    with session_factory.begin() as session:
        owners = select(StoredBlob.workflow_id, StoredBlob.expires_at, StoredBlob.codecs).distinct()
        assert session.execute(owners).one() == (workflow, None, ["zstd", "aes-siv:new"])
        raw = b"".join(session.scalars(select(BlobChunk.data)))
        assert objects(tmp_path) == ([] if url is None else sorted(map(str, every)))
        raw += b"".join(each.read_bytes() for each in tmp_path.rglob("*") if each.is_file())
        assert raw
        assert DOCUMENT[:64] not in raw
        manage.delete(session, select(Workflow).where(Workflow.id == workflow))
    assert (stored(session_factory), sweep(engine, durable)) == (every, 3)
    assert (stored(session_factory), objects(tmp_path)) == ([], [])
    with pytest.raises(NotFoundError, match=f"blob {made.id} of 1,310,720 bytes is not there: it was deleted with"):
        open_blob(session_factory, made).read()


@pytest.mark.parametrize(
    ("async_driver", "url"), [("psycopg", "store"), ("asyncpg", "table"), ("asyncpg", "store")], indirect=True
)
async def test_async_code_writes_and_reads_in_the_same_way(
    async_session_factory: AsyncSessions, url: str | None
) -> None:
    durable = Durable(async_sessionmaker=async_session_factory, blobs=url)

    async def copied(source: AsyncSession | AsyncSessions, blob: Blob, **options: Any) -> Blob:
        async with aio.open_blob(source, blob) as reader, aio.create_blob(**options) as writer:
            async for chunk in reader:
                await writer.write(chunk)
        return writer.blob

    @durable.step
    async def plain(source: Blob) -> Blob:
        return await copied(async_session_factory, source)

    @durable.step
    async def transactional(session: AsyncSession, source: Blob) -> Blob:
        inside = await session.run_sync(lambda inner: written(session=inner))
        assert await session.run_sync(lambda inner: open_blob(inner, inside).read()) == DOCUMENT
        return await copied(session, source, session=session)

    @durable.workflow
    async def copy(source: Blob) -> Blob:
        return await transactional(await plain(source))

    async with async_session_factory.begin() as session:
        async with aio.create_blob(session=session, durable=durable) as writer:
            await writer.write(memoryview(DOCUMENT))
        workflow = await copy.start(session, writer.blob)
    async with Worker(durable, poll_interval=TICK):
        blob = await copy.handle(async_session_factory, workflow).result(SOON)
    reader = aio.open_blob(async_session_factory, blob)
    assert (await reader.read(7), await reader.read()) == (DOCUMENT[:7], DOCUMENT[7:])

    async with async_session_factory() as session:
        again = await AsyncExecutor(session).run(copy, blob)
        assert again.sha256 == blob.sha256 == hashlib.sha256(DOCUMENT).hexdigest()
    async with async_session_factory() as session:
        owners = select(func.count(StoredBlob.workflow_id.distinct()), func.count(StoredBlob.stored_at))
        assert (await session.execute(owners)).one() == (2, 7)


def test_joined_executor_writes_into_the_callers_transaction(session_factory: Sessions, tmp_path: Path) -> None:
    durable = Durable()

    @durable.step
    def plain() -> Blob:
        return written()

    @durable.step
    def transactional(session: Session, source: Blob) -> Blob:
        assert open_blob(session, source).read() == DOCUMENT
        return written(session=session)

    @durable.workflow
    def both() -> Blob:
        return transactional(plain())

    outside = Durable(blobs=f"file://{tmp_path}")
    elsewhere = outside.step(lambda: written(), name="elsewhere")
    refused = outside.workflow(lambda: elsewhere(), name="refused")

    with session_factory() as session:
        blob = Executor.joined(session).run(both)
        assert open_blob(session, blob).read() == DOCUMENT
        with pytest.raises(UsageError, match="in a joined executor, whose caller may roll back"):
            Executor.joined(session).run(refused)
        session.rollback()
        assert session.scalars(select(BlobChunk.number)).all() == []
    assert (stored(session_factory), objects(tmp_path)) == ([], [])


def test_a_failed_try_and_a_rollback_leave_nothing_behind(
    engine: Engine, session_factory: Sessions, url: str | None, tmp_path: Path
) -> None:
    durable = Durable(sessionmaker=session_factory, blobs=url)
    tries: list[Blob] = []

    @durable.step(retry=lambda state: state.outcome is not None and state.outcome.failed)
    def flaky() -> Blob:
        tries.append(written())
        if len(tries) == 1:
            with create_blob() as writer:
                writer.write(DOCUMENT)
                raise ConnectionError
        return tries[-1]

    @durable.step
    def refusing(session: Session) -> None:
        written(session=session)
        raise LookupError

    @durable.workflow
    def attempts() -> Blob:
        with pytest.raises(LookupError):
            refusing()
        return flaky()

    with Worker(durable, poll_interval=TICK):
        with session_factory.begin() as session:
            workflow = attempts.start(session)
        blob = attempts.handle(session_factory, workflow).result(SOON)
    with session_factory() as session:
        written(session=session, durable=durable)
        session.rollback()
    # What was outside of the database has its row until that expires.
    with session_factory.begin() as session:
        session.execute(update(StoredBlob).where(StoredBlob.expires_at.is_not(None)).values(expires_at=func.now()))
    assert sweep(engine, durable) == (2 if url is None else 4)
    assert (tries[1], stored(session_factory)) == (blob, [blob.id])
    assert objects(tmp_path) == ([] if url is None else [str(blob.id)])
    assert open_blob(session_factory, blob).read() == DOCUMENT
    assert sweep(engine, durable) == 0


def test_an_attempt_that_loses_its_workflow_meanwhile_leaves_no_object(
    engine: Engine, session_factory: Sessions, url: str | None, tmp_path: Path
) -> None:
    # behaviour: C4
    durable = Durable(blobs=url)
    reached: list[str] = []

    @durable.step
    def late() -> Blob:
        with create_blob() as writer:
            writer.write(DOCUMENT[:CHUNK])
            with session_factory.begin() as other:
                manage.cancel(other, select(Workflow))
            reached.append("written")
        reached.append("completed")
        return writer.blob

    @durable.workflow
    def document() -> Blob:
        return late()

    with session_factory() as session, pytest.raises((AttemptLostError, WorkflowCancelledError)):
        Executor(session).run(document)
    assert (reached, objects(tmp_path)) == (["written"], [])
    assert (sweep(engine, durable), stored(session_factory)) == (1, [])


def test_a_blob_belongs_to_the_first_workflow_that_gets_it(session_factory: Sessions) -> None:
    durable = Durable(sessionmaker=session_factory)

    @durable.workflow
    def keep(source: Blob | None = None) -> Blob | None:
        return source or wait_signal("document", Blob)

    with session_factory.begin() as session:
        blobs = [written(b"x", session=session, durable=durable) for _ in range(5)]
        first = keep.start(session, blobs[0]).id
        second = keep.options(key="a").start(session, blobs[0]).id
        keep.options(key="a").start(session, blobs[1])
        third, fourth = start_many(session, [keep.bind(blobs[2]), keep.bind()])
        send_signal(session, [fourth], "document", {"documents": [blobs[3]]})
    with session_factory() as session:
        owners = {each.id: each.workflow_id for each in session.scalars(select(StoredBlob))}
        kept = set(session.scalars(select(StoredBlob.id).where(StoredBlob.expires_at.is_not(None))))
    assert [owners[each.id] for each in blobs] == [first, second, third, fourth, None]
    assert kept == {blobs[4].id}


def test_workers_sweep_by_themselves_and_go_on_where_a_store_refuses(
    session_factory: Sessions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker_blobs, "SWEEP_EVERY", 0.05)
    durable, inside = Durable(sessionmaker=session_factory, blobs=f"file://{tmp_path}"), Durable()
    with session_factory.begin() as session:
        refused, others = written(session=session, durable=durable), Durable(blobs=f"file://{tmp_path}/others")
        left = written(session=session, durable=others)
        for each in (durable, inside):
            written(session=session, durable=each)
        session.execute(update(StoredBlob).values(expires_at=func.now()))
    (tmp_path / str(refused.id)).unlink()
    (tmp_path / str(refused.id)).mkdir()  # which cannot be deleted as a file
    with Worker(durable, poll_interval=TICK):
        races.wait_until(lambda: stored(session_factory) == [refused.id, left.id], what="the sweep")
        races.wait_until(lambda: f"object of blob {refused.id} cannot be deleted" in caplog.text)
    assert objects(tmp_path) == [str(left.id)]


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ"])
def test_an_object_cannot_be_completed_in_an_old_snapshot(engine: Engine, tmp_path: Path, level: str) -> None:
    durable = Durable(blobs=f"file://{tmp_path}")
    with Session(engine.execution_options(isolation_level=level)) as session:
        session.execute(select(1))
        if level == "READ COMMITTED":
            assert open_blob(session, written(session=session, durable=durable)).read() == DOCUMENT
            return
        with pytest.raises(UsageError, match="In a REPEATABLE READ or SERIALIZABLE transaction, its row"):
            written(session=session, durable=durable)
        assert objects(tmp_path) == []


def test_a_forged_chunk_without_bytes_is_not_the_end(session_factory: Sessions) -> None:
    with session_factory.begin() as session:
        blob = written(session=session, durable=Durable(payloads=[Zstandard()]))
        session.execute(
            update(BlobChunk).where(BlobChunk.blob_id == blob.id, BlobChunk.number == 1).values(data=b"[]\n")
        )
    with pytest.raises(DecodingError, match=f"chunk 1 of blob {blob.id} has no bytes"):
        open_blob(session_factory, blob).read()


def test_what_was_changed_is_not_read(session_factory: Sessions, tmp_path: Path) -> None:
    durable, encrypted = Durable(), Durable(payloads=[Encryption({"new": "k" * 32}, required=True)])
    outside = Durable(blobs=f"file://{tmp_path}")
    with session_factory.begin() as session:
        plain, sealed, other, thrown = (
            written(session=session, durable=each) for each in (durable, encrypted, encrypted, outside)
        )
        chunk = text("UPDATE durable.blob_chunk SET data = :data WHERE blob_id = :id AND number = 0")
        session.execute(chunk, {"id": plain.id, "data": b"x" * CHUNK})
        data = open_blob(session, sealed) and session.scalar(
            select(BlobChunk.data).where(BlobChunk.blob_id == other.id, BlobChunk.number == 0)
        )
        session.execute(chunk, {"id": sealed.id, "data": data})
    with pytest.raises(DecodingError, match="is not what was written: its bytes have another hash"):
        open_blob(session_factory, plain).read()
    with pytest.raises(DecodingError, match=f"chunk 0 of blob {sealed.id} cannot be read as 'aes-siv:new'"):
        open_blob(session_factory, sealed).read()
    (tmp_path / str(thrown.id)).unlink()
    with pytest.raises(NotFoundError, match=f"blob {thrown.id} of 1,310,720 bytes is not there"):
        open_blob(session_factory, thrown).read()
    with session_factory.begin() as session:  # an object is deleted and read by its id only
        session.execute(update(StoredBlob).where(StoredBlob.id == thrown.id).values(url="file:///etc/passwd"))
    with pytest.raises(
        NotFoundError, match=r"is at 'file:///etc/passwd', and no Durable\(blobs=\.\.\.\) of this process"
    ):
        open_blob(session_factory, thrown).read()

    @encrypted.step
    def read(blob: Blob) -> None:
        open_blob(session_factory, blob).read()

    @encrypted.workflow
    def reads() -> None:
        read(plain)

    with session_factory() as session, pytest.raises(DecodingError, match="is not encrypted, which Encryption"):
        Executor(session).run(reads)


def test_mistakes_are_refused_with_what_to_do(session_factory: Sessions) -> None:
    durable = Durable()

    @durable.step
    def plain() -> None:
        with session_factory() as session:
            written(session=session)

    @durable.step
    def transactional(_: Session) -> None:
        written()

    @durable.workflow
    def between() -> None:
        written()

    @durable.workflow
    def in_plain_step() -> None:
        plain()

    @durable.workflow
    def in_transaction() -> None:
        transactional()

    with session_factory() as session:
        run = Executor(session).run
        calls: list[tuple[Callable[[], object], str]] = [
            (written, "called outside a workflow without a session"),
            (lambda: written(session=session), "without a Durable, which says how blobs are stored"),
            (lambda: run(between), "in the code of workflow 'between', which is executed again"),
            (lambda: run(in_plain_step), "was given a session in step 'plain', which is plain"),
            (lambda: run(in_transaction), "in step 'transactional', which is transactional, without a session"),
            (lambda: create_blob(session=session, durable=durable).write(b""), "nothing can be written here"),
        ]
        for call, message in calls:
            with pytest.raises(UsageError, match=message):
                call()
        mistaken = create_blob(session=session, durable=durable)
        with pytest.raises(ArgumentError, match=r"write\(\) takes bytes, got str: encode a text"), mistaken as writer:
            writer.write("text")  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match=r"open_blob\(\) takes a Blob second, got 'x'"):
            open_blob(session, "x")  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match="media_type=' ' is blank"):
            written(session=session, durable=durable, media_type=" ")
    for url in ("documents", "nosuch://documents"):
        with pytest.raises(DefinitionError, match=f"blobs='{url}' (is no URL|cannot be used)"):
            Durable(blobs=url)


def test_only_references_are_found_in_a_value() -> None:
    blob = Blob(uuid7(), 1, "0" * 64)
    one = f'{{"id": "{blob.id}", "size": 1, "sha256": "{blob.sha256}"}}'
    others = '{"sha256": "0"}, {"id": 1, "size": 1, "sha256": 1}'
    assert blobs_in(f'[{one}, {{"x": {one}}}, {others}]') == (blob.id,)
    assert blobs_in('{"id": "x"}') == ()
