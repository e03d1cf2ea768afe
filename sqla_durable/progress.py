"""The heartbeat of a step that takes long."""

from __future__ import annotations

from collections.abc import Awaitable

from sqla_durable.context import active
from sqla_durable.errors import UsageError
from sqla_durable.inspection import SessionKind
from sqla_durable.operations.progress import INTERVAL, send
from sqla_durable.publishing import DONE, encode


def heartbeat(details: object = None) -> Awaitable[None]:
    """Report from a plain step that it lives, and how far it is. In an `async def` step, await the call.

    ```python
    @durable.step
    def import_file(path: str) -> int:
        execution = current()
        done = execution.details or 0 if execution else 0
        for number, line in enumerate(lines_of(path, after=done), done + 1):
            ...
            heartbeat(number)
        return number
    ```

    The last details stand in the step's record, `Step.details`, and stay there; the next try of the step finds them in
    `current().details`, whichever worker executes it. The first call is committed when it returns; after that there is
    at most one statement a second: details that come sooner wait for the next call after it, or for the end of the try,
    and a worker that dies before loses them. Refused to an attempt that no longer owns its workflow: the
    step of a cancelled workflow ends here. With `heartbeat_timeout=` a step has failed that does not call this for so
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
        where = "between steps" if step is None else f"in step {step.position.key!r}, which is transactional"
        raise UsageError(
            f"heartbeat() was called {where} in workflow {context.attempt.name!r}: only a plain step has one. What "
            "others are to see of the rest, set_event() shows."
        )
    text = (
        None if details is None else encode(details, what=f"details of step {step.position.key!r}", limit=context.limit)
    )
    if not context.attempt.progress(step.position).report(text, interval=INTERVAL):
        return DONE
    return context.operate(step.position, lambda runtime, _: send(runtime, step)) or DONE
