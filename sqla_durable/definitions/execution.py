"""`Execution` and `StepExecution`: where the code is. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID


@dataclass(frozen=True, slots=True)
class Execution:
    """Where the code is.

    Attributes:
        workflow_id: the id of the workflow's record.
        workflow: the workflow's name.
        attempt: the workflow's attempt, from 1; it counts up when a worker died, and when it is resumed.
        step: the key of the step that is being executed; None between steps.
        step_attempt: the try of that step, from 1, those of earlier attempts included; None between steps.
        idempotency_key: for the system that the step calls: the same on every execution of this step, and of no
            other; None between steps.
        details: what the step has last reported by `heartbeat`, in this try or in one before; None if nothing.
        headers: what interceptors gave to the workflow when it was started; see `Interceptor.start`.
    """

    workflow_id: UUID
    workflow: str
    attempt: int
    step: str | None = None
    step_attempt: int | None = None
    idempotency_key: str | None = None
    details: Any = field(default=None, hash=False)
    headers: Mapping[str, str] = field(default_factory=dict[str, str], hash=False)


@dataclass(frozen=True, slots=True)
class StepExecution(Execution):
    """Where the code of a step is: an `Execution` whose step, try and idempotency key are there; see `current_step`."""

    step: str = ""
    step_attempt: int = 1
    idempotency_key: str = ""
