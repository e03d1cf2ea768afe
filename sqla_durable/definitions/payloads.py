"""How values are stored that are not to be plain JSON: compressed, encrypted, or by a codec of the application's own.

A value becomes an *envelope*, JSON too, that says which codecs have made it: `{"$as": ["zstd", "aes-siv:2026"], "data":
"...", "workflow": "..."}`. So every value can be read by whoever has the codecs, whatever those of new values are, and
SQL sees which are used.
"""

from __future__ import annotations

import base64
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple
from uuid import UUID
from weakref import ReferenceType, ref

from sqla_durable.definitions.checks import fault_in, unescape_key
from sqla_durable.definitions.json_values import MARK
from sqla_durable.errors import DecodingError, DefinitionError, PayloadKeyError

_LARGEST = 2**28 - 1
"""The most bytes that a `jsonb` can have: no value that was stored is larger. Source: PostgreSQL, `jsonb_util.c`."""

_PUBLISHED = "event ", "stream "
"""The fields that forks have copies of, and that are read by whom nobody has said whether it is of a fork."""

_NEXT, _COLON = re.compile(r"[\s,]*."), re.compile(r"\s*:\s*")
_SHORTEST_SECRET = 32
_KEY_BYTES = 64
_NO_NAMES = '":'


ANYONE = ("",)
"""The others of what may come from any owner."""


class Place(NamedTuple):
    """Where a value is stored, to which encryption binds it.

    Attributes:
        owner: the workflow that it belongs to: the text of its id.
        field: which of its values it is: `result`, `step charge`.
        others: the owners from whom it may come as well; an empty text stands for any.
    """

    owner: str
    field: str
    others: tuple[str, ...] = ()

    @classmethod
    def of(cls, workflow_id: UUID, field: str, *, is_fork: bool = False) -> Place:
        """Return the place of a value of a workflow; that of a fork may have been copied from any other."""
        return cls(str(workflow_id), field, ANYONE if is_fork else ())

    @property
    def owners(self) -> tuple[str, ...]:
        """The owner, and the others."""
        return self.owner, *self.others

    def accepts(self, owner: str) -> bool:
        """Return whether a value that was stored for this owner may be here: what is published, from anyone."""
        return self.field.startswith(_PUBLISHED) or owner == self.owner or owner in self.others or "" in self.others


class PayloadCodec(ABC):
    """One layer of how values are stored: it makes bytes of bytes, and the same again.

    Subclass it for what is not here. Its names are stored with each value, so they must be the same in every process,
    and for as long as a value is there.

    Attributes:
        names: those of what it can decode; it encodes as the first.
    """

    names: Sequence[str] = ()

    @abstractmethod
    def encode(self, data: bytes, place: bytes) -> bytes | None:
        """Return the bytes to store, or None to leave these as they are.

        Args:
            data: the value as JSON, or what the codec before has made of it.
            place: where the value is stored: its workflow and which of its values it is.
        """

    @abstractmethod
    def decode(self, name: str, data: bytes, place: bytes) -> bytes:
        """Return the bytes that were encoded as `name`. Raises an exception if they were not."""


class Zstandard(PayloadCodec):
    """Compresses values by Zstandard. Needs the extra `payloads`.

    Args:
        over: values up to this many bytes stay as they are, and so do those that become no smaller.
        level: 1 is fast, 22 is small.
    """

    names = ("zstd",)

    def __init__(self, *, over: int = 2_048, level: int = 3) -> None:
        if over < 0 or not 1 <= level <= 22:
            raise DefinitionError(f"Zstandard(over={over!r}, level={level!r}): over is at least 0, level 1 to 22.")
        self.over = over
        self._library: Any = _library("zstandard")
        self._level = level

    def encode(self, data: bytes, place: bytes) -> bytes | None:
        """Return the value compressed, or None if it is small or does not become smaller."""
        if len(data) <= self.over:
            return None
        made: bytes = self._library.ZstdCompressor(level=self._level).compress(data)
        return made if len(made) * 4 < len(data) * 3 else None  # base64 makes it longer by a third

    def decode(self, name: str, data: bytes, place: bytes) -> bytes:
        """Return the value; refuse one that says it is larger than any that can be stored."""
        size: int = self._library.frame_content_size(data)
        if not 0 <= size <= _LARGEST:
            raise ValueError(f"it says that it becomes {size:,} bytes, and can have {_LARGEST:,}")
        made: bytes = self._library.ZstdDecompressor().decompress(data)
        return made


