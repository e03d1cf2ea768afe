"""The checks of what workers are to do: who has died, what nobody claims, and what should have gone on long ago."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from shlex import quote
from typing import Any

from sqlalchemy import Row

from sqla_durable.definitions.queues import fitting
from sqla_durable.definitions.texts import duration_text, time_text
from sqla_durable.store import backlog, catalogue, diagnosis
from sqla_durable.store.diagnosis import MOST
from sqla_durable.tools.doctor.findings import (
    Code,
    Examined,
    Finding,
    are,
    error,
    note,
    warning,
)

LONG = 12
"""How many times the patience a pause or a backlog may last: one hour, by default."""

_START = "Start a worker: sqla-durable worker MODULE:ATTRIBUTE."
_MAINTAIN = (
    f"{_START} If one is live, its log says why: the rows may be locked by a transaction that is among the other "
    "findings."
)


def check_workers(examined: Examined) -> Iterator[Finding]:
    """Find workers that have died, and what runs under such a worker or under one that is not in the table."""
    holding = diagnosis.holders(examined.session)
    for row in holding:
        values = {"worker": row.worker_id, "workflows": row.workflows}
        running = are(row.workflows, row.workflows + 1)
        if row.over_for is None:
            yield warning(
                Code.UNKNOWN_WORKER,
                f"{running} running under the worker {row.worker_id}, which is not in the table of workers: its row "
                "was deleted, or the status was written by hand.",
                f"A live worker reclaims them within minutes. {_START}",
                **values,
            )
        elif row.over_for >= examined.patience:
            yield error(
                Code.UNRECLAIMED,
                f"{running} running under the worker {row.name!r}, whose lease expired "
                f"{duration_text(row.over_for)} ago: no other worker has reclaimed them.",
                _MAINTAIN,
                **values,
                name=row.name,
            )
    still = {row.worker_id for row in holding}
    for row in diagnosis.workers(examined.session):
        if row.over_for >= examined.patience and row.id not in still:
            yield note(
                Code.DEAD_WORKER,
                f"the worker {row.name!r} died without releasing anything: its lease expired "
                f"{duration_text(row.over_for)} ago. What it executed was reclaimed.",
                "If it was not killed on purpose, see its log. Its row is deleted after a day by a live worker.",
                worker=row.id,
                name=row.name,
            )


def check_backlog(examined: Examined) -> Iterator[Finding]:
    """Find what has been pending for long because no live worker claims it, or although one does."""
    rows = diagnosis.heads(examined.session, backlog.queue_names(examined.session), examined.patience)
    live = [each for each in diagnosis.workers(examined.session) if each.is_alive and each.queues]
    now = catalogue.server(examined.session).read_at
    yield from of_backlog(rows, live, long_ago=now - LONG * examined.patience)


def of_backlog(rows: Sequence[Any], live: Sequence[Any], *, long_ago: Any) -> Iterator[Finding]:
    """Return what keeps each kind of pending workflow from being claimed; the kinds of one queue, if none claims it."""
    if rows and not live:
        since = min(row.since for row in rows)
        number = are(sum(row.workflows for row in rows), MOST)
        text = f"{number} pending, the first since {time_text(since)}, and no worker is alive."
        yield error(Code.NO_WORKER, text, _START, since=since, queues=sorted({row.queue for row in rows}))
        return
    unclaimed: set[str] = set()
    for row in rows:
        of_queue = [each for each in live if fitting(each.queues).fullmatch(row.queue)]
        if of_queue:
            yield from _of_claimed_queue(row, of_queue, long_ago)
        elif row.queue not in unclaimed:
            unclaimed.add(row.queue)
            yield _unclaimed(row, live)


def _unclaimed(row: Any, live: Sequence[Any]) -> Finding:
    claimed = _listed(queue for each in live for queue in each.queues)
    return warning(
        Code.QUEUE_UNCLAIMED,
        f"no live worker claims from the queue {row.queue!r}, where {row.workflow!r} has been waiting since "
        f"{time_text(row.since)}; they claim from {claimed}.",
        f"sqla-durable worker MODULE:ATTRIBUTE --queue {row.queue!r}",
        queue=row.queue,
        since=row.since,
    )


def _of_claimed_queue(row: Any, of_queue: Sequence[Any], long_ago: Any) -> Iterator[Finding]:
    values = {"queue": row.queue, "workflow": row.workflow, "version": row.version, "since": row.since}
    knowing = [each for each in of_queue if each.names is None or row.workflow in each.names]
    waits = f"{are(row.workflows, diagnosis.HEAD)} pending since {time_text(row.since)}"
    if not knowing:
        yield warning(
            Code.NAME_UNCLAIMED,
            f"no live worker of the queue {row.queue!r} knows a workflow named {row.workflow!r}: {waits}.",
            "Start a worker whose code defines it; or cancel what was renamed: sqla-durable cancel.",
            **values,
        )
    elif row.version is not None and not any(not each.versions or row.version in each.versions for each in knowing):
        yield warning(
            Code.VERSION_UNCLAIMED,
            f"no live worker of the queue {row.queue!r} claims {row.workflow!r} of version {row.version!r}: {waits}.",
            f"sqla-durable worker MODULE:ATTRIBUTE --version {row.version!r}, or another version for them: see "
            "docs/changing.md.",
            **values,
        )
    elif row.since < long_ago:
        yield note(
            Code.BACKLOG,
            f"of {row.workflow!r} in the queue {row.queue!r}, which live workers claim from, {waits}.",
            "sqla-durable show says what keeps one; more workers or slots, if they are all taken.",
            **values,
        )


def check_timers(examined: Examined) -> Iterator[Finding]:
    """Find suspended workflows whose time has come and that nobody wakes."""
    rows = diagnosis.due_timers(examined.session, examined.patience)
    yield from _standing(Code.TIMERS_OVERDUE, rows, "suspended, and should have gone on")


def check_deadlines(examined: Examined) -> Iterator[Finding]:
    """Find unfinished workflows whose deadline has passed and that nobody lets fail."""
    rows = diagnosis.overdue(examined.session, examined.patience)
    yield from _standing(Code.DEADLINES_OVERDUE, rows, "unfinished, and should have failed")


def _standing(code: Code, rows: Sequence[Row[Any]], what: str) -> Iterator[Finding]:
    if rows:
        first = rows[0]
        found = f"{are(len(rows), MOST)} {what}, the first at {time_text(first.since)}: {first.name} {first.id}."
        yield error(code, found, _MAINTAIN, workflows=len(rows), since=first.since, first=first.id)


def check_signals(examined: Examined) -> Iterator[Finding]:
    """Find signals that nobody delivers."""
    rows = diagnosis.undelivered(examined.session, examined.patience)
    if rows:
        first = rows[0]
        number = are(len(rows), MOST, "signal")
        yield error(
            Code.UNDELIVERED,
            f"{number} not delivered, the first sent at {time_text(first.since)}: {first.name!r} to "
            f"{first.workflow_id}.",
            _MAINTAIN,
            signals=len(rows),
            since=first.since,
            first=first.workflow_id,
        )


def check_waits(examined: Examined) -> Iterator[Finding]:
    """Find workflows that wait for children that have all ended."""
    rows = diagnosis.waits_over(examined.session, examined.patience)
    if rows:
        yield error(
            Code.WAIT_OVER,
            f"{are(len(rows), MOST)} waiting for children that have ended, and nobody notified them: "
            f"{rows[0].name} {rows[0].id} is the first. SQL that ends or deletes a child leaves no notice.",
            f"A live worker repairs it within minutes. {_START}",
            workflows=len(rows),
            first=rows[0].id,
        )


def check_pauses(examined: Examined) -> Iterator[Finding]:
    """Find queues and keys that were paused long ago and have work behind them."""
    long = LONG * examined.patience
    for row in diagnosis.paused_queues(examined.session, long):
        yield warning(
            Code.QUEUE_PAUSED,
            f"the queue {row.name!r} has been paused since {time_text(row.paused_at)}: "
            f"{are(row.workflows, MOST)} pending.",
            f"sqla-durable queue resume {quote(row.name)}",
            queue=row.name,
            paused_at=row.paused_at,
            workflows=row.workflows,
        )
    for row in diagnosis.paused_keys(examined.session, long):
        yield warning(
            Code.KEY_PAUSED,
            f"the key {row.by!r} of the queue {row.queue!r} has been paused since {time_text(row.paused_at)}: "
            f"{are(row.workflows, MOST)} pending.",
            f"sqla-durable queue resume {quote(row.queue)} --by {quote(row.by)}",
            queue=row.queue,
            by=row.by,
            paused_at=row.paused_at,
            workflows=row.workflows,
        )


def check_blocked(examined: Examined) -> Iterator[Finding]:
    """Find failed workflows that keep those of their key from starting, in a queue with fifo="block"."""
    for row in diagnosis.blocked_keys(examined.session, examined.patience):
        yield warning(
            Code.KEY_BLOCKED,
            f"the workflow {row.name} {row.id} failed at {time_text(row.finished_at)} and blocks the key {row.by!r} of "
            f"the queue {row.queue!r}: {are(row.workflows, MOST)} pending.",
            "sqla-durable retry lets it go on, and sqla-durable delete removes it.",
            workflow=row.id,
            queue=row.queue,
            by=row.by,
            workflows=row.workflows,
        )


def check_schedules(examined: Examined) -> Iterator[Finding]:
    """Find schedules whose tick has passed and that nobody fires, and those that no code declares any more."""
    for row in diagnosis.schedules(examined.session, examined.patience):
        if row.paused_at is None:
            yield error(
                Code.SCHEDULE_OVERDUE,
                f"the schedule {row.name!r} of {row.workflow!r} has been due since {time_text(row.since)}, and no "
                "worker has looked at it.",
                _MAINTAIN,
                schedule=row.name,
                since=row.since,
            )
        else:
            yield note(
                Code.SCHEDULE_UNDECLARED,
                f"the schedule {row.name!r} of {row.workflow!r} has been paused since {time_text(row.paused_at)}: the "
                "code no longer declares it.",
                "Declare it again, or delete its row from the table schedule.",
                schedule=row.name,
                paused_at=row.paused_at,
            )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(set(names))))
