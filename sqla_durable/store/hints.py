"""The statements of hints: NOTIFY and LISTEN, for connections in autocommit, outside of any transaction.

A hint is a channel and a payload. The channel is named after the schema that holds the tables, because notifications
reach the whole database. The payload has a kind and an addressee: `q:mail` is for workers that
claim from the queue `mail`, `w:` and a worker's id for that worker, `s:` for every worker, to deliver what was sent to
workflows; `l:` says that something was committed late or released. The empty payload is for every worker, to poll for
everything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import StrEnum
from hashlib import sha256
from typing import Any, TypeAlias
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY

from sqla_durable.models import SCHEMA
from sqla_durable.models.base import Text
from sqla_durable.store.driver import DriverStatement
from sqla_durable.store.statements import parameter, pg

Hint: TypeAlias = tuple[str, str]

EVERYWHERE = ""
"""The payload of a hint for every worker: to poll for everything."""


_PREFIX = "sqla_durable."
_LONGEST_CHANNEL = 63  # bytes of an identifier
_MOST_SENT = 20  # signals that have a payload each
_LONGEST_PAYLOAD = 7_999  # bytes; PostgreSQL manual, NOTIFY: shorter than 8000


class Kind(StrEnum):
    """What a hint says."""

    QUEUE = "q"
    """There is something in a queue."""
    WORKER = "w"
    """Something has been taken from a worker that it is executing."""
    LATE = "l"
    """Something is where not every poll reads: it was committed late, or released."""
    SENT = "s"
    """Something was sent to a workflow."""


LATE = f"{Kind.LATE}:"
"""The payload of a hint for every worker: to poll for everything, from the beginning of each index."""

SENT = f"{Kind.SENT}:"
"""The payload of a hint for every worker: to deliver what was sent."""

_KINDS = frozenset(each.value for each in Kind)


def channel(schema: str) -> str:
    """Return the channel for the tables in a schema; a long or unusual name is replaced by its hash."""
    plain = re.fullmatch(r"\w+", schema, re.ASCII) and len(_PREFIX + schema) <= _LONGEST_CHANNEL
    return _PREFIX + (schema if plain else sha256(schema.encode()).hexdigest()[:32])


def channel_on(bind: sa.Engine | sa.Connection) -> str:
    """Return the channel for the tables that an engine or a connection finds."""
    names: dict[str, str] = bind.get_execution_options().get("schema_translate_map") or {}
    return channel(names.get(SCHEMA) or SCHEMA)


def to_queue(queue: str) -> str:
    """Return the payload for a queue; for a name that is too long for a notification, that for every worker."""
    payload = f"{Kind.QUEUE}:{queue}"
    return payload if len(payload.encode(errors="replace")) <= _LONGEST_PAYLOAD else EVERYWHERE


def sent_to(workflow_id: UUID, name: str) -> str:
    """Return the payload for a signal to one workflow: every worker delivers, and a wait in memory polls at once."""
    payload = f"{SENT}{workflow_id}:{name}"
    return payload if len(payload.encode(errors="replace")) <= _LONGEST_PAYLOAD else SENT


def merged(payloads: Iterable[str]) -> set[str]:
    """Return the payloads; where many of them are for one signal each, one for all signals instead."""
    found = set(payloads)
    sent = {each for each in found if each.startswith(SENT)}
    return found if len(sent) <= _MOST_SENT else (found - sent) | {SENT}


def to_worker(worker_id: UUID) -> str:
    """Return the payload for one worker: it no longer owns something that it is executing."""
    return f"{Kind.WORKER}:{worker_id}"


def read(payload: str) -> tuple[Kind | None, str]:
    """Return the kind of a payload, and the queue or the worker's id; None where it is for every worker."""
    kind, colon, name = payload.partition(":")
    return (Kind(kind), name) if colon and kind in _KINDS else (None, "")


def notify(connection: sa.Connection, hints: Iterable[Hint]) -> None:
    """Send hints by one statement, on a connection in autocommit.

    NOTIFY takes a lock of the whole database until its transaction ends, so it must be the only statement in it. It
    waits for no fsync: a transaction that wrote nothing but its commit record is not flushed. Source: PostgreSQL,
    RecordTransactionCommit in xact.c.
    """
    channels, payloads = zip(*sorted(set(hints)), strict=True)
    _NOTIFY.rows(connection, {"channels": list(channels), "payloads": list(payloads)})


def listen(connection: sa.Connection) -> None:
    """Subscribe a connection in autocommit to the channel, until it is closed."""
    name = connection.dialect.identifier_preparer.quote_identifier(channel_on(connection))
    connection.execute(sa.text(f"LISTEN {name}"))


def probe(connection: sa.Connection) -> None:
    """Execute a statement that only shows that the connection is alive."""
    connection.execute(sa.select(1))


def _notify_statement() -> Any:
    shape = sa.column("channel", Text()), sa.column("payload", Text())
    each = sa.func.unnest(_texts("channels"), _texts("payloads")).table_valued(*shape).render_derived(name="hint")
    return sa.select(pg.pg_notify(each.c.channel, each.c.payload))


def _texts(name: str) -> Any:
    return parameter(name, ARRAY(Text()))


_NOTIFY = DriverStatement(_notify_statement)
