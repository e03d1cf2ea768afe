"""Encodes values as JSON by a function's annotations, with pydantic, and decodes them.

A workflow gets on its first execution what a replay will read: the value is encoded, brought into the form that `jsonb`
returns, and decoded. Errors are stored by `failure`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, date, datetime
from types import GenericAlias
from typing import Any, NamedTuple, cast
from uuid import UUID

from sqla_durable.definitions.comparison import Difference, annotation_for, difference, joined_path
from sqla_durable.definitions.dataclass import dataclass
from sqla_durable.definitions.json_values import (
    DEFAULT_LIMIT,
    adapter_of,
    dump,
    elements_of,
    inner_values,
    is_dataclass_instance,
    is_mapped,
    path_to,
    refuse_large,
)
from sqla_durable.definitions.libraries import pydantic, pydantic_core
from sqla_durable.definitions.redaction import problems_of
from sqla_durable.errors import ArgumentError, DecodingError, DefinitionError, EncodingError

_SURE = frozenset({str, int, bool, type(None)})
"""Annotations that read exactly what was written, if it has the annotated type."""
_JSON = frozenset({*_SURE, float, list, dict})
"""The types that JSON is read as where the annotation does not say."""
_READABLE = frozenset({*_SURE, float, bytes, date, UUID})
"""Types whose values can all be read again by an annotation with the type."""
_ZONES = (None, UTC)
"""Time zones of a datetime for which that is true, too: the offset of another may have seconds."""
_MASK = "**********"
"""What pydantic writes in place of a secret."""
_INSTEAD_OF_ROWS = (
    "An ORM instance belongs to its session: pass its primary key, and load it in the step that needs it."
)
_BRING_BACK = "Restore an annotation that reads it, or start a new workflow."
_SEND = (
    "Send a value of that type, or wait for the type that is sent. A workflow that has received the wrong one goes on "
    "as a fork from that wait, to which the right one is sent."
)
_UNKNOWN_TYPE = re.compile(r"unknown type: <class '[^']*'>")


class Encoded(NamedTuple):
    """A value as it is stored, and as it will be read.

    Attributes:
        text: the JSON text.
        value: what decoding the text returns: equal to the encoded value, and sharing no part with it.
    """

    text: str
    value: Any


@dataclass(frozen=True, slots=True)
class Codec:
    """Encodes and decodes values of one annotation.

    What is encoded is decoded again and compared: a value that would not be read back equal is refused.

    Args:
        what: what the value is, for messages: `result of step 'charge'`.
        annotation: the annotation; `Any` accepts only JSON's own types.
        adapter: pydantic's adapter of it.
        limit: the largest payload in bytes of UTF-8 JSON.
        is_inferred: whether a value is encoded by its own type; the reader names the type to decode it as.
    """

    what: str
    annotation: Any
    adapter: pydantic.TypeAdapter[tuple[Any]]
    limit: int = DEFAULT_LIMIT
    is_inferred: bool = False

    @classmethod
    def of(cls, annotation: Any, *, what: str, limit: int = DEFAULT_LIMIT) -> Codec:
        """Return the codec of an annotation; `Any` accepts only JSON's own types.

        Raises:
            DefinitionError: pydantic cannot encode and decode it.
        """
        return cls(what, annotation, adapter_of(annotation, what), limit)

    @classmethod
    def inferred(cls, *, what: str, limit: int = DEFAULT_LIMIT) -> Codec:
        """Return a codec that encodes each value by its own type: a dataclass, a datetime, a model, a JSON value."""
        return cls(what, Any, adapter_of(Any, what), limit, is_inferred=True)

    def encode(self, value: object) -> str:
        """Return the value's JSON text, as `jsonb` will return it.

        Raises:
            EncodingError: it does not fit the annotation, would be read as something else, or contains NUL, a lone
                surrogate, NaN or infinity.
            PayloadTooLargeError: it is larger than the limit.
        """
        return self.encoded(value).text

    def encoded(self, value: object) -> Encoded:
        """Return the value's JSON text, and what decoding it returns. Raises as `encode`."""
        if self._is_sure(value):
            return Encoded(dump(value, what=self.what, limit=self.limit), value)
        text = self._text(value)
        return Encoded(text, self._read_back(text, value))

    def encode_argument(self, value: object) -> str:
        """Return the JSON text of a value that must have the annotated type. Raises as `encode` and `check`."""
        if self._is_sure(value):
            return dump(value, what=self.what, limit=self.limit)
        text = self._text(self.check(value))
        self._read_back(text, value)
        return text

    def check(self, value: object) -> Any:
        """Return the value if it has the annotated type, without converting anything.

        Raises:
            pydantic.ValidationError: it has another type.
        """
        return self.adapter.validate_python((value,), strict=True)[0]

    def decode(self, text: str) -> Any:
        """Return the value of a JSON text.

        Raises:
            DecodingError: it does not fit the annotation.
        """
        return self.decode_in_array(f"[{text}]")

    def decode_in_array(self, array: str | bytes) -> Any:
        """Return the value of a JSON array with one element. Raises as `decode`."""
        try:
            return self._read(array)
        except pydantic.ValidationError as error:
            raise DecodingError(
                f"the stored {self.what} does not fit the annotation that the code has now: "
                f"{problems_of(error, below=1)}. {_SEND if self.what.startswith('payload') else _BRING_BACK}"
            ) from error

    def _text(self, value: object) -> str:
        try:
            if self.annotation is Any and not self.is_inferred:
                _require_native(value, self.what)
            # By field names and without computed fields, so that whatever is written can be read.
            encode = self.adapter.serializer.to_python
            (plain,) = encode((value,), mode="json", by_alias=False, round_trip=True, warnings="error")
        except EncodingError:
            raise
        except Exception as error:  # a property or a serializer may raise anything
            # Without a cause, because pydantic's own text shows the value.
            raise EncodingError(f"the {self.what} cannot be stored: {self._misfit(value, error)}.") from None
        text = dump(plain, what=self.what, limit=self.limit)
        if _MASK in text and (path := path_to(value, _is_secret)) is not None:
            raise EncodingError(
                f"the {self.what} cannot be stored: {path or 'it'} is a pydantic secret, which is encoded as "
                "asterisks: keep it in a vault or a table of your own, and pass its key."
            )
        return text

    def _read(self, array: str | bytes) -> Any:
        return self.adapter.validator.validate_json(array, by_alias=True, by_name=True)[0]

    def _is_sure(self, value: object) -> bool:
        """Return whether a value is read exactly as it is written."""
        return type(value) is self.annotation and self.annotation in _SURE

    def _misfit(self, value: object, error: Exception) -> str:
        """Return what of a value cannot be stored, and where, without the value."""
        try:
            self._normal(value)
        except pydantic.ValidationError as found:
            return f"{type(value).__name__} does not fit its annotation: {problems_of(found, below=1)}"
        except Exception:
            return f"{type(value).__name__} does not fit its annotation"
        unknown = _UNKNOWN_TYPE.search(str(error))
        return f"{type(value).__name__} cannot be encoded as JSON" + (f": {unknown[0]}" if unknown else "")

    def _read_back(self, text: str, value: object) -> Any:
        """Return what will be read; refuse the value if that is something else."""
        try:
            kept = self._read(f"[{text}]")
        except Exception as error:  # a validator may raise anything
            reason = (
                problems_of(error, below=1) if isinstance(error, pydantic.ValidationError) else type(error).__name__
            )
            raise EncodingError(
                f"the {self.what} cannot be stored: {type(value).__name__} becomes JSON that its annotation cannot "
                f"read: {reason}. Annotate it with what can be read, such as plain values, a dataclass or a model."
            ) from None
        if self.is_inferred:
            _require_readable(value, self.what)
        elif self.annotation is not Any:
            self._require_same(value, kept)
        return kept

    def _require_same(self, value: object, kept: object) -> None:
        try:
            found = difference(value, kept)
        except Exception as error:  # the user's class may raise anything; RecursionError
            raise EncodingError(
                f"the {self.what} cannot be compared with what would be read: {type(error).__name__} was raised."
            ) from None
        if found is not None and not self._is_normal(value, kept):
            raise EncodingError(f"the {self.what} cannot be stored as it is: {_changed(found)}")

    def _is_normal(self, value: object, kept: object) -> bool:
        """Return whether what is read is the value as the annotation normalizes it, and is stable from then on.

        A `StrEnum` is read as a text where `str` is annotated; a validator may strip blanks. A value that changes with
        each reading is refused, and so is an object of another class.
        """
        try:
            same = difference(self._normal(value), kept) is None and difference(self._normal(kept), kept) is None
        except Exception:
            return False
        return same and Counter(_structures(value)) == Counter(_structures(kept))

    def _normal(self, value: object) -> Any:
        adapter = adapter_of(self.annotation, self.what, revalidating=True)
        return adapter.validate_python((value,), strict=True, by_alias=True, by_name=True)[0]