class Encryption(PayloadCodec):
    """Encrypts values by AES-256-SIV, which finds out every change. Needs the extra `payloads`.

    A value is bound to its workflow and to which of its values it is: copied elsewhere by SQL, it is refused. The same
    value at the same place is encrypted as the same bytes, and at every other place as others, so that sending an
    answer again is seen to be the same. The length of a value can be seen. Source: RFC 5297.

    Args:
        keys: secrets of 32 characters or bytes and more, by a short name that is stored with each value. The first
            encrypts, all decrypt: to rotate, put the new one first, and drop an old one when no value has it.
        required: whether what is not encrypted is refused where an attempt reads it: inputs, results of steps, signals
            and updates. Without it, rows from before, and those that SQL inserts, are read.
    """

    def __init__(self, keys: Mapping[str, str | bytes], *, required: bool = False) -> None:
        if not keys:
            raise DefinitionError("Encryption({}) has no key: generate one with secrets.token_hex(32).")
        self.required = required
        self.names = tuple(f"aes-siv:{_require_key_name(name)}" for name in keys)
        _library("cryptography")
        self._ciphers = {f"aes-siv:{name}": _cipher(name, secret) for name, secret in keys.items()}

    def encode(self, data: bytes, place: bytes) -> bytes | None:
        """Return the value encrypted by the first key."""
        made: bytes = self._ciphers[self.names[0]].encrypt(data, [place])
        return made

    def decode(self, name: str, data: bytes, place: bytes) -> bytes:
        """Return the value; raise if it was changed, or is at another place than it was made for."""
        made: bytes = self._ciphers[name].decrypt(data, [place])
        return made


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError:
        raise DefinitionError(f"payloads need {name}: pip install 'sqla-durable[payloads]'.") from None


def _is_name(given: object) -> bool:
    return isinstance(given, str) and fault_in(given, longest=200) is None


def _require_key_name(name: str) -> str:
    if fault_in(name, longest=100) is not None or any(each in name for each in _NO_NAMES):
        raise DefinitionError(f"an encryption key is named {name!r}: use a short name such as '2026-11', without ':'.")
    return name


def _cipher(name: str, secret: str | bytes) -> Any:
    from cryptography.hazmat.primitives.ciphers.aead import AESSIV
    from cryptography.hazmat.primitives.hashes import SHA512
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    given = secret.encode() if isinstance(secret, str) else secret
    if len(given) < _SHORTEST_SECRET:
        raise DefinitionError(
            f"the encryption key {name!r} has {len(given)} bytes, and needs {_SHORTEST_SECRET}: generate one with "
            "secrets.token_hex(32)."
        )
    return AESSIV(HKDF(SHA512(), _KEY_BYTES, salt=None, info=b"sqla-durable payload").derive(given))


