"""JSON text as PostgreSQL's `jsonb` keeps it: what it cannot hold is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from decimal import Decimal
from math import isfinite
from typing import TYPE_CHECKING, Any, TypeGuard, cast

from pydantic import BaseModel

from sqla_durable.definitions.comparison import joined_path
from sqla_durable.definitions.redaction import without_values
from sqla_durable.errors import EncodingError, PayloadTooLargeError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

DEFAULT_LIMIT = 1024 * 1024
"""The default limit of one payload: 1 MiB of UTF-8 JSON."""

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_DEPTH = 50  # of values in values, where one is looked for
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


def dump(plain: Any, *, what: str, limit: int = DEFAULT_LIMIT) -> str:
    """Return the JSON text of JSON values in the form that PostgreSQL's `jsonb` stores; refuse what it cannot store.

    Source: PostgreSQL manual, 8.14.1 (no NUL, no lone surrogates, numbers as `numeric`) and 8.14.4 (order of keys).
    """
    try:
        text = _ENCODER.encode(_as_jsonb(plain))
        size = len(text.encode())
    except UnicodeEncodeError as error:
        del error  # its message shows the text
        raise EncodingError(f"the {what} cannot be stored: lone surrogate{_at(plain, _has_surrogate)}.") from None
    except (TypeError, ValueError, RecursionError) as error:
        reason = without_values(str(error))
        raise EncodingError(f"the {what} cannot be stored: {reason}{_at(plain, _is_not_finite)}.") from None
    if "\\u0000" in text and _NUL.search(text):
        raise EncodingError(f"the {what} cannot be stored: PostgreSQL stores no NUL character{_at(plain, _has_nul)}.")
    refuse_large(size, what=what, limit=limit)
    return text


def refuse_large(size: int, *, what: str, limit: int) -> None:
    """Refuse a payload that is larger than the limit; both are in bytes."""
    if size > limit:
        raise PayloadTooLargeError(
            f"the {what} is {size:,} bytes of JSON, over the limit of {limit:,}. Store it in a table or a file and "
            "pass its key, or raise Durable(payload_limit=...).",
            size=size,
            limit=limit,
        )


def _as_jsonb(value: Any) -> Any:
    match value:
        case dict():
            mapping = cast("dict[str, Any]", value)
            keys = sorted(mapping, key=_key_order) if len(mapping) > 1 else mapping
            return {key: _as_jsonb(mapping[key]) for key in keys}
        case list() | tuple():
            return [_as_jsonb(inner) for inner in cast("list[Any]", value)]
        case float():
            return _as_numeric(value)
        case _:
            return value


def _key_order(key: str) -> tuple[int, bytes]:
    encoded = key.encode()
    return len(encoded), encoded


def _as_numeric(value: float) -> float | int:
    """Return a float as `numeric` prints it: no exponent, so 1e22 is read as an integer, and no negative zero."""
    if value == 0:
        return 0.0
    return int(Decimal(repr(value))) if "e+" in repr(value) else value


def path_to(value: object, wanted: Callable[[object], bool], *, depth: int = _DEPTH) -> str | None:
    """Return where in a value something is, such as `cards[2].number`; "" for the value itself, None for nowhere."""
    if wanted(value):
        return ""
    if depth:
        for place, inner in inner_values(value):
            path = path_to(inner, wanted, depth=depth - 1)
            if path is not None:
                return joined_path(place, path)
    return None


def inner_values(value: object) -> Iterable[tuple[str, object]]:
    """Return the parts of a container, a model or a dataclass, each with its place: `cards` or `[2]`."""
    if isinstance(value, Mapping):
        mapping = cast("Mapping[object, object]", value)
        return [*elements_of(mapping), *((f"[{number}]", key) for number, key in enumerate(mapping))]
    if isinstance(value, (list, tuple, set, frozenset)):
        return elements_of(cast("Iterable[object]", value))
    if isinstance(value, BaseModel):
        return [*value.__dict__.items(), *(value.__pydantic_extra__ or {}).items()]
    return (
        [(each.name, getattr(value, each.name, None)) for each in fields(value)] if is_dataclass_instance(value) else []
    )


def elements_of(value: Iterable[object]) -> Iterable[tuple[str, object]]:
    """Return the elements of a container, or the values of a mapping, each with its place."""
    if isinstance(value, Mapping):
        return [(str(key)[:100], inner) for key, inner in cast("Mapping[object, object]", value).items()]
    return [(f"[{number}]", inner) for number, inner in enumerate(value)]


def is_dataclass_instance(value: object) -> TypeGuard[DataclassInstance]:
    """Return whether a value is an instance of a dataclass, and not the class itself."""
    return is_dataclass(value) and not isinstance(value, type)


def _has_surrogate(value: object) -> bool:
    return isinstance(value, str) and any("\ud800" <= each <= "\udfff" for each in value)


def _has_nul(value: object) -> bool:
    return isinstance(value, str) and "\0" in value


def _is_not_finite(value: object) -> bool:
    return isinstance(value, float) and not isfinite(value)


def _at(plain: object, wanted: Callable[[object], bool]) -> str:
    path = path_to(plain, wanted)
    return f" in {path}" if path else ""
