"""`Blob`, the reference to a document that passes through workflows, and the stores of objects outside the database."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from typing import Any, BinaryIO, cast
from uuid import UUID
from weakref import WeakSet

from sqla_durable.errors import DefinitionError, NotFoundError

CHUNK = 512 * 1024
"""How many bytes of a document are written and read at once."""

MARK = '"sha256"'
"""What is in the JSON text of every value that refers to a blob."""

_KEYS = {"id", "size", "sha256", "media_type"}
_LONGEST_URL = 3_900


@dataclasses.dataclass(frozen=True, slots=True)
class Blob:
    """A reference to a document: what arguments, results and signals hold in place of its bytes.

    `create_blob` writes the document and `open_blob` reads it. The reference is stored as JSON like any dataclass.

    Attributes:
        id: its id in the table `blob`.
        size: its length in bytes.
        sha256: the hash of its bytes, in hexadecimal digits.
        media_type: what its writer says that it is, "application/pdf" for example.
    """

    id: UUID
    size: int
    sha256: str
    media_type: str | None = None


def blobs_in(text: str) -> tuple[UUID, ...]:
    """Return the ids of the blobs that a value refers to, from its JSON text."""
    return tuple(dict.fromkeys(_ids_in(json.loads(text)))) if MARK in text else ()


def _ids_in(value: Any) -> Iterator[UUID]:
    if isinstance(value, list):
        for each in value:  # pyright: ignore[reportUnknownVariableType]
            yield from _ids_in(each)
    elif isinstance(value, dict):
        members = cast("dict[str, Any]", value)
        if _KEYS - {"media_type"} <= members.keys() <= _KEYS:
            with suppress(ValueError, TypeError, AttributeError):  # it looks like one, and is something else
                yield UUID(members["id"])
        for each in members.values():
            yield from _ids_in(each)


class Parts:
    """Cuts what is written into chunks of the same length, and counts and hashes it."""

    def __init__(self) -> None:
        self.size = 0
        self._hash = hashlib.sha256()
        self._waiting = bytearray()

    @property
    def sha256(self) -> str:
        """The hash of everything that was added."""
        return self._hash.hexdigest()

    def add(self, data: bytes | bytearray | memoryview) -> Iterator[bytes]:
        """Add bytes; yield the chunks that are full."""
        if not len(data):
            return
        with memoryview(data).cast("B") as given:
            self.size += given.nbytes
            self._hash.update(given)
            for first in range(0, given.nbytes, CHUNK):
                self._waiting += given[first : first + CHUNK]
                if len(self._waiting) >= CHUNK:
                    yield self._cut(CHUNK)

    def rest(self) -> Iterator[bytes]:
        """Yield the last chunk, if anything is left."""
        if self._waiting:
            yield self._cut(len(self._waiting))

    def _cut(self, length: int) -> bytes:
        chunk = bytes(self._waiting[:length])
        del self._waiting[:length]
        return chunk


class ObjectStore:
    """A place for the bytes of blobs outside the database: an URL of fsspec, under which each is an object.

    An object's name is its blob's id and nothing else: so what a row of the table says cannot lead elsewhere.
    """

    def __init__(self, url: str) -> None:
        if not isinstance(url, str) or "://" not in url or len(url) > _LONGEST_URL:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise DefinitionError(f"blobs={url!r} is no URL of a store: write one such as 's3://bucket/documents'.")
        try:
            fsspec = import_module("fsspec")
        except ModuleNotFoundError:
            raise DefinitionError(f"blobs={url!r} needs fsspec: pip install 'sqla-durable[blobs]'.") from None
        try:
            fsspec.get_filesystem_class(url.partition("://")[0])
        except (ValueError, ImportError) as error:
            raise DefinitionError(f"blobs={url!r} cannot be used: {error}.") from error
        self.url = url.rstrip("/")
        _known.add(self)

    @classmethod
    def of(cls, url: str, blob_id: UUID) -> ObjectStore:
        """Return the store of an object, of those that this process knows.

        Raises:
            NotFoundError: no `Durable` of this process has it.
        """
        for each in list(_known):
            if each.url_of(blob_id) == url:
                return each
        raise NotFoundError(
            f"blob {blob_id} is at {url!r}, and no Durable(blobs=...) of this process has that place: import the "
            "application's Durable before."
        )

    def url_of(self, blob_id: UUID) -> str:
        """Return the URL of a blob's object."""
        return f"{self.url}/{blob_id}"

    def create(self, blob_id: UUID) -> BinaryIO:
        """Begin to write an object; it is there when the file is closed, or earlier."""
        files, path = self._found(blob_id)
        return cast("BinaryIO", files.open(path, "wb"))

    def open(self, blob_id: UUID) -> BinaryIO:
        """Open an object to be read.

        Raises:
            FileNotFoundError: it is not there.
        """
        files, path = self._found(blob_id)
        return cast("BinaryIO", files.open(path, "rb"))

    def delete(self, blob_id: UUID) -> None:
        """Delete an object, if it is there."""
        files, path = self._found(blob_id)
        with suppress(FileNotFoundError):
            files.rm_file(path)

    def _found(self, blob_id: UUID) -> tuple[Any, str]:
        """Return the file system and the path; asked for each time, because not every one survives a fork."""
        is_local = self.url.startswith(("file://", "local://"))
        options = {"auto_mkdir": True} if is_local else {}
        found: tuple[Any, str] = import_module("fsspec").core.url_to_fs(self.url_of(blob_id), **options)
        return found


_known: WeakSet[ObjectStore] = WeakSet()
"""Those of this process."""
