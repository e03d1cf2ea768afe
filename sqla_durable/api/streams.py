"""Streams: a workflow writes them item by item, for progress and tokens; others read them meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Generic
from uuid import UUID

from sqlalchemy.orm import Session, sessionmaker
from typing_extensions import TypeVar

from sqla_durable.api.calls import ANY, Call, publication, sealed
from sqla_durable.api.polling import PollingEngine, pauses, refuse_event_loop
from sqla_durable.api.sessions import AnySession, id_of
from sqla_durable.definitions.checks import require_key
from sqla_durable.definitions.codec import Codec
from sqla_durable.definitions.payloads import Place, opened
from sqla_durable.errors import ArgumentError, ResultTimeoutError, UsageError
from sqla_durable.models import Workflow
from sqla_durable.operations.runtime import Runtime
from sqla_durable.runtime.context import Context
from sqla_durable.store import Checkpoint, Connectable, Origin, streams
from sqla_durable.store.streams import Append, Appended, Item, Page

T = TypeVar("T", default=Any)

_PAGE = 500
_SHORTEST = 0.02
"""The shortest pause between two polls, in seconds."""


@dataclass(frozen=True, slots=True)
class StreamEntry(Generic[T]):
    """One item of a stream, as `read_stream` yields it.

    Attributes:
        value: what was written.
        number: its place in the stream, from 0; to read on after it, start at `number + 1`.
        step_key: the key of the step, or of the operation, that wrote it.
        attempt: the workflow's attempt.
        try_number: the try of the step, from 1; None where the workflow's own code wrote it.
        created_at: when it was written, on the database's clock.
    """

    value: T
    number: int
    step_key: str | None
    attempt: int
    try_number: int | None
    created_at: datetime


@dataclass(frozen=True, slots=True)
class _NewItems:
    """Items to be appended, as JSON texts; None closes the stream."""

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


def write_stream(name: str, *values: object, session: Session | None = None) -> None:
    """Append a value, or several, to a stream of the workflow.

    ```python
    @durable.step
    def answer(prompt: str) -> str:
        for token in client.stream(prompt):
            write_stream("answer", token)
        ...
    ```

    In a workflow's own code it is an operation of its own, carried out exactly once, committed when it returns. In a
    transactional step pass the step's session: then it commits with the step. In a plain step it is committed when it
    returns, while the step goes on, and stays if the try fails; each item says which try wrote it. Several values are
    one statement and one commit, all or none. Items are numbered from 0 in each stream, without gaps; the steps of one
    workflow that write at the same time take turns at its row's lock. Outside a workflow nothing happens.

    Args:
        name: the name of the stream, a text.
        *values: of any type that can be stored as JSON, each within the limit of one payload.
        session: that of the transactional step.

    Raises:
        ArgumentError: the name cannot be stored, or there is no value.
        EncodingError, PayloadTooLargeError: a value cannot be stored, or is too large; nothing was written.
        UsageError: the stream is closed.
        UsageError: a session is passed where there is none of the workflow's, or is missing in a transactional step; or
            this is a task or thread that is no branch of the workflow.
        UsageError: the code is `async def`.
    """
    write_stream_call(name, values, session).outcome()


def close_stream(name: str, *, session: Session | None = None) -> None:
    """Close a stream: its readers end after the last item.

    A stream needs not be closed: it ends when its workflow does. Where it is closed by a plain step, the next try of
    that step may write to it again. Guarantees, the session and errors are those of `write_stream`.
    """
    close_stream_call(name, session).outcome()


def write_stream_call(name: str, values: Sequence[object], session: AnySession | None) -> Call[None]:
    """Return the call of `write_stream`."""
    require_key(name, what="name of a stream")
    if not values:
        raise ArgumentError(f"write_stream({name!r}) has no value: give one at least.")

    def encoded(context: Context) -> _NewItems:
        what = f"item of stream {name!r}"
        return _NewItems(name, [sealed(value, context, "stream", name, what=what) for value in values])

    return publication("write_stream", f"write_stream({name})", encoded, session=session)


def close_stream_call(name: str, session: AnySession | None) -> Call[None]:
    """Return the call of `close_stream`."""
    require_key(name, what="name of a stream")
    end = _NewItems(name, [None])
    return publication("close_stream", f"close_stream({name})", lambda _: end, session=session)


def read_stream(
    source: Session | sessionmaker[Session],
    workflow: Workflow | UUID,
    name: str,
    kind: type[T] = ANY,
    *,
    start: int = 0,
    timeout: timedelta | None = None,
) -> Iterator[StreamEntry[T]]:
    """Read a workflow's stream, item by item as they are committed, until it is closed or the workflow is finished.

    ```python
    for entry in read_stream(SessionLocal, workflow.id, "answer", str):
        print(entry.value, end="")
    ```

    Polls in short transactions of its own, on the engine of the session or sessionmaker, up to 50 times a second while
    items come and 4 times a second later: a session that is passed is not used itself. Takes no lock, and keeps no
    connection between two polls. Every item is read once, in order; those of a try that failed too.

    Args:
        source: a session or a sessionmaker, for its engine.
        workflow: the record, or its id.
        name: the name of the stream; one that nobody has written to yet is waited for.
        kind: the type of its values.
        start: the number of the first item that is wanted.
        timeout: how long to wait for the next item; None waits as long as it takes.

    Raises:
        ResultTimeoutError: no further item came in time. What was read before stands; read on from there.
        NotFoundError: there is no such workflow, or its start is not committed.
        DecodingError: a value does not fit the type.
        ArgumentError: the name cannot be one, or `start` is negative.
        SchemaError, SessionError: the database does not hold the tables.
        UsageError: this was called in a running event loop, which it would block.
    """
    reader = StreamReader.of(workflow, name, kind, start=start, timeout=timeout)
    return _read(PollingEngine.of_sync(source, name="read_stream"), reader)


def _read(engine: PollingEngine, reader: StreamReader[T]) -> Iterator[StreamEntry[T]]:
    refuse_event_loop("read_stream()", "iterate over sqla_durable.asyncio.read_stream by `async for`")
    pauses = reader.pauses()
    while True:
        page = engine.read(reader.read)
        yield from reader.entries(page)
        if reader.is_at_end(page):
            return
        pauses = reader.pauses() if page.items else pauses
        if not reader.is_full(page):
            time.sleep(next(pauses))


async def read_async(engine: PollingEngine, reader: StreamReader[T]) -> AsyncIterator[StreamEntry[T]]:
    """Read a stream as `read_stream` does, without blocking the event loop."""
    pauses = reader.pauses()
    while True:
        page = await engine.read_async(reader.read)
        for entry in reader.entries(page):
            yield entry
        if reader.is_at_end(page):
            return
        pauses = reader.pauses() if page.items else pauses
        if not reader.is_full(page):
            await asyncio.sleep(next(pauses))


@dataclass(slots=True)
class StreamReader(Generic[T]):
    """How far a stream was read."""

    workflow_id: UUID
    name: str
    next: int
    codec: Codec
    timeout: timedelta | None

    @classmethod
    def of(
        cls, workflow: Workflow | UUID, name: str, kind: type[T], *, start: int, timeout: timedelta | None
    ) -> StreamReader[T]:
        """Check the arguments of `read_stream`.

        Raises:
            ArgumentError: the name cannot be one, `start` is negative, or this is no workflow.
        """
        require_key(name, what="name of a stream")
        if start < 0:
            raise ArgumentError(f"start={start!r} is negative: items are numbered from 0.")
        return StreamReader(id_of(workflow), name, start, Codec.of(kind, what=f"item of stream {name!r}"), timeout)

    def read(self, session: Session) -> Page:
        """Read the next page."""
        return streams.read(session, self.workflow_id, self.name, start=self.next, limit=_PAGE)

    def entries(self, page: Page) -> Iterator[StreamEntry[T]]:
        """Yield the entries of a page, and count them as read."""
        for item in page.items:
            self.next = item.number + 1
            if item.value is not None:  # what an earlier try of a step has closed may go on
                yield self._entry(item, item.value)

    def is_full(self, page: Page) -> bool:
        """Return whether there may be more behind the page already."""
        return len(page.items) >= _PAGE

    def is_at_end(self, page: Page) -> bool:
        """Return whether all was read: the page shows the end of the stream in the same snapshot as its items."""
        return page.ended and not self.is_full(page)

    def pauses(self) -> Iterator[float]:
        """Yield the seconds of the pauses between polls; raise when the time is up."""
        yield from pauses(self.timeout, shortest=_SHORTEST)
        raise ResultTimeoutError(
            f"the stream {self.name!r} of workflow {self.workflow_id} has no item {self.next} after {self.timeout}; "
            "the workflow goes on.",
            workflow_id=self.workflow_id,
        )

    def _entry(self, item: Item, value: str) -> StreamEntry[T]:
        text = opened(value, Place.of(self.workflow_id, f"stream {self.name}"))
        return StreamEntry(
            self.codec.decode(text), item.number, item.step_key, item.attempt, item.try_number, item.created_at
        )
