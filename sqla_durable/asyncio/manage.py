"""What operators do with workflows, in the transaction of an `AsyncSession`: `from sqla_durable.asyncio import manage`.

The functions of `sqla_durable.manage`, awaited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Unpack, overload
from uuid import UUID

from sqlalchemy import CompoundSelect, Select
from sqlalchemy.ext.asyncio import AsyncSession

import sqla_durable.manage as sync
from sqla_durable.api.sessions import run_sync
from sqla_durable.manage import id_at
from sqla_durable.manage.forks import ForkOptions, OneForkOptions
from sqla_durable.manage.verbs import Selected
from sqla_durable.models import Workflow

__all__ = ["cancel", "delete", "fork", "id_at", "resume", "retry", "rewind"]


async def cancel(session: AsyncSession, workflows: Selected) -> list[UUID]:
    """Cancel workflows that are pending, running or suspended, with their trees. See `sqla_durable.manage.cancel`."""
    return await run_sync(session, sync.cancel, workflows)


async def resume(session: AsyncSession, workflows: Selected) -> list[UUID]:
    """Enqueue workflows again that were cancelled or lost too many workers. See `sqla_durable.manage.resume`."""
    return await run_sync(session, sync.resume, workflows)


async def retry(session: AsyncSession, workflows: Selected) -> list[UUID]:
    """Enqueue failed workflows again, from the step that failed. See `sqla_durable.manage.retry`."""
    return await run_sync(session, sync.retry, workflows)


async def rewind(session: AsyncSession, workflows: Selected, *, to_step: str) -> list[UUID]:
    """Return workflows to before a step, and enqueue them again. See `sqla_durable.manage.rewind`."""
    return await run_sync(session, sync.rewind, workflows, to_step=to_step)


async def delete(session: AsyncSession, workflows: Selected) -> list[UUID]:
    """Delete finished workflows with their trees and all that is theirs. See `sqla_durable.manage.delete`."""
    return await run_sync(session, sync.delete, workflows)


@overload
async def fork(session: AsyncSession, workflows: Workflow | UUID, **options: Unpack[OneForkOptions]) -> Workflow: ...


@overload
async def fork(
    session: AsyncSession,
    workflows: Iterable[Workflow | UUID] | Select[Any] | CompoundSelect[Any],
    **options: Unpack[ForkOptions],
) -> list[Workflow]: ...


async def fork(
    session: AsyncSession,
    workflows: Selected,
    *,
    from_step: str | None = None,
    input: Mapping[str, object] | None = None,  # noqa: A002 (the record's own word for it)
    outcomes: Mapping[str, object] | None = None,
    version: str | None = None,
    key: str | None = None,
    queue: str | None = None,
) -> Any:
    """Start new workflows that begin with a part of the history of others. See `sqla_durable.manage.fork`."""
    options = {"from_step": from_step, "input": input, "outcomes": outcomes, "version": version, "key": key}
    fork: Callable[..., Any] = sync.fork
    return await run_sync(session, fork, workflows, queue=queue, **options)
