"""Children: workflows that a workflow starts, each in one commit with its checkpoint, and whose outcomes it takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from uuid import UUID

from sqla_durable.codec import DEFAULT_LIMIT, refuse_large
from sqla_durable.errors import ChildrenFailedError, PayloadTooLargeError, UsageError
from sqla_durable.failure import Failure
from sqla_durable.operations.attempt import Position, Wait
from sqla_durable.operations.outcome import raise_recorded
from sqla_durable.operations.runtime import Runtime
from sqla_durable.operations.wait import Source, received
from sqla_durable.operations.workflow import Outcome
from sqla_durable.status import StepStatus, WorkflowStatus
from sqla_durable.store import Awaited, Checkpoint, NewWorkflow, Recorded, Standing, children, waits

_UNBOUNDED = 2**31 - 1


async def start(
    runtime: Runtime, position: Position, new: Sequence[NewWorkflow], *, active: int | None = None
) -> list[UUID]:
    """Start children, or find those that were started before; give their ids.

    Raises:
        UsageError: one of them has the name and key of a workflow that is this one itself.
    """
    attempt = runtime.attempt
    try:
        recorded = attempt.recorded(position)
        text = None if recorded is None else recorded.output
        if text is None:
            await runtime.settle()
            own = [replace(each, parent_id=attempt.workflow_id, parent_key=position.key) for each in new]
            checkpoint = _checkpoint(runtime, position, StepStatus.SUCCEEDED)
            limit = _UNBOUNDED if active is None else active
            text = await runtime.execute(partial(_start, checkpoint=checkpoint, new=own, active=limit))
        ids = [UUID(each) for each in json.loads(text)]
    finally:
        attempt.left(position)
    if attempt.workflow_id in ids:
        raise UsageError(
            f"workflow {attempt.name!r} starts itself as its child: it has the same name and key, so it would wait for "
            "its own end. Give the child another key."
        )
    return ids


def _start(connectable: Any, checkpoint: Checkpoint, new: Sequence[NewWorkflow], active: int) -> str:
    return str(children.start(connectable, checkpoint, new, active=active))


async def result(runtime: Runtime, position: Position, workflow_id: UUID, **within: Any) -> Outcome:
    """Wait for a workflow's outcome: of a child it is told, of another it is looked for again and again.

    Raises:
        WaitTimeoutError: it has none in time.
        WorkflowNotFoundError: there is no such workflow.
    """
    take = partial(children.take_outcome, workflow_id=workflow_id)
    look = partial(children.awaited, parent_id=runtime.attempt.workflow_id, workflow_ids=[workflow_id])
    late = f"workflow {workflow_id} had no outcome in time; it goes on."
    recorded = await received(runtime, position, Source(look, take, late), **within)
    if recorded.status is StepStatus.FAILED:
        raise_recorded(recorded)
    return _outcome(json.loads(recorded.output or "{}"))


async def first(runtime: Runtime, position: Position, workflow_ids: Sequence[UUID], **within: Any) -> UUID:
    """Wait until the first of some workflows has an outcome; give its id."""
    take = partial(children.take_first, workflow_ids=workflow_ids)
    look = partial(children.awaited, parent_id=runtime.attempt.workflow_id, workflow_ids=workflow_ids)
    late = f"none of {len(workflow_ids)} workflows had an outcome in time; they go on."
    recorded = await received(runtime, position, Source(look, take, late), **within)
    if recorded.status is StepStatus.FAILED:
        raise_recorded(recorded)
    return UUID(json.loads(recorded.output or '""'))


async def join(
    runtime: Runtime,
    position: Position,
    group: str,
    *,
    name: str,
    total: int,
    active: int | None,
    tolerate: int,
    limit: int = DEFAULT_LIMIT,
) -> list[Outcome]:
    """Wait for a group of children, letting held ones go as others end; give the outcomes in their order.

    Raises:
        ChildrenFailedError: more of them failed than are tolerated; the rest is cancelled.
        PayloadTooLargeError: all the outcomes together are too large to be recorded.
    """
    attempt = runtime.attempt
    try:
        recorded = attempt.recorded(position)
        if recorded is None:
            await runtime.settle()
            group_of = _Group(runtime, position, group, total=total, active=active, tolerate=tolerate)
            recorded = await group_of.joined(name, limit)
    finally:
        attempt.left(position)
    if recorded.status is StepStatus.FAILED:
        raise_recorded(recorded)
    return [_outcome({"name": name, **each}) for each in json.loads(recorded.output or "[]")]


class _Group:
    """Children that were started together, under one key."""

    def __init__(
        self, runtime: Runtime, position: Position, key: str, *, total: int, active: int | None, tolerate: int
    ) -> None:
        self._runtime = runtime
        self._position = position
        self._key = key
        self._total = total
        self._active = active or _UNBOUNDED
        self._tolerate = tolerate
        self._parent = runtime.attempt.workflow_id

    async def joined(self, name: str, limit: int) -> Recorded:
        """Wait until all are finished, or too many have failed; record that."""
        begun = self._runtime.attempt.tried(self._position) is not None
        while True:
            found = await self._runtime.execute(partial(children.progress, parent_id=self._parent, key=self._key))
            if found.failed > self._tolerate:
                return await self._give_up(name)
            if found.finished >= self._total:
                return await self._record_all(name, limit)
            if found.held and found.active < self._active:
                room = self._active - found.active
                let_go = partial(children.release, parent_id=self._parent, key=self._key, limit=room)
                await self._runtime.execute(let_go)
            if not begun:
                waiting = _checkpoint(self._runtime, self._position, StepStatus.WAITING)
                await self._runtime.execute(partial(waits.begin, checkpoint=waiting))
                begun = True
            await self._wait(found)

    async def _wait(self, found: children.Progress) -> None:
        """Wait until a share of them is finished: replays are few, and a failure is seen before the end."""
        rest = self._total - found.finished
        share = min(rest, self._active) if found.held else rest
        count = found.finished + max(1, share // 4)
        awaits = (Awaited(children=self._key, count=min(count, self._total)),)
        await self._runtime.wait(self._position, Wait(float("inf"), float("-inf"), awaits))
        await self._runtime.settle()

    async def _record_all(self, name: str, limit: int) -> Recorded:
        found = await self._runtime.execute(partial(children.outcomes, parent_id=self._parent, key=self._key))
        output = json.dumps(found, ensure_ascii=False)
        try:
            refuse_large(len(output.encode()), what=f"outcomes of {self._total} children {name!r}", limit=limit)
        except PayloadTooLargeError as error:
            return await self._fail(error)
        return await self._record(StepStatus.SUCCEEDED, output=output)

    async def _give_up(self, name: str) -> Recorded:
        await self._runtime.execute(partial(children.cancel_rest, parent_id=self._parent, key=self._key))
        found = await self._runtime.execute(partial(children.outcomes, parent_id=self._parent, key=self._key))
        failed = [each for each in found if each["status"] == WorkflowStatus.FAILED.value]
        first_one = (
            f" The first: {failed[0]['error'].get('type')}: {failed[0]['error'].get('message')}" if failed else ""
        )
        return await self._fail(
            ChildrenFailedError(
                f"{len(failed)} of {self._total} children {name!r} failed, {self._tolerate} are tolerated; the rest is "
                f"cancelled.{first_one}"
            )
        )

    async def _fail(self, error: Exception) -> Recorded:
        return await self._record(StepStatus.FAILED, error=Failure.of(error).to_json())

    async def _record(self, status: StepStatus, *, output: str | None = None, error: str | None = None) -> Recorded:
        checkpoint = _checkpoint(self._runtime, self._position, status, output=output, error=error)
        await self._runtime.record(checkpoint)
        return Recorded(checkpoint.key, checkpoint.name, checkpoint.position, status, output, error)


def _outcome(found: dict[str, Any]) -> Outcome:
    output = None if found["output"] is None else json.dumps(found["output"])
    status = WorkflowStatus(found["status"])
    if status is WorkflowStatus.SUCCEEDED and output is None:
        output = "null"
    return Outcome(Standing(UUID(found["id"]), found["name"], status, output, found["error"]))


def _checkpoint(
    runtime: Runtime,
    position: Position,
    status: StepStatus,
    *,
    output: str | None = None,
    error: str | None = None,
) -> Checkpoint:
    attempt = runtime.attempt
    return Checkpoint(
        fence=attempt.fence,
        key=position.key,
        name=position.name,
        position=position.number,
        status=status,
        output=output,
        error=error,
        attempt=attempt.number,
        attempts=1,
        elapsed=0.0,
    )
