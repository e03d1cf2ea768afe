"""Blobs: documents that pass through workflows by reference, written and read in chunks and never as a whole.

Writing and reading are coroutines, once for both kinds of code: in blocking code they never suspend. A `Channel` says
how they get at the database, and at what blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, BinaryIO, Self, cast

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker
from uuid_utils.compat import uuid7

from sqla_durable.api.blob_channels import (
    Channel,
    OfAsyncMaker,
    OfAsyncSession,
    OfMaker,
    OfSession,
    OfStep,
    channel_of_writing,
)
from sqla_durable.api.calls import in_async_code, in_sync_code
from sqla_durable.api.durable import Durable
from sqla_durable.api.sessions import AnySession, require_async_session, require_sync_session
from sqla_durable.definitions.blobs import CHUNK, Blob, ObjectStore, Parts
from sqla_durable.definitions.checks import fault_in
from sqla_durable.definitions.payloads import PLAIN, Payloads
from sqla_durable.definitions.registry import DurableOptions
from sqla_durable.errors import ArgumentError, DecodingError, NotFoundError, UsageError
from sqla_durable.operations.publishing import origin_of
from sqla_durable.operations.runtime import run_blocking
from sqla_durable.runtime.context import Context
from sqla_durable.store import Origin, blobs
from sqla_durable.store.blobs import Found, NewBlob

_LENGTH = 4  # bytes in an object before each chunk that was sealed
_LONGEST_CHUNK = 2 * CHUNK  # sealed


def create_blob(
    *, session: Session | None = None, durable: Durable | None = None, media_type: str | None = None
) -> BlobWriter:
    """Write a document of any size, from a step or in a caller's transaction; what is passed on is its `Blob`.

    ```python
    @durable.step
    def fetch(url: str) -> Blob:
        with create_blob(media_type="application/pdf") as writer:
            for part in download(url):
                writer.write(part)
        return writer.blob
    ```

    It is written in chunks of 512 KiB, of which the process has one. In a plain step each is committed by itself, and a
    later try of the step replaces what earlier ones have written. In a transactional step pass the step's session: then
    the document commits with the step. It is refused to an attempt that no longer owns its workflow, and deleted soon
    after its workflow. Outside a workflow pass a session and the `Durable`: the document commits with the caller, and
    belongs to the first workflow that is started with the `Blob`, or gets it by a signal, an update or a callback; if
    there is none after a day, it is deleted.

    Args:
        session: that of the transactional step, or outside a workflow the caller's.
        durable: whose `blobs` and `payloads` say how it is stored; by default that of the workflow.
        media_type: what it is, for its readers.

    Returns:
        A writer for a `with` block. Its `blob` is there after the block; if the block raises, there is none.

    Raises:
        UsageError: this is a workflow's own code, and not a step; a session is missing, or is passed in a plain step;
            or the `Durable` is missing outside a workflow.
        ArgumentError: the media type cannot be stored.
        SessionError, SchemaError: as `WorkflowFunction.start`, when the block begins.
    """
    context = in_sync_code("create_blob")
    if session is not None:
        require_sync_session(session, "create_blob")
    return BlobWriter(_writing(context, session, durable, media_type, is_async=False))


def create_blob_async(session: AsyncSession | None, durable: Durable | None, media_type: str | None) -> AsyncBlobWriter:
    """Return the writer of `sqla_durable.asyncio.create_blob`."""
    context = in_async_code("create_blob")
    if session is not None:
        require_async_session(session, "create_blob")
    return AsyncBlobWriter(_writing(context, session, durable, media_type, is_async=True))


def open_blob(source: Session | sessionmaker[Session], blob: Blob) -> BlobReader:
    """Read a document, chunk by chunk.

    ```python
    with open_blob(SessionLocal, blob) as reader:
        for chunk in reader:
            digest.update(chunk)
    ```

    With a sessionmaker each chunk is read in a short transaction of its own; with a session in that one's transaction,
    which sees what is not committed yet. Takes no lock. What is read to its end is compared with the hash.

    Args:
        source: a session or a sessionmaker.
        blob: the reference.

    Raises:
        NotFoundError: when it is read: it was deleted, with its workflow for example, or is not committed.
        DecodingError: it was changed. PayloadKeyError: this process has no key for it.
        ArgumentError: this is no `Blob`.
    """
    context = in_sync_code("open_blob")
    channel = OfSession(source) if isinstance(source, Session) else OfMaker(source)
    return BlobReader(_Reading(channel, _checked(blob), _payloads(context)))


def open_blob_async(source: AsyncSession | async_sessionmaker[AsyncSession], blob: Blob) -> AsyncBlobReader:
    """Return the reader of `sqla_durable.asyncio.open_blob`."""
    context = in_async_code("open_blob")
    channel = OfAsyncSession(source) if isinstance(source, AsyncSession) else OfAsyncMaker(source)
    return AsyncBlobReader(_Reading(channel, _checked(blob), _payloads(context)))


class BlobWriter:
    """Writes a document in a `with` block; see `create_blob`."""

    def __init__(self, writing: _Writing) -> None:
        self._writing = writing

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write bytes; return how many."""
        return run_blocking(self._writing.write(data))

    @property
    def blob(self) -> Blob:
        """The reference to the document, after the block.

        Raises:
            UsageError: the block has not ended, or has raised.
        """
        return self._writing.blob

    def __enter__(self) -> Self:
        run_blocking(self._writing.begin())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        run_blocking(self._writing.end(error))


