"""The records that statements are given and that they return; most are written or read as columns of one table.

Those that every step and every workflow makes are named tuples, which cost a fifth of a frozen dataclass to make.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import Enum, auto
from types import MappingProxyType
from typing import Any, NamedTuple
from uuid import UUID

from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.definitions.json_values import escaped
from sqla_durable.models.base import StepStatus, WorkflowStatus

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Fence(NamedTuple):
    """What an attempt proves with every write: that the workflow is running under this token."""

    workflow_id: UUID
    token: UUID


@dataclass(frozen=True, slots=True)
class Origin:
    """Where something is published: in an attempt, in a step, in a try of that; between steps there is no try."""

    fence: Fence
    attempt: int
    step_key: str
    try_number: int | None = None


class Checkpoint(NamedTuple):
    """The outcome of a step, or of a try that will be followed by another after `delay`, to be recorded.

    `output` is JSON text, or `error` is; `elapsed` and `delay` are in seconds. `value` is what reading `output` gives,
    where that was done already.
    """

    fence: Fence
    key: str
    name: str
    position: int
    status: StepStatus
    output: str | None
    error: str | None
    attempt: int
    tries: int
    elapsed: float
    delay: float | None = None
    value: tuple[Any] | None = None

    @property
    def escaped(self) -> Checkpoint:
        """The same with an error that every database can store."""
        return self if self.error is None else self._replace(error=escaped(self.error))

    @property
    def recorded(self) -> Recorded:
        """The same as a replay reads it."""
        return Recorded(self.key, self.name, self.position, self.status, self.output, self.error, value=self.value)


class Recorded(NamedTuple):
    """A recorded checkpoint, as a replay reads it: JSON text, decoded when the step is visited.

    Of a step that is being tried again, `tries` have failed, the first began `age` seconds before the record was
    read, and the next is due in `due_in` seconds. Of one that is running, the last of `tries` was interrupted, and
    `details` is the JSON text that it has reported. Of one that was recorded just now, `value` is what reading `output`
    gave when it was encoded: it is not copied, so give it to one reader only.
    """

    key: str
    name: str
    position: int
    status: StepStatus
    output: str | None
    error: str | None
    tries: int = 1
    age: float = 0.0
    due_in: float = 0.0
    details: str | None = None
    value: tuple[Any] | None = None


@dataclass(frozen=True, slots=True)
class Awaited:
    """What a workflow may wait for: a signal of this name, or that at most `open` of these children are unfinished.

    For children it counts those still unfinished, never those that have ended: that number falls when some are deleted
    or retried. A child that does not exist is not unfinished.
    """

    signal: str | None = None
    children: Sequence[UUID] = ()
    open: int = 0

    @classmethod
    def any_of(cls, children: Sequence[UUID]) -> Awaited:
        """Wait for the first of some children."""
        return cls(children=children, open=len(children) - 1)

    def to_json(self) -> dict[str, Any]:
        """Return it as an element of the column `awaits`."""
        if self.signal:
            return {"signal": self.signal}
        return {"children": [str(each) for each in self.children], "open": self.open}


@dataclass(frozen=True, slots=True)
class Suspend:
    """A workflow to be suspended by its own attempt.

    It is due again after `delay` seconds, if that is given, or when one of what it `awaits` is available.
    """

    fence: Fence
    delay: float | None
    awaits: Sequence[Awaited] = ()


class Completion(NamedTuple):
    """The outcome of a workflow, to be recorded. `output` is JSON text, or `error` is.

    It may have deferred children, and undelivered notices.
    """

    fence: Fence
    status: WorkflowStatus
    output: str | None = None
    error: str | None = None
    is_child: bool = False
    has_deferred: bool = False
    has_notices: bool = False

    @property
    def escaped(self) -> Completion:
        """The same with an error that every database can store."""
        return self if self.error is None else self._replace(error=escaped(self.error))


class Claimed(NamedTuple):
    """A claimed workflow: what a worker needs to execute it. `input` is JSON text.

    If it `is_unread`, its history did not come with the claim, and is to be read before it is executed.

    One that `is_cancelling` compensates, and then ends: failed with the message `overdue` if there is one, otherwise
    cancelled. `origin` is from where its input may be besides itself: see `definitions.payloads.Place`.
    """

    fence: Fence
    name: str
    attempt: int
    input: str
    is_child: bool = False
    is_cancelling: bool = False
    overdue: str | None = None
    headers: Mapping[str, str] = _NOTHING
    history: Mapping[str, Recorded] = _NOTHING
    is_unread: bool = False
    origin: str | None = None


class NewWorkflow(NamedTuple):
    """A workflow to be started. `delay`, `timeout` and `deadline` are in seconds, `wake_at` and `deadline_at` times.

    `input` is JSON text. At most one of `delay` and `wake_at` is given, and of `deadline` and `deadline_at`. A tuple,
    because many are started at once: a frozen dataclass of so many fields takes five times as long to make.
    """

    id: UUID
    name: str
    input: str
    queue: str
    priority: int = 0
    key: str | None = None
    delay: float | None = None
    wake_at: datetime | None = None
    parent_id: UUID | None = None
    parent_key: str | None = None
    detached: bool = False
    timeout: float | None = None
    deadline: float | None = None
    deadline_at: datetime | None = None
    version: str | None = None
    schedule: str | None = None
    by: str | None = None
    tags: dict[str, str] | None = None
    headers: dict[str, str] | None = None


class KeyRule(NamedTuple):
    """How long a key is taken by the workflow that has it, and what a start does that finds it taken.

    Without a rule a key is taken for ever, and a start returns the workflow that has it. `unique` is "forever",
    "unfinished", "unstarted", or "period": then it is taken for `period` seconds from that one's start. Where the start
    is to "replace" what it finds, that one becomes due at most `longest_wait` seconds after its own start, and is
    replaced no more from then on.
    """

    on_conflict: str
    unique: str
    period: float | None = None
    longest_wait: float | None = None


@dataclass(frozen=True, slots=True)
class WorkflowState:
    """The state of a workflow; with an outcome, `output` is JSON text, or `error` a JSON object."""

    workflow_id: UUID
    name: str
    status: WorkflowStatus
    output: str | None
    error: dict[str, Any] | None


class Verdict(Enum):
    """The result of a fenced write: LOST means that the attempt no longer owns the workflow."""

    RECORDED = auto()
    DUPLICATE = auto()
    LOST = auto()