@dataclass(frozen=True, slots=True)
class ArgumentsCodec:
    """Encodes the arguments of a workflow by parameter name, and decodes them again."""

    codecs: Mapping[str, Codec]
    required: frozenset[str]
    workflow: str
    limit: int

    @classmethod
    def of(
        cls,
        annotations: Mapping[str, Any],
        *,
        required: frozenset[str],
        workflow: str,
        limit: int = DEFAULT_LIMIT,
    ) -> ArgumentsCodec:
        """Return the codec of parameters with these annotations; those not `required` have defaults.

        Raises:
            DefinitionError: pydantic cannot encode and decode one of them.
        """
        codecs = {
            name: Codec.of(annotation, what=f"argument {name!r} of workflow {workflow!r}", limit=limit)
            for name, annotation in annotations.items()
        }
        return cls(codecs=codecs, required=required, workflow=workflow, limit=limit)

    def encode(self, arguments: Mapping[str, object]) -> str:
        """Return the JSON object of the arguments, which must fit the annotations, as text.

        Raises:
            ArgumentError: one does not fit, or is an ORM instance.
            EncodingError, PayloadTooLargeError: as `Codec.encode`.
        """
        encoded = {name: self._encode(name, arguments[name]) for name in self.codecs if name in arguments}
        refuse_large(sum(map(len, encoded.values())), what=f"input of workflow {self.workflow!r}", limit=self.limit)
        return "{" + ",".join([f'"{name}":{text}' for name, text in encoded.items()]) + "}"

    def decode(self, text: str) -> dict[str, Any]:
        """Return the arguments by name.

        Raises:
            DecodingError: they do not fit the annotations, which can happen to a row that SQL inserted.
        """
        stored: dict[str, Any] = json.loads(text)
        missing, unknown = self.required - stored.keys(), stored.keys() - self.codecs.keys()
        if missing or unknown:
            raise DecodingError(
                f"the stored input of workflow {self.workflow!r} does not fit: missing {sorted(missing)}, "
                f"unknown {[each[:100] for each in sorted(unknown)[:20]]}. Its parameters are {sorted(self.codecs)}."
            )
        arrays = {name: pydantic_core.to_json([value]) for name, value in stored.items()}
        return {name: self.codecs[name].decode_in_array(array) for name, array in arrays.items()}

    def _encode(self, name: str, value: object) -> str:
        codec = self.codecs[name]
        if is_mapped(type(value)):
            raise ArgumentError(
                f"{codec.what} is an ORM instance of {type(value).__name__}: "
                "pass its primary key and load it in the step that needs it. Nothing was started."
            )
        try:
            return codec.encode_argument(value)
        except pydantic.ValidationError as error:
            raise ArgumentError(
                f"{codec.what} does not fit its annotation: {problems_of(error, below=1)}. Nothing was started."
            ) from error


