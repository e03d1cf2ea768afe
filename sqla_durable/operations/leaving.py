"""What an attempt that is ending says to code that goes on all the same, in a `finally` or after it caught the signal.

Such code cannot be kept from being executed, but from having durable effects: each of its calls is refused, with words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqla_durable.definitions.log import Log
from sqla_durable.unwinding import (
    AttemptLost,
    CallRefused,
    Cancelling,
    ContinuedAsNew,
    ControlFlow,
    Interrupted,
    Released,
    Suspended,
)

if TYPE_CHECKING:
    from uuid import UUID

log = Log("sqla_durable.workflow")

_AGAIN = "The code comes here again when the workflow goes on; what is to be done once belongs after the wait"
_UNDO = "What is to be done when a workflow is cancelled is a compensation of a Saga"
_WHY: dict[type[ControlFlow], tuple[str, str]] = {  # the first that fits
    ContinuedAsNew: ("the workflow begins anew", "Call it before continue_as_new()"),
    Suspended: ("the workflow is parked until what it waits for has come", _AGAIN),
    Released: ("its worker stops and hands the workflow back", _AGAIN),
    Cancelling: ("the workflow was cancelled, or its deadline has come", _UNDO),
    AttemptLost: ("the workflow was cancelled, or another attempt has taken it over", _UNDO),
    Interrupted: ("its database was lost", _AGAIN),
    ControlFlow: ("it was told to end", _AGAIN),
}


def refusal(
    signal: ControlFlow, *, call: str, workflow: str, workflow_id: UUID, attempt: int, warn: bool
) -> CallRefused:
    """Give the error for a durable call of an attempt that ends with a signal, and log it if it is to be a warning.

    Args:
        call: what was called: an operation's key.
        workflow: the workflow's name.
    """
    why, instead = next(words for kind, words in _WHY.items() if isinstance(signal, kind))
    error = CallRefused(
        f"{call!r} was called in workflow {workflow!r} {workflow_id} while its attempt {attempt} was ending, because "
        f"{why}: it was not executed. A finally or an except block has gone on although the attempt was over. "
        f"{instead}.",
        workflow_id=workflow_id,
        call=call,
    )
    if warn:
        log.warning("%s", error)
    return error