class Payloads:
    """The codecs of a `Durable`, in the order in which a value passes them on its way into the tables.

    Attributes:
        codecs: none of them leaves values plain JSON.
        is_required: whether values that are not encrypted are refused.
    """

    def __init__(self, codecs: Iterable[PayloadCodec] = ()) -> None:
        self.codecs = tuple(codecs)
        for each in self.codecs:
            if not isinstance(each, PayloadCodec):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise DefinitionError(f"payloads={each!r} is no PayloadCodec: give Zstandard(), Encryption({{...}}).")
            if isinstance(each.names, str) or not all(map(_is_name, each.names)) or not each.names:
                raise DefinitionError(f"{type(each).__name__}.names is {each.names!r}: give a list of short texts.")
        kinds = [isinstance(each, Encryption) for each in self.codecs]
        if True in kinds and not all(kinds[kinds.index(True) :]):
            raise DefinitionError("Encryption comes last: what is encrypted cannot be compressed.")
        self.is_required = any(isinstance(each, Encryption) and each.required for each in self.codecs)
        self._workflows: set[str] = set()
        if self.codecs:
            _known[:] = [*(each for each in _known if each() is not None), ref(self)]

    def note_workflow(self, name: str) -> None:
        """Note that values which are sent to workflows of this name are stored by these codecs."""
        self._workflows.add(name)

    @classmethod
    def of_workflow(cls, name: str) -> Payloads:
        """Return the codecs of the `Durable` of this process that has a workflow; without one, values stay plain."""
        return next((each for each in _all() if name in each._workflows), PLAIN)

    @classmethod
    def moved(cls, text: str, name: str, owner: str) -> str:
        """Return the JSON text of arguments that were sealed for another owner, sealed for this one."""
        if MARK not in text:
            return text
        return cls.of_workflow(name).seal_members(PLAIN.open_members(text, Place("", "input", ANYONE)), owner)

    def seal(self, text: str, place: Place) -> str:
        """Return the JSON text to store of that of a value. Raises whatever a codec raises."""
        if not self.codecs:
            return text
        data, names = self._encoded(text.encode(), _bytes(place.owner, place.field))
        if not names:
            return text
        envelope = {"$as": names, "data": base64.b64encode(data).decode(), "workflow": place.owner}
        return _json(envelope)

    def seal_chunk(self, data: bytes, blob_id: UUID, number: int) -> bytes:
        """Return the bytes to store of a chunk of a blob: a line with the names of its codecs, and what they made."""
        data, names = self._encoded(data, _place_of_chunk(blob_id, number))
        return _json(names).encode() + b"\n" + data

    def open_chunk(self, data: bytes, blob_id: UUID, number: int, *, is_sealed: bool) -> bytes:
        """Return a chunk of a blob from what is stored, by the codecs of all `Durable` of this process.

        Raises:
            PayloadKeyError: no `Durable` of this process has one of its codecs.
            DecodingError: it was changed, or is another one; or it is not encrypted, and must be.
        """
        what, names = f"chunk {number} of blob {blob_id}", list[str]()
        if is_sealed:
            line, _, data = data.partition(b"\n")
            try:
                names = [str(each) for each in json.loads(line)]
            except (TypeError, ValueError):
                raise DecodingError(f"{what} does not begin with the names of its codecs: it was changed.") from None
        if self.is_required and not self._own_keys.intersection(names):
            raise DecodingError(f"{what} is not encrypted, which Encryption(required=True) refuses.")
        for name in reversed(names):
            data = _decoded(name, data, _place_of_chunk(blob_id, number), what)
        return data

    @property
    def names(self) -> list[str] | None:
        """The names by which its codecs encode now; None where there are no codecs."""
        return [each.names[0] for each in self.codecs] or None

    @property
    def _own_keys(self) -> set[str]:
        return {name for each in self.codecs if isinstance(each, Encryption) for name in each.names}

    def _encoded(self, data: bytes, where: bytes) -> tuple[bytes, list[str]]:
        names: list[str] = []
        for each in self.codecs:
            made = each.encode(data, where)
            if made is not None:
                data = made
                names.append(each.names[0])
        return data, names

    def seal_members(self, text: str, owner: str) -> str:
        """Return the JSON text to store of that of the arguments of a workflow, an object: each is sealed by itself."""
        if not self.codecs:
            return text
        return _object({name: self.seal(each, argument(name, owner)) for name, each in _members(text).items()})

    def open_members(self, text: str, place: Place) -> str:
        """Return the JSON text of arguments from that which is stored. Raises as `open`."""
        if MARK not in text and not self.is_required:
            return text
        opened_ones = {name: self.open(each, argument(name, *place.owners)) for name, each in _members(text).items()}
        return _object(opened_ones)

    def open(self, text: str, place: Place) -> str:
        """Return the JSON text of a value from that which is stored; see `opened`.

        Raises:
            DecodingError: as `opened`; or it is not encrypted, and must be.
        """
        if not self.is_required:
            return opened(text, place)
        match json.loads(text) if text.startswith(MARK) else None:
            case {"$as": [*names]}:  # it may be forged
                is_ours = not self._own_keys.isdisjoint(map(str, names))
            case _:
                is_ours = False
        if not is_ours:
            raise DecodingError(
                f"the stored {place.field} of workflow {place.owner} is not encrypted, which Encryption(required=True) "
                "refuses: who inserted it has no key, or it is from before."
            )
        return opened(text, place)


_known: list[ReferenceType[Payloads]] = []
"""Those of this process that have codecs."""

