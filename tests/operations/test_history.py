"""What today's code visits, beside what was recorded by the code of earlier deploys."""

from __future__ import annotations

from uuid import UUID

import pytest

from sqla_durable.models.base import StepStatus
from sqla_durable.operations.attempt import Attempt
from sqla_durable.operations.history import PATCH
from sqla_durable.operations.workflow import patched
from sqla_durable.store import Claimed, Fence, Recorded

FENCE = Fence(UUID(int=7), UUID(int=8))


class Deploys:
    """A workflow whose code changes, from attempt to attempt; everything that is visited is recorded."""

    def __init__(self) -> None:
        self.history: dict[str, Recorded] = {}

    def attempt(self, code: str, *, recording: bool = True) -> Attempt:
        """Visit the steps of today's code; a name with `?` asks for that patch."""
        attempt = Attempt(Claimed(FENCE, "ship", 1, "{}", history=dict(self.history)))
        for name in code.split():
            if name.endswith("?"):
                _, marker = patched(attempt, name[:-1])
                if marker is not None:
                    self._record(marker.key, PATCH, marker.position)
            else:
                position = attempt.begin_call(name.rpartition("/")[2], name)
                if recording:
                    self._record(position.key, position.name, position.number)
        return attempt

    def _record(self, key: str, name: str, place: int) -> None:
        self.history.setdefault(key, Recorded(key, name, place, StepStatus.SUCCEEDED, "null", None))

    @property
    def places(self) -> dict[str, int]:
        return {key: each.position for key, each in self.history.items()}


@pytest.fixture
def deploys() -> Deploys:
    return Deploys()


def test_places_count_up_from_one(deploys: Deploys) -> None:
    deploys.attempt("a b a c")
    assert deploys.places == {"a": 1, "b": 2, "a#2": 3, "c": 4}
    assert deploys.attempt("a b a c").history_check.mismatch() is None


def test_new_workflow_has_no_mismatch(deploys: Deploys) -> None:
    assert deploys.attempt("a b c").history_check.mismatch() is None


def test_step_that_is_removed_is_named(deploys: Deploys) -> None:
    deploys.attempt("a old b")
    mismatch = deploys.attempt("a b c").history_check.mismatch()
    assert mismatch is not None
    assert mismatch.not_visited == ("old",)
    assert mismatch.moved == ()
    assert str(mismatch) == "recorded and not visited: 'old'\n  recorded: 'a', 'old', 'b'\n  visited:  'a', 'b', 'c'"
    assert deploys.places["c"] == 4


def test_places_after_a_removed_step_go_on_from_what_is_recorded(deploys: Deploys) -> None:
    deploys.attempt("a old1 old2 old3 b")
    deploys.attempt("a b c d")
    mismatch = deploys.attempt("a b c d").history_check.mismatch()
    assert mismatch is not None
    assert (mismatch.not_visited, mismatch.moved) == (("old1", "old2", "old3"), ())


@pytest.mark.parametrize("second", ["a x1 x2 x3 b c", "x1 x2 x3 a b c", "a x1 b x2 x3 x4 c", "a b c x1"])
def test_steps_that_are_added_are_no_mismatch_then_or_later(deploys: Deploys, second: str) -> None:
    deploys.attempt("a b c")
    for code in (second, second, f"{second} d", f"y {second} d", f"y {second} z d"):
        assert deploys.attempt(code).history_check.mismatch() is None, code


@pytest.mark.parametrize(
    ("second", "moved"),
    [("a c b d", ("b",)), ("b a c d", ("a",)), ("d c b a", ("c", "b", "a")), ("c d a b", ("a",))],
)
def test_steps_that_are_visited_in_another_order_are_named(
    deploys: Deploys, second: str, moved: tuple[str, ...]
) -> None:
    deploys.attempt("a b c d")
    mismatch = deploys.attempt(second).history_check.mismatch()
    assert mismatch is not None
    assert (mismatch.not_visited, mismatch.moved) == ((), moved)
    assert "visited in another order than recorded: " in str(mismatch)


def test_key_that_another_step_has_recorded_is_named() -> None:
    history = {"deposit": Recorded("deposit", "charge", 1, StepStatus.SUCCEEDED, "1", None)}
    attempt = Attempt(Claimed(FENCE, "ship", 1, "{}", history=history))
    attempt.begin_call("refund", "refund", key="deposit")
    mismatch = attempt.history_check.mismatch()
    assert mismatch is not None
    assert mismatch.renamed == (("deposit", "charge", "refund"),)
    assert str(mismatch).startswith("'deposit' was recorded by step 'charge' and is now 'refund'\n")


def test_step_that_waits_or_is_tried_again_and_is_not_visited_is_named() -> None:
    history = {"a": Recorded("a", "a", 1, StepStatus.RETRYING, None, None)}
    mismatch = Attempt(Claimed(FENCE, "ship", 1, "{}", history=history)).history_check.mismatch()
    assert mismatch is not None
    assert mismatch.not_visited == ("a",)


def test_order_among_parallel_branches_is_nobodys_business() -> None:
    keys = ("1/a", "2/a", "1/b", "2/b")
    history = {key: Recorded(key, "a", place, StepStatus.SUCCEEDED, "1", None) for place, key in enumerate(keys, 1)}
    attempt = Attempt(Claimed(FENCE, "ship", 1, "{}", history=history))
    for key in ("2/a", "2/b", "1/a", "1/b"):
        attempt.history_check.add_call(key, "a")
    assert attempt.history_check.mismatch() is None


def test_many_keys_are_shown_shortened(deploys: Deploys) -> None:
    deploys.attempt(" ".join(["a"] * 120))
    mismatch = deploys.attempt("").history_check.mismatch()
    assert "'a#100' and 20 more" in str(mismatch)


def test_patch_is_for_workflows_that_have_not_passed_it(deploys: Deploys) -> None:
    deploys.attempt("a b")
    before, after = deploys.attempt("a p?"), deploys.attempt("a b p?")
    assert not before.history_check.patched("p").is_new
    assert after.history_check.patched("p").is_new
    assert deploys.places == {"a": 1, "b": 2, f"{PATCH}/p": 3}


def test_patch_is_decided_once(deploys: Deploys) -> None:
    attempt = deploys.attempt("a p? b p? c p?")
    assert list(deploys.history) == ["a", f"{PATCH}/p", "b", "c"]
    assert attempt.history_check.mismatch() is None
    again = deploys.attempt("a")
    assert again.history_check.patched("p").is_new
    assert again.history_check.patched("p").key is None


def test_old_way_stays_the_old_way_when_its_history_is_visited(deploys: Deploys) -> None:
    deploys.attempt("a b")
    attempt = deploys.attempt("a")
    assert not attempt.history_check.patched("p").is_new
    attempt.begin_call("b", "b")
    assert not attempt.history_check.patched("p").is_new


def test_marker_that_no_code_asks_for_any_more_is_no_mismatch_and_no_evidence(deploys: Deploys) -> None:
    deploys.attempt("a p? b")
    attempt = deploys.attempt("a b")
    assert attempt.history_check.mismatch() is None
    assert attempt.history_check.patched("q").is_new
