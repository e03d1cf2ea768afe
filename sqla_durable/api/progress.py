"""Steps that take long: their heartbeat, and which of them are being executed."""

from __future__ import annotations

from collections.abc import Awaitable, Coroutine
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any, overload
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sqla_durable.api.callers import AnySession, id_of, read
from sqla_durable.api.publishing import DONE, encode
from sqla_durable.definitions.inspection import SessionKind
from sqla_durable.errors import UsageError
from sqla_durable.models import Workflow
from sqla_durable.operations.publishing import INTERVAL, send_heartbeat
from sqla_durable.runtime.context import active
from sqla_durable.store import workers


def heartbeat(details: object = None) -> Awaitable[None]:
    """Report from a plain step that it lives, and how far it is. In an `async def` step, await the call.

    ```python
    @durable.step
    def import_file(path: str) -> int:
        done = current_step().details or 0
        for number, line in enumerate(lines_of(path, after=done), done + 1):
            ...
            heartbeat(number)
        return number
    ```

    The last details stand in the step's record, `Step.details`, and stay there; the next try of the step finds them in
    `current_step().details`, whichever worker executes it. The first call is committed when it returns; after that
    there is at most one statement a second: details that come sooner wait for the next call after it, or for the end of
    the try, and a worker that dies before loses them. Refused to an attempt that no longer owns its workflow: the step
    of a cancelled workflow ends here. With `heartbeat_timeout=` a step has failed that does not call this for so
    long; a `def` one ends here then, and likewise when its `timeout` is over. Outside a workflow nothing happens.

    Args:
        details: of any type that can be stored as JSON, and read as what JSON knows; None leaves those that are there.

    Raises:
        EncodingError, PayloadTooLargeError: they cannot be stored, or are too large.
        HeartbeatTimeoutError: the step has been silent for longer than its `heartbeat_timeout`; nothing is reported.
        StepTimeoutError: the time of the try is over; likewise.
        UsageError: this is not a plain step.
    """
    context = active()
    if context is None:
        return DONE
    step = context.step
    if step is None or step.definition.session is not SessionKind.NONE:
        where = "between steps" if step is None else f"in step {step.position.shown!r}, which is transactional"
        raise UsageError(
            f"heartbeat() was called {where} in workflow {context.attempt.name!r}: only a plain step has one. What "
            "others are to see of the rest, set_event() shows."
        )
    text = (
        None
        if details is None
        else encode(details, what=f"details of step {step.position.shown!r}", limit=context.limit)
    )
    if not context.attempt.progress(step.position).report(text, interval=INTERVAL):
        return DONE
    return context.runtime.operate_in_step(step.position, lambda runtime, _: send_heartbeat(runtime, step)) or DONE


@dataclass(frozen=True, slots=True)
class RunningStep:
    """A step that was being executed when its worker's last heartbeat was written.

    Attributes:
        step: its key.
        step_attempt: which try of it, from 1.
        since: when that try began, on the database's clock.
        worker: the name of the worker.
        seen_at: the time of that heartbeat. The next ones come within a third of the lease, while the worker lives.
        lease_expires_at: if the worker is dead, another one takes over then.
    """

    step: str
    step_attempt: int
    since: datetime
    worker: str
    seen_at: datetime
    lease_expires_at: datetime


@overload
def running_steps(session: Session, workflow: Workflow | UUID) -> list[RunningStep]: ...


@overload
def running_steps(session: AsyncSession, workflow: Workflow | UUID) -> Coroutine[Any, Any, list[RunningStep]]: ...


def running_steps(
    session: AnySession, workflow: Workflow | UUID
) -> list[RunningStep] | Coroutine[Any, Any, list[RunningStep]]:
    """Return the steps of a workflow that a worker is executing, the oldest first. With an `AsyncSession`, await it.

    ```python
    for step in running_steps(session, order.checkout):
        print(f"{step.step} is being executed since {step.since}, seen at {step.seen_at} on {step.worker}")
    ```

    A worker writes them with its heartbeat, three times in a lease, and only those that are executed for longer than
    the time between two: what is shorter is in the records of the steps before that. Executors have no heartbeat.

    Raises:
        ArgumentError: this is no workflow.
        SchemaError, SessionError: the session's database does not hold the tables.
    """
    return read(session, partial(_running_steps, workflow_id=id_of(workflow)))


def _running_steps(session: Session, workflow_id: UUID) -> list[RunningStep]:
    found = workers.running_steps(session, workflow_id)
    if found is None:
        return []
    steps = [
        RunningStep(
            step=key,
            step_attempt=count,
            since=found.heartbeat_at - timedelta(seconds=seconds),
            worker=found.name,
            seen_at=found.heartbeat_at,
            lease_expires_at=found.lease_expires_at,
        )
        for key, (count, seconds) in found.steps.items()
    ]
    return sorted(steps, key=lambda each: each.since)
