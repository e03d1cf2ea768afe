"""How values become JSON: pydantic's type adapters, built once for each annotation, and text that `jsonb` can keep.

An annotation is refused where no value could be read back, and a text where PostgreSQL cannot hold it. Each adapter
adapts a tuple of one value, because only inside it does the configuration apply to dataclasses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from decimal import Decimal
from enum import Enum
from functools import lru_cache
from math import isfinite
from types import GenericAlias
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, cast, get_args

from sqla_durable.definitions.comparison import joined_path
from sqla_durable.definitions.libraries import pydantic, pydantic_core, pydantic_fields
from sqla_durable.definitions.redaction import without_values
from sqla_durable.errors import DefinitionError, EncodingError, PayloadTooLargeError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from pydantic import ConfigDict


_CONFIG: ConfigDict = {"ser_json_bytes": "base64", "val_json_bytes": "base64", "ser_json_inf_nan": "constants"}
_REVALIDATING: ConfigDict = {**_CONFIG, "revalidate_instances": "always", "extra": "forbid"}
_KEPT = 512  # adapters in the cache: building one takes milliseconds

_NATIVE = (str, int, float, bool, type(None))
_NO_KEYS = {
    "call": "named tuples",
    "dataclass": "dataclasses",
    "dict": "dicts",
    "frozenset": "sets",
    "list": "lists",
    "model": "models",
    "named-tuple": "named tuples",
    "set": "sets",
    "tuple": "tuples",
    "typed-dict": "dicts",
}
_UNRELATED = frozenset({"metadata", "config", "default", "serialization"})

_Schema: TypeAlias = Mapping[str, Any]


MARK = '{"$as"'
"""How the JSON of what `payloads` has encoded begins, here and as `jsonb` returns it: its shortest key comes first."""

DEFAULT_LIMIT = 1024 * 1024
"""The default limit of one payload: 1 MiB of UTF-8 JSON."""

_DEPTH = 50  # of values in values, where one is looked for
_MOST_DIGITS = 4_300  # Python documentation, "Integer string conversion length limitation"
_LONG_NUMBER = re.compile(f"-?[0-9]{{{_MOST_DIGITS}}}")
_UNREADABLE = -(10 ** (_MOST_DIGITS - 1)), 10**_MOST_DIGITS  # older versions of pydantic count the sign, too
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
_ASCII = 0x80
_CHARACTER = re.compile(r"\\(?:u([0-9a-fA-F]{4})|.)|[^\x00-\x7f]", re.DOTALL)


def adapter_of(annotation: Any, what: str, *, revalidating: bool = False) -> pydantic.TypeAdapter[tuple[Any]]:
    """Return the adapter of an annotation.

    Args:
        annotation: the annotation.
        what: the value that has it, for messages.
        revalidating: whether it also validates the contents of instances, and refuses undeclared keys.

    Raises:
        DefinitionError: pydantic cannot encode it as JSON, or its values could not be read back.
    """
    _refuse_mapped(annotation, what)
    try:
        adapter = _kept(_Annotation(annotation), revalidating)
        # An incomplete one refers to a class that was not defined yet: it is built again.
        return adapter if adapter.pydantic_complete else _built(annotation, revalidating)
    except (pydantic.PydanticUserError, NameError, TypeError) as error:
        raise DefinitionError(
            f"{what} is annotated {annotation!r}, which cannot be stored as JSON: {error}. "
            "Annotate it with a dataclass, a pydantic model, or plain values."
        ) from error


def is_mapped(kind: object) -> bool:
    """Return whether a class is mapped by SQLAlchemy's ORM."""
    return isinstance(kind, type) and hasattr(kind, "__mapper__")


