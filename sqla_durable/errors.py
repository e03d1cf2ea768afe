"""Every error that this package raises. Standard library only.

There is a class of its own for what a caller can act on apart; the message says the rest.

```
DurableError
├── DefinitionError               (also TypeError) fix the function or the options that a decorator was given
├── UsageError                    fix the code: an operation was called where or how it cannot work
│   ├── SessionError                  pass a session of the right kind, bound to the right database
│   └── HistoryLimitError             continue as new, use children, or raise the limit and resume
├── PayloadError                  a value cannot be stored, or not be read again
│   ├── ArgumentError                 (also TypeError) correct the argument; nothing was done with it
│   ├── EncodingError                 store another value
│   │   └── PayloadTooLargeError          store the value elsewhere and pass its key
│   └── DecodingError                 bring back an annotation that reads the stored value
│       └── PayloadKeyError               give a Durable of this process the codec or the key that is named
├── NotFoundError                 (also LookupError) check the id or token, and that its transaction committed
├── KeyNotVisibleError            try again in a new transaction, or look at the row's policy
├── KeyTakenError                 use the workflow that has the key, or wait until the key is free
├── WorkflowReferencedError       delete the application's own rows first
├── WorkflowRunningError          wait until the lease of another executor or worker has expired
├── AttemptLostError              stop: another execution owns the workflow, or it was cancelled
├── WorkflowFinishedError         do not send: the workflow has an outcome
├── UpdateRejectedError           show the reason to the sender
├── UpdateNotAnsweredError        look at the workflow's outcome, or send the update again
├── CompensationFailedError       undo by hand what the saga could not undo
├── ChildrenFailedError           look at the errors of the children
├── WaitTimeoutError              (also TimeoutError) go on in the workflow without what it waited for
│   └── CallbackSilentError           the same, where a callback sent no heartbeat
├── CallbackFailedError           handle the failure that the other system reported
├── CallbackFinishedError         do not answer again: the first answer stands
├── HistoryMismatchError          deploy code that fits the history, or mark the change as a patch
├── EventNotSetError              (also LookupError) do not wait: the workflow finished without setting the event
├── ResultTimeoutError            (also TimeoutError) ask again later; the workflow is not affected
├── WorkflowError                 the outcome of a workflow that did not succeed
│   ├── WorkflowFailedError           make its exception class known with `Durable(errors=[...])`
│   ├── WorkflowCancelledError        nothing: somebody cancelled it
│   ├── WorkflowTimeoutError          (also TimeoutError) resume it with more time
│   ├── MaxAttemptsError              find out why its workers died, then resume it
│   └── RowRefusedError               repair its row or the trigger that refuses it, then resume it
├── StepTimeoutError              (also TimeoutError) try the step again, or give it more time
│   └── HeartbeatTimeoutError         the same, where a plain step sent no heartbeat
├── TransactionLostError          find out why the connection is lost while the step is executed
├── StepFailedError               make its exception class known with `Durable(errors=[...])`
├── SchemaError                   run the migrations, or upgrade this package
└── DatabaseUnavailableError      wait until the server can be reached and takes writes
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID


class DurableError(Exception):
    """The base of every error of this package."""


class DefinitionError(DurableError, TypeError):
    """A function or its options cannot be registered as a workflow or as a step."""


class UsageError(DurableError):
    """An operation was called where or how it cannot work; the code has to be changed.

    Raised, for example, for a step that ends its own transaction, for sync code where async code is needed, for a
    workflow that returns before its steps are finished, for a retry policy that fails itself, and for a workflow name
    that is not registered. An error in a step or a workflow is recorded as its outcome.
    """


class SessionError(UsageError):
    """A session has no engine, or one that cannot hold durable workflows, or is of the wrong kind."""


class HistoryLimitError(UsageError):
    """A workflow calls more operations than its `Durable` allows: each replay would read all of them."""


class PayloadError(DurableError):
    """A value cannot be stored in the database, or not be read from it again."""


class ArgumentError(PayloadError, TypeError):
    """An argument does not fit the annotations of a workflow, or what a function of this package accepts.

    Nothing was done with it.
    """


class EncodingError(PayloadError):
    """A value cannot be stored as JSON by its annotation."""


class PayloadTooLargeError(EncodingError):
    """A value is larger than the limit.

    Attributes:
        size: its size in bytes of UTF-8 JSON.
        limit: the limit in bytes.
    """

    def __init__(self, message: str, *, size: int, limit: int) -> None:
        super().__init__(message)
        self.size = size
        self.limit = limit


class DecodingError(PayloadError):
    """A stored value does not fit the annotation that the code has now."""


class PayloadKeyError(DecodingError):
    """A stored value needs a codec or a key that no `Durable` of this process has.

    Where an attempt meets it, the workflow is suspended for a minute, and does not fail.
    """


class _AboutWorkflow(DurableError):
    """An error about one workflow.

    Attributes:
        workflow_id: the id of its record.
    """

    def __init__(self, message: str, *, workflow_id: UUID) -> None:
        super().__init__(message)
        self.workflow_id = workflow_id


class NotFoundError(DurableError, LookupError):
    """No workflow or update with this id, and no callback with this token, is visible.

    It is in another database, was deleted, or its transaction is not committed yet. Nothing was written.

    Attributes:
        workflow_id: the id of the workflow; None for a callback, whose token does not name one that is visible.
    """

    def __init__(self, message: str, *, workflow_id: UUID | None = None) -> None:
        super().__init__(message)
        self.workflow_id = workflow_id


class KeyNotVisibleError(DurableError):
    """A key is taken by a row that cannot be seen: nothing was written, and the transaction is usable.

    A policy of row level security hides it, it is newer than the snapshot of a REPEATABLE READ or SERIALIZABLE
    transaction, or it is deleted again and again. A transactional step that meets a newer one is executed again.

    Attributes:
        name: the name of the workflow, update, signal, callback or stream.
        key: the key.
        is_newer: whether it was inserted after the transaction's snapshot: a new transaction sees it.
    """

    def __init__(self, message: str, *, name: str, key: str, is_newer: bool = False) -> None:
        super().__init__(message)
        self.name = name
        self.key = key
        self.is_newer = is_newer


class KeyTakenError(_AboutWorkflow):
    """A start with `on_conflict="refuse"` has found its key taken: nothing was written, and the transaction is usable.

    Attributes:
        workflow_id: the id of the workflow that has the key.
        name: the name of both.
        key: the key.
    """

    def __init__(self, message: str, *, workflow_id: UUID, name: str, key: str) -> None:
        super().__init__(message, workflow_id=workflow_id)
        self.name = name
        self.key = key


class WorkflowReferencedError(DurableError):
    """Rows of the application refer to workflows that were to be deleted, by a foreign key that does not allow it."""


class WorkflowRunningError(_AboutWorkflow):
    """The workflow cannot be claimed now: another executor or worker has a live lease on it, or it is suspended.

    Attributes:
        lease_expires_at: when the lease expires, if there is one. If its owner is dead, the workflow can be reclaimed
            then.
    """

    def __init__(self, message: str, *, workflow_id: UUID, lease_expires_at: datetime | None = None) -> None:
        super().__init__(message, workflow_id=workflow_id)
        self.lease_expires_at = lease_expires_at


class AttemptLostError(_AboutWorkflow):
    """An executor no longer owns the workflow: its lease expired and another reclaimed it, or it was cancelled.

    What was committed before stands and is in the record; nothing more of this attempt commits.
    """


class WorkflowFinishedError(_AboutWorkflow):
    """The workflow has an outcome and receives nothing more. Nothing was sent."""


class _AboutUpdate(_AboutWorkflow):
    """An error about one update: `update_id` is its id, `reason` the workflow's reason, if it gave one."""

    def __init__(self, message: str, *, workflow_id: UUID, update_id: int, reason: str | None = None) -> None:
        super().__init__(message, workflow_id=workflow_id)
        self.update_id = update_id
        self.reason = reason


