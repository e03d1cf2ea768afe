"""Values on their way to the database and back: JSON, by a function's annotations, with pydantic.

What is returned to a workflow on its first execution is what a replay will read: encoded, brought into the form that
`jsonb` gives back, and decoded. Nothing here knows about workflows; errors travel in `failure`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from decimal import Decimal
from functools import lru_cache
from math import isfinite
from types import GenericAlias
from typing import TYPE_CHECKING, Any, TypeGuard, cast, get_args

import pydantic_core
from pydantic import (
    BaseModel,
    ConfigDict,
    PydanticUserError,
    Secret,
    SecretBytes,
    SecretStr,
    TypeAdapter,
    ValidationError,
)
from pydantic.fields import FieldInfo

from sqla_durable.errors import (
    ArgumentError,
    DecodingError,
    DefinitionError,
    EncodingError,
    PayloadTooLargeError,
)
from sqla_durable.redaction import problems_of, without_values

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

DEFAULT_LIMIT = 1024 * 1024
"""The default limit of one payload: 1 MiB of UTF-8 JSON."""

_CONFIG = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64", ser_json_inf_nan="constants")
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_KEPT = 512  # adapters: building one takes milliseconds, and most are wanted again at the next call
_DEPTH = 50  # of values in values, where one is looked for
_MASK = "**********"
"""What pydantic writes for a secret."""
_UNKNOWN_TYPE = re.compile(r"unknown type: <class '[^']*'>")
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


@dataclass(frozen=True, slots=True)
class Codec:
    """Encodes and decodes values of one annotation.

    Args:
        what: what the value is, for messages: `result of step 'charge'`.
        adapter: pydantic's adapter of a tuple of one such value: inside it, the configuration reaches dataclasses.
        limit: the largest payload in bytes of UTF-8 JSON.
        native: the annotation says nothing, so only what JSON itself knows is accepted.
    """

    what: str
    adapter: TypeAdapter[tuple[Any]]
    limit: int = DEFAULT_LIMIT
    native: bool = False

    @classmethod
    def of(cls, annotation: Any, *, what: str, limit: int = DEFAULT_LIMIT) -> Codec:
        """Build the codec of an annotation; `Any` admits what JSON itself knows.

        Raises:
            DefinitionError: pydantic knows no way to and from JSON for it.
        """
        return cls(what=what, adapter=_adapter(annotation, what), limit=limit, native=annotation is Any)

    @classmethod
    def inferred(cls, *, what: str, limit: int = DEFAULT_LIMIT) -> Codec:
        """Build one that encodes a value by its own type: a dataclass, a datetime, a model, what JSON knows."""
        return cls(what=what, adapter=_adapter(Any, what), limit=limit)

    def encode(self, value: object) -> str:
        """Give the value's JSON text, as `jsonb` will give it back.

        Raises:
            EncodingError: it does not fit the annotation, or holds NUL, a lone surrogate, NaN or infinity.
            PayloadTooLargeError: it is larger than the limit.
        """
        try:
            if self.native:
                _require_native(value, self.what)
            (plain,) = self.adapter.dump_python((value,), mode="json", warnings="error")
        except (pydantic_core.PydanticSerializationError, ValueError, RecursionError) as error:
            # Without a cause: pydantic's own text shows the value.
            raise EncodingError(f"the {self.what} cannot be stored: {self._misfit(value, error)}.") from None
        text = dump(plain, what=self.what, limit=self.limit)
        if _MASK in text and (path := path_to(value, _is_secret)) is not None:
            raise EncodingError(
                f"the {self.what} cannot be stored: {path or 'it'} is a secret of pydantic's, which JSON shows as "
                "asterisks: keep it in a vault or a table of yours, and pass its key."
            )
        return text

    def _misfit(self, value: object, error: Exception) -> str:
        """Say what of a value cannot be stored, and where, without the value."""
        try:
            self.check(value)
        except ValidationError as found:
            return f"{type(value).__name__} does not fit its annotation: {problems_of(found, below=1)}"
        except Exception:
            return f"{type(value).__name__} does not fit its annotation"
        unknown = _UNKNOWN_TYPE.search(str(error))
        return f"{type(value).__name__} is not for JSON" + (f": {unknown[0]}" if unknown else "")

    def check(self, value: object) -> Any:
        """Give the value if it has the annotated type, without converting anything.

        Raises:
            pydantic.ValidationError: it has another.
        """
        return self.adapter.validate_python((value,), strict=True)[0]

    def decode(self, text: str) -> Any:
        """Give back the value of a JSON text.

        Raises:
            DecodingError: it does not fit the annotation.
        """
        try:
            return self.adapter.validate_json(f"[{text}]")[0]
        except ValidationError as error:
            raise DecodingError(
                f"the stored {self.what} does not fit the annotation that the code has now: "
                f"{problems_of(error, below=1)}. Bring back an annotation that reads it, or start a new workflow."
            ) from error


@dataclass(frozen=True, slots=True)
class ArgumentsCodec:
    """Encodes the arguments of a workflow by parameter name, and decodes them again."""

    codecs: Mapping[str, Codec]
    required: frozenset[str]
    workflow: str

    @classmethod
    def of(
        cls,
        annotations: Mapping[str, Any],
        *,
        required: frozenset[str],
        workflow: str,
        limit: int = DEFAULT_LIMIT,
    ) -> ArgumentsCodec:
        """Build it from the annotations of the parameters; those not `required` have defaults.

        Raises:
            DefinitionError: pydantic knows no way to and from JSON for one of them.
        """
        codecs = {
            name: Codec.of(annotation, what=f"argument {name!r} of workflow {workflow!r}", limit=limit)
            for name, annotation in annotations.items()
        }
        return cls(codecs=codecs, required=required, workflow=workflow)

    def encode(self, arguments: Mapping[str, object]) -> dict[str, Any]:
        """Give the JSON object of arguments that fit the annotations.

        Raises:
            ArgumentError: one does not fit, or is an ORM instance.
            EncodingError, PayloadTooLargeError: as `Codec.encode`.
        """
        encoded = {name: self._encode(name, value) for name, value in arguments.items()}
        limit = max((codec.limit for codec in self.codecs.values()), default=DEFAULT_LIMIT)
        refuse_large(sum(map(len, encoded.values())), what=f"input of workflow {self.workflow!r}", limit=limit)
        return {name: json.loads(text) for name, text in encoded.items()}

    def decode(self, text: str) -> dict[str, Any]:
        """Give back the arguments by name.

        Raises:
            DecodingError: they do not fit the annotations, as a row inserted by SQL may not.
        """
        stored: dict[str, Any] = json.loads(text)
        missing, unknown = self.required - stored.keys(), stored.keys() - self.codecs.keys()
        if missing or unknown:
            raise DecodingError(
                f"the stored input of workflow {self.workflow!r} does not fit: missing {sorted(missing)}, "
                f"unknown {[each[:100] for each in sorted(unknown)[:20]]}. Its parameters are {sorted(self.codecs)}."
            )
        return {name: self.codecs[name].decode(json.dumps(value)) for name, value in stored.items()}

    def _encode(self, name: str, value: object) -> str:
        codec = self.codecs[name]
        if is_mapped(type(value)):
            raise ArgumentError(
                f"{codec.what} is an ORM instance of {type(value).__name__}: "
                "pass its primary key and load it in the step that needs it. Nothing was started."
            )
        try:
            return codec.encode(codec.check(value))
        except ValidationError as error:
            raise ArgumentError(
                f"{codec.what} does not fit its annotation: {problems_of(error, below=1)}. Nothing was started."
            ) from error


def dump(plain: Any, *, what: str, limit: int = DEFAULT_LIMIT) -> str:
    """Give the JSON text of JSON values in the form that PostgreSQL's `jsonb` keeps, refusing what it cannot hold.

    Source: PostgreSQL manual, 8.14.1 (no NUL, no lone surrogates, numbers as `numeric`) and 8.14.4 (order of keys).
    """
    try:
        text = _ENCODER.encode(_as_jsonb(plain))
        size = len(text.encode())
    except UnicodeEncodeError as error:
        del error  # which shows the text
        raise EncodingError(f"the {what} cannot be stored: lone surrogate{_at(plain, _has_surrogate)}.") from None
    except (TypeError, ValueError, RecursionError) as error:
        reason = without_values(str(error))
        raise EncodingError(f"the {what} cannot be stored: {reason}{_at(plain, _is_not_finite)}.") from None
    if "\\u0000" in text and _NUL.search(text):
        raise EncodingError(f"the {what} cannot be stored: PostgreSQL keeps no NUL character{_at(plain, _has_nul)}.")
    refuse_large(size, what=what, limit=limit)
    return text


def refuse_large(size: int, *, what: str, limit: int) -> None:
    """Refuse a payload over the limit, both in bytes."""
    if size > limit:
        raise PayloadTooLargeError(
            f"the {what} is {size:,} bytes of JSON, over the limit of {limit:,}. Keep it in a table or a file and "
            "pass its key, or raise Durable(payload_limit=...).",
            size=size,
            limit=limit,
        )


def is_mapped(kind: object) -> bool:
    """Tell whether a class is mapped by SQLAlchemy's ORM."""
    return isinstance(kind, type) and hasattr(kind, "__mapper__")