class _Annotation:
    """An annotation as a cache key: two are equal if they consist of the same objects in the same order.

    Equality of the annotations is not enough: `A | B` equals `B | A`, which prefers another class, `Annotated[int, 1]`
    equals `Annotated[int, True]`, and some annotations cannot be hashed. The annotation is kept alive here, so that the
    ids in the key are not reused.
    """

    __slots__ = ("_identity", "value")

    def __init__(self, value: Any) -> None:
        self.value = value
        self._identity = _identity(value)

    def __hash__(self) -> int:
        return hash(self._identity)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Annotation) and self._identity == other._identity


@lru_cache(maxsize=_KEPT)
def _kept(annotation: _Annotation, revalidating: bool) -> pydantic.TypeAdapter[tuple[Any]]:
    return _built(annotation.value, revalidating)


def _built(annotation: Any, revalidating: bool) -> pydantic.TypeAdapter[tuple[Any]]:
    wrapped: Any = GenericAlias(tuple, (annotation,))
    adapter: pydantic.TypeAdapter[tuple[Any]] = pydantic.TypeAdapter(
        wrapped, config=_REVALIDATING if revalidating else _CONFIG
    )
    if adapter.pydantic_complete:
        fault = next(_faults(adapter.core_schema), None)
        if fault is not None:
            raise TypeError(fault)
    return adapter


def _identity(value: Any) -> Hashable:
    """Return a key that identifies an annotation or a part of one: a class by its id, a composed one by its parts.

    Constraints are identified by their parts too: an annotation written inside a function is a new object in each call.
    """
    kind = cast("type[object]", type(value))
    if isinstance(value, (str, bytes, int, float)):
        return kind, value
    parts = None if isinstance(value, type) else _parts(value)
    return id(value) if parts is None else (id(kind), *map(_identity, parts))


def _parts(value: Any) -> Iterable[Any] | None:
    match value:
        case tuple() | list() | set() | frozenset():
            return cast("Iterable[Any]", value)
        case dict():
            return list(cast("Any", value).items())
        case pydantic_fields.FieldInfo():
            return [getattr(value, name, None) for name in pydantic_fields.FieldInfo.__slots__]
        case _ if is_dataclass(value):
            return [getattr(value, each.name) for each in fields(value)]
        case _ if isinstance(getattr(value, "__args__", None), tuple):
            return [getattr(value, name, None) for name in ("__origin__", "__args__", "__metadata__")]
        case _:
            return None


def _refuse_mapped(annotation: Any, what: str) -> None:
    if is_mapped(annotation):
        raise DefinitionError(
            f"{what} is annotated with the ORM class {annotation.__name__}: an instance belongs to its session "
            "and cannot be stored. Pass its primary key and load it in the step that needs it."
        )
    for inner in get_args(annotation):
        _refuse_mapped(inner, what)


def _faults(schema: _Schema) -> Iterator[str]:
    """Yield what is wrong with each part of an annotation whose values could not be read back."""
    referred = {each["ref"]: each for each in _schemas_in(schema) if "ref" in each}
    for each in _schemas_in(schema):
        if is_mapped(each.get("cls")):
            yield f"it holds instances of the ORM class {each['cls'].__name__}, which belong to their session"
        match each:
            case {"type": "generator"}:
                yield "an iterator can be read only once, so use list[...]"
            case {"type": "dict", "keys_schema": keys} if (kind := _no_key(keys, referred)) is not None:
                yield f"{kind} as the keys of a dict become texts that cannot be read back, so use a list of pairs"
            case {"type": "enum", "cls": kind, "members": members} if _has_unreadable(kind, members):
                yield f"the enum {kind.__name__} has members that are not text or numbers, which cannot be read back"
            case _:
                pass


def _has_unreadable(kind: type[Enum], members: Iterable[Enum]) -> bool:
    if vars(kind).get("_missing_") is not None:
        return False  # it may read such members itself
    return any(not isinstance(each.value, _NATIVE) for each in members)


