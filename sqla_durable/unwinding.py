"""The signals that unwind a workflow function; never an error of the user's.

```
ControlFlow(BaseException)
├── AttemptLost                   the fence refused a write: another attempt owns the workflow, or it was cancelled
├── Interrupted                   an executor lost its database in the middle
├── Suspended                     the workflow waits, as a row
│   └── ContinuedAsNew                it begins anew, with another input and no history
├── Cancelling                    the workflow was cancelled or is overdue, and undoes what it did
├── Released                      the worker is stopping and hands the workflow back
└── CallRefused                   a durable call in a `finally` of an attempt that is ending for one of these reasons
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uuid import UUID


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
    """The workflow was cancelled, or its deadline has come: it ends at the first operation that is not recorded."""


class Released(ControlFlow):
    """The worker is stopping; the workflow is handed back at the boundary between two steps."""


class CallRefused(ControlFlow):
    """A durable call was made by code that goes on although its attempt is ending. Nothing was executed.

    No `Exception` either, so that code which tries again and again is left too; the workflow ends as it would have.

    Attributes:
        workflow_id: the id of the workflow's record.
        call: the key of the operation that was called.
    """

    def __init__(self, message: str, *, workflow_id: UUID, call: str) -> None:
        super().__init__(message)
        self.workflow_id = workflow_id
        self.call = call
