"""What operations other than steps record of themselves."""

from __future__ import annotations

from sqla_durable.models.status import StepStatus
from sqla_durable.operations.attempt import Attempt, Position
from sqla_durable.store import Checkpoint


def checkpoint_of(
    attempt: Attempt,
    position: Position,
    status: StepStatus = StepStatus.SUCCEEDED,
    *,
    output: str | None = None,
    error: str | None = None,
    elapsed: float = 0.0,
    delay: float | None = None,
) -> Checkpoint:
    """Give an operation's record; `output` and `error` are JSON text, times in seconds."""
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
        elapsed=elapsed,
        delay=delay,
    )
