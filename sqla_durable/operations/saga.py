"""The saga: it begins with a row that says so, and ends by undoing, in reverse, what was done in it."""

from __future__ import annotations

from functools import partial

from sqla_durable.operations.attempt import Attempt, Position
from sqla_durable.operations.checkpoint import checkpoint_of
from sqla_durable.operations.raised import is_own_failure_of_workflow
from sqla_durable.operations.runtime import Runtime
from sqla_durable.store import attempts


async def begin(runtime: Runtime, position: Position) -> None:
    """Note that the workflow may have something to undo; durable when this returns."""
    attempt = runtime.attempt
    if attempt.recorded(position) is not None:
        return
    await runtime.recorder.settle()
    checkpoint = checkpoint_of(attempt, position, output="null")
    await runtime.recorder.execute(partial(attempts.begin_saga, checkpoint=checkpoint))
    await runtime.recorder.record(checkpoint)


def calls_for_compensation(attempt: Attempt, error: BaseException | None) -> bool:
    """Tell whether what ends a saga undoes it: an error, or that the workflow is cancelled.

    Not a workflow that is suspended, released or lost, whatever error its code makes of that: it will come here again.
    """
    if attempt.stopped:
        return attempt.cancelling and (error is not None or attempt.signal_is_delivered)
    return error is not None and is_own_failure_of_workflow(attempt, error)
