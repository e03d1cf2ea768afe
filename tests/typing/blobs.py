"""What type checkers know of blobs; see `test_typing`."""

from __future__ import annotations

from typing import assert_type
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

import sqla_durable.asyncio as aio
from sqla_durable import Blob, BlobReader, BlobWriter, Durable, create_blob, open_blob

durable = Durable(blobs="memory://documents")


@durable.step
def write(session: Session) -> Blob:
    with create_blob(session=session, media_type="text/plain") as writer:
        assert_type(writer, BlobWriter)
        assert_type(writer.write(b"x"), int)
    return writer.blob


@durable.step
async def awrite() -> Blob:
    async with aio.create_blob() as writer:
        assert_type(writer, aio.AsyncBlobWriter)
        assert_type(await writer.write(bytearray()), int)
    return writer.blob


def reading(maker: sessionmaker[Session], session: Session, blob: Blob) -> None:
    assert_type((blob.id, blob.size, blob.sha256), tuple[UUID, int, str])
    with open_blob(maker, blob) as reader:
        assert_type(reader, BlobReader)
        for chunk in reader:
            assert_type(chunk, bytes)
    assert_type(open_blob(session, blob).read(3), bytes)


async def areading(maker: async_sessionmaker[AsyncSession], blob: Blob) -> None:
    async with aio.open_blob(maker, blob) as reader:
        assert_type(await reader.read(3), bytes)
        async for chunk in reader:
            assert_type(chunk, bytes)


async def wrong_calls(maker: sessionmaker[Session], session: Session, blob: Blob) -> None:
    create_blob(session)  # type: ignore[call-arg]
    create_blob().write("text")  # type: ignore[arg-type]
    open_blob(maker, blob.id)  # type: ignore[arg-type]
    aio.open_blob(maker, blob)  # type: ignore[arg-type]
    aio.create_blob(session=session)  # type: ignore[arg-type]
