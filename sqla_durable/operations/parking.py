"""Waiting in memory at first, then as a row: in a worker, and in an executor that returns where its workflow waits."""

from __future__ import annotations

from typing import Protocol

from sqla_durable.errors import EncodingError
from sqla_durable.operations.arrivals import Waker
from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.calls import Position, Suspension, Wait
from sqla_durable.unwinding import Suspended

QUIET = 5.0
"""For how many seconds an attempt must have done nothing, where nobody can tell that all of its code waits."""

LOOK_EVERY = 1.0
"""After how many seconds an operation that waits in memory looks whether the workflow can be suspended."""


class Parkable(Protocol):
    """What waiting needs of either runtime."""

    attempt: Attempt

    async def begin_parking(self, wait: Wait) -> Suspension | None:
        """Return how the workflow can be suspended now, once; None: it stays in memory."""
        ...

    async def pause(self, seconds: float) -> None:
        """Wait a moment in memory."""

    async def listen(self, waker: Waker, seconds: float) -> None:
        """Wait a moment in memory, or until the operation is woken."""

    async def park(self, parking: Suspension, position: Position) -> None:
        """Suspend the workflow at an operation, and return when that is committed."""


def suspension_of_threads(attempt: Attempt) -> Suspension | None:
    """Return how a `def` workflow can be suspended now: once every branch waits.

    What else a thread does, nobody can see; so there is no suspending after a quiet while.
    """
    return attempt.begin_suspension(
        quiet=float("inf"), idle=lambda: attempt.branches.all_wait_or_are_in(attempt.homes_in_calls)
    )


async def wait_or_park(runtime: Parkable, position: Position, wait: Wait) -> None:
    """Wait as a row once everything in the workflow waits for long enough, until then in memory.

    Returns when the time has come; in memory, what awaits something else looks for it now and then.

    Raises:
        Suspended: the workflow is parked.
        ControlFlow: the attempt is to end.
    """
    attempt = runtime.attempt
    attempt.begin_wait(position, wait)
    try:
        while True:
            parking = await runtime.begin_parking(wait)
            if parking is not None:
                try:
                    await runtime.park(parking, position)
                except EncodingError:  # the database refuses the try that was to be recorded with it
                    attempt.undo_suspension()
                    raise
                raise Suspended
            if not wait.seconds:
                return
            seconds = min(wait.seconds, LOOK_EVERY)
            if wait.waker is None:
                await runtime.pause(seconds)
            else:
                await runtime.listen(wait.waker, wait.seconds if wait.in_memory else seconds)
            attempt.raise_if_stopped()
            if wait.awaits:
                return
    finally:
        attempt.end_wait(position)
