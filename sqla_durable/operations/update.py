"""`wait_update`: the workflow looks at what it is asked, refuses it or takes it. What it took is recorded."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeAlias

from sqla_durable.models.status import StepStatus
from sqla_durable.operations.attempt import Position
from sqla_durable.operations.outcome import raise_recorded
from sqla_durable.operations.runtime import Runtime
from sqla_durable.operations.wait import Source, received
from sqla_durable.store import Awaited, Checkpoint, updates

Consider: TypeAlias = Callable[[str], Coroutine[Any, Any, str | None]]
"""Says of a payload, which is JSON text, why it is refused; None if it is not."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What a workflow took; the payload is JSON text."""

    id: int
    payload: str


async def receive(
    runtime: Runtime, position: Position, *, name: str, consider: Consider, within: timedelta | None
) -> Taken:
    """Wait for an update that is not refused, and take it. Each that is refused is answered, and leaves no record here.

    Raises:
        WaitTimeoutError: none came in time.
    """
    late = f"no update {name!r} that is not refused came within {within}."
    take = partial(_take, name=name, consider=consider)
    source = Source(None, take, late, (Awaited(signal=updates.signal_of(name)),))
    recorded = await received(runtime, position, source, within=within)
    if recorded.status is StepStatus.FAILED:
        raise_recorded(recorded, runtime.attempt.errors)
    output = json.loads(recorded.output or "{}")
    return Taken(output["id"], json.dumps(output["payload"]))


async def _take(runtime: Runtime, checkpoint: Checkpoint, *, name: str, consider: Consider) -> str | None:
    fence = checkpoint.fence
    find = partial(updates.oldest, workflow_id=fence.workflow_id, name=name)
    while (found := await runtime.recorder.execute(find)) is not None:
        reason = await consider(found.payload)
        if reason is not None:
            await runtime.recorder.execute(partial(updates.refuse, fence=fence, update_id=found.id, reason=reason))
            await runtime.recorder.settle()
            continue
        taken = await runtime.recorder.execute(partial(updates.take, checkpoint=checkpoint, update_id=found.id))
        if taken is not None:  # another branch may have taken it meanwhile
            return taken
    return None