class AsyncBlobWriter:
    """Writes a document in an `async with` block; see `create_blob`."""

    def __init__(self, writing: _Writing) -> None:
        self._writing = writing

    async def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write bytes; return how many."""
        return await self._writing.write(data)

    @property
    def blob(self) -> Blob:
        """The reference to the document, after the block. See `BlobWriter.blob`."""
        return self._writing.blob

    async def __aenter__(self) -> Self:
        await self._writing.begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._writing.end(error)


class BlobReader:
    """Reads a document from its beginning: by `read`, or chunk by chunk in a loop; see `open_blob`."""

    def __init__(self, reading: _Reading) -> None:
        self._reading = reading

    def read(self, size: int = -1) -> bytes:
        """Read so many bytes, fewer at the end and none behind it; by default all that is left, at once."""
        return run_blocking(self._reading.read(size))

    def close(self) -> None:
        """Close the object that is read, if it is outside the database."""
        run_blocking(self._reading.close())

    def __iter__(self) -> Iterator[bytes]:
        while chunk := self.read(CHUNK):
            yield chunk

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


class AsyncBlobReader:
    """Reads a document from its beginning: by `read`, or chunk by chunk in a loop; see `open_blob`."""

    def __init__(self, reading: _Reading) -> None:
        self._reading = reading

    async def read(self, size: int = -1) -> bytes:
        """Read so many bytes, fewer at the end and none behind it. See `BlobReader.read`."""
        return await self._reading.read(size)

    async def close(self) -> None:
        """Close the object that is read, if it is outside the database."""
        await self._reading.close()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while chunk := await self.read(CHUNK):
            yield chunk

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.close()


def _writing(
    context: Context | None,
    session: AnySession | None,
    durable: Durable | None,
    media_type: str | None,
    *,
    is_async: bool,
) -> _Writing:
    if media_type is not None and (fault := fault_in(media_type)) is not None:
        raise ArgumentError(f"media_type={media_type!r} {fault}: write one such as 'application/pdf'.")
    channel = channel_of_writing(context, session, is_async=is_async)
    if durable is None and context is None:
        raise UsageError(
            "create_blob() was called outside a workflow without a Durable, which says how blobs are stored: pass "
            "durable=durable."
        )
    options = durable.options if durable is not None else cast("Context", context).attempt.options
    step = None if context is None else context.step
    origin = None if context is None or step is None else origin_of(context.attempt, step)
    return _Writing(channel, origin, options, media_type)


class _Writing:
    """One document that is being written.

    With a store, its row is committed before its object is begun: a crash leaves no object that no row leads to.
    """

    def __init__(
        self, channel: Channel, origin: Origin | None, options: DurableOptions, media_type: str | None
    ) -> None:
        self._channel, self._origin = channel, origin
        self._payloads, self._store = options.payloads, options.blobs
        self._id = uuid7()
        self._media_type = media_type
        self._parts = Parts()
        self._number = 0
        self._file: BinaryIO | None = None
        self._is_open = False
        self._blob: Blob | None = None

    @property
    def blob(self) -> Blob:
        """The reference to it.

        Raises:
            UsageError: it is not complete.
        """
        if self._blob is None:
            raise UsageError("a blob is there when the block that writes it has ended: take writer.blob after it.")
        return self._blob

    async def begin(self) -> None:
        """Insert its row, and begin its object."""
        if self._is_open or self._blob is not None:
            raise UsageError("this writer was used before: each document has a create_blob() of its own.")
        store = self._store
        url = None if store is None else store.url_of(self._id)
        new = NewBlob(self._id, self._media_type, self._payloads.names, url)
        in_step = isinstance(self._channel, OfStep)
        if store is not None and in_step and not self._channel.commits:
            raise UsageError(
                f"create_blob() would write to {store.url!r} in a joined executor, whose caller may roll back: nobody "
                "would delete the object then. Execute the workflow in a worker, or in an executor that commits."
            )
        if self._origin is not None and (store is None or in_step):
            await self._channel.within(partial(blobs.begin, new=new, origin=self._origin))
        else:
            execute = self._channel.within if store is None else self._channel.alone
            await execute(partial(blobs.begin_outside, new=new))
        if store is not None:
            self._file = await self._channel.block(partial(store.create, self._id))
        self._is_open = True

    async def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write bytes; return how many."""
        if not self._is_open:
            raise UsageError("nothing can be written here: write in the block, `with create_blob() as writer`.")
        if not isinstance(data, (bytes, bytearray, memoryview)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError(f"write() takes bytes, got {type(data).__name__}: encode a text, text.encode().")
        before = self._parts.size
        for chunk in self._parts.add(data):
            await self._put(chunk)
        return self._parts.size - before

    async def end(self, error: BaseException | None) -> None:
        """Complete it; or leave it as it is because of an error: the next try, or a sweep, deletes it."""
        was_open, self._is_open = self._is_open, False
        if error is None and was_open:
            await self._complete()
        elif self._file is not None:
            await self._channel.block(partial(_discard, self._file))

    async def _complete(self) -> None:
        for chunk in self._parts.rest():
            await self._put(chunk)
        if self._file is not None:
            await self._channel.block(self._file.close)
        size, sha256 = self._parts.size, self._parts.sha256
        complete = partial(blobs.complete, blob_id=self._id, size=size, sha256=sha256, origin=self._origin)
        try:
            is_complete = await self._channel.within(complete)
        except BaseException:
            await self._delete_object()
            raise
        if not is_complete:
            await self._delete_object()
            raise self._replaced()
        self._blob = Blob(self._id, size, sha256, self._media_type)

    async def _delete_object(self) -> None:
        """Delete the object of a blob that cannot be completed: a sweep may have deleted its row before."""
        if self._store is not None:
            await self._channel.block(partial(self._store.delete, self._id))

    async def _put(self, chunk: bytes) -> None:
        number, self._number = self._number, self._number + 1
        is_sealed = bool(self._payloads.codecs)
        data = self._payloads.seal_chunk(chunk, self._id, number) if is_sealed else chunk
        if self._file is not None:
            await self._channel.block(partial(_append, self._file, data, is_sealed=is_sealed))
        elif not await self._channel.within(
            partial(blobs.write, blob_id=self._id, number=number, data=data, origin=self._origin)
        ):
            raise self._replaced()

    def _replaced(self) -> UsageError:
        return UsageError(
            f"blob {self._id} is not there to be written any more: a later try of its step has replaced it, or it took "
            "more than a day. In a REPEATABLE READ or SERIALIZABLE transaction, its row cannot be seen where blobs= "
            "names a place outside of the database: write it in a plain step."
        )


class _Reading:
    """One document that is being read."""

    def __init__(self, channel: Channel, blob: Blob, payloads: Payloads) -> None:
        self._channel, self._blob, self._payloads = channel, blob, payloads
        self._found: Found | None = None
        self._file: BinaryIO | None = None
        self._hash = hashlib.sha256()
        self._number = self._size = 0
        self._waiting = bytearray()

    async def read(self, size: int) -> bytes:
        """Read so many bytes, or all that are left."""
        while not 0 <= size <= len(self._waiting):
            chunk = await self._next()
            if not chunk:
                break
            self._waiting += chunk
        length = len(self._waiting) if size < 0 else size
        data = bytes(self._waiting[:length])
        del self._waiting[:length]
        return data

    async def close(self) -> None:
        """Close the object."""
        if self._file is not None:
            await self._channel.block(self._file.close)

    async def _next(self) -> bytes:
        """Return the next chunk; empty at the end, where the whole is compared with the hash."""
        found = self._found = self._found or await self._find()
        if self._size >= self._blob.size:
            if (self._size, self._hash.hexdigest()) != (self._blob.size, self._blob.sha256):
                raise DecodingError(f"blob {self._blob.id} is not what was written: its bytes have another hash.")
            return b""
        stored = await self._stored(found)
        chunk = self._payloads.open_chunk(stored, self._blob.id, self._number, is_sealed=found.is_sealed)
        if not chunk:  # to a reader that is the end, which is compared with the hash before
            raise DecodingError(f"chunk {self._number} of blob {self._blob.id} has no bytes: it was changed.")
        self._number += 1
        self._size += len(chunk)
        self._hash.update(chunk)
        return chunk

    async def _find(self) -> Found:
        found = await self._channel.within(partial(blobs.find, blob_id=self._blob.id))
        if found is None:
            raise self._gone()
        if found.url is not None:
            store = ObjectStore.of(found.url, self._blob.id)
            try:
                self._file = await self._channel.block(partial(store.open, self._blob.id))
            except FileNotFoundError as error:
                raise self._gone() from error
        return found

    async def _stored(self, found: Found) -> bytes:
        if self._file is not None:
            data: bytes | None = await self._channel.block(partial(_take, self._file, is_sealed=found.is_sealed))
        else:
            data = await self._channel.within(partial(blobs.read, blob_id=self._blob.id, number=self._number))
        if not data:
            raise self._gone()
        return data

    def _gone(self) -> NotFoundError:
        return NotFoundError(
            f"blob {self._blob.id} of {self._blob.size:,} bytes is not there: it was deleted with the workflow that it "
            "belonged to (a fork has none of its own), replaced by a later try of its step, was for no workflow within "
            "a day, or is not committed yet."
        )


def _append(file: BinaryIO, data: bytes, *, is_sealed: bool) -> None:
    if is_sealed:
        file.write(len(data).to_bytes(_LENGTH, "big"))
    file.write(data)


def _take(file: BinaryIO, *, is_sealed: bool) -> bytes:
    length = int.from_bytes(file.read(_LENGTH), "big") if is_sealed else CHUNK
    if length > _LONGEST_CHUNK:
        raise DecodingError(f"the object {file!r} is no document of sqla-durable: a chunk would have {length:,} bytes.")
    return file.read(length)


def _discard(file: Any) -> None:
    """Close a file that is not complete; what is there of it is deleted with its row."""
    for end in ("discard", "close"):
        with suppress(Exception):  # whatever the store says, its row leads to it
            getattr(file, end)()


def _checked(blob: Blob) -> Blob:
    if not isinstance(blob, Blob):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(f"open_blob() takes a Blob second, got {blob!r}: annotate what holds it as Blob.")
    return blob


def _payloads(context: Context | None) -> Payloads:
    return PLAIN if context is None else context.attempt.options.payloads
