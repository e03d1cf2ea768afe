"""Facts about a run, as multisets of plain tuples: what happened twice is seen as well as what never happened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TypeAlias

Fact: TypeAlias = tuple[str | int | None, ...]
Facts: TypeAlias = Mapping[str, Counter[Fact]]

_SHOWN = 5


def differences(expected: Facts, actual: Facts) -> list[str]:
    """Name each kind of fact that is not exactly as expected."""
    found: list[str] = []
    for kind in expected.keys() | actual.keys():
        wanted, seen = expected.get(kind, Counter()), actual.get(kind, Counter())
        found += _described(f"{kind}: missing", wanted - seen)
        found += _described(f"{kind}: too many or wrong", seen - wanted)
    return sorted(found)


def _described(what: str, facts: Counter[Fact]) -> list[str]:
    if not facts:
        return []
    examples = ", ".join(str(each) for each in sorted(facts.elements(), key=str)[:_SHOWN])
    return [f"{what} {facts.total()}, such as {examples}"]