PLAIN = Payloads()
"""No codecs."""


def _all() -> list[Payloads]:
    """Return those of this process that have codecs, the newest first."""
    return [found for each in reversed(_known) if (found := each()) is not None]


def opened(text: str, place: Place) -> str:
    """Return the JSON text of a value from that which is stored, by the codecs of all `Durable` of this process.

    Raises:
        PayloadKeyError: no `Durable` of this process has one of its codecs.
        DecodingError: it was changed, or belongs to another workflow, or is another of its values.
    """
    if not text.startswith(MARK):
        return text
    what = f"the stored {place.field} of workflow {place.owner}"
    try:
        envelope: dict[str, Any] = json.loads(text)
        names, owner = [str(each) for each in envelope["$as"]], str(envelope["workflow"])
        data = base64.b64decode(envelope["data"], validate=True)
    except (KeyError, TypeError, ValueError):
        raise DecodingError(f'{what} begins as an envelope, and is none: a value has the key "$as".') from None
    where = _bytes(owner, place.field)
    for name in reversed(names):
        data = _decoded(name, data, where, what)
    if not place.accepts(owner):
        raise DecodingError(f"{what} was stored for workflow {owner}: it was copied by hand. Nothing was read of it.")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise DecodingError(f"{what} is no text after {', '.join(reversed(names))}.") from None


def _decoded(name: str, data: bytes, place: bytes, what: str) -> bytes:
    failures: list[Exception] = []
    able = [each for chain in _all() for each in chain.codecs if name in each.names]
    for each in able or _always_there(name):
        try:
            return each.decode(name, data, place)
        except Exception as error:  # of a codec of the application's own
            failures.append(error)
    if not failures:
        raise PayloadKeyError(
            f"{what} is stored as {name!r}, for which no Durable of this process has a codec or key: add it to "
            "Durable(payloads=[...]). Nothing was changed."
        )
    reason = f"{type(failures[0]).__name__} {failures[0]}".strip()
    raise DecodingError(
        f"{what} cannot be read as {name!r}: {reason}. It was changed or copied by hand, or stored with another key of "
        "this name."
    ) from failures[0]


def _always_there(name: str) -> list[PayloadCodec]:
    return [Zstandard()] if name == "zstd" else []


def argument(name: str, owner: str, *others: str) -> Place:
    """Return the place of an argument of a workflow."""
    return Place(owner, f"argument {name}", others)


def field_of_outcome(key: str) -> str | None:
    """Return the field of what is recorded under a key; None for records of the engine's own, which stay plain."""
    operation = unescape_key(key.rpartition("/")[2].partition("#")[0])
    if operation.startswith("signal:"):
        return f"signal {operation.removeprefix('signal:')}"
    if operation.startswith("wait_event("):
        return f"event {operation.removeprefix('wait_event(').removesuffix(')')}"
    return None if ":" in operation or "(" in operation else f"step {key}"


def owner_of_key(name: str, key: str | None) -> str:
    """Return the owner of the arguments of a start that may replace those of the workflow which has the key."""
    return f"key {name}/{key}"


def owner_of_schedule(name: str) -> str:
    """Return the owner of the arguments of what a schedule starts."""
    return f"schedule {name}"


def _members(text: str) -> dict[str, str]:
    """Return the JSON texts of the members of an object by name, as they are: numbers that Python rounds among them."""
    decoder, found = json.JSONDecoder(parse_int=str, parse_float=str), dict[str, str]()
    at = text.index("{") + 1
    while (begin := _NEXT.match(text, at)) and begin[0][-1] == '"':
        name, at = decoder.raw_decode(text, begin.end() - 1)
        start = _COLON.match(text, at).end()  # type: ignore[union-attr]  # the text is JSON
        _, at = decoder.raw_decode(text, start)
        found[name] = text[start:at]
    return found


def _object(members: Mapping[str, str]) -> str:
    return f"{{{','.join(f'{json.dumps(name, ensure_ascii=False)}:{each}' for name, each in members.items())}}}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _place_of_chunk(blob_id: UUID, number: int) -> bytes:
    return _bytes(f"blob {blob_id}", f"chunk {number}")


def _bytes(owner: str, field: str) -> bytes:
    return f"{owner}\n{field}".encode()
