"""A workflow that begins anew: its history goes, and a new attempt begins with another input."""

from __future__ import annotations

from functools import partial
from typing import NoReturn

from sqla_durable.operations.attempt import Position
from sqla_durable.operations.runtime import Runtime
from sqla_durable.store import continuations
from sqla_durable.unwinding import AttemptLost, ContinuedAsNew


async def begin_anew(runtime: Runtime, position: Position, *, given: str) -> NoReturn:
    """Enqueue the workflow with this input, and unwind this attempt.

    Raises:
        ContinuedAsNew: that is done.
        AttemptLost: the attempt no longer owns the workflow; or it was done, and the acknowledgement was lost.
    """
    attempt = runtime.attempt
    await runtime.recorder.settle()
    if not await runtime.recorder.execute(partial(continuations.continue_as_new, fence=attempt.fence, given=given)):
        raise AttemptLost(attempt.workflow_id)
    attempt.stop(ContinuedAsNew)
    raise ContinuedAsNew
