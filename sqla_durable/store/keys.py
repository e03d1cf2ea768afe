"""What all inserts under a key share: they return the row that has the key, or raise if it is not visible.

In READ COMMITTED a statement sees what another transaction has inserted as soon as that is committed. In a stronger
isolation level it sees what its snapshot has, and `ON CONFLICT DO NOTHING` of a newer row aborts the transaction
(40001): there the caller sets a savepoint first. Source: PostgreSQL manual, Transaction Isolation; INSERT, ON CONFLICT.
"""

from __future__ import annotations

from collections.abc import Iterable

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import Insert
from sqlalchemy.orm import Session

from sqla_durable.errors import KeyNotVisibleError
from sqla_durable.models.base import Text
from sqla_durable.store.statements import (
    Condition,
    insert_select,
    pg,
    scalar,
    text_literal,
)

MOST_REPEATS = 5
"""How often an insert and a search under a key are repeated: between the two, the row may be deleted."""


class SnapshotKept(Exception):
    """Nothing was inserted: the transaction keeps a snapshot, so the insert must be repeated in a savepoint."""


def sees_the_latest() -> Condition:
    """Return the condition that each statement of the transaction has a snapshot of its own."""
    setting: sa.ColumnElement[str] = text_literal("transaction_isolation")
    return pg.current_setting(setting, type_=Text()) == text_literal("read committed")


def insert_new_keys(table: sa.Table, columns: Iterable[str], source: sa.SelectBase) -> Insert:
    """Insert what a select returns, except rows whose key exists; waits for a transaction that is inserting it."""
    scope = ["workflow_id"] if "workflow_id" in table.c else []
    return insert_select(table, columns, source).on_conflict_do_nothing(
        index_elements=[*scope, "name", "key"], index_where=table.c.key.is_not(None)
    )


def require_the_latest(session: Session) -> None:
    """Raise in a transaction that keeps a snapshot: an insert under a key needs a savepoint there.

    Raises:
        SnapshotKept: it does.
    """
    if not scalar(session, sa.select(sees_the_latest())):
        raise SnapshotKept


def not_visible(what: str, *, name: str, key: str) -> KeyNotVisibleError:
    """Return the error for a key that is taken by a row which is found nowhere."""
    return KeyNotVisibleError(
        f"{what} {name!r} with the key {key!r} cannot be inserted, because it exists, but this session cannot see "
        "it: a policy of row level security hides it, as where two tenants use one key, or it is deleted repeatedly. "
        "Nothing was written, and the transaction is usable. Make the tenant a part of the key, or let the "
        "policy show the row.",
        name=name,
        key=key,
    )


def newer_than_snapshot(what: str, *, name: str, key: str) -> KeyNotVisibleError:
    """Return the error for a key that is taken by a row newer than the transaction's snapshot."""
    return KeyNotVisibleError(
        f"{what} {name!r} with the key {key!r} was inserted or changed by another transaction after this one had its "
        "snapshot (REPEATABLE READ or SERIALIZABLE), which cannot see that. Nothing was written, and the transaction "
        "is usable. Do it in a new transaction, or in READ COMMITTED.",
        name=name,
        key=key,
        is_newer=True,
    )
