"""The statuses of a workflow and of a step, as they are in the database.

The CHECK constraints in `models` define the legal rows, the statements of the store the transitions.
"""

from __future__ import annotations

from enum import StrEnum


class WorkflowStatus(StrEnum):
    """The status of a workflow.

    ```
    pending ──claim──► running ──► succeeded | failed
       ▲                 │
       │ release,        │
       ├─── reclaim ─────┤──reclaim after max_attempts──► failed
       │                 │ suspend, reclaim after several crashes
       │                 ▼
       └──── wake ── suspended
    pending, running, suspended ──cancel──► cancelled
    cancelled, failed for its crashes ──resume──► pending
    failed by itself ──retry──► pending
    any ──rewind──► pending
    ```
    """

    PENDING = "pending"
    RUNNING = "running"
    SUSPENDED = "suspended"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def finished(self) -> bool:
        """Whether the workflow has an outcome that will not change by itself."""
        return self in FINISHED

    @property
    def as_predicate(self) -> str:
        """How a workflow of this status came to its end, for messages: "has succeeded", "was cancelled"."""
        return f"{'was' if self is WorkflowStatus.CANCELLED else 'has'} {self}"


class StepStatus(StrEnum):
    """The status of a step. One without a row has not ended its first try.

    `running` has reported details, `retrying` waits for its next try, `waiting` is a wait that has begun.
    """

    RUNNING = "running"
    RETRYING = "retrying"
    WAITING = "waiting"
    SUCCEEDED = "succeeded"
    FAILED = "failed"

    @property
    def finished(self) -> bool:
        """Whether it is the status of an outcome."""
        return self in (StepStatus.SUCCEEDED, StepStatus.FAILED)


FINISHED = frozenset({WorkflowStatus.SUCCEEDED, WorkflowStatus.FAILED, WorkflowStatus.CANCELLED})
