"""Values that payload codecs have encoded, for people: decoded where this process has the keys, otherwise described."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, cast

from sqla_durable.definitions.payloads import ANYONE, Place, opened
from sqla_durable.errors import DecodingError

MARKED = '{"$as": ['
"""What the text of a value has in it that was encoded, wherever it is."""


def revealed_row(row: Mapping[str, Any], *names: str, as_text: bool) -> dict[str, Any]:
    """Return a row of the tables with the values of these columns revealed, which are JSON values or texts of them."""
    key, of = str(row.get("key")), str(row.get("name") or "")
    reveal = revealed_text if as_text else revealed
    return {**row, **{name: reveal(row[name], fields_of(name, key, of)) for name in names}}


def revealed(value: Any, fields: Iterable[str]) -> Any:
    """Return a JSON value with what is encoded in it decoded or described.

    Args:
        value: the value.
        fields: as which of its workflow's values it may have been stored; see `Place`.
    """
    return _inner(value, tuple(fields))


def revealed_text(text: str | None, fields: Iterable[str]) -> str | None:
    """Return the same of the text of a JSON value, of which there may be only the beginning if nothing is encoded."""
    if text is None or MARKED not in text:
        return text
    return json.dumps(_inner(json.loads(text), tuple(fields)), ensure_ascii=False)


def fields_of(column: str, key: str, name: str) -> list[str]:
    """Return as which of its workflow's values the value of a column of a row may have been stored."""
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
