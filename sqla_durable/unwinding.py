"""The exceptions that unwind a workflow function; none of them is an error of the user's code.

```
ControlFlow(BaseException)
├── AttemptLost                   the fence refused a write: another attempt owns the workflow, or it was cancelled
├── Interrupted                   an executor lost its database while it recorded
├── Unwound                       what was raised beside it is no outcome, and ends the attempt
├── Suspended                     the workflow waits without occupying a slot
│   └── ContinuedAsNew                it starts again with another input and no history
├── Cancelling                    the workflow was cancelled or is overdue, and its sagas compensate
├── Released                      the worker is stopping and releases the workflow
└── CallRefused                   a durable call by code that goes on, as in a `finally`, after one of these
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uuid import UUID


class ControlFlow(BaseException):
    """Unwinds a workflow function without being an error of it.

    Not an `Exception`, so that `except Exception` in a workflow cannot swallow it.
    """


class AttemptLost(ControlFlow):
    """The fence refused a write: this execution no longer owns its workflow."""


class Interrupted(ControlFlow):
    """The database was lost while an executor was recording; the workflow has no outcome.

    Attributes:
        error: what the database driver raised.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class Unwound(ControlFlow):
    """Something was raised beside this that is neither an outcome nor control flow: the attempt ends with it.

    Attributes:
        error: what was raised.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


class Suspended(ControlFlow):
    """The workflow is suspended: its row says when it continues, and its replay returns to where it waits."""


class ContinuedAsNew(Suspended):
    """The workflow was enqueued to continue as new; this attempt is over."""


class Cancelling(ControlFlow):
    """The workflow was cancelled, or its deadline has passed: it ends at the first operation that is not recorded."""


class Released(ControlFlow):
    """The worker is stopping; the workflow is released between two steps."""


class CallRefused(ControlFlow):
    """A durable call was made by code that goes on although its attempt is ending. Nothing was executed.

    Not an `Exception` either, so that code which retries in a loop is unwound too; the workflow ends as it would have.

    Attributes:
        workflow_id: the id of the workflow's record.
        call: the key of the operation that was called.
    """

    def __init__(self, message: str, *, workflow_id: UUID, call: str) -> None:
        super().__init__(message)
        self.workflow_id = workflow_id
        self.call = call


_AGAIN = "The workflow's code comes here again when it is resumed; what is to happen once belongs after the wait"
_UNDO = "What is to be done when a workflow is cancelled is a compensation of a Saga"
_REASONS: dict[type[ControlFlow], tuple[str, str]] = {  # the first that fits
    ContinuedAsNew: ("the workflow continues as new", "Call it before continue_as_new()"),
    Suspended: ("the workflow is suspended until what it waits for is there", _AGAIN),
    Released: ("its worker is stopping and releases the workflow", _AGAIN),
    Cancelling: ("the workflow was cancelled, or its deadline has passed", _UNDO),
    AttemptLost: ("the workflow was cancelled, or another worker has reclaimed it", _UNDO),
    Interrupted: ("the connection to the database was lost", _AGAIN),
    Unwound: ("what was raised beside it is no outcome, and ended the attempt", _AGAIN),
    ControlFlow: ("it was stopped", _AGAIN),
}


def refusal(ending: ControlFlow, *, call: str, workflow: str, workflow_id: UUID, attempt: int) -> CallRefused:
    """Return the error for a durable call that is made while its attempt ends.

    A `finally` or an `except` block that goes on cannot be stopped, but it must have no durable effects.

    Args:
        ending: what ends the attempt.
        call: the key of the operation that was called.
        workflow: the workflow's name.
        workflow_id: its id.
        attempt: the attempt's number.
    """
    why, instead = next(words for kind, words in _REASONS.items() if isinstance(ending, kind))
    return CallRefused(
        f"{call!r} was called in workflow {workflow!r} {workflow_id} while its attempt {attempt} was ending, because "
        f"{why}: it was not executed. A finally or an except block has gone on although the attempt was over. "
        f"{instead}.",
        workflow_id=workflow_id,
        call=call,
    )
