"""What must be the same wherever a worker was killed: how a workflow ended, and how two ends differ.

```
AssertionError
└── CrashDifference           a crash changed how a workflow ends
DurableError
└── CrashTestError            the test cannot be executed as it was given
    └── CrashTimeoutError         (also TimeoutError) a workflow did not end in time
```
"""

from __future__ import annotations

import difflib
import pprint
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias
from uuid import UUID

from sqlalchemy.orm import Session

from sqla_durable.definitions.revealing import fields_of, revealed
from sqla_durable.errors import DurableError
from sqla_durable.models import Step, Workflow
from sqla_durable.models.base import WorkflowStatus
from sqla_durable.testing.crash_points import CrashPoint


class CrashTestError(DurableError):
    """The test cannot be executed as it was given; the message says what to change."""


class CrashTimeoutError(CrashTestError, TimeoutError):
    """A workflow did not end in time, undisturbed or after it was reclaimed."""


@dataclass(frozen=True, slots=True)
class EndState:
    """How one workflow ended.

    Attributes:
        domain: what the test's own `end_state` returned.
        status: the workflow's status.
        error: the type of its error, or None.
        steps: the status of each of its steps by key, with the type of its error.
        values: the workflow's `output`, and that of each step by key.
    """

    domain: object
    status: WorkflowStatus
    error: str | None
    steps: dict[str, str]
    values: dict[str, Json]

    @classmethod
    def of(cls, session: Session, workflow: Workflow, domain: Callable[[Session, Workflow], object]) -> EndState:
        """Return how the workflow ended, read in a session that has loaded nothing before."""
        return cls(
            domain=domain(session, workflow),
            status=workflow.status,
            error=_type_of(workflow.error),
            steps={each.key: _shown(each) for each in sorted(workflow.steps, key=lambda step: step.key)},
            values={"output": revealed(workflow.output, ["result"])} | dict(map(_value, workflow.steps)),
        )


def _value(step: Step) -> tuple[str, Json]:
    return f"step {step.key}", revealed(step.output, fields_of("output", step.key, step.name))


class CrashDifference(AssertionError):
    """A workflow whose worker was killed ended differently than an undisturbed one.

    Attributes:
        point: where the worker was killed; None where a workflow differs from others although none was.
        workflow_id: the id of the workflow's record.
        expected: how an undisturbed workflow ended.
        found: how this one did.
        diff: the lines that differ, from `difflib.unified_diff`.
    """

    def __init__(
        self,
        message: str,
        *,
        point: CrashPoint | None,
        workflow_id: UUID,
        expected: EndState,
        found: EndState,
        diff: str,
    ) -> None:
        super().__init__(message)
        self.point = point
        self.workflow_id = workflow_id
        self.expected = expected
        self.found = found
        self.diff = diff


class Reference:
    """How workflows end undisturbed.

    Taken from two of them, because results may contain what belongs to one workflow only, such as the id of its order:
    where the outputs of the two differ, those of others are not compared.

    Raises:
        CrashTestError: the two differ in anything else.
    """

    def __init__(self, one: EndState, other: EndState) -> None:
        if _compared(one) != _compared(other):
            raise CrashTestError(
                "two undisturbed workflows ended differently, so the effect of a crash cannot be seen. Leave out of "
                "end_state what belongs to one workflow only, such as ids and times, and let it return plain "
                "comparable values; a workflow must execute the same steps each time.\n"
                f"{_diff(_compared(one), _compared(other), names=('one', 'the other'))}"
            )
        self.end_state = one
        self._values = _common(one.values, other.values)

    def difference(self, found: EndState, *, name: str) -> str:
        """Return the lines in which a workflow's end differs; empty if it is the same."""
        ours = {**_compared(self.end_state), "values": self._values}
        theirs = {**_compared(found), "values": _masked(found.values, self._values)}
        same = ours == theirs and pprint.pformat(self._values) == pprint.pformat(
            theirs["values"]
        )  # True == 1, and 1 == 1.0
        return "" if same else _diff(ours, theirs, names=("undisturbed", name))


class _Varies:
    """Marks a value in which two undisturbed workflows differ."""

    def __repr__(self) -> str:
        return "<varies>"


_VARIES = _Varies()

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | _Varies | None"


def _compared(state: EndState) -> dict[str, Any]:
    return {"end_state": state.domain, "status": str(state.status), "error": state.error, "steps": state.steps}


def _common(one: Json, other: Json) -> Json:
    """Return what two JSON values have in common, with a mark where they differ."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return {key: _common(value, other[key]) for key, value in one.items()}
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [_common(*each) for each in zip(one, other, strict=True)]
    return one if one == other and type(one) is type(other) else _VARIES


def _masked(value: Json, common: Json) -> Json:
    """Return a JSON value with those parts masked that vary."""
    if common is _VARIES:
        return _VARIES
    if isinstance(value, dict) and isinstance(common, dict):
        return {key: _masked(each, common.get(key)) for key, each in value.items()}
    if isinstance(value, list) and isinstance(common, list) and len(value) == len(common):
        return [_masked(*each) for each in zip(value, common, strict=True)]
    return value


def _diff(ours: object, theirs: object, *, names: tuple[str, str]) -> str:
    before, after = (pprint.pformat(each, width=100).splitlines() for each in (ours, theirs))
    return "\n".join(difflib.unified_diff(before, after, *names, lineterm=""))


def _shown(step: Step) -> str:
    return f"{step.status} {_type_of(step.error)}" if step.error else str(step.status)


def _type_of(error: dict[str, Any] | None) -> str | None:
    return None if error is None else str(error["type"])
