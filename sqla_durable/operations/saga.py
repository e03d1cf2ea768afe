"""The saga: it begins with a row that says so, and ends by undoing, in reverse, what was done in it."""

from __future__ import annotations

from functools import partial

from sqla_durable.operations.attempt import Position
from sqla_durable.operations.checkpoint import checkpoint_of
from sqla_durable.operations.runtime import Runtime
from sqla_durable.operations.workflow import signal_in
from sqla_durable.store import sagas
from sqla_durable.unwinding import Cancelling


async def begin(runtime: Runtime, position: Position) -> None:
    """Note that the workflow may have something to undo; durable when this returns."""
    attempt = runtime.attempt
    if attempt.recorded(position) is not None:
        return
    await runtime.settle()
    checkpoint = checkpoint_of(attempt, position, output="null")
    await runtime.execute(partial(sagas.begin, checkpoint=checkpoint))
    await runtime.record(checkpoint)


def calls_for_compensation(error: BaseException | None) -> bool:
    """Tell whether what ends a saga undoes it: an error, or that the workflow is cancelled.

    Not a workflow that is parked, handed back or lost: it will come here again.
    """
    if error is None:
        return False
    signal = signal_in(error)
    return isinstance(signal, Cancelling) if signal is not None else isinstance(error, (Exception, SystemExit))