def _no_key(schema: _Schema, referred: Mapping[str, _Schema]) -> str | None:
    while "serialization" not in schema and not schema.get("root_model"):
        if schema["type"] in _NO_KEYS:
            return _NO_KEYS[schema["type"]]
        inner = referred.get(schema.get("schema_ref", ""), schema.get("schema"))
        if inner is None:
            return None
        schema = inner
    return None


def _schemas_in(value: Any) -> Iterator[_Schema]:
    if isinstance(value, dict):
        schema = cast("dict[str, Any]", value)
        if isinstance(schema.get("type"), str):
            yield schema
        for name, each in schema.items():
            if name not in _UNRELATED:
                yield from _schemas_in(each)
    elif isinstance(value, (list, tuple)):
        for each in cast("Iterable[Any]", value):
            yield from _schemas_in(each)


def dump(plain: Any, *, what: str, limit: int = DEFAULT_LIMIT) -> str:
    """Return the JSON text of JSON values in the form that PostgreSQL's `jsonb` stores; refuse what it cannot store.

    Source: PostgreSQL manual, 8.14.1 (no NUL, no lone surrogates, numbers as `numeric`) and 8.14.4 (order of keys).
    """
    try:
        encoded = pydantic_core.to_json(_as_jsonb(plain))
    except (TypeError, ValueError, RecursionError) as error:
        if (path := path_to(plain, _has_surrogate)) is not None:  # the message of such an error shows the text
            raise EncodingError(f"the {what} cannot be stored: lone surrogate{_in(path)}.") from None
        reason = without_values(str(error))
        raise EncodingError(f"the {what} cannot be stored: {reason}{_at(plain, _is_not_finite)}.") from None
    text = encoded.decode()
    if "\\u0000" in text and _NUL.search(text):
        raise EncodingError(f"the {what} cannot be stored: PostgreSQL stores no NUL character{_at(plain, _has_nul)}.")
    if text.startswith(MARK):
        raise EncodingError(
            f'the {what} cannot be stored: its first key is "$as", which marks what payloads encode: choose another.'
        )
    if len(encoded) > limit:
        refuse_large(len(encoded), what=what, limit=limit)
    if len(text) >= _MOST_DIGITS and _LONG_NUMBER.search(text) and (path := path_to(plain, _is_unreadable)) is not None:
        raise EncodingError(
            f"the {what} cannot be stored: an integer{_in(path)} has more than {_MOST_DIGITS:,} digits and sign, which "
            "Python does not read."
        )
    return text


def refuse_large(size: int, *, what: str, limit: int) -> None:
    """Refuse a payload that is larger than the limit; both are in bytes."""
    if size > limit:
        raise PayloadTooLargeError(
            f"the {what} is {size:,} bytes of JSON, over the limit of {limit:,}. Write it with "
            "create_blob() and pass the Blob, or raise Durable(payload_limit=...).",
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
    if not isfinite(value):
        raise ValueError("a float that is no number or infinite is not JSON compliant, pass None or a text instead")
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
    if isinstance(value, pydantic.BaseModel):
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


def _is_unreadable(value: object) -> bool:
    return isinstance(value, int) and not _UNREADABLE[0] < value < _UNREADABLE[1]


def _is_not_finite(value: object) -> bool:
    return isinstance(value, float) and not isfinite(value)


def _at(plain: object, wanted: Callable[[object], bool]) -> str:
    return _in(path_to(plain, wanted))


def _in(path: str | None) -> str:
    return f" in {path}" if path else ""


def escaped(text: str) -> str:
    """Return JSON text whose non-ASCII characters are escaped twice, so that readers see ``\\u20ac`` for a euro sign.

    A database whose encoding lacks a character refuses it, as itself and as an escape of JSON.
    """

    def shown(found: re.Match[str]) -> str:
        number = int(found[1], 16) if found[1] else ord(found[0][-1])
        return found[0] if number < _ASCII else f"\\\\u{number:04x}"

    return _CHARACTER.sub(shown, text)
