"""What is compared: everything that two undisturbed workflows have in common."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sqla_durable.models.base import WorkflowStatus
from sqla_durable.testing import CrashTestError, EndState
from sqla_durable.testing.end_states import Reference


def end(output: Any, **changes: Any) -> EndState:
    state = EndState(
        domain=[("entry", 1)],
        status=WorkflowStatus.SUCCEEDED,
        error=None,
        steps={"charge": "succeeded"},
        values={"output": output},
    )
    return replace(state, **changes)


ONE = end({"order": 1, "charges": 1, "lines": [{"id": 7, "cents": 5}]})
OTHER = end({"order": 2, "charges": 1, "lines": [{"id": 8, "cents": 5}]})


def test_what_belongs_to_one_workflow_is_not_compared() -> None:
    found = end({"order": 3, "charges": 1, "lines": [{"id": 9, "cents": 5}]})
    assert Reference(ONE, OTHER).difference(found, name="killed") == ""


@pytest.mark.parametrize(
    "found",
    [
        end({"order": 3, "charges": 2, "lines": [{"id": 9, "cents": 5}]}),
        end({"order": 3, "charges": True, "lines": [{"id": 9, "cents": 5}]}),
        end({"order": 3, "charges": 1, "lines": [{"id": 9, "cents": 6}]}),
        end({"order": 3, "charges": 1, "lines": []}),
        end({"order": 3, "charges": 1}),
        end({"order": 3, "charges": 1, "lines": [{"id": 9, "cents": 5}], "more": None}),
        end(None),
        replace(OTHER, domain=[("entry", 1), ("entry", 1)]),
        replace(OTHER, status=WorkflowStatus.FAILED),
        replace(OTHER, error="builtins:ValueError"),
        replace(OTHER, steps={}),
        replace(OTHER, steps={"charge": "failed builtins:ValueError"}),
    ],
)
def test_everything_else_is(found: EndState) -> None:
    difference = Reference(ONE, OTHER).difference(found, name="killed")
    assert difference.startswith("--- undisturbed\n+++ killed")


@pytest.mark.parametrize(
    "other", [replace(OTHER, domain=[]), replace(OTHER, steps={}), replace(OTHER, status=WorkflowStatus.FAILED)]
)
def test_two_undisturbed_workflows_must_agree(other: EndState) -> None:
    with pytest.raises(CrashTestError, match=r"(?s)two undisturbed workflows ended differently.*--- one\n"):
        Reference(ONE, other)
