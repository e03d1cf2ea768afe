"""The statements of hints: NOTIFY and LISTEN, for connections in autocommit that are in nobody's transaction.

A hint is a channel and a queue. The channel is named after the schema that holds the tables, because notifications
reach the whole database. An empty queue means: look everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from hashlib import sha256
from typing import Any, TypeAlias

from sqlalchemy import Connection, Engine, Text, column, func, literal, select, text
from sqlalchemy.dialects.postgresql import ARRAY

from sqla_durable.models import SCHEMA

Hint: TypeAlias = tuple[str, str]

EVERYWHERE = ""
"""The payload of a hint that names no queue."""

_PREFIX = "sqla_durable."
_LONGEST_CHANNEL = 63  # bytes of an identifier
_LONGEST_PAYLOAD = 7_999  # bytes; PostgreSQL manual, NOTIFY: shorter than 8000


def channel(schema: str) -> str:
    """Give the channel for the tables in a schema; where the name is long or unusual, its hash stands in for it."""
    plain = re.fullmatch(r"\w+", schema, re.ASCII) and len(_PREFIX + schema) <= _LONGEST_CHANNEL
    return _PREFIX + (schema if plain else sha256(schema.encode()).hexdigest()[:32])


def channel_on(bind: Engine | Connection) -> str:
    """Give the channel for the tables where an engine or a connection finds them."""
    names: dict[str, str] = bind.get_execution_options().get("schema_translate_map") or {}
    return channel(names.get(SCHEMA) or SCHEMA)


def hint(on: str, queue: str) -> Hint:
    """Give the hint for a queue on a channel; for a name that is too long for a notification, that for every queue."""
    return on, queue if len(queue.encode(errors="replace")) <= _LONGEST_PAYLOAD else EVERYWHERE


def notify(connection: Connection, hints: Iterable[Hint]) -> None:
    """Send hints by one statement, on a connection in autocommit.

    NOTIFY takes a lock of the whole database until its transaction ends, so it must be the only statement in it. It
    waits for no fsync: a transaction that wrote nothing but its commit record is not flushed. Source: PostgreSQL,
    RecordTransactionCommit in xact.c.
    """
    channels, queues = zip(*sorted(set(hints)), strict=True)
    shape = column("channel", Text()), column("queue", Text())
    each = func.unnest(_texts(channels), _texts(queues)).table_valued(*shape).render_derived(name="hint")
    connection.execute(select(func.pg_notify(each.c.channel, each.c.queue)))


def listen(connection: Connection) -> None:
    """Let a connection in autocommit be notified, until it is closed."""
    name = connection.dialect.identifier_preparer.quote_identifier(channel_on(connection))
    connection.execute(text(f"LISTEN {name}"))


def probe(connection: Connection) -> None:
    """Ask for an answer, whatever it is."""
    connection.execute(select(1))


def _texts(values: Iterable[str]) -> Any:
    return literal(list(values), ARRAY(Text()))
