"""What is called with an `AsyncSession`: the functions of `sqla_durable` of the same names, awaited."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from typing_extensions import TypeVar

import sqla_durable.api.blobs as blobs
import sqla_durable.api.callbacks as callbacks
import sqla_durable.api.events as events
import sqla_durable.api.signals as signals
import sqla_durable.api.steps as steps
import sqla_durable.api.streams as streams
import sqla_durable.api.updates as updates
import sqla_durable.api.workflows as starts
from sqla_durable.api.blobs import AsyncBlobReader
from sqla_durable.api.calls import ANY
from sqla_durable.api.polling import PollingEngine
from sqla_durable.api.sessions import run_sync
from sqla_durable.api.steps import RunningStep
from sqla_durable.api.streams import StreamEntry, StreamReader
from sqla_durable.api.updates import AsyncUpdateHandle
from sqla_durable.api.workflows import BoundWorkflow
from sqla_durable.definitions.blobs import Blob
from sqla_durable.models import Workflow

T = TypeVar("T", default=Any)


async def start_many(session: AsyncSession, bound: Iterable[BoundWorkflow]) -> list[UUID]:
    """Start many workflows in the caller's transaction. See `sqla_durable.start_many`."""
    return await run_sync(session, starts.start_many, bound)


async def start_with_signal(
    session: AsyncSession, bound: BoundWorkflow, name: str, payload: object = None, *, key: str | None = None
) -> Workflow:
    """Start a workflow, or find the one with its key, and send it a signal. See `sqla_durable.start_with_signal`."""
    return await run_sync(session, signals.start_with_signal, bound, name, payload, key=key)


async def start_with_update(
    session: AsyncSession,
    bound: BoundWorkflow,
    name: str,
    payload: object = None,
    *,
    reply: type[T] = ANY,
    key: str | None = None,
) -> tuple[Workflow, AsyncUpdateHandle[T]]:
    """Start a workflow, or find the one with its key, and send it an update. See `sqla_durable.start_with_update`."""
    workflow, update = await run_sync(session, updates.start_with_update, bound, name, payload, reply=reply, key=key)
    return workflow, AsyncUpdateHandle.of(update)


async def send_signal(
    session: AsyncSession,
    workflows: Workflow | UUID | Iterable[Workflow | UUID],
    name: str,
    payload: object = None,
    *,
    key: str | None = None,
) -> None:
    """Send a signal to a workflow, or to several, in the caller's transaction. See `sqla_durable.send_signal`."""
    await run_sync(session, signals.send_signal, workflows, name, payload, key=key)


async def send_update(
    session: AsyncSession,
    workflow: Workflow | UUID,
    name: str,
    payload: object = None,
    *,
    reply: type[T] = ANY,
    key: str | None = None,
) -> AsyncUpdateHandle[T]:
    """Ask a running workflow for something, in the caller's transaction. See `sqla_durable.send_update`.

    ```python
    async with AsyncSessionLocal.begin() as session:
        request = await send_update(session, order.checkout, "set_address", Address("Elm Street 7"), reply=Saved)
    saved = await request.result(timeout=timedelta(seconds=10))
    ```
    """
    return AsyncUpdateHandle.of(
        await run_sync(session, updates.send_update, workflow, name, payload, reply=reply, key=key)
    )


def update_handle(
    source: AsyncSession | async_sessionmaker[AsyncSession],
    workflow: Workflow | UUID,
    update_id: int,
    *,
    reply: type[T] = ANY,
) -> AsyncUpdateHandle[T]:
    """Return what waits for the answer to an update that was sent elsewhere. See `sqla_durable.update_handle`."""
    engine = PollingEngine.of_async(source, name="update_handle")
    return AsyncUpdateHandle(engine, *updates.handle_parts(workflow, update_id, reply))


async def complete_callback(session: AsyncSession, token: str, value: object = None) -> None:
    """Answer a callback with a value, by its token. See `sqla_durable.complete_callback`."""
    await run_sync(session, callbacks.complete_callback, token, value)


async def fail_callback(session: AsyncSession, token: str, message: str, *, details: object = None) -> None:
    """Answer a callback with an error, by its token. See `sqla_durable.fail_callback`."""
    await run_sync(session, callbacks.fail_callback, token, message, details=details)


async def heartbeat_callback(session: AsyncSession, token: str) -> None:
    """Record that whoever is to answer a callback is alive. See `sqla_durable.heartbeat_callback`."""
    await run_sync(session, callbacks.heartbeat_callback, token)


async def get_event(
    source: AsyncSession | async_sessionmaker[AsyncSession],
    workflow: Workflow | UUID,
    key: str,
    kind: type[T] = ANY,
    *,
    timeout: timedelta | None = None,  # noqa: ASYNC109 (durable work is not cancelled by it)
) -> T:
    """Return the latest value of a workflow's event, from outside the workflow. See `sqla_durable.get_event`."""
    search = events.EventSearch[T].of(workflow, key, kind, timeout)
    return await events.search_async(PollingEngine.of_async(source, name="get_event"), search)


def read_stream(
    source: AsyncSession | async_sessionmaker[AsyncSession],
    workflow: Workflow | UUID,
    name: str,
    kind: type[T] = ANY,
    *,
    start: int = 0,
    timeout: timedelta | None = None,
) -> AsyncIterator[StreamEntry[T]]:
    """Read a workflow's stream, item by item as they are committed. See `sqla_durable.read_stream`.

    ```python
    async for entry in read_stream(AsyncSessionLocal, workflow.id, "answer", str):
        print(entry.value, end="")
    ```
    """
    reader: StreamReader[T] = StreamReader.of(workflow, name, kind, start=start, timeout=timeout)
    return streams.read_async(PollingEngine.of_async(source, name="read_stream"), reader)


async def running_steps(session: AsyncSession, workflow: Workflow | UUID) -> list[RunningStep]:
    """Return the steps of a workflow that a worker is executing. See `sqla_durable.running_steps`."""
    return await run_sync(session, steps.running_steps, workflow)


def open_blob(source: AsyncSession | async_sessionmaker[AsyncSession], blob: Blob) -> AsyncBlobReader:
    """Read a document, chunk by chunk. See `sqla_durable.open_blob`.

    ```python
    async with open_blob(AsyncSessionLocal, blob) as reader:
        async for chunk in reader:
            digest.update(chunk)
    ```
    """
    return blobs.open_blob_async(source, blob)
