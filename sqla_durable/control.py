"""What unwinds a workflow's function without being an error; `errors` has the whole tree. Standard library only."""

from __future__ import annotations


class ControlFlow(BaseException):
    """Unwinds a workflow function without being an error of its own.

    Not an `Exception`, so that `except Exception` in a workflow cannot swallow it.
    """


class AttemptLost(ControlFlow):
    """The fence refused a write: this execution no longer owns its workflow."""


class Interrupted(ControlFlow):
    """The database was lost while an executor was recording; the workflow is neither finished nor failed.

    Attributes:
        error: what the database driver raised.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class Suspended(ControlFlow):
    """The workflow is parked: its row says when it goes on, and its replay will come back to where it waits."""


class ContinuedAsNew(Suspended):
    """The workflow was enqueued to begin anew; this attempt is over."""


class Cancelling(ControlFlow):
    """The workflow was cancelled: it ends at the first operation that is not recorded, and its sagas compensate."""


class Released(ControlFlow):
    """The worker is stopping; the workflow is handed back at the boundary between two steps."""
