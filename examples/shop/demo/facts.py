"""Facts about a run, as multisets of plain tuples: what happened twice is seen as well as what never happened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
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


def settled(facts: Facts, called_off: Collection[str]) -> Facts:
    """Strike out what these orders did and undid, once each, and their steps: how many depends on the moment.

    What they did and did not undo, or undid and had not done, or did twice, is left.
    """
    left = {kind: Counter(counter) for kind, counter in facts.items()}
    for kind, back in (("stock movement", "stock movement"), ("payment", "refund"), ("charge", "refund booked")):
        for done in facts[kind]:
            undone = (*done[:-1], -int(done[-1] or 0)) if kind == back else done
            if done[0] in called_off and left[back][undone] and (kind != back or int(done[-1] or 0) < 0):
                left[kind][done] -= 1
                left[back][undone] -= 1
    left["steps"] = Counter({fact: count for fact, count in facts["steps"].items() if fact[0] not in called_off})
    return {kind: +counter for kind, counter in left.items()}


def _described(what: str, facts: Counter[Fact]) -> list[str]:
    if not facts:
        return []
    examples = ", ".join(str(each) for each in sorted(facts.elements(), key=str)[:_SHOWN])
    return [f"{what} {facts.total()}, such as {examples}"]
