"""Children: workflows that a workflow starts in one commit with its checkpoint, and whose outcomes it waits for."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from uuid import UUID

from sqla_durable.definitions.failure import Failure, record
from sqla_durable.definitions.json_values import DEFAULT_LIMIT, refuse_large
from sqla_durable.errors import (
    ChildrenFailedError,
    KeyNotVisibleError,
    KeyTakenError,
    PayloadTooLargeError,
    UsageError,
)
from sqla_durable.models.base import StepStatus, WorkflowStatus
from sqla_durable.operations.calls import Position
from sqla_durable.operations.outcome import checkpoint_of, raise_recorded
from sqla_durable.operations.runtime import Runtime
from sqla_durable.operations.suspending import Wait
from sqla_durable.operations.waiting import GracePeriod, WaitSource, in_one_statement, receive_recorded
from sqla_durable.operations.workflow import WorkflowOutcome
from sqla_durable.store import (
    Awaited,
    Checkpoint,
    KeyRule,
    NewWorkflow,
    Recorded,
    WorkflowState,
    children,
    deferred,
    steps,
)

_UNBOUNDED = 2**31 - 1
_SHOWN = 20  # children's errors in that of their map
_MOST_WATCHED = 20  # children: of more, not every end wakes a parent that waits in memory
_POLL_INTERVAL = 5.0  # seconds between two looks at children that send their notices to another workflow


async def start(
    runtime: Runtime,
    position: Position,
    new: Sequence[NewWorkflow],
    *,
    active: int | None = None,
    rule: KeyRule | None = None,
    prepare: Callable[[NewWorkflow], NewWorkflow] | None = None,
) -> list[UUID]:
    """Start children, or find those that were started before, and return their ids.

    Those that a compensation starts are detached and do not inherit their parent's deadline: nothing that ends the
    parent may end what undoes its work.

    Args:
        prepare: completes each that is really started.

    Raises:
        UsageError: one of them has the name and key of this workflow itself.
    """
    attempt = runtime.attempt
    attempt.note_child()
    try:
        recorded = attempt.recorded(position)
        if recorded is not None and recorded.status is StepStatus.FAILED:
            raise_recorded(recorded, attempt.options.errors)
        text = None if recorded is None else recorded.output
        if text is None:
            await runtime.recorder.settle()
            undoes = attempt.is_compensating
            prepared = new if prepare is None else [prepare(each) for each in new]
            own = [each._replace(parent_id=attempt.workflow_id, parent_key=position.key) for each in prepared]
            if undoes:
                own = [each._replace(detached=True) for each in own]
            checkpoint = checkpoint_of(attempt, position, StepStatus.SUCCEEDED)
            try:
                text = await _started(runtime, checkpoint, own, active=active, rule=rule, compensates=undoes)
            except (KeyNotVisibleError, KeyTakenError) as error:
                await _record_refusal(runtime, position, [each.id for each in new], error)
                raise
        ids = [UUID(each) for each in json.loads(text)]
    finally:
        attempt.end_call(position)
    if attempt.workflow_id in ids:
        raise UsageError(
            f"workflow {attempt.name!r} starts itself as its child: with the same name and key it would wait for its "
            "own end. Use another key for the child."
        )
    return ids


async def _started(
    runtime: Runtime,
    checkpoint: Checkpoint,
    own: Sequence[NewWorkflow],
    *,
    active: int | None,
    rule: KeyRule | None,
    compensates: bool,
) -> str:
    recorder = runtime.recorder
    if rule is None:
        limit = _UNBOUNDED if active is None else active
        start_all = partial(children.start, checkpoint=checkpoint, children=own, active=limit, compensates=compensates)
        return await recorder.execute(start_all)
    (child,) = own
    start_one = partial(children.start_ruled, checkpoint=checkpoint, child=child, rule=rule, compensates=compensates)
    return await recorder.execute_together(start_one)


async def _record_refusal(
    runtime: Runtime, position: Position, started: Sequence[UUID], error: KeyNotVisibleError | KeyTakenError
) -> None:
    """Record that the key of a child is taken by another, and cancel the children started with it."""
    failed = checkpoint_of(runtime.attempt, position, StepStatus.FAILED, error=record(error))
    await runtime.recorder.execute(partial(children.cancel_rest, checkpoint=failed, ids=started))
    await runtime.recorder.record(failed)


async def result(runtime: Runtime, position: Position, workflow_id: UUID, **within: Any) -> WorkflowOutcome:
    """Wait for a workflow's outcome: a child's is announced by a notice, any other's is polled for.

    Raises:
        WaitTimeoutError: it has none in time.
        NotFoundError: there is no such workflow.
    """
    take = partial(children.take_outcome, workflow_id=workflow_id)
    query = partial(children.awaited, parent_id=runtime.attempt.workflow_id, workflow_ids=[workflow_id])
    late = f"workflow {workflow_id} had no outcome in time; it continues."
    source = WaitSource(query, in_one_statement(take), late, workflows=[workflow_id])
    recorded = await receive_recorded(runtime, position, source, **within)
    if recorded.status is StepStatus.FAILED:
        raise_recorded(recorded, runtime.attempt.options.errors)
    return _outcome(json.loads(recorded.output or "{}"))


async def first(runtime: Runtime, position: Position, workflow_ids: Sequence[UUID], **within: Any) -> UUID:
    """Wait until the first of some workflows has an outcome, and return its id."""
    take = partial(children.take_first, workflow_ids=workflow_ids)
    query = partial(children.awaited, parent_id=runtime.attempt.workflow_id, workflow_ids=workflow_ids)
    late = f"none of {len(workflow_ids)} workflows had an outcome in time; they continue."
    source = WaitSource(query, in_one_statement(take), late, workflows=workflow_ids)
    recorded = await receive_recorded(runtime, position, source, **within)
    if recorded.status is StepStatus.FAILED:
        raise_recorded(recorded, runtime.attempt.options.errors)
    return UUID(json.loads(recorded.output or '""'))


async def join(
    runtime: Runtime,
    position: Position,
    started: Started,
    *,
    active: int | None,
    tolerate: int,
    limit: int = DEFAULT_LIMIT,
) -> list[WorkflowOutcome]:
    """Wait for children that were started together, and return their outcomes in order.

    Deferred children are started as others end.

    Raises:
        ChildrenFailedError: more of them failed than are tolerated, and the others are cancelled; or some were deleted.
        PayloadTooLargeError: the outcomes together are too large to be recorded.
    """
    attempt = runtime.attempt
    try:
        recorded = attempt.recorded(position)
        if recorded is None:
            await runtime.recorder.settle()
            joining = _ChildrenWait(runtime, position, started, active=active or _UNBOUNDED, tolerate=tolerate)
            recorded = await joining.joined(limit)
        attempt.note_joined_map(started.key)
    finally:
        attempt.end_call(position)
    if recorded.status is StepStatus.FAILED:
        raise_recorded(recorded, runtime.attempt.options.errors)
    return [_outcome({"name": started.name, **each}) for each in json.loads(recorded.output or "[]")]


@dataclass(frozen=True, slots=True)
class Started:
    """Children of one name that were started together by one call, whose key is `key`."""

    name: str
    key: str
    ids: Sequence[UUID]


class _ChildrenWait:
    """One wait for children, which reads their progress whenever a share of them has ended."""

    def __init__(self, runtime: Runtime, position: Position, started: Started, *, active: int, tolerate: int) -> None:
        self._runtime = runtime
        self._position = position
        self._started = started
        self._ids = started.ids
        self._active = active
        self._tolerate = tolerate
        self._parent = runtime.attempt.workflow_id
        self._began = time.monotonic()

    async def joined(self, limit: int) -> Recorded:
        """Wait until all are finished or too many have failed, record the result and return the record."""
        # Of many children, the end of each does not wake it: the statement that reads their progress reads them all.
        watched = self._ids if len(self._ids) <= _MOST_WATCHED else ()
        with self._runtime.attempt.listening(self._runtime.recorder.waker(), watched) as waker:
            return await self._joined(limit, GracePeriod(self._runtime, waker))

    async def _joined(self, limit: int, grace: GracePeriod) -> Recorded:
        begun = self._runtime.attempt.unfinished_record(self._position) is not None
        query = partial(children.progress, parent_id=self._parent, ids=self._ids)
        while True:
            grace.waker.clear()  # before the query: what arrives during it wakes again
            found = await self._runtime.recorder.execute(query)
            if found.there < len(self._ids):
                gone = len(self._ids) - found.there
                words = f"{gone} of {self._label} no longer exist: were they deleted?"
                await self._start_all_deferred()
                return await self._fail(ChildrenFailedError(words, count=gone))
            if found.failed > self._tolerate:
                return await self._give_up()
            if found.finished >= len(self._ids):
                return await self._record_all(limit)
            places = min(found.deferred, self._active - found.active)
            released = await self._start_deferred(places) if places > 0 else []
            if not begun:
                waiting = checkpoint_of(self._runtime.attempt, self._position, StepStatus.WAITING)
                await self._runtime.recorder.execute(partial(steps.begin_wait, checkpoint=waiting))
                begun = True
            wait = self._wait_for(found, released)
            if len(released) < places:  # other transactions lock the rows, and nothing announces their end
                wait = replace(wait, until=min(wait.until, time.monotonic() + _POLL_INTERVAL))
            if wait.awaits and not grace.is_over:
                wait = grace.wait(wait.awaits, wait.until)
            await self._runtime.wait(self._position, wait)
            await self._runtime.recorder.settle()

    async def _start_deferred(self, count: int) -> list[UUID]:
        return await self._runtime.recorder.execute(partial(deferred.start_some, ids=self._ids, limit=count))

    async def _start_all_deferred(self) -> None:
        checkpoint = checkpoint_of(self._runtime.attempt, self._position)
        await self._runtime.recorder.execute(partial(deferred.start_rest, checkpoint=checkpoint, ids=self._ids))

    @property
    def _label(self) -> str:
        return f"{len(self._ids)} children {self._started.name!r}"

    def _wait_for(self, found: children.Progress, released: Sequence[UUID]) -> Wait:
        """Wait until a quarter of the active ones have ended: so replays are few, and a failure is noticed early."""
        if found.own < len(self._ids):  # of a fork: their notices go to the original workflow
            return Wait(time.monotonic() + _POLL_INTERVAL, self._began + _POLL_INTERVAL / 2, polls=True)
        named = children.sample([*found.named, *released])
        awaited = Awaited(children=named, open=len(named) - max(1, len(named) // 4))
        return Wait(float("inf"), float("-inf"), (awaited,) if named else ())

    async def _record_all(self, limit: int) -> Recorded:
        found = await self._runtime.recorder.execute(partial(children.outcomes, ids=self._ids))
        output = json.dumps(found, ensure_ascii=False)
        try:
            refuse_large(len(output.encode()), what=f"outcomes of {self._label}", limit=limit)
        except PayloadTooLargeError as error:
            return await self._fail(error)
        return await self._record(StepStatus.SUCCEEDED, output=output)

    async def _give_up(self) -> Recorded:
        checkpoint = checkpoint_of(self._runtime.attempt, self._position)
        ended = await self._runtime.recorder.execute(partial(children.outcomes, ids=self._ids))
        cancelled = {each["id"] for each in ended if each["status"] == WorkflowStatus.CANCELLED.value}  # by others
        await self._runtime.recorder.execute(partial(children.cancel_rest, checkpoint=checkpoint, ids=self._ids))
        await self._start_all_deferred()  # the detached ones
        found = await self._runtime.recorder.execute(partial(children.outcomes, ids=self._ids))
        failed = [each for each in found if each["status"] == WorkflowStatus.FAILED.value or each["id"] in cancelled]
        error = failed[0]["error"] if failed else None
        first = Failure.from_json(error)
        shown = f" The first: {first.type}: {first.message}" if error else ""
        shown = shown or (" The first was cancelled." if failed else "")
        ids = [UUID(each["id"]) for each in failed[:_SHOWN]]
        find = self._runtime.attempt.options.errors.inside
        return await self._fail(
            ChildrenFailedError(
                f"{len(failed)} of {self._label} failed, {self._tolerate} are tolerated; the rest is cancelled.{shown}",
                count=len(failed),
                indices=[self._ids.index(each) for each in ids],
                workflow_ids=ids,
                errors=[_outcome({"name": self._started.name, **each}).error(find) for each in failed[:_SHOWN]],
            )
        )

    async def _fail(self, error: Exception) -> Recorded:
        return await self._record(StepStatus.FAILED, error=record(error))

    async def _record(self, status: StepStatus, *, output: str | None = None, error: str | None = None) -> Recorded:
        checkpoint = checkpoint_of(self._runtime.attempt, self._position, status, output=output, error=error)
        await self._runtime.recorder.record(checkpoint)
        return checkpoint.recorded


def _outcome(found: dict[str, Any]) -> WorkflowOutcome:
    output = None if found["output"] is None else json.dumps(found["output"])
    status = WorkflowStatus(found["status"])
    if status is WorkflowStatus.SUCCEEDED and output is None:
        output = "null"
    return WorkflowOutcome(WorkflowState(UUID(found["id"]), found["name"], status, output, found["error"]))
