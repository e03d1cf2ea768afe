"""Starts whose key has a rule, in the caller's transaction: one, and many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from uuid import UUID

from sqlalchemy import inspect
from sqlalchemy.orm import Session

import sqla_durable.api.hints as hints
from sqla_durable.api.sessions import explain_missing_rights, in_savepoint
from sqla_durable.models import Workflow
from sqla_durable.runtime.context import active
from sqla_durable.store import conflicts, starts
from sqla_durable.store.conflicts import RuledStart, Settled
from sqla_durable.store.keys import SnapshotKept, require_the_latest

_CHANGED = [each.key for each in inspect(Workflow).column_attrs if each.key not in ("id", "name")]


def add_ruled(session: Session, start: RuledStart) -> Workflow:
    """Start one, and return its record or that of the workflow that is there for it.

    Raises:
        KeyTakenError: its key is taken, and its rule refuses.
        KeyNotVisibleError: the workflow that has the key cannot be seen.
        UsageError: this is a step of a workflow that would be cancelled.
    """
    new, _ = start
    if session.autoflush:
        session.flush()
    with explain_missing_rights("replacer"):
        try:
            require_the_latest(session)
            done = conflicts.insert(session, [start], own=_own())
        except SnapshotKept:
            with in_savepoint(session, what="workflow", name=new.name, key=new.key):
                done = conflicts.insert(session, [start], own=_own())
    _note(session, done)
    return starts.shown_record(session, done.ids[new.id])


def start_all_ruled(session: Session, ruled: Sequence[RuledStart]) -> dict[UUID, UUID]:
    """Start many, in the order given where some have the same name and key; return all ids. In a savepoint.

    Raises:
        KeyTakenError, KeyNotVisibleError, UsageError: as `add_ruled`.
    """
    done = Settled({}, set(), set())
    with explain_missing_rights("replacer"):
        for wave in _waves(ruled):
            done |= conflicts.insert(session, wave, own=_own())
    _note(session, done)
    return done.ids


def _waves(ruled: Sequence[RuledStart]) -> Iterator[list[RuledStart]]:
    """Yield starts of different names and keys, in the order of these; what is like an earlier one comes later."""
    waves: list[list[RuledStart]] = []
    seen: dict[tuple[str, str | None], int] = {}
    for each in ruled:
        number = seen.get((each[0].name, each[0].key), 0)
        seen[each[0].name, each[0].key] = number + 1
        if number == len(waves):
            waves.append([])
        waves[number].append(each)
    for wave in waves:
        yield sorted(wave, key=lambda start: (start[0].key or "", start[0].name))


def _own() -> UUID | None:
    """Return the workflow in whose step this is."""
    context = active()
    return None if context is None else context.attempt.workflow_id


def _note(session: Session, done: Settled) -> None:
    """Let records that have changed be loaded again when they are asked for, and send hints."""
    for each in done.changed:
        record = session.identity_map.get(session.identity_key(Workflow, each))
        if record is not None:
            session.expire(record, _CHANGED)
    if done.changed:
        hints.announce(session, hints.EVERYWHERE, *map(hints.to_worker, done.workers))
