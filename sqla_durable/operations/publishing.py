"""What workflows and steps publish while they are executed: events, and items of streams.

Between steps, publishing is an operation of its own, recorded once. In a plain step it is written at once, and again by
the next try; in a transactional step it is part of the step's transaction, and this module is not involved.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol

from sqlalchemy.exc import DBAPIError

from sqla_durable.definitions.database_errors import first_line, is_transient
from sqla_durable.errors import EncodingError
from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.calls import Position, StepCall
from sqla_durable.operations.outcome import checkpoint_of
from sqla_durable.operations.runtime import Runtime
from sqla_durable.store import Checkpoint, Connectable, Origin


class Publication(Protocol):
    """An event or an item of a stream that is to be written."""

    def record(self, connectable: Connectable, checkpoint: Checkpoint) -> None:
        """Write it and record that as a step, in one statement."""

    def write(self, connectable: Connectable, origin: Origin) -> None:
        """Write it."""

    async def write_at_once(self, runtime: Runtime, origin: Origin) -> None:
        """Write it in a transaction of its own, or in one that several writes share."""


async def publish_once(runtime: Runtime, position: Position, encode: Callable[[], Publication]) -> None:
    """Publish between steps, exactly once; committed when this returns.

    Raises:
        EncodingError: it cannot be stored; nothing was written.
        UsageError: its stream is closed.
        ControlFlow: the attempt ends here.
    """
    attempt = runtime.attempt
    try:
        if attempt.recorded(position) is None:
            publication = encode()
            await runtime.recorder.settle()
            record = partial(publication.record, checkpoint=checkpoint_of(attempt, position, output="null"))
            await _explaining_refusal(runtime, runtime.recorder.execute(record))
    finally:
        attempt.end_call(position)


async def publish_at_once(runtime: Runtime, call: StepCall, encode: Callable[[], Publication]) -> None:
    """Publish in a plain step; committed when this returns, whatever becomes of the step.

    Raises:
        EncodingError, UsageError, ControlFlow: as `publish_once`.
    """
    publication = encode()
    await _explaining_refusal(runtime, publication.write_at_once(runtime, origin_of(runtime.attempt, call)))


def origin_of(attempt: Attempt, call: StepCall) -> Origin:
    """Return the try of the step that publishes."""
    return Origin(attempt.fence, attempt.number, call.position.key, call.tries.count)


async def _explaining_refusal(runtime: Runtime, writing: Awaitable[None]) -> None:
    try:
        await writing
    except DBAPIError as error:
        if is_transient(error):
            raise
        raise EncodingError(
            f"the database refuses what workflow {runtime.attempt.name!r} publishes: {first_line(error)}"
        ) from error
