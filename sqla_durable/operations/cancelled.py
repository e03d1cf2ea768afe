"""An operation whose call the workflow's own code has cancelled: what is recorded of it, so that replays agree.

The database decides: either the operation's own outcome was recorded first, and that is what the code sees; or it is
recorded as cancelled, and then nothing else of it can be recorded or committed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from sqla_durable.models.status import StepStatus
from sqla_durable.operations.attempt import Position
from sqla_durable.operations.checkpoint import checkpoint_of
from sqla_durable.operations.runtime import Runtime
from sqla_durable.store import Recorded, steps

_TYPE = "asyncio.exceptions:CancelledError"
_MARK = "cancelled"


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The record of a call that was cancelled.

    Attributes:
        order: grows from one cancelled call of a workflow to the next.
        fired: the timers of asyncio that fired meanwhile, by their keys.
    """

    order: int
    fired: tuple[str, ...] = ()


async def settle(runtime: Runtime, position: Position, cancelled: Cancelled) -> Recorded:
    """Record that a call was cancelled, unless the operation has an outcome; return the outcome that stands.

    What the code had recorded before, the reason for the cancel perhaps, is committed first.

    Raises:
        ControlFlow: the attempt ends here, and nothing was recorded.
    """
    await runtime.recorder.settle()
    words = f"the workflow's own code cancelled the call {position.key!r}"
    error: dict[str, Any] = {
        "type": _TYPE,
        "message": words,
        "args": [],
        "state": {},
        "traceback": "",
        _MARK: asdict(cancelled),
    }
    checkpoint = checkpoint_of(runtime.attempt, position, StepStatus.FAILED, error=json.dumps(error))
    return await runtime.recorder.execute(partial(steps.settle, checkpoint=checkpoint))


def cancelled_in(recorded: Recorded) -> Cancelled | None:
    """Return what a record says of a cancelled call; None if it is another outcome."""
    if recorded.status is not StepStatus.FAILED or f'"{_MARK}"' not in (recorded.error or ""):
        return None
    found: Any = json.loads(recorded.error or "{}").get(_MARK)
    return Cancelled(found["order"], tuple(found["fired"])) if found else None
