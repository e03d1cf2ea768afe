"""The workflow as a whole: its execution and outcome, sagas, continue-as-new, patches, and the check of its history."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn, cast

from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.definitions.error_classes import Find
from sqla_durable.definitions.failure import Failure, add_notes, record
from sqla_durable.definitions.interceptors import Interceptor
from sqla_durable.definitions.json_values import MARK
from sqla_durable.definitions.log import Log, joined
from sqla_durable.definitions.payloads import Place, opened
from sqla_durable.definitions.registry import WorkflowDefinition
from sqla_durable.errors import (
    EncodingError,
    HistoryMismatchError,
    MaxAttemptsError,
    RowRefusedError,
    WorkflowCancelledError,
    WorkflowFailedError,
    WorkflowTimeoutError,
)
from sqla_durable.models.base import WorkflowStatus
from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.calls import Position
from sqla_durable.operations.history import PATCH
from sqla_durable.operations.outcome import checkpoint_of, failure_of_workflow, is_own_failure_of_workflow
from sqla_durable.operations.runtime import Recorder, Runtime, execution_of
from sqla_durable.store import Checkpoint, Completion, WorkflowState, attempts, continuations
from sqla_durable.store.failures import TIMEOUT_TYPE
from sqla_durable.unwinding import AttemptLost, CallRefused, Cancelling, ContinuedAsNew, ControlFlow

# The errors with which the engine itself ends a workflow, by their recorded type.
_ENGINE_ERRORS = {
    f"{kind.__module__}:{kind.__qualname__}": kind for kind in (MaxAttemptsError, RowRefusedError, WorkflowTimeoutError)
}


log = Log("sqla_durable.changes")


async def run_workflow(runtime: Runtime, definition: WorkflowDefinition) -> Completion:
    """Execute a claimed workflow to its outcome, and record that. Raises as `execute_workflow`."""
    return await record_completion(runtime.recorder, await execute_workflow(runtime, definition))


async def execute_workflow(runtime: Runtime, definition: WorkflowDefinition) -> Completion:
    """Execute a claimed workflow to its outcome, which is yet to be recorded.

    Raises:
        ControlFlow: the attempt ended without an outcome of its own.
        HistoryMismatchError: likewise, because the workflow is strict and its code does not fit its history.
    """
    completion = await completion_of(runtime, definition)
    if not runtime.attempt.is_undoing:
        check_history(runtime.attempt, strict=definition.options.strict)
    return completion


async def record_completion(recorder: Recorder, completion: Completion) -> Completion:
    """Record the outcome of a workflow, and return what stands; where the database refuses it, that it failed.

    Raises:
        ControlFlow: the attempt no longer owns the workflow, or is to end without an outcome.
    """
    try:
        await recorder.finish(completion)
    except EncodingError as refused:
        completion = completion._replace(status=WorkflowStatus.FAILED, output=None, error=record(refused))
        await recorder.finish(completion)
    if ends := recorder.attempt.options.interceptors.ends:
        _call_at_end(ends, recorder.attempt, completion.status)
    return completion


def _call_at_end(ends: Sequence[Interceptor], attempt: Attempt, status: WorkflowStatus) -> None:
    execution = execution_of(attempt)
    for each in ends:
        try:
            each.finished(execution, status.value)
        except Exception:
            log.exception("workflow %s %s: an interceptor failed after its end", attempt.name, attempt.workflow_id)


async def completion_of(runtime: Runtime, definition: WorkflowDefinition) -> Completion:
    """Execute a workflow to its outcome, and do not record that.

    Raises:
        ControlFlow: the attempt ended without an outcome of its own.
    """
    try:
        return await _completion_of(runtime, definition)
    except BaseException as error:
        ending = control_flow_in(error)  # a task group wraps what its tasks raise
        if isinstance(ending, CallRefused):
            ending = runtime.attempt.ending or ending
        if isinstance(ending, Cancelling):
            return _undone(runtime.attempt)
        raise ending or error from None


async def _completion_of(runtime: Runtime, definition: WorkflowDefinition) -> Completion:
    attempt = runtime.attempt
    attempt.options = definition.durable_options
    try:
        _ = definition.result  # raises before the workflow is executed, if its result could not be recorded
        given, payloads = attempt.input, attempt.options.payloads
        if payloads.is_required or MARK in given:
            given = payloads.open_members(given, attempt.place("input"))
        arguments = definition.arguments.decode(given)
        if definition.durable_options.interceptors.workflows:
            value = await _call_intercepted(runtime, definition, arguments)
        else:
            value = await runtime.call_workflow(definition, arguments)
        attempt.raise_if_stopped()
        attempt.refuse_unfinished()
        output = definition.result.encode(value)
        if payloads.codecs:
            output = attempt.seal(output, "result")
    except BaseException as error:
        if not is_own_failure_of_workflow(attempt, error):
            raise
        attempt.raise_if_stopped()
        failure = failure_of_workflow(error, attempt.name)
        return _ended(attempt, WorkflowStatus.FAILED, error=record(failure, attempt.options.errors))
    return _ended(attempt, WorkflowStatus.SUCCEEDED, output=output)


def _undone(attempt: Attempt) -> Completion:
    """Return the outcome of a workflow that has compensated, because it was cancelled or its deadline passed."""
    if attempt.deadline_message is None:
        return _ended(attempt, WorkflowStatus.CANCELLED)
    return _ended(
        attempt, WorkflowStatus.FAILED, error=Failure(type=TIMEOUT_TYPE, message=attempt.deadline_message).to_json()
    )


def _ended(
    attempt: Attempt, status: WorkflowStatus, *, output: str | None = None, error: str | None = None
) -> Completion:
    return Completion(
        attempt.fence,
        status,
        output,
        error,
        is_child=attempt.is_child,
        has_deferred=attempt.may_have_deferred,
        has_notices=attempt.may_have_notices,
    )


async def _call_intercepted(runtime: Runtime, definition: WorkflowDefinition, arguments: dict[str, Any]) -> Any:
    async with runtime.intercepted():
        return await runtime.call_workflow(definition, arguments)


def control_flow_in(error: BaseException) -> ControlFlow | None:
    """Return the `ControlFlow` that an error is, or that a group of errors contains; None if there is none."""
    if isinstance(error, BaseExceptionGroup):
        inner = cast("BaseExceptionGroup[BaseException]", error).exceptions
        return next((found for each in inner if (found := control_flow_in(each)) is not None), None)
    return error if isinstance(error, ControlFlow) else None


@dataclass(frozen=True, slots=True)
class WorkflowOutcome:
    """The outcome of a finished workflow."""

    state: WorkflowState

    @classmethod
    def of(cls, name: str, completion: Completion) -> WorkflowOutcome:
        """Return the outcome that a completion records."""
        error = None if completion.error is None else json.loads(completion.error)
        workflow_id = completion.fence.workflow_id
        return cls(WorkflowState(workflow_id, name, completion.status, completion.output, error))

    def value(self, definition: WorkflowDefinition, *, find: Find | None = None) -> Any:
        """Return the workflow's result, or raise its error.

        Args:
            definition: the workflow's.
            find: returns the exception classes that may be rebuilt; by default those for code outside of workflows.

        Raises:
            Exception: the workflow's own error, if its class is known to its `Durable` and imported here.
            WorkflowFailedError: if not.
            WorkflowCancelledError: it was cancelled.
            MaxAttemptsError: its workers died too often.
            RowRefusedError: the database refused what a worker had to write to its row.
            WorkflowTimeoutError: it was not finished at its deadline.
        """
        match self.state.status:
            case WorkflowStatus.SUCCEEDED:
                output = opened(self.state.output or "null", Place.of(self.state.workflow_id, "result"))
                return definition.result.decode(output)
            case _:
                raise self.error(find or definition.durable_options.errors.outside)

    @property
    def _label(self) -> str:
        return f"workflow {self.state.name!r} {self.state.workflow_id}"

    def error(self, find: Find) -> Exception:
        """Return the error of a workflow that failed or was cancelled, of a class that may be rebuilt here."""
        if self.state.status is WorkflowStatus.CANCELLED:
            return WorkflowCancelledError(f"{self._label} was cancelled.", workflow_id=self.state.workflow_id)
        failure = Failure.from_json(self.state.error or {"type": "unknown"})
        if (kind := _ENGINE_ERRORS.get(failure.type)) is not None:
            return kind(f"{self._label} failed: {failure.message}.", workflow_id=self.state.workflow_id)
        error = failure.rebuild(find)
        if error is None:
            error = WorkflowFailedError(
                f"{self._label} failed with {failure.type}: {failure.message}",
                workflow_id=self.state.workflow_id,
                error_type=failure.type,
                error_message=failure.message,
            )
            failure.complete(error)
        add_notes(error, f"raised in {self._label}")
        return error


async def begin_saga(runtime: Runtime, position: Position) -> None:
    """Record that the workflow may have something to compensate; it is committed when this returns."""
    attempt = runtime.attempt
    if attempt.recorded(position) is not None:
        return
    await runtime.recorder.settle()
    checkpoint = checkpoint_of(attempt, position, output="null")
    await runtime.recorder.execute(partial(attempts.begin_saga, checkpoint=checkpoint))
    await runtime.recorder.record(checkpoint)


def must_compensate(attempt: Attempt, error: BaseException | None) -> bool:
    """Return whether a saga that ends so must compensate: by an error, or because the workflow is cancelled.

    Not if the workflow is suspended, released or lost, whatever error its code raises then: it will be replayed.
    """
    if attempt.is_stopped:
        return attempt.is_cancelling and (error is not None or attempt.is_unwound)
    return error is not None and is_own_failure_of_workflow(attempt, error)


async def continue_as_new(runtime: Runtime, position: Position, *, given: str) -> NoReturn:
    """Enqueue the workflow with this input and without a history, and end this attempt.

    Raises:
        ContinuedAsNew: it is enqueued.
        AttemptLost: the attempt no longer owns the workflow; or it is enqueued, and the acknowledgement was lost.
    """
    attempt = runtime.attempt
    await runtime.recorder.settle()
    if not await runtime.recorder.execute(partial(continuations.continue_as_new, fence=attempt.fence, given=given)):
        raise AttemptLost(attempt.workflow_id)
    attempt.stop(ContinuedAsNew)
    raise ContinuedAsNew


def patched(attempt: Attempt, patch_id: str) -> tuple[bool, Checkpoint | None]:
    """Return whether the workflow takes the new path, and the marker to record before the next effect, if any."""
    with attempt.branches.lock:
        patch = attempt.history_check.patched(patch_id)
    if patch.key is None:
        return patch.is_new, None
    attempt.refuse_when_unwound(patch.key)
    return patch.is_new, checkpoint_of(attempt, Position(patch.key, PATCH, patch.place), output="true")


def check_history(attempt: Attempt, *, strict: bool) -> None:
    """Warn if today's code has not called what the history holds, in its order.

    Raises:
        HistoryMismatchError: with `strict`, instead of the warning.
    """
    mismatch = attempt.history_check.mismatch()
    if mismatch is None:
        return
    what = f"workflow {attempt.name!r} {attempt.workflow_id} was recorded by other code than today's: {mismatch}"
    if not strict:
        log.warning("%s", joined(what))
        return
    raise HistoryMismatchError(
        f"{what}\nIt is strict and has no outcome for now: deploy code that fits its history, or mark the change "
        "with patched().",
        workflow_id=attempt.workflow_id,
        recorded=mismatch.recorded,
        visited=mismatch.visited,
    )
