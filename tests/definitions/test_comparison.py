"""What went into JSON and what came out of it, compared part by part."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum
from typing import Any, NamedTuple
from uuid import UUID

import pytest
from pydantic import BaseModel, ConfigDict, PrivateAttr

from sqla_durable.definitions.comparison import annotation_for, difference


@dataclass(eq=False)
class Node:
    """Equal to itself only, if `==` is asked."""

    name: str
    below: list[Node] = field(default_factory=list["Node"])
    cache: dict[str, int] = field(default_factory=dict[str, int], init=False, compare=False)


class Model(BaseModel):
    model_config = ConfigDict(extra="allow")
    number: int = 0
    _token: object = PrivateAttr(None)

    def __eq__(self, other: object) -> bool:
        raise AssertionError("nobody asks")

    def __hash__(self) -> int:
        return 1


class Place(NamedTuple):
    x: Any
    y: Any


class Plain:
    def __init__(self, size: int) -> None:
        self.size = size


class Slotted:
    __slots__ = ("size",)

    def __init__(self, size: int) -> None:
        self.size = size


class Array:
    """Compares element by element, and has no truth."""

    def __init__(self, *elements: int) -> None:
        self.elements = elements

    def __eq__(self, other: object) -> Any:
        assert isinstance(other, Array)
        return Verdicts([a == b for a, b in zip(self.elements, other.elements, strict=True)])

    __hash__ = None  # type: ignore[assignment]


class Verdicts(list[bool]):
    def __bool__(self) -> bool:
        raise ValueError("the truth of several is ambiguous")

    def all(self) -> bool:
        return all(list(self))


class Silent:
    """Has no equality that works."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __eq__(self, other: object) -> bool:
        raise TypeError("cannot be compared")

    def __hash__(self) -> int:
        return 1


class Colour(Enum):
    RED = 1
    BLUE = 2


class Moment(datetime):
    """As drivers and test tools have them."""


class Id(UUID):
    """Likewise."""


def with_token(token: object) -> Model:
    model = Model()
    model._token = token  # pyright: ignore[reportPrivateUsage]
    return model


def cached(name: str) -> Node:
    node = Node(name)
    node.cache["seen"] = 1
    return node


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (float("nan"), float("nan")),
        (1, 1.0),
        (1e22, 10**22),
        (Moment(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 1, tzinfo=UTC)),
        (Id(int=7), UUID(int=7)),
        (defaultdict(int, a=1), {"a": 1}),
        ([OrderedDict[str, int](a=1), Counter("a")], [{"a": 1}, {"a": 1}]),
        ({"b": 1, "a": 2}, {"a": 2, "b": 1}),
        (Node("a", [Node("b")]), Node("a", [Node("b")])),
        (cached("a"), Node("a")),
        ({Node("a"), Node("b")}, {Node("b"), Node("a")}),
        (Model.model_validate({"more": [1]}), Model.model_validate({"more": [1]})),
        (with_token(threading.Lock()), with_token(threading.Lock())),
        (deque([1, 2]), deque([1, 2])),
        (Place(1, [2]), Place(1, [2])),
        (Plain(1), Plain(1)),
        (Slotted(1), Slotted(1)),
        (Silent(1), Silent(1)),
        (Array(1, 2), Array(1, 2)),
        (Colour.RED, Colour.RED),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_the_same_in_structure_is_the_same(given: Any, kept: Any) -> None:
    assert difference(given, kept) is None


@pytest.mark.parametrize(
    ("given", "kept", "path"),
    [
        (1, True, ""),
        (1.0, 1, ""),
        (1, "1", ""),
        (2**53 + 1, float(2**53), ""),
        (Decimal("1.0"), "1.0", ""),
        (b"a", "a", ""),
        ((1,), [1], ""),
        ({1}, frozenset({1}), ""),
        ([1], [1, 2], ""),
        (datetime(2026, 1, 1, 1, tzinfo=timezone(timedelta(hours=1))), datetime(2026, 1, 1, tzinfo=UTC), ""),
        (datetime(2026, 1, 1), date(2026, 1, 1), ""),
        ({"a": [1, {"b": 1}]}, {"a": [1, {"b": 1.5}]}, "a[1].b"),
        ({1: "a"}, {"1": "a"}, "[key 0]"),
        ({1: "a"}, {True: "a"}, "[key 0]"),
        ({1}, {True}, "[element]"),
        (Node("a", [Node("b")]), Node("a", [Node("c")]), "below[0].name"),
        ({Node("a")}, {Node("b")}, "[element]"),
        (Model(number=1), Model(number=2), "number"),
        (Model.model_validate({"more": 1}), Model.model_validate({"more": "1"}), "more"),
        (with_token(1), with_token(None), "_token"),
        (Place(1, 2), Place(1, "2"), "y"),
        (Place(1, 2), (1, 2), ""),
        (Plain(1), Plain(2), "size"),
        (Slotted(1), Slotted(2), "size"),
        (Silent(1), Silent(2), "size"),
        (Array(1, 2), Array(1, 3), ""),
        (Colour.RED, Colour.BLUE, ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_differs_is_found_where_it_is(given: Any, kept: Any, path: str) -> None:
    found = difference(given, kept)
    assert found is not None
    assert found.path == path


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (Decimal(1), "Decimal"),
        ({}, "dict[str, int]"),
        ({"a": Decimal(1), "b": None}, "dict[str, Decimal | None]"),
        ({1: [Node("a")]}, "dict[int, list[Node]]"),
        ((1, "a"), "tuple[int | str, ...]"),
        ([1, "a", None, 1.5], "list[int | str | None | ...]"),
        ((), "tuple[int, ...]"),
    ],
)
def test_annotation_is_proposed_by_the_types_of_a_value(value: object, annotation: str) -> None:
    assert annotation_for(value) == annotation
