"""The workflow: decode its arguments, call its function, record its outcome; and read a recorded outcome again."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, cast

from sqla_durable.definitions.classes import Find
from sqla_durable.definitions.failure import Failure, add_notes, record
from sqla_durable.definitions.registry import WorkflowDefinition
from sqla_durable.errors import (
    EncodingError,
    MaxAttemptsError,
    RowRefusedError,
    WorkflowCancelledError,
    WorkflowFailedError,
    WorkflowTimeoutError,
)
from sqla_durable.models.status import WorkflowStatus
from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.patches import report
from sqla_durable.operations.raised import failure_of_workflow, is_own_failure_of_workflow
from sqla_durable.operations.runtime import Runtime
from sqla_durable.store import Completion, WorkflowState
from sqla_durable.store.failures import TIMEOUT_TYPE
from sqla_durable.unwinding import CallRefused, Cancelling, ControlFlow

# What the engine ends a workflow with, by the type that is recorded.
_OF_THE_ENGINE = {
    f"{kind.__module__}:{kind.__qualname__}": kind for kind in (MaxAttemptsError, RowRefusedError, WorkflowTimeoutError)
}


async def run_workflow(runtime: Runtime, definition: WorkflowDefinition) -> Completion:
    """Execute a claimed workflow to its outcome and record it.

    Raises:
        ControlFlow: the attempt ended without an outcome of its own.
        HistoryMismatchError: likewise, because the workflow is strict and its history was not visited.
    """
    completion = await completion_of(runtime, definition)
    if not runtime.attempt.undoes:
        report(runtime.attempt, strict=definition.strict)
    try:
        await runtime.recorder.finish(completion)
    except EncodingError as refused:
        completion = replace(completion, status=WorkflowStatus.FAILED, output=None, error=record(refused))
        await runtime.recorder.finish(completion)
    return completion


async def completion_of(runtime: Runtime, definition: WorkflowDefinition) -> Completion:
    """Execute a workflow to its outcome, and record nothing of that.

    Raises:
        ControlFlow: the attempt ended without an outcome of its own.
    """
    try:
        return await _completion_of(runtime, definition)
    except BaseException as error:
        signal = signal_in(error)  # a task group wraps the signals of its tasks
        if isinstance(signal, CallRefused):
            signal = runtime.attempt.ending or signal  # the reason for it
        if isinstance(signal, Cancelling):
            return _undone(runtime.attempt)
        raise signal or error from None


async def _completion_of(runtime: Runtime, definition: WorkflowDefinition) -> Completion:
    attempt = runtime.attempt
    attempt.interceptors = definition.interceptors
    attempt.history_limit = definition.history_limit or attempt.history_limit
    attempt.errors, attempt.secrets = definition.errors, definition.secrets
    try:
        _ = definition.result  # what could not be recorded is not executed
        value = await _called(runtime, definition)
        attempt.proceed()
        attempt.refuse_unfinished()
        output = definition.result.encode(value)
    except BaseException as error:
        if not is_own_failure_of_workflow(attempt, error):
            raise
        attempt.proceed()
        failure = failure_of_workflow(error, attempt.name)
        return _ended(attempt, WorkflowStatus.FAILED, error=record(failure, attempt.errors))
    return _ended(attempt, WorkflowStatus.SUCCEEDED, output=output)


def _undone(attempt: Attempt) -> Completion:
    """Give the outcome of a workflow that has undone what it did: it was cancelled, or its deadline has come."""
    if attempt.overdue is None:
        return _ended(attempt, WorkflowStatus.CANCELLED)
    return _ended(attempt, WorkflowStatus.FAILED, error=Failure(type=TIMEOUT_TYPE, message=attempt.overdue).to_json())


def _ended(
    attempt: Attempt, status: WorkflowStatus, *, output: str | None = None, error: str | None = None
) -> Completion:
    return Completion(
        attempt.fence,
        status,
        output,
        error,
        is_child=attempt.is_child,
        has_deferred=attempt.may_hold,
        has_notices=attempt.may_have_notices,
    )


async def _called(runtime: Runtime, definition: WorkflowDefinition) -> Any:
    arguments = definition.arguments.decode(runtime.attempt.input)
    if not definition.interceptors.workflows:
        return await runtime.call_workflow(definition, arguments)
    async with runtime.intercepted():
        return await runtime.call_workflow(definition, arguments)


def signal_in(error: BaseException) -> ControlFlow | None:
    """Give the signal that an error is, or that a group of errors holds."""
    if isinstance(error, BaseExceptionGroup):
        inner = cast("BaseExceptionGroup[BaseException]", error).exceptions
        return next((found for each in inner if (found := signal_in(each)) is not None), None)
    return error if isinstance(error, ControlFlow) else None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a finished workflow."""

    standing: WorkflowState

    @classmethod
    def of(cls, name: str, completion: Completion) -> Outcome:
        """Give the outcome that a completion records."""
        error = None if completion.error is None else json.loads(completion.error)
        workflow_id = completion.fence.workflow_id
        return cls(WorkflowState(workflow_id, name, completion.status, completion.output, error))

    def value(self, definition: WorkflowDefinition, *, find: Find | None = None) -> Any:
        """Return the workflow's result, or raise its error.

        Args:
            definition: the workflow's.
            find: returns the classes that may be raised; by default what may be raised outside of workflows.

        Raises:
            Exception: the workflow's own error, where its class is known to its `Durable`, and imported here.
            WorkflowFailedError: where it is not.
            WorkflowCancelledError: it was cancelled.
            MaxAttemptsError: its workers died too often.
            RowRefusedError: the database refused what a worker had to do with its row.
            WorkflowTimeoutError: it was not finished at its deadline.
        """
        match self.standing.status:
            case WorkflowStatus.SUCCEEDED:
                return definition.result.decode(self.standing.output or "null")
            case _:
                raise self.error(find or definition.errors.outside)

    @property
    def _label(self) -> str:
        return f"workflow {self.standing.name!r} {self.standing.workflow_id}"

    def error(self, find: Find) -> Exception:
        """Return the error of a workflow that failed or was cancelled, of a class that may be raised here."""
        if self.standing.status is WorkflowStatus.CANCELLED:
            return WorkflowCancelledError(f"{self._label} was cancelled.", workflow_id=self.standing.workflow_id)
        failure = Failure.from_json(self.standing.error or {"type": "unknown"})
        if (kind := _OF_THE_ENGINE.get(failure.type)) is not None:
            return kind(f"{self._label} failed: {failure.message}.", workflow_id=self.standing.workflow_id)
        error = failure.rebuild(find)
        if error is None:
            error = WorkflowFailedError(
                f"{self._label} failed with {failure.type}: {failure.message}",
                workflow_id=self.standing.workflow_id,
                error_type=failure.type,
                error_message=failure.message,
            )
            failure.complete(error)
        add_notes(error, f"raised in {self._label}")
        return error
