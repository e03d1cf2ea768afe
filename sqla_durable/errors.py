"""Every error that this package raises. Standard library only.

```
DurableError
├── DefinitionError               (also TypeError) a decorator was given a function that cannot be made durable
├── UsageError                    an operation was called where it cannot work
│   ├── StepOutsideWorkflowError      a transactional step without a session and without a workflow
│   ├── SyncAsyncError                sync where async is needed, or the other way round
│   ├── SessionError                  a session that is unbound, bound elsewhere, or not PostgreSQL
│   ├── StepTransactionError          a step committed, rolled back or closed its own session
│   ├── StreamClosedError             something is written to a stream that is closed
│   ├── HistoryLimitError             a workflow calls more operations than it may
│   ├── RetryPolicyError              what a step was given as retry, stop or wait fails itself
│   └── UnfinishedStepError           a workflow returned while a step or a branch was not awaited to its end
├── PayloadError                  a value that cannot travel to the database and back
│   ├── ArgumentError                 (also TypeError) an argument of a workflow, or of this package, that does not fit
│   ├── EncodingError                 a value that cannot be stored
│   │   └── PayloadTooLargeError          … because of its size
│   └── DecodingError                 a stored value that does not fit today's annotations
├── UnknownWorkflowError          (also LookupError) no workflow of that name is registered
├── WorkflowNotFoundError         no such workflow record is visible
├── KeyNotVisibleError            a key is taken by a row that the session cannot see
├── WorkflowReferencedError       rows of the application refer to a workflow that was to be deleted
├── WorkflowRunningError          somebody else holds a live lease on the workflow
├── AttemptLostError              this execution no longer owns its workflow; nothing more of it commits
├── WorkflowFinishedError         a signal, update or callback is for a workflow that has an outcome
├── UpdateRejectedError           a workflow has refused or rejected an update
├── UpdateNotAnsweredError        a workflow has ended, or begun anew, without answering an update
├── UpdateNotFoundError           no such update is visible
├── CompensationFailedError       a saga could not undo all that it did
├── ChildrenFailedError           more children of a group failed than are tolerated
├── WaitTimeoutError              (also TimeoutError) what an operation waited for did not come in time
│   └── CallbackSilentError           a callback was not kept alive
├── CallbackFailedError           a callback failed, says whoever has its token
├── CallbackFinishedError         a callback has another outcome, or its time is over
├── CallbackNotFoundError         (also LookupError) no callback has this token
├── HistoryMismatchError          today's code does not visit what a strict workflow has recorded
├── EventNotSetError              (also LookupError) a workflow has finished and has never set the event
├── ResultTimeoutError            (also TimeoutError) no outcome, event, item or answer within the time given
├── WorkflowError                 the outcome of a workflow that did not succeed
│   ├── WorkflowFailedError           its own exception type cannot be rebuilt here
│   ├── WorkflowCancelledError
│   ├── WorkflowTimeoutError          (also TimeoutError) it was not finished at its deadline
│   ├── MaxAttemptsError              its workers died too often
│   └── RowRefusedError               the database refuses what workers have to do with its row
├── StepTimeoutError              (also TimeoutError) a step was not done within its time
│   └── HeartbeatTimeoutError         a plain step reported nothing for too long
├── TransactionLostError          a transactional step lost its connection every time it was executed
├── StepFailedError               a step's own exception type cannot be rebuilt here
├── SchemaError                   the tables and this package do not fit together
│   ├── SchemaMissingError
│   ├── SchemaOlderError
│   └── SchemaNewerError
└── DatabaseUnavailableError      the server cannot be reached, or takes no writes
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
    """A function cannot be registered as a workflow or as a step."""


class UsageError(DurableError):
    """An operation was called where it cannot work."""


class StepOutsideWorkflowError(UsageError):
    """A transactional step was called without a session and outside a workflow."""


class SyncAsyncError(UsageError):
    """Sync code was called where async code is needed, or the other way round."""


class SessionError(UsageError):
    """A session has no engine, or an engine that cannot hold durable workflows."""


class StepTransactionError(UsageError):
    """A step ended the transaction that its checkpoint must share.

    Attributes:
        step: the key of the step.
    """

    def __init__(self, message: str, *, step: str) -> None:
        super().__init__(message)
        self.step = step


class StreamClosedError(UsageError):
    """Something is written to a stream that is closed. Nothing was written.

    Attributes:
        stream: the name of the stream.
    """

    def __init__(self, message: str, *, stream: str) -> None:
        super().__init__(message)
        self.stream = stream


class RetryPolicyError(UsageError):
    """What a step was given as `retry`, `stop` or `wait` raised, or gave no number of seconds: the step's outcome."""


class HistoryLimitError(UsageError):
    """A workflow calls more operations than its `Durable` allows: each replay would read all of them."""


class UnfinishedStepError(UsageError):
    """A workflow function returned while steps that it had called, or branches of its code, were not finished.

    Attributes:
        steps: the keys of those steps, or the branches.
    """

    def __init__(self, message: str, *, steps: list[str]) -> None:
        super().__init__(message)
        self.steps = steps


class PayloadError(DurableError):
    """A value cannot travel to the database and back."""