def _require_native(value: object, what: str) -> None:
    """Refuse a value that JSON would return as something else."""
    if not _is_native(value):
        raise EncodingError(
            f"the {what} has no annotation and is {_an(value)}, which JSON would return as something else. "
            f"{_instead_of(value)}"
        )


def _instead_of(value: object) -> str:
    if path_to(value, _is_mapped_instance) is not None:
        return _INSTEAD_OF_ROWS
    try:
        adapter_of(type(value), "result")
    except DefinitionError:
        return "Pass plain values, a dataclass or a pydantic model with what is needed of it."
    return f"Annotate it, for example with {annotation_for(value)!r}."


def _require_readable(value: object, what: str, path: str = "") -> None:
    """Refuse a value whose parts cannot each be read again by their own type."""
    kind = type(value)
    if kind in _READABLE or (kind is datetime and cast("datetime", value).tzinfo in _ZONES):
        return
    if is_mapped(kind):
        raise EncodingError(f"the {what} cannot be stored: {path or 'it'} is {_an(value)}. {_INSTEAD_OF_ROWS}")
    if hasattr(kind, "_fields") or not issubclass(kind, (dict, list, tuple, set, frozenset)):
        _encode_alone(kind, value, what, path)
        return
    if isinstance(value, dict):
        _require_readable_keys(cast("dict[object, object]", value), what, path)
    for place, inner in elements_of(cast("Iterable[object]", value)):
        _require_readable(inner, what, joined_path(path, place))