class UpdateRejectedError(_AboutUpdate):
    """The workflow refused an update before it accepted it, or rejected it afterwards: `reason` says why."""


class UpdateNotAnsweredError(_AboutUpdate):
    """The workflow ended, or continued as new, without answering an update."""


class CompensationFailedError(DurableError):
    """Some compensations of a saga failed, in spite of their retries; the others were carried out."""


class ChildrenFailedError(DurableError):
    """More children of a group failed than are tolerated; those that were not finished are cancelled.

    Attributes:
        count: how many failed, or were deleted. The lists are about the first 20 that failed.
        indices: the places of their items among those of the map, from 0.
        workflow_ids: the ids of their records.
        errors: their errors, of their own types where these are known and imported; without tracebacks.
    """

    def __init__(
        self,
        message: str,
        *,
        count: int,
        indices: list[int] | None = None,
        workflow_ids: list[UUID] | None = None,
        errors: list[Exception] | None = None,
    ) -> None:
        super().__init__(message)
        self.count = count
        self.indices = indices or []
        self.workflow_ids = workflow_ids or []
        self.errors = errors or []


class WaitTimeoutError(DurableError, TimeoutError):
    """What an operation waited for did not come within its time. It is the operation's outcome, also on replay."""


class CallbackSilentError(WaitTimeoutError):
    """A callback sent no heartbeat for longer than its `heartbeat`. It is the callback's outcome, also on replay."""


