"""What operators do with workflows, in the transaction of an `AsyncSession`: `from sqla_durable.asyncio import manage`.

The functions of `sqla_durable.manage`, awaited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, Unpack, overload
from uuid import UUID

from sqlalchemy import CompoundSelect, Select
from sqlalchemy.ext.asyncio import AsyncSession

import sqla_durable.manage as sync
from sqla_durable.api.sessions import run_sync
from sqla_durable.api.workflows import BoundWorkflow
from sqla_durable.definitions.queues import QueueKeywords
from sqla_durable.definitions.retention import Statuses
from sqla_durable.definitions.schedules import ScheduleKeywords
from sqla_durable.manage import Backfill, id_at, next_ticks
from sqla_durable.manage.forks import ForkOptions, OneForkOptions
from sqla_durable.manage.verbs import Selected
from sqla_durable.models import Queue, Retention, Schedule, Workflow

__all__ = [
    "Backfill",
    "backfill_schedule",
    "cancel",
    "change",
    "delete",
    "drop_retention",
    "explain_pending",
    "fork",
    "id_at",
    "next_ticks",
    "pause_key",
    "pause_queue",
    "pause_schedule",
    "put_queue",
    "put_retention",
    "put_schedule",
    "resume",
    "resume_key",
    "resume_queue",
    "resume_schedule",
    "retry",
    "rewind",
    "run_schedule",
]


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


async def change(
    session: AsyncSession,
    workflows: Selected,
    *,
    queue: str | None = None,
    priority: int | None = None,
    delay: timedelta | None = None,
    at: datetime | None = None,
) -> list[UUID]:
    """Change the queue, the priority or the time of workflows that wait. See `sqla_durable.manage.change`."""
    return await run_sync(session, sync.change, workflows, queue=queue, priority=priority, delay=delay, at=at)


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


async def explain_pending(session: AsyncSession, workflow: Workflow | UUID) -> list[str]:
    """Return in words why a workflow does not start. See `sqla_durable.manage.explain_pending`."""
    return await run_sync(session, sync.explain_pending, workflow)


async def put_queue(session: AsyncSession, name: str, **options: Unpack[QueueKeywords]) -> Queue:
    """Make the row of a queue, or change its settings. See `sqla_durable.manage.put_queue`."""
    return await run_sync(session, sync.put_queue, name, **options)


async def pause_queue(session: AsyncSession, name: str) -> None:
    """Pause a queue. See `sqla_durable.manage.pause_queue`."""
    await run_sync(session, sync.pause_queue, name)


async def resume_queue(session: AsyncSession, name: str) -> None:
    """Let a paused queue go on. See `sqla_durable.manage.resume_queue`."""
    await run_sync(session, sync.resume_queue, name)


async def pause_key(session: AsyncSession, name: str, by: str) -> None:
    """Pause one key of a queue. See `sqla_durable.manage.pause_key`."""
    await run_sync(session, sync.pause_key, name, by)


async def resume_key(session: AsyncSession, name: str, by: str) -> None:
    """Let a paused key of a queue go on. See `sqla_durable.manage.resume_key`."""
    await run_sync(session, sync.resume_key, name, by)


async def put_schedule(
    session: AsyncSession, name: str, workflow: BoundWorkflow, **options: Unpack[ScheduleKeywords]
) -> Schedule:
    """Make a schedule, or change the one of that name. See `sqla_durable.manage.put_schedule`."""
    return await run_sync(session, sync.put_schedule, name, workflow, **options)


async def pause_schedule(session: AsyncSession, name: str, *, reason: str | None = None) -> None:
    """Pause a schedule. See `sqla_durable.manage.pause_schedule`."""
    await run_sync(session, sync.pause_schedule, name, reason=reason)


async def resume_schedule(session: AsyncSession, name: str) -> None:
    """Let a paused schedule go on. See `sqla_durable.manage.resume_schedule`."""
    await run_sync(session, sync.resume_schedule, name)


async def run_schedule(session: AsyncSession, name: str) -> bool:
    """Start the schedule's workflow now. See `sqla_durable.manage.run_schedule`."""
    return await run_sync(session, sync.run_schedule, name)


async def backfill_schedule(
    session: AsyncSession, name: str, *, since: datetime, until: datetime, limit: int = 1_000
) -> Backfill:
    """Start the workflows of the ticks in a time that has passed. See `sqla_durable.manage.backfill_schedule`."""
    return await run_sync(session, sync.backfill_schedule, name, since=since, until=until, limit=limit)


async def put_retention(
    session: AsyncSession, name: str, *, keep: timedelta, workflow: str | None = None, status: Statuses = None
) -> Retention:
    """Make a policy of retention, or change the one of that name. See `sqla_durable.manage.put_retention`."""
    return await run_sync(session, sync.put_retention, name, keep=keep, workflow=workflow, status=status)


async def drop_retention(session: AsyncSession, name: str) -> bool:
    """Drop a policy of retention. See `sqla_durable.manage.drop_retention`."""
    return await run_sync(session, sync.drop_retention, name)
