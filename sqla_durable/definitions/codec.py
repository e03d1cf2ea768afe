"""Values on their way to the database and back: JSON, by a function's annotations, with pydantic.

What is returned to a workflow on its first execution is what a replay will read: encoded, brought into the form that
`jsonb` gives back, and decoded. Nothing here knows about workflows; errors travel in `failure`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from types import GenericAlias
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

from pydantic import BaseModel, Secret, SecretBytes, SecretStr, TypeAdapter, ValidationError

from sqla_durable.definitions.adapters import adapter_of, is_mapped
from sqla_durable.definitions.comparison import Difference, annotation_for, difference, joined_path
from sqla_durable.definitions.jsonb import (
    DEFAULT_LIMIT,
    dump,
    elements_of,
    inner_values,
    is_dataclass_instance,
    path_to,
    refuse_large,
)
from sqla_durable.definitions.redaction import problems_of
from sqla_durable.errors import ArgumentError, DecodingError, DefinitionError, EncodingError

if TYPE_CHECKING:
    pass

_SURE = frozenset({str, int, bool, type(None)})
"""Annotations that read exactly what was written, if that was of the same type."""
_JSON = frozenset({*_SURE, float, list, dict})
"""The types of what is read where an annotation leaves it to JSON."""
_READABLE = frozenset({*_SURE, float, bytes, date, UUID})
"""Types that are read again by their own name, whatever the value is."""
_ZONES = (None, UTC)
"""Zones of times that are, too: the offset of another may have seconds."""
_MASK = "**********"
"""What pydantic writes for a secret."""
_INSTEAD_OF_ROWS = (
    "An ORM instance belongs to its session: give its primary key, and load it in the step that needs it."
)
_BRING_BACK = "Bring back an annotation that reads it, or start a new workflow."
_SEND = "Send what fits, or wait with the type that is sent."
_UNKNOWN_TYPE = re.compile(r"unknown type: <class '[^']*'>")


@dataclass(frozen=True, slots=True)
class Encoded:
    """A value as it is stored, and as it will be read.

    Attributes:
        text: the JSON text.
        value: what reading the text gives; equal to what went in, and no part of it.
    """

    text: str
    value: Any


@dataclass(frozen=True, slots=True)
class Codec:
    """Encodes and decodes values of one annotation.

    What is encoded is read again and compared with what went in: it comes back equal, or it is refused here.

    Args:
        what: what the value is, for messages: `result of step 'charge'`.
        annotation: the annotation; `Any` admits only what JSON itself knows.
        adapter: pydantic's adapter of it.
        limit: the largest payload in bytes of UTF-8 JSON.
        is_inferred: a value is encoded by its own type; who reads it says of which type it is to be.
    """

    what: str
    annotation: Any
    adapter: TypeAdapter[tuple[Any]]
    limit: int = DEFAULT_LIMIT
    is_inferred: bool = False

    @classmethod
    def of(cls, annotation: Any, *, what: str, limit: int = DEFAULT_LIMIT) -> Codec:
        """Build the codec of an annotation; `Any` admits what JSON itself knows.

        Raises:
            DefinitionError: pydantic knows no way to and from JSON for it.
        """
        return cls(what, annotation, adapter_of(annotation, what), limit)

    @classmethod
    def inferred(cls, *, what: str, limit: int = DEFAULT_LIMIT) -> Codec:
        """Build one that encodes a value by its own type: a dataclass, a datetime, a model, what JSON knows."""
        return cls(what, Any, adapter_of(Any, what), limit, is_inferred=True)

    def encode(self, value: object) -> str:
        """Return the value's JSON text, as `jsonb` will give it back.

        Raises:
            EncodingError: it does not fit the annotation, would come back as something else, or holds NUL, a lone
                surrogate, NaN or infinity.
            PayloadTooLargeError: it is larger than the limit.
        """
        return self.encoded(value).text

    def encoded(self, value: object) -> Encoded:
        """Return the value's JSON text, and what reading it gives. Raises as `encode`."""
        text = self._text(value)
        return Encoded(text, self._read_back(text, value))

    def encode_argument(self, value: object) -> str:
        """Return the JSON text of a value that must have the annotated type. Raises as `encode` and `check`."""
        text = self._text(self.check(value))
        self._read_back(text, value)
        return text

    def check(self, value: object) -> Any:
        """Return the value if it has the annotated type, without converting anything.

        Raises:
            pydantic.ValidationError: it has another.
        """
        return self.adapter.validate_python((value,), strict=True)[0]

    def decode(self, text: str) -> Any:
        """Return the value of a JSON text.

        Raises:
            DecodingError: it does not fit the annotation.
        """
        try:
            return self._read(text)
        except ValidationError as error:
            raise DecodingError(
                f"the stored {self.what} does not fit the annotation that the code has now: "
                f"{problems_of(error, below=1)}. {_SEND if self.what.startswith('payload') else _BRING_BACK}"
            ) from error

    def _text(self, value: object) -> str:
        try:
            if self.annotation is Any and not self.is_inferred:
                _require_native(value, self.what)
            # By the names of fields and without what is computed: so that whatever is written can be read.
            encode = self.adapter.dump_python
            (plain,) = encode((value,), mode="json", by_alias=False, round_trip=True, warnings="error")
        except EncodingError:
            raise
        except Exception as error:  # a property or a serializer may raise anything
            # Without a cause: pydantic's own text shows the value.
            raise EncodingError(f"the {self.what} cannot be stored: {self._misfit(value, error)}.") from None
        text = dump(plain, what=self.what, limit=self.limit)
        if _MASK in text and (path := path_to(value, _is_secret)) is not None:
            raise EncodingError(
                f"the {self.what} cannot be stored: {path or 'it'} is a secret of pydantic's, which JSON shows as "
                "asterisks: keep it in a vault or a table of yours, and pass its key."
            )
        return text

    def _read(self, text: str) -> Any:
        return self.adapter.validate_json(f"[{text}]", by_alias=True, by_name=True)[0]

    def _misfit(self, value: object, error: Exception) -> str:
        """Return what of a value cannot be stored, and where, without the value."""
        try:
            self._normal(value)
        except ValidationError as found:
            return f"{type(value).__name__} does not fit its annotation: {problems_of(found, below=1)}"
        except Exception:
            return f"{type(value).__name__} does not fit its annotation"
        unknown = _UNKNOWN_TYPE.search(str(error))
        return f"{type(value).__name__} is not for JSON" + (f": {unknown[0]}" if unknown else "")

    def _read_back(self, text: str, value: object) -> Any:
        """Return what will be read, if it is the value that went in."""
        if type(value) is self.annotation and self.annotation in _SURE:
            return value
        try:
            kept = self._read(text)
        except Exception as error:  # a validator may raise anything
            reason = problems_of(error, below=1) if isinstance(error, ValidationError) else type(error).__name__
            raise EncodingError(
                f"the {self.what} cannot be stored: {type(value).__name__} becomes JSON that its annotation does not "
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
        except Exception as error:  # a class of the user's may raise anything; RecursionError
            raise EncodingError(f"the {self.what} cannot be compared: {type(error).__name__} is raised.") from None
        if found is not None and not self._is_normal(value, kept):
            raise EncodingError(f"the {self.what} cannot be stored as it is: {_changed(found)}")

    def _is_normal(self, value: object, kept: object) -> bool:
        """Return whether what is read is what the annotation itself makes of a value, once and for all.

        A `StrEnum` is a text where `str` is annotated, a validator strips blanks. What changes a value each time that
        it is read is not normal, and neither is an object of another class.
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
            return codec.encode_argument(value)
        except ValidationError as error:
            raise ArgumentError(
                f"{codec.what} does not fit its annotation: {problems_of(error, below=1)}. Nothing was started."
            ) from error


def _require_native(value: object, what: str) -> None:
    """Refuse what JSON would give back as something else."""
    if not _is_native(value):
        raise EncodingError(
            f"the {what} has no annotation and is {_an(value)}, which would come back from JSON as something else. "
            f"{_instead_of(value)}"
        )


def _instead_of(value: object) -> str:
    if path_to(value, _is_mapped_instance) is not None:
        return _INSTEAD_OF_ROWS
    try:
        adapter_of(type(value), "result")
    except DefinitionError:
        return "Give plain values, a dataclass or a pydantic model with what is needed of it."
    return f"Annotate it, for example with {annotation_for(value)!r}."


def _require_readable(value: object, what: str, path: str = "") -> None:
    """Refuse what nobody can read again as what it is: each part by its own type."""
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
    """Return which part of a value would come back as what, and what to do, without the value."""
    kinds = type(found.given), type(found.kept)
    where = found.path or "it"
    if is_mapped(kinds[0]):
        return f"{where} is {_an(found.given)}. {_INSTEAD_OF_ROWS}"
    if kinds[0] is kinds[1]:
        return (
            f"{where} would come back as another {kinds[0].__name__}. Private attributes, fields with `init=False` or "
            "`exclude=True`, keys that are not declared, and what a serializer leaves out are not stored: pass it to "
            "the constructor, or keep it elsewhere."
        )
    changed = f"{where} is {_an(found.given)} and would come back as one of type {kinds[1].__name__}."
    if isinstance(found.given, kinds[1]):
        return f"{changed} Annotate it with {kinds[0].__name__}, or give a {kinds[1].__name__}."
    if kinds[1] in _JSON:
        wanted = annotation_for(found.given)
        return f"{changed} Annotate it with {wanted} where a dict, list, object, Any, a TypeVar or a union stands."
    return f"{changed} Tell the members of the union apart with a discriminator, or annotate one of them only."


def _structures(value: object) -> Iterable[type]:
    """Return the classes of the dataclasses and models in a value."""
    if is_dataclass_instance(value) or isinstance(value, BaseModel):
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
    return isinstance(value, Secret | SecretStr | SecretBytes)


def _an(value: object) -> str:
    return f"of type {type(value).__name__}"
