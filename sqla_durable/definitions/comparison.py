"""Whether a value is the same after encoding and decoding, part by part, and where it is not.

Structure is compared, and not `__eq__`: dataclasses, models, named tuples and containers by their parts, however they
define equality. Types count: `1`, `1.0` and `True` are three values. Nothing here shows a value.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import lru_cache, partial
from typing import Any, TypeAlias, cast
from uuid import UUID

from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.definitions.libraries import pydantic

_SHOWN = 100  # characters of a key in a path
_KINDS = 3  # of elements, in a proposed annotation
_CLASSES = 512  # in the cache of comparisons
_ABSENT = object()

_Comparison: TypeAlias = Callable[[Any, Any], "Difference | None"]

_ATOMS = frozenset({type(None), bool, int, str, bytes, Decimal, UUID, date, timedelta})
"""Types whose values are the same if they are equal."""

_BASES = (datetime, date, time, timedelta, Decimal, UUID)
"""Classes that are read back in place of their subclasses, which drivers and test tools define. Unlike texts and
numbers, they are read only where an annotation names them."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A part of a value that is different after encoding and decoding.

    Attributes:
        path: where it is, such as `cards[2].number`; "" for the value itself.
        given: the part that went in.
        kept: the part that came out.
    """

    path: str
    given: object
    kept: object

    def below(self, place: str) -> Difference:
        """Return the same difference, with its path below a place."""
        return Difference(joined_path(place, self.path), self.given, self.kept)


def joined_path(place: str, path: str) -> str:
    """Return the path of a part below a place: `cards[2].number`."""
    joint = "." if place and path and path[0] != "[" else ""
    return f"{place}{joint}{path}"


def difference(given: Any, kept: Any) -> Difference | None:
    """Return the first part that differs between a value and what is read of it; None if all is the same.

    Raises:
        RecursionError: the value is nested too deeply.
    """
    if given is kept:
        return None
    kind = cast("type[object]", type(given))
    if kind is not type(kept):
        return _between_types(given, kept)
    if kind in _ATOMS:
        return None if given == kept else Difference("", given, kept)
    return _comparison_of(kind)(given, kept)


def annotation_for(value: object) -> str:
    """Return an annotation that fits a value: `dict[str, Decimal]`."""
    kind = type(value)
    if value is None:
        return "None"
    if kind is dict:
        mapping = cast("dict[object, object]", value)
        return f"dict[{_kinds(mapping)}, {_kinds(mapping.values())}]" if mapping else "dict[str, int]"
    if kind in (list, set, frozenset, tuple):
        elements = cast("Collection[object]", value)
        return f"{kind.__name__}[{_kinds(elements) if elements else 'int'}{', ...' if kind is tuple else ''}]"
    return kind.__name__


def _kinds(values: Iterable[object]) -> str:
    found = list(dict.fromkeys(annotation_for(each) for each in values))
    return " | ".join(found[:_KINDS]) + (" | ..." if len(found) > _KINDS else "")


def _unless(same: bool, given: object, kept: object) -> Difference | None:
    return None if same else Difference("", given, kept)


def _between_types(given: Any, kept: Any) -> Difference | None:
    """Compare two values of different types, a few of which are equivalent."""
    kinds = cast("type[object]", type(given)), cast("type[object]", type(kept))
    if kinds == (int, float):  # an int is accepted where float is annotated
        return _unless(given == kept, given, kept)
    if kinds == (float, int):  # `numeric` writes 1e22 as 10000000000000000000000
        return _unless("e+" in repr(given) and given == kept, given, kept)
    if kinds[1] in (dict, list) and issubclass(kinds[0], kinds[1]) and not _has_attributes(given):
        return _comparison_of(kinds[1])(given, kept)
    base = next((each for each in kinds[0].__mro__ if each in _BASES), None)
    return _of_dates(given, kept) if base is kinds[1] else Difference("", given, kept)


def _has_attributes(value: object) -> bool:
    """Return whether a container has attributes; the type parameters of `OrderedDict[str, int]()` do not count."""
    contained: Iterable[str] = getattr(value, "__dict__", ())
    return any(name != "__orig_class__" for name in contained)


def _find_comparison(kind: type[Any]) -> _Comparison:
    if kind in (datetime, time):
        return _of_dates
    if kind is float:
        return _of_floats
    if issubclass(kind, Enum):
        return _of_members
    if issubclass(kind, pydantic.BaseModel):
        return partial(_of_models, list(kind.model_fields))
    if is_dataclass(kind):
        # A field that is neither an argument nor compared is internal to the object, such as a cache.
        return partial(_of_attributes, [each.name for each in fields(kind) if each.init or each.compare])
    if issubclass(kind, Mapping):
        return _of_mappings
    if issubclass(kind, AbstractSet):
        return _of_sets
    if issubclass(kind, tuple) and hasattr(cast("type[object]", kind), "_fields"):
        return _of_named_tuples
    if issubclass(kind, (tuple, list, deque)):
        return _of_sequences
    return _of_objects


_comparison_of = cast("Callable[[type], _Comparison]", lru_cache(maxsize=_CLASSES)(_find_comparison))


def _of_members(given: Enum, kept: Enum) -> Difference | None:
    return _unless(given == kept, given, kept)


def _of_dates(given: Any, kept: Any) -> Difference | None:
    same = given == kept
    if same and isinstance(given, datetime):
        same = given.utcoffset() == kept.utcoffset()
    return _unless(same, given, kept)


def _of_floats(given: float, kept: float) -> Difference | None:
    return _unless(given == kept or (given != given and kept != kept), given, kept)


def _of_sequences(given: Collection[Any], kept: Collection[Any]) -> Difference | None:
    if len(given) != len(kept):
        return Difference("", given, kept)
    for number, (one, other) in enumerate(zip(given, kept, strict=True)):
        if one is not other and (found := difference(one, other)) is not None:
            return found.below(f"[{number}]")
    return None


def _of_named_tuples(given: Any, kept: Any) -> Difference | None:
    return _of_attributes(given._fields, given, kept)


def _of_mappings(given: Mapping[Any, Any], kept: Mapping[Any, Any]) -> Difference | None:
    if len(given) != len(kept):
        return Difference("", given, kept)
    keys = None if all(type(key) is str for key in kept) else {key: key for key in kept}
    for number, (key, value) in enumerate(given.items()):
        other = kept.get(key, _ABSENT)
        same_key = type(key) is str if keys is None else difference(key, keys.get(key, _ABSENT)) is None
        if other is _ABSENT or not same_key:
            return _of_keys(number, key, kept)
        if value is not other and (found := difference(value, other)) is not None:
            return found.below(str(key)[:_SHOWN])
    return None


def _of_keys(number: int, key: object, kept: Iterable[object]) -> Difference:
    """Return the difference of a key that is missing: from the key that its text became, if that is there."""
    found = next((each for each in kept if each == key or each == str(key)), _ABSENT)
    return Difference(f"[key {number}]", key, found)


def _of_sets(given: AbstractSet[Any], kept: AbstractSet[Any]) -> Difference | None:
    """Compare sets: by equality, and elements that are equal only to themselves by their structure."""
    if len(given) != len(kept):
        return Difference("", given, kept)
    same = {each: each for each in kept}
    left = [each for each in given if difference(each, same.get(each, _ABSENT)) is not None]
    others = [each for each in kept if each not in given] if left else []
    for each in left:
        match = next((other for other in others if difference(each, other) is None), _ABSENT)
        if match is _ABSENT:
            return Difference("[element]", each, next(iter(others), _ABSENT))
        others.remove(match)
    return None


def _of_models(names: list[str], given: pydantic.BaseModel, kept: pydantic.BaseModel) -> Difference | None:
    return (
        _of_attributes(names, given, kept)
        or _of_mappings(given.__pydantic_extra__ or {}, kept.__pydantic_extra__ or {})
        or _of_mappings(given.__pydantic_private__ or {}, kept.__pydantic_private__ or {})
    )


def _of_objects(given: Any, kept: Any) -> Difference | None:
    """Compare two objects by the equality of their class, or by their attributes where it defines none."""
    if not _is_by_identity(given):
        try:
            return _unless(_is_true(given == kept), given, kept)
        except Exception:  # noqa: S110 (a comparison that fails decides nothing)
            pass
    # Objects without attributes, such as locks, count as the same.
    return _of_mappings(getattr(given, "__dict__", {}), getattr(kept, "__dict__", {})) or _of_slots(given, kept)


def _is_by_identity(value: object) -> bool:
    return cast("Any", type(value)).__eq__ is object.__eq__


def _is_true(found: Any) -> bool:
    """Return the result of a comparison; that of arrays and frames has one for each element."""
    for _ in range(2):
        found = found.all() if hasattr(found, "all") else found
    return bool(found)


def _of_slots(given: Any, kept: Any) -> Difference | None:
    slots = [getattr(each, "__slots__", ()) for each in type(given).__mro__]
    names = [name for each in slots for name in ([each] if isinstance(each, str) else each)]
    return _of_attributes([each for each in names if not each.startswith("__")], given, kept)


def _of_attributes(names: Iterable[str], given: Any, kept: Any) -> Difference | None:
    for name in names:
        one, other = getattr(given, name, _ABSENT), getattr(kept, name, _ABSENT)
        if one is not other and (found := difference(one, other)) is not None:
            return found.below(name)
    return None
