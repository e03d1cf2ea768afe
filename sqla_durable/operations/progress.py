"""The heartbeat of a step that takes long: that it lives, and how far it is, at most once in a while."""

from __future__ import annotations

from functools import partial

from sqlalchemy.exc import DBAPIError

from sqla_durable.definitions.retry import first_line, is_about_data
from sqla_durable.errors import EncodingError
from sqla_durable.models.status import StepStatus
from sqla_durable.operations.runtime import Runtime, StepCall
from sqla_durable.store import Checkpoint, steps

INTERVAL = 1.0
"""Seconds between two statements of one step; what is reported in between replaces what waits."""


async def send_unsent(runtime: Runtime, call: StepCall) -> None:
    """Send what a step has reported and what is not sent yet.

    Raises:
        AttemptLost: the attempt no longer owns the workflow.
    """
    if runtime.attempt.progress(call.position).unsent:
        await send(runtime, call)


async def send(runtime: Runtime, call: StepCall) -> None:
    """Write that a step lives, and its newest details, in a transaction of its own.

    Raises:
        AttemptLost: the attempt no longer owns the workflow.
        EncodingError: the database refuses the details.
    """
    reported = runtime.attempt.progress(call.position)
    report = partial(steps.report_progress, checkpoint=_running(runtime, call), details=reported.details)
    try:
        with reported.sending():
            await runtime.recorder.execute(report)
    except DBAPIError as error:
        if not is_about_data(error):
            raise
        raise EncodingError(
            f"the database refuses the details that step {call.position.key!r} reports: {first_line(error)}"
        ) from error


def _running(runtime: Runtime, call: StepCall) -> Checkpoint:
    return Checkpoint(
        fence=runtime.attempt.fence,
        key=call.position.key,
        name=call.position.name,
        position=call.position.number,
        status=StepStatus.RUNNING,
        output=None,
        error=None,
        attempt=runtime.attempt.number,
        attempts=call.tries.count,
        elapsed=call.tries.age,
    )
