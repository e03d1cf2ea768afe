"""Reading what workflows publish, in the way of each shell."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID

import sqla_durable.asyncio as aio
from sqla_durable import StreamEntry, get_event, read_stream
from tests.acceptance.shells import AnyUpdate, AsyncShell, Shell

PATIENCE = timedelta(seconds=30)


def event(shell: Shell, workflow_id: UUID, key: str, *, timeout: timedelta = PATIENCE, wanted: Any = Any) -> Any:
    """Return the latest value of an event."""
    if isinstance(shell, AsyncShell):
        return shell.runner.run(aio.get_event(shell.async_sessionmaker, workflow_id, key, timeout=timeout, kind=wanted))
    return get_event(shell.sessionmaker, workflow_id, key, timeout=timeout, kind=wanted)


def stream(
    shell: Shell, workflow_id: UUID, name: str, *, start: int = 0, timeout: timedelta = PATIENCE, wanted: Any = Any
) -> list[StreamEntry[Any]]:
    """Read a stream to its end."""
    if not isinstance(shell, AsyncShell):
        return list(read_stream(shell.sessionmaker, workflow_id, name, start=start, timeout=timeout, kind=wanted))

    async def read() -> list[StreamEntry[Any]]:
        entries = aio.read_stream(
            shell.async_sessionmaker, workflow_id, name, start=start, timeout=timeout, kind=wanted
        )
        return [entry async for entry in entries]

    return shell.runner.run(read())


def answer(shell: Shell, request: AnyUpdate, *, timeout: timedelta = PATIENCE) -> Any:
    """Wait for the answer to an update."""
    if isinstance(request, aio.AsyncUpdateHandle):
        assert isinstance(shell, AsyncShell)
        return shell.runner.run(request.result(timeout))
    return request.result(timeout)


def accepted(shell: Shell, request: AnyUpdate, *, timeout: timedelta = PATIENCE) -> None:
    """Wait until an update is taken."""
    if isinstance(request, aio.AsyncUpdateHandle):
        assert isinstance(shell, AsyncShell)
        shell.runner.run(request.accepted(timeout))
    else:
        request.accepted(timeout)


def values(entries: list[StreamEntry[Any]]) -> list[Any]:
    """Return what was written."""
    return [entry.value for entry in entries]