def _adapter(annotation: Any, what: str) -> TypeAdapter[Any]:
    _refuse_mapped(annotation, what)
    try:
        adapter = _kept(_Annotation(annotation))
        # One that refers to a class that is not defined yet is built again: by then it may be.
        return adapter if adapter.pydantic_complete else _built(annotation)
    except (PydanticUserError, NameError, TypeError) as error:
        raise DefinitionError(
            f"{what} is annotated {annotation!r}, which cannot be stored as JSON: {error}. "
            "Annotate it with a dataclass, a pydantic model, or plain values."
        ) from error


class _Annotation:
    """An annotation as a key: two are the same if they consist of the same objects in the same order.

    Equality is not enough: `A | B` equals `B | A`, which prefers another class, `Annotated[int, 1]` equals
    `Annotated[int, True]`, and some annotations cannot be hashed. Holds the annotation, so that no identity in the key
    is taken by another object.
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
def _kept(annotation: _Annotation) -> TypeAdapter[Any]:
    return _built(annotation.value)


def _built(annotation: Any) -> TypeAdapter[Any]:
    wrapped: Any = GenericAlias(tuple, (annotation,))
    return TypeAdapter(wrapped, config=_CONFIG)


def _identity(value: Any) -> Hashable:
    """Return what tells an annotation, or a part of one, from others: a class by itself, a composed one by its parts.

    Constraints are compared by their parts too: an annotation that is written in a call is made anew by each call.
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
        case FieldInfo():
            return [getattr(value, name, None) for name in FieldInfo.__slots__]
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


