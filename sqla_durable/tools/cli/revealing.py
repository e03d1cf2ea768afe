"""Values that payload codecs have encoded, for `show`: decoded where `--app` has the keys, and otherwise described."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, cast

from sqla_durable.definitions.payloads import ANYONE, Place, opened
from sqla_durable.errors import DecodingError

MARKED = '{"$as": ['
"""What the text of a value has in it that was encoded, wherever it is."""


def revealed_row(row: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return a row of the tables with the values of these columns revealed; see `revealed`."""
    return {**row, **{name: revealed(row[name], _fields(name, row)) for name in names}}


def revealed(value: Any, fields: Iterable[str] = ()) -> Any:
    """Return a value, or its JSON text, with what is encoded in it decoded or described.

    Args:
        value: JSON values, or the text of one.
        fields: as which of its workflow's values it may have been stored; see `Place`.
    """
    if not isinstance(value, str):
        return _inner(value, tuple(fields))
    if MARKED not in value:
        return value
    return json.dumps(_inner(json.loads(value), tuple(fields)), ensure_ascii=False)


def _fields(column: str, row: Mapping[str, Any]) -> list[str]:
    key, name = row.get("key"), str(row.get("name") or "")
    match column:
        case "value":
            return [f"event {key}"]
        case "payload":
            return [f"signal {name}", f"update {name.rpartition(':')[2]}"]
        case "details":
            return [f"details {key}"]
        case _:
            kind, _, of = name.partition(":")
            event = name.removeprefix("wait_event(").removesuffix(")")
            return [f"step {key}", f"{kind} {of}", f"event {event}", "result"]


def _inner(value: Any, fields: tuple[str, ...]) -> Any:
    match value:
        case {"$as": [*names], "data": str(data)}:
            return _opened(
                cast("dict[str, Any]", value), fields, f"({', '.join(map(str, names))}, {len(data):,} bytes)"
            )
        case dict():
            members = cast("dict[str, Any]", value)
            return {name: _inner(each, (*fields, f"argument {name}")) for name, each in members.items()}
        case [*members]:
            return [_inner(each, fields) for each in members]
        case _:
            return value


def _opened(envelope: dict[str, Any], fields: tuple[str, ...], otherwise: str) -> Any:
    for field in fields:
        try:
            return json.loads(opened(json.dumps(envelope), Place("", field, ANYONE)))
        except DecodingError:  # of another field, or of a key that is not here
            continue
    return otherwise
