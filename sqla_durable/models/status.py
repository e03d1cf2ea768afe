"""The statuses of a workflow and of a step, as they stand in the database.

Which rows are legal is held by the CHECK constraints in `models`; which transitions there are, by the store.
"""

from __future__ import annotations

from enum import StrEnum


class WorkflowStatus(StrEnum):
    """Where a workflow stands.

    ```
    pending ──claim──► running ──► succeeded | failed
       ▲                 │
       │ release,        │
       ├─── reclaim ─────┤──reclaim after max_attempts──► failed
       │                 │ park, reclaim after several crashes
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
    """Where a step stands. One without a row has not ended its first try.

    `running` has reported details, `retrying` waits for its next try, `waiting` for what it is about.
    """

    RUNNING = "running"
    RETRYING = "retrying"
    WAITING = "waiting"
    SUCCEEDED = "succeeded"
    FAILED = "failed"

    @property
    def finished(self) -> bool:
        """Whether it is an outcome."""
        return self in (StepStatus.SUCCEEDED, StepStatus.FAILED)


FINISHED = frozenset({WorkflowStatus.SUCCEEDED, WorkflowStatus.FAILED, WorkflowStatus.CANCELLED})