def _require_readable_keys(mapping: dict[object, object], what: str, path: str) -> None:
    for key in mapping:
        if type(key) not in _READABLE:
            _encode_alone(GenericAlias(dict, (type(key), int)), {key: 0}, what, path)


def _encode_alone(annotation: Any, value: object, what: str, path: str) -> None:
    try:
        Codec.of(annotation, what=f"{what}, at {path}," if path else what).encode(value)
    except DefinitionError as error:
        raise EncodingError(f"the {what} cannot be stored: {error}") from None


def _changed(found: Difference) -> str:
    """Return, without the value, which part of it would be read as what, and what to do."""
    kinds = type(found.given), type(found.kept)
    where = found.path or "it"
    if is_mapped(kinds[0]):
        return f"{where} is {_an(found.given)}. {_INSTEAD_OF_ROWS}"
    if kinds[0] is kinds[1]:
        return (
            f"{where} would be read back as another {kinds[0].__name__}. Private attributes, fields with "
            "`init=False` or `exclude=True`, keys that are not declared, and what a serializer leaves out are not "
            "stored: pass it to the constructor, or keep it elsewhere."
        )
    changed = f"{where} is {_an(found.given)} and would be read back as one of type {kinds[1].__name__}."
    if isinstance(found.given, kinds[1]):
        return f"{changed} Annotate it with {kinds[0].__name__}, or pass a {kinds[1].__name__}."
    if kinds[1] in _JSON:
        wanted = annotation_for(found.given)
        return f"{changed} Annotate it with {wanted} where a dict, list, object, Any, a TypeVar or a union stands."
    return f"{changed} Distinguish the members of the union by a discriminator, or annotate only one of them."


def _structures(value: object) -> Iterable[type]:
    """Yield the classes of the dataclasses and models in a value."""
    if is_dataclass_instance(value) or isinstance(value, pydantic.BaseModel):
        yield type(value)
    for _, inner in inner_values(value):
        yield from _structures(inner)


def _is_native(value: Any) -> bool:
    match value:
        case dict():
            mapping = cast("dict[object, object]", value)
            return all(type(key) is str and _is_native(inner) for key, inner in mapping.items())
        case list():
            return all(map(_is_native, cast("list[object]", value)))
        case _:
            return type(value) in _JSON


def _is_mapped_instance(value: object) -> bool:
    return is_mapped(type(value))


def _is_secret(value: object) -> bool:
    return isinstance(value, pydantic.Secret | pydantic.SecretStr | pydantic.SecretBytes)


def _an(value: object) -> str:
    return f"of type {type(value).__name__}"