class CallbackFailedError(DurableError):
    """A callback was answered with a failure; `details` is what was sent with the message, as read from JSON."""

    def __init__(self, message: str, details: object = None) -> None:
        super().__init__(message)
        self.details = details


class CallbackFinishedError(_AboutWorkflow):
    """A callback already has another outcome, which stands. Nothing was written."""


class HistoryMismatchError(_AboutWorkflow):
    """Today's code does not visit what a strict workflow has recorded, or visits it in another order.

    The workflow has no outcome. A worker suspends it and tries again in a minute; from an executor the error is raised.

    Attributes:
        workflow_id: the id of its record.
        recorded: the keys of its history, in order.
        visited: the keys that the code visited, in order.
    """

    def __init__(self, message: str, *, workflow_id: UUID, recorded: tuple[str, ...], visited: tuple[str, ...]) -> None:
        super().__init__(message, workflow_id=workflow_id)
        self.recorded = recorded
        self.visited = visited


class EventNotSetError(_AboutWorkflow, LookupError):
    """The workflow finished without setting the event, which can no longer be set.

    Attributes:
        workflow_id: the id of its record.
        key: the key of the event.
    """

    def __init__(self, message: str, *, workflow_id: UUID, key: str) -> None:
        super().__init__(message, workflow_id=workflow_id)
        self.key = key


class ResultTimeoutError(_AboutWorkflow, TimeoutError):
    """The workflow had no outcome, or nothing new to read, within the time given. The workflow is not affected."""


class WorkflowError(_AboutWorkflow):
    """The outcome of a workflow that did not succeed."""


class WorkflowFailedError(WorkflowError):
    """A workflow failed with an exception whose type is not known, or cannot be rebuilt in this process.

    `Durable(errors=[...])` makes types known; see docs, "Security".

    Attributes:
        workflow_id: the id of its record.
        error_type: the recorded type, `module:qualified_name`.
        error_message: the recorded message.
    """

    def __init__(self, message: str, *, workflow_id: UUID, error_type: str, error_message: str) -> None:
        super().__init__(message, workflow_id=workflow_id)
        self.error_type = error_type
        self.error_message = error_message


class WorkflowCancelledError(WorkflowError):
    """The workflow was cancelled."""


class WorkflowTimeoutError(WorkflowError, TimeoutError):
    """The workflow was not finished at its deadline; `resume` gives it more time, unless sagas have undone it."""


class MaxAttemptsError(WorkflowError):
    """The workflow was stopped because its workers died too often while executing it."""


class RowRefusedError(WorkflowError):
    """The database refuses what workers have to write to the workflow's row, because of its values or of a trigger.

    After that is repaired, `resume` lets the workflow continue.
    """


class StepTimeoutError(DurableError, TimeoutError):
    """A step was not done within its `timeout` or `total_timeout`; nothing of a transactional one is written.

    Attributes:
        step: the key of the step.
        seconds: the time that it had.
    """

    def __init__(self, message: str, *, step: str, seconds: float) -> None:
        super().__init__(message)
        self.step = step
        self.seconds = seconds


class HeartbeatTimeoutError(StepTimeoutError):
    """A plain step sent no heartbeat for longer than its `heartbeat_timeout`."""


class TransactionLostError(DurableError):
    """A transactional step was executed again and again, and each time its transaction was lost before its COMMIT.

    Nothing of it is written. While a step is tried again, this is the error in its record.

    Attributes:
        step: the key of the step.
        count: how many times in a row.
        sqlstate: PostgreSQL's code of the last error, or None where the driver gave none.
    """

    def __init__(self, message: str, *, step: str, count: int, sqlstate: str | None) -> None:
        super().__init__(message)
        self.step = step
        self.count = count
        self.sqlstate = sqlstate


class StepFailedError(DurableError):
    """A step failed with an exception whose type is not known, or cannot be rebuilt in this process.

    Raised on the first execution as well as on replay, so that both take the same path. `Durable(errors=[...])` makes
    types known; see docs, "Security".

    Attributes:
        error_type: the recorded type, `module:qualified_name`.
        error_message: the recorded message.
    """

    def __init__(self, message: str, *, error_type: str, error_message: str) -> None:
        super().__init__(message)
        self.error_type = error_type
        self.error_message = error_message


class SchemaError(DurableError):
    """The tables are missing, or are older or newer than this package."""


class DatabaseUnavailableError(DurableError):
    """The database server cannot be reached with the URL given, or takes no writes."""