def _require_native(value: object, what: str) -> None:
    """Refuse what JSON would give back as something else."""
    if not _is_native(value):
        raise EncodingError(
            f"the {what} has no annotation and is {_an(value)}, which would come back from JSON as something else. "
            f"{_instead_of(value)}"
        )


def _instead_of(value: object) -> str:
    if is_mapped(type(value)):
        return "An ORM instance belongs to its session: give its primary key, and load it in the step that needs it."
    try:
        _adapter(type(value), "result")
    except DefinitionError:
        return "Give plain values, a dataclass or a pydantic model with what is needed of it."
    return f"Annotate it, for example with {type(value).__name__!r}."


def _is_native(value: Any) -> bool:
    match value:
        case dict():
            mapping = cast("dict[object, object]", value)
            return all(type(key) is str and _is_native(inner) for key, inner in mapping.items())
        case list():
            return all(map(_is_native, cast("list[object]", value)))
        case _:
            return type(value) in (type(None), bool, int, float, str)


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
    """Give a float as `numeric` prints it: no exponent, so 1e22 reads as an integer, and no negative zero."""
    if value == 0:
        return 0.0
    return int(Decimal(repr(value))) if "e+" in repr(value) else value


def path_to(value: object, wanted: Callable[[object], bool], *, depth: int = _DEPTH) -> str | None:
    """Return where in a value something is, such as `cards[2].number`; "" for the value itself, None for nowhere."""
    if wanted(value):
        return ""
    if depth:
        for place, inner in _inside(value):
            path = path_to(inner, wanted, depth=depth - 1)
            if path is not None:
                return f"{place}{path}" if not path or path[0] == "[" else f"{place}.{path}"
    return None


def _inside(value: object) -> Iterable[tuple[str, object]]:
    if isinstance(value, Mapping):
        mapping = cast("Mapping[object, object]", value)
        return [(str(key)[:100], inner) for key, inner in mapping.items()] + [
            (f"[{number}]", key) for number, key in enumerate(mapping)
        ]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [(f"[{number}]", inner) for number, inner in enumerate(cast("Iterable[object]", value))]
    if isinstance(value, BaseModel):
        return [*value.__dict__.items(), *(value.__pydantic_extra__ or {}).items()]
    return [(each.name, getattr(value, each.name, None)) for each in fields(value)] if _is_dataclass(value) else []


def _is_dataclass(value: object) -> TypeGuard[DataclassInstance]:
    return is_dataclass(value) and not isinstance(value, type)


def _is_secret(value: object) -> bool:
    return isinstance(value, Secret | SecretStr | SecretBytes)


def _has_surrogate(value: object) -> bool:
    return isinstance(value, str) and any("\ud800" <= each <= "\udfff" for each in value)


def _has_nul(value: object) -> bool:
    return isinstance(value, str) and "\0" in value


def _is_not_finite(value: object) -> bool:
    return isinstance(value, float) and not isfinite(value)


def _at(plain: object, wanted: Callable[[object], bool]) -> str:
    path = path_to(plain, wanted)
    return f" in {path}" if path else ""


def _an(value: object) -> str:
    return f"of type {type(value).__name__}"
