"""Values of the engine behave as those of Python's frozen dataclasses, except that nothing refuses an assignment."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from dataclasses import field, fields, replace
from typing import Any

import pytest

from sqla_durable.definitions.dataclass import dataclass


@dataclass(frozen=True, slots=True)
class Ours:
    """A value made with ours."""

    key: str
    number: int = 1
    seen: list[int] = field(default_factory=list[int], compare=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Theirs:
    """The same made with Python's."""

    key: str
    number: int = 1
    seen: list[int] = field(default_factory=list[int], compare=False)


@dataclass(slots=True)
class Mutable:
    """A value that changes."""

    count: int = 0


@pytest.mark.parametrize("kind", [Ours, Theirs])
def test_values_are_equal_if_their_fields_are(kind: type[Any]) -> None:
    assert kind("a") == kind("a", 1)
    assert kind("a") != kind("a", 2)
    assert kind("a", seen=[1]) == kind("a", seen=[2])
    assert hash(kind("a", seen=[1])) == hash(kind("a", seen=[2]))
    assert len({kind("a"), kind("a"), kind("b")}) == 2
    other: object = Theirs("a")
    assert Ours("a") != other


def test_their_text_shows_all_fields() -> None:
    assert repr(Ours("a", 2, [3])) == repr(Theirs("a", 2, [3])).replace("Theirs", "Ours")


def test_they_are_replaced_copied_pickled_and_matched() -> None:
    value = Ours("a", 2, [3])
    assert replace(value, key="b") == Ours("b", 2)
    assert [each.name for each in fields(value)] == ["key", "number", "seen"]
    assert copy.deepcopy(value).seen == [3]
    assert pickle.loads(pickle.dumps(value)) == value
    match value:
        case Ours("a", number):
            assert number == 2
        case _:
            pytest.fail("no match")
    assert not hasattr(value, "__dict__")


def test_a_value_that_changes_has_no_hash() -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(Mutable())
