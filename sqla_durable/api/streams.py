"""Streams: what a workflow writes item by item, for progress and tokens, and others read while it is being written."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Generic, TypeVar, overload
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

import sqla_durable.api.polling as polling
from sqla_durable.api.callers import AnySession, id_of
from sqla_durable.api.handle import refuse_event_loop
from sqla_durable.api.publishing import encode, publish
from sqla_durable.definitions.checks import require_text
from sqla_durable.definitions.codec import Codec
from sqla_durable.errors import ArgumentError, ResultTimeoutError, UsageError
from sqla_durable.models import Workflow
from sqla_durable.operations.runtime import Runtime
from sqla_durable.store import Checkpoint, Connectable, Origin, streams
from sqla_durable.store.streams import Append, Appended, Item, Page

T = TypeVar("T")

_PAGE = 500
_SHORTEST = 0.02
"""The shortest pause between two looks, in seconds: a stream of 50 items a second is read as often at most."""


@dataclass(frozen=True, slots=True)
class StreamEntry(Generic[T]):
    """One item of a stream, as `read_stream` gives it.

    Attributes:
        value: what was written.
        number: its place in the stream, from 0; to read on after it, start at `number + 1`.
        step_key: the key of the step, or of the operation, that wrote it.
        attempt: the workflow's attempt.
        step_attempt: the try of the step, from 1; None where the workflow's own code wrote it.
        created_at: when it was written, on the database's clock.
    """

    value: T
    number: int
    step_key: str | None
    attempt: int
    step_attempt: int | None
    created_at: datetime


@dataclass(frozen=True, slots=True)
class _Items:
    """Items that are to be appended, as JSON texts; None closes the stream."""

    name: str
    values: Sequence[str | None]

    def record(self, connectable: Connectable, checkpoint: Checkpoint) -> None:
        self._check(streams.record(connectable, checkpoint, name=self.name, values=self.values))

    def write(self, connectable: Connectable, origin: Origin) -> None:
        self._check(streams.append(connectable, origin, name=self.name, values=self.values))

    async def write_at_once(self, runtime: Runtime, origin: Origin) -> None:
        self._check(await runtime.recorder.append(Append(origin, self.name, self.values)))

    def _check(self, appended: Appended) -> None:
        if appended is Appended.CLOSED:
            raise UsageError(f"the stream {self.name!r} is closed: write before close_stream(), or to another stream.")


@overload
def write_stream(name: str, /, *values: object) -> Awaitable[None]: ...


@overload
def write_stream(session: AnySession, name: str, /, *values: object) -> Awaitable[None]: ...


def write_stream(*given: Any) -> Awaitable[None]:
    """Append a value, or several, to a stream of the workflow. In `async def` code, await the call.

    ```python
    @durable.step
    async def answer(prompt: str) -> str:
        async for token in client.stream(prompt):
            await write_stream("answer", token)
        ...
    ```

    In a workflow's own code it is an operation of its own, carried out exactly once, committed when it returns. In a
    transactional step pass the step's session first: then it commits with the step. In a plain step it is committed
    when it returns, while the step goes on, and stays if the try fails; each item tells which try wrote it. Several
    values are one statement and one commit, all or none. Items are numbered from 0 in each stream, without gaps; the
    steps of one workflow that write at the same time take turns at its row's lock. Outside a workflow nothing happens.

    Args:
        *given: the session of a transactional step; the name of the stream, which is a text; and the values, of any
            type that can be stored as JSON, each within the limit of one payload.

    Raises:
        ArgumentError: the name cannot be stored.
        EncodingError, PayloadTooLargeError: a value cannot be stored, or is too large; nothing was written.
        UsageError: the stream is closed.
        UsageError: a session is given where there is none of the workflow's, or is missing in a transactional step; or
            this is a task or thread of its own.
    """
    session, name, values = _parts("write_stream()", given)
    if not values:
        raise ArgumentError(f"write_stream({name!r}) has no value: give one at least.")

    def publication(limit: int) -> _Items:
        what = f"item of stream {name!r}"
        return _Items(name, [encode(value, what=what, limit=limit) for value in values])

    return publish("write_stream()", session, publication, name=f"write_stream({name})")


@overload
def close_stream(name: str, /) -> Awaitable[None]: ...


@overload
def close_stream(session: AnySession, name: str, /) -> Awaitable[None]: ...


def close_stream(*given: Any) -> Awaitable[None]:
    """Close a stream: its readers end after the last item. In `async def` code, await the call.

    A stream needs not be closed: it ends when its workflow does. Where it is closed by a plain step, the next try of
    that step may write to it again. Guarantees, sessions and errors are those of `write_stream`.
    """
    session, name, values = _parts("close_stream()", given)
    if values:
        raise ArgumentError(f"close_stream({name!r}) takes no values, got {values!r}.")
    return publish("close_stream()", session, lambda _: _Items(name, [None]), name=f"close_stream({name})")


def _parts(call: str, given: tuple[Any, ...]) -> tuple[AnySession | None, str, tuple[Any, ...]]:
    session, rest = (given[0], given[1:]) if isinstance(given[0], (Session, AsyncSession)) else (None, given)
    name, *values = rest
    require_text(name, what="name of a stream")
    return session, name, tuple(values)


@overload
def read_stream(
    source: Session | sessionmaker[Session],
    workflow: Workflow | UUID,
    name: str,
    *,
    start: int = 0,
    timeout: timedelta | None = None,
) -> Iterator[StreamEntry[Any]]: ...


@overload
def read_stream(
    source: Session | sessionmaker[Session],
    workflow: Workflow | UUID,
    name: str,
    kind: type[T],
    *,
    start: int = 0,
    timeout: timedelta | None = None,
) -> Iterator[StreamEntry[T]]: ...


@overload
def read_stream(
    source: AsyncSession | async_sessionmaker[AsyncSession],
    workflow: Workflow | UUID,
    name: str,
    *,
    start: int = 0,
    timeout: timedelta | None = None,
) -> AsyncIterator[StreamEntry[Any]]: ...


@overload
def read_stream(
    source: AsyncSession | async_sessionmaker[AsyncSession],
    workflow: Workflow | UUID,
    name: str,
    kind: type[T],
    *,
    start: int = 0,
    timeout: timedelta | None = None,
) -> AsyncIterator[StreamEntry[T]]: ...


def read_stream(
    source: polling.Source,
    workflow: Workflow | UUID,
    name: str,
    kind: Any = Any,
    *,
    start: int = 0,
    timeout: timedelta | None = None,
) -> Iterator[StreamEntry[Any]] | AsyncIterator[StreamEntry[Any]]:
    """Read a workflow's stream, item by item as they are committed, until it is closed or the workflow is finished.

    ```python
    for entry in read_stream(SessionLocal, workflow.id, "answer", str):
        print(entry.value, end="")
    ```

    Polls in short transactions of its own, on the engine of the session or sessionmaker, up to 50 times a second while
    items come and 4 times a second later: a session that is given is not used itself. Takes no lock, and holds no
    connection between two looks. Every item is given once, in order; those of a try that failed too. With an
    `AsyncSession` or its maker it is an asynchronous iterator.

    Args:
        source: a session or a sessionmaker, for its engine.
        workflow: the record, or its id.
        name: the name of the stream; one that nobody has written to yet is waited for.
        kind: the type of its values.
        start: the number of the first item that is wanted.
        timeout: how long to wait for the next item; None waits as long as it takes.

    Raises:
        ResultTimeoutError: no further item came in time. What was given before stands; read on from there.
        NotFoundError: there is no such workflow, or its start is not committed.
        DecodingError: a value does not fit the type.
        ArgumentError: the name cannot be one, or `start` is negative.
        SchemaError, SessionError: the database does not hold the tables.
        UsageError: the sync form was called in a running event loop, which it would block.
    """
    require_text(name, what="name of a stream")
    if start < 0:
        raise ArgumentError(f"start={start!r} is negative: items are numbered from 0.")
    outlook = polling.Outlook.of(source, what="read_stream()")
    reader = _Reader(id_of(workflow), name, start, Codec.of(kind, what=f"item of stream {name!r}"), timeout)
    return _read_async(outlook, reader) if outlook.is_async else _read(outlook, reader)


def _read(outlook: polling.Outlook, reader: _Reader) -> Iterator[StreamEntry[Any]]:
    refuse_event_loop("read_stream()", "give it an AsyncSession or its sessionmaker, and use `async for`")
    pauses = reader.pauses()
    while True:
        page = outlook.look(reader.look)
        yield from reader.entries(page)
        if reader.at_end(page):
            return
        pauses = reader.pauses() if page.items else pauses
        if len(page.items) < _PAGE:
            time.sleep(next(pauses))


async def _read_async(outlook: polling.Outlook, reader: _Reader) -> AsyncIterator[StreamEntry[Any]]:
    pauses = reader.pauses()
    while True:
        page = await outlook.look_async(reader.look)
        for entry in reader.entries(page):
            yield entry
        if reader.at_end(page):
            return
        pauses = reader.pauses() if page.items else pauses
        if len(page.items) < _PAGE:
            await asyncio.sleep(next(pauses))


@dataclass(slots=True)
class _Reader:
    """How far a stream is read."""

    workflow_id: UUID
    name: str
    next: int
    codec: Codec
    timeout: timedelta | None

    def look(self, session: Session) -> Page:
        return streams.read(session, self.workflow_id, self.name, start=self.next, limit=_PAGE)

    def entries(self, page: Page) -> Iterator[StreamEntry[Any]]:
        for item in page.items:
            self.next = item.number + 1
            if item.value is not None:  # what an earlier try of a step has closed may go on
                yield self._entry(item, item.value)

    def at_end(self, page: Page) -> bool:
        """Tell whether all is read: the page shows the end of the stream in the same snapshot as its items."""
        return page.ended and len(page.items) < _PAGE

    def pauses(self) -> Iterator[float]:
        yield from polling.pauses(self.timeout, shortest=_SHORTEST)
        raise ResultTimeoutError(
            f"the stream {self.name!r} of workflow {self.workflow_id} has no item {self.next} after {self.timeout}; "
            "the workflow goes on.",
            workflow_id=self.workflow_id,
        )

    def _entry(self, item: Item, value: str) -> StreamEntry[Any]:
        return StreamEntry(
            self.codec.decode(value), item.number, item.step_key, item.attempt, item.step_attempt, item.created_at
        )
