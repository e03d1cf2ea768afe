"""SIGKILL on a process that writes a blob, and how much memory one needs for a large document."""

from __future__ import annotations

import asyncio
import hashlib
import os
import resource
import signal
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, select
from sqlalchemy.orm import Session, sessionmaker

from sqla_durable import Blob, Durable, Executor, Worker, WorkflowFunction, create_blob, current_step, open_blob
from sqla_durable.definitions.blobs import CHUNK
from sqla_durable.execution.worker.blobs import Blobs
from sqla_durable.execution.worker.database import open_databases
from sqla_durable.models import StoredBlob
from tests.support.processes import forked

LEASE, POLL, SOON = timedelta(seconds=0.6), timedelta(seconds=0.02), timedelta(seconds=20)
MEGABYTE = 1024 * 1024

Sessions = sessionmaker[Session]


def application(sessions: Sessions, url: str | None) -> tuple[Durable, WorkflowFunction[[str], Blob]]:
    durable = Durable(sessionmaker=sessions, blobs=url)

    def written(point: str) -> Blob:
        with create_blob() as writer:
            for number in range(4):
                writer.write(bytes([number]) * CHUNK)
                if number == 2:
                    die(point, "writing")
        die(point, "written")
        return writer.blob

    def die(point: str, here: str) -> None:
        if point == here and current_step().attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    step = durable.step(written, name="write")

    @durable.workflow
    def document(point: str) -> Blob:
        return step(point)

    return durable, document


def execute(database_url: str, url: str | None, point: str) -> None:
    engine = create_engine(database_url)
    _, document = application(sessionmaker(engine), url)
    with Session(engine) as session:
        Executor(session, lease=LEASE).run(document.options(key=point), point)


async def sweep(engine: Engine, durable: Durable) -> int:
    database = open_databases(engine, hold=0, limit=10, beat_limit=10).shared
    try:
        return await Blobs(database, durable.options.blobs).sweep()
    finally:
        await database.close()


@pytest.mark.parametrize("kind", ["table", "store"])
def test_a_killed_writer_leaves_neither_a_missing_object_nor_an_orphan(
    database_url: str, engine: Engine, session_factory: Sessions, tmp_path: Path, kind: str
) -> None:
    # behaviour: R1
    url = None if kind == "table" else f"file://{tmp_path}/documents"
    points = ["writing", "written"]
    for point in points:
        process = forked.Process(target=execute, args=(database_url, url, point))
        process.start()
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
    with session_factory() as session:
        left = {each.id: each.stored_at is not None for each in session.scalars(select(StoredBlob))}
    assert sorted(left.values()) == [False, True]
    durable, document = application(session_factory, url)
    assert asyncio.run(sweep(engine, durable)) == 0  # the attempts may go on
    with Worker(durable, lease=LEASE, poll_interval=POLL), session_factory() as session:
        records = [document.options(key=point).start(session, point) for point in points]
        blobs = [document.handle(session_factory, each).result(SOON) for each in records]
    assert asyncio.run(sweep(engine, durable)) == 2
    with session_factory() as session:
        assert {*session.scalars(select(StoredBlob.id))} == {each.id for each in blobs}.difference(left)
    wanted = b"".join(bytes([number]) * CHUNK for number in range(4))
    assert all(open_blob(session_factory, each).read() == wanted for each in blobs)
    objects = {each.name for each in tmp_path.rglob("*") if each.is_file()}
    assert objects == (set() if url is None else {str(each.id) for each in blobs})


def pass_through(database_url: str, megabytes: int, answer: Connection) -> None:
    """Pass a document from a plain step to a transactional one, and send how much memory was needed for it."""
    engine = create_engine(database_url)
    sessions = sessionmaker(engine)
    durable = Durable(sessionmaker=sessions)

    def generated(size: int) -> Iterator[bytes]:
        for number in range(size * 16):
            yield number.to_bytes(8, "big") * 8192

    @durable.step
    def generate(size: int) -> Blob:
        with create_blob() as writer:
            for part in generated(size):
                writer.write(part)
        return writer.blob

    @durable.step
    def copy(session: Session, source: Blob) -> Blob:
        with open_blob(sessions, source) as reader, create_blob(session=session) as writer:
            for chunk in reader:
                writer.write(chunk)
        return writer.blob

    @durable.workflow
    def large(size: int) -> Blob:
        return copy(generate(size))

    def run(size: int) -> int:
        with Session(engine) as session:
            blob = Executor(session).run(large, size)
        digest = hashlib.sha256()
        for part in generated(size):
            digest.update(part)
        assert (blob.size, blob.sha256) == (size * MEGABYTE, digest.hexdigest())
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

    before = run(1)
    answer.send(run(megabytes) - before)


@pytest.mark.timeout(180)
def test_a_large_document_passes_through_a_small_process(database_url: str, thorough: bool) -> None:
    """With `--all` it has 200 MB; by default as much as shows that it is not loaded."""
    answers, answer = forked.Pipe(duplex=False)
    process = forked.Process(target=pass_through, args=(database_url, 200 if thorough else 40, answer))
    process.start()
    try:
        assert answers.poll(150)
        assert answers.recv() < (32 if thorough else 12)
    finally:
        process.join(20)
        answers.close()
        answer.close()