class ArgumentError(PayloadError, TypeError):
    """An argument does not fit: of a workflow its annotations, or another what is called. Nothing was done with it."""


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
    """A stored value does not fit the annotation that today's code has for it."""


class UnknownWorkflowError(DurableError, LookupError):
    """No workflow of this name is registered.

    Attributes:
        name: the name that was asked for.
    """

    def __init__(self, message: str, *, name: str) -> None:
        super().__init__(message)
        self.name = name


class _AboutWorkflow(DurableError):
    """An error about one workflow.

    Attributes:
        workflow_id: the id of its record.
    """

    def __init__(self, message: str, *, workflow_id: UUID) -> None:
        super().__init__(message)
        self.workflow_id = workflow_id


class WorkflowNotFoundError(_AboutWorkflow):
    """No record of this id is visible: wrong id, wrong database, or its start is not committed yet."""


class KeyNotVisibleError(DurableError):
    """A key is taken, and the row that has it cannot be seen: nothing was written, and the transaction is usable.

    A policy of row level security hides it, it is newer than the snapshot of a REPEATABLE READ or SERIALIZABLE
    transaction, or somebody deletes it again and again. A transactional step that meets a newer one is executed again.

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


class WorkflowReferencedError(DurableError):
    """Rows of the application refer to workflows that were to be deleted, by a foreign key that does not allow it."""


class WorkflowRunningError(_AboutWorkflow):
    """The workflow is not to be claimed now: another executor or worker holds a live lease on it, or it waits.

    Attributes:
        lease_expires_at: until when the lease is, if there is one. If its holder is dead, the workflow can be taken up
            then.
    """

    def __init__(self, message: str, *, workflow_id: UUID, lease_expires_at: datetime | None = None) -> None:
        super().__init__(message, workflow_id=workflow_id)
        self.lease_expires_at = lease_expires_at


class AttemptLostError(_AboutWorkflow):
    """An executor no longer owns the workflow: its lease ran out and another took over, or it was cancelled.

    What was committed before stands and is in the record; nothing of this attempt commits any more.
    """


class WorkflowFinishedError(_AboutWorkflow):
    """The workflow has an outcome: nobody will take what is sent to it. Nothing was sent."""


class _AboutUpdate(_AboutWorkflow):
    """An error about one update: `update_id` is its id, `reason` what the workflow says of it."""

    def __init__(self, message: str, *, workflow_id: UUID, update_id: int, reason: str | None = None) -> None:
        super().__init__(message, workflow_id=workflow_id)
        self.update_id = update_id
        self.reason = reason


class UpdateRejectedError(_AboutUpdate):
    """The workflow has refused an update before it took it, or rejected it afterwards: `reason` says why."""


class UpdateNotAnsweredError(_AboutUpdate):
    """The workflow has ended without answering an update, or has begun anew and forgotten it."""


class UpdateNotFoundError(_AboutUpdate):
    """No such update is visible: wrong id, wrong database, or it is not committed yet."""


class CompensationFailedError(DurableError):
    """Some compensations of a saga failed, in spite of their retries; the others were carried out."""


class ChildrenFailedError(DurableError):
    """More children of a group failed than are tolerated; those that were not finished are cancelled.

    Attributes:
        count: how many have failed, or are there no longer. The lists are about the first 20 that failed.
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
    """A callback was silent for longer than its `heartbeat`. It is the callback's outcome, also on replay."""


class CallbackFailedError(DurableError):
    """A callback failed, says whoever has its token; `details` is what they gave with the message, as JSON has it."""

    def __init__(self, message: str, details: object = None) -> None:
        super().__init__(message)
        self.details = details


class CallbackFinishedError(_AboutWorkflow):
    """A callback has an outcome, and it is another one: the first stands. Nothing was written."""


class CallbackNotFoundError(DurableError, LookupError):
    """No callback has this token, or nobody can answer it any more. Nothing was written."""


class HistoryMismatchError(_AboutWorkflow):
    """Today's code does not visit what a strict workflow has recorded, or in another order.

    The workflow has no outcome. A worker parks it and looks again in a minute; from an executor the error is raised.

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
    """The workflow is finished and has never set the event: nobody will.

    Attributes:
        workflow_id: the id of its record.
        key: the key of the event.
    """

    def __init__(self, message: str, *, workflow_id: UUID, key: str) -> None:
        super().__init__(message, workflow_id=workflow_id)
        self.key = key


class ResultTimeoutError(_AboutWorkflow, TimeoutError):
    """The workflow had no outcome, or nothing new to read, within the time given. It goes on undisturbed."""


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
    """The database refuses what workers have to do with the workflow's row, because of what is in it or of a trigger.

    When that has been mended, `resume` lets the workflow go on.
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
    """A plain step was silent for longer than its `heartbeat_timeout`."""


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
    """The tables in the database and this package do not fit together."""


class SchemaMissingError(SchemaError):
    """The tables are not there."""


class SchemaOlderError(SchemaError):
    """The tables are older than this package."""


class SchemaNewerError(SchemaError):
    """The tables are newer than this package."""


class DatabaseUnavailableError(DurableError):
    """The database server cannot be reached with the URL given, or takes no writes."""
