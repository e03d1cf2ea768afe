"""The commands `list`, `queues`, `workers` and `schedules`: tables of what there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sqla_durable.definitions.texts import duration_text
from sqla_durable.tools.cli.database import App, Schema, Url, session_of
from sqla_durable.tools.cli.filters import Filters, parsed_id, with_filters
from sqla_durable.tools.cli.output import (
    AsJson,
    Quiet,
    error_in_words,
    print_json,
    print_table,
    repeat,
    shown,
)
from sqla_durable.tools.cli.times import duration_option

if TYPE_CHECKING:
    from sqla_durable import Schedule

Row = Mapping[str, Any]

_MOST = 10_000
_WHEN_USED = "key", "by", "tags"
_LIMITS = "concurrency", "per_worker", "per_key"


@with_filters
def list_workflows(
    filters: Filters,
    *,
    limit: Annotated[int, typer.Option(min=1, max=_MOST, help="How many at most.")] = 50,
    after: Annotated[
        str | None, typer.Option("--after", metavar="ID", help="The last id of the page before: those that come next.")
    ] = None,
    watch: Annotated[
        timedelta | None, duration_option("--watch", help="Print again at this interval: 5s.", least="100ms")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    url: Url = None,
    app: App = None,
    schema: Schema = None,
) -> None:
    """List workflows, the newest first.

    Pages are by id. The statuses pending, running, suspended and failed, --tag, --parent, --since and --until are
    found by indexes. All other filters are compared with one workflow after the other, from the newest on, until
    there are enough: what is rare, or is not there, reads all rows. Add --since to them.
    """
    last = None if after is None else parsed_id(after)
    with session_of(url, app, schema) as session:
        from sqla_durable.tools.cli.reading import page

        query = page(filters, limit=limit, after=last)

        def print_page() -> None:
            rows = [dict(each) for each in session.execute(query).mappings()]
            session.rollback()  # a watch keeps no transaction open
            _print_page(rows, limit=limit, as_json=as_json, quiet=quiet)

        repeat(print_page, every=watch)


def _print_page(found: Sequence[Row], *, limit: int, as_json: bool, quiet: bool) -> None:
    rows = found[:limit]
    if as_json:
        print_json(rows)
    elif quiet:
        for each in rows:
            print(each["id"])
    else:
        used = [name for name in _WHEN_USED if any(each[name] for each in rows)]
        columns = ("id", "name", "status", "queue", *used, "created", "waited", "took", "error")
        print_table(columns, (_listed(each, used) for each in rows), cut="error")
    if len(found) > limit:
        typer.echo(f"There are more: --after {rows[-1]['id']}", err=True)


def _listed(row: Row, used: Sequence[str]) -> list[Any]:
    named = [row[each] for each in ("id", "name", "status", "queue", *used)]
    error = error_in_words(row["error_type"], row["error_message"])
    return [*named, row["created_at"], row["waited"], row["took"], error]


def queues(*, as_json: AsJson = False, url: Url = None, app: App = None, schema: Schema = None) -> None:
    """Show each queue: how much waits and runs, its limits, and whether it is paused.

    Counts what is not finished, by indexes; of what is suspended, what has not started yet is delayed.
    """
    with session_of(url, app, schema) as session:
        from sqla_durable.tools.cli.reading import queue_rows

        rows = queue_rows(session)
    if as_json:
        print_json(rows)
        return
    columns = "queue", "pending", "oldest", "running", "delayed", "suspended", "limits", "paused"
    print_table(columns, map(_queue, rows))


def _queue(row: Row) -> tuple[Any, ...]:
    since = row["pending_since"]
    oldest = None if since is None else row["read_at"] - since
    counts = row["pending"], oldest, row["running"], row["delayed"], row["suspended"]
    return row["queue"], *counts, ", ".join(_limits(row)), _pause(row)


def _limits(row: Row) -> list[str]:
    """Return the settings of a queue that are not those of every queue."""
    found = [f"{name} {row[name]}" for name in _LIMITS if row[name] is not None]
    rates = [each for each in ("rate", "key_rate") if row[each] is not None]
    found += [f"{each} {row[each]} in {duration_text(row[f'{each}_period'])}" for each in rates]
    if row["fifo"] is not None:
        found.append(f"fifo {row['fifo']}")
    if row["fair"]:
        found.append("fair")
    if row["while_suspended"] == "hold":
        found.append("while_suspended hold")
    if row["aging"] is not None:
        found.append(f"aging {duration_text(row['aging'])}")
    return found


def _pause(row: Row) -> str:
    found = [] if row["paused_at"] is None else [f"since {shown(row['paused_at'])}"]
    if row["paused_keys"]:
        found.append(f"keys {', '.join(row['paused_keys'])}")
    return "; ".join(found)


def workers(*, as_json: AsJson = False, url: Url = None, app: App = None, schema: Schema = None) -> None:
    """Show each worker: whether its lease is live, what it claims, its slots, and how many workflows it executes."""
    with session_of(url, app, schema) as session:
        from sqla_durable.tools.cli.reading import worker_rows

        rows = worker_rows(session)
    if as_json:
        print_json(rows)
        return
    columns = "worker", "lease", "heartbeat", "queues", "versions", "executing", "slots", "oldest", "up"
    print_table(columns, map(_worker, rows))


def _worker(row: Row) -> tuple[Any, ...]:
    now: datetime = row["read_at"]
    left: datetime = row["lease_expires_at"]
    lease = f"{duration_text(left - now)} left" if row["is_alive"] else f"expired {duration_text(now - left)} ago"
    oldest = None if row["oldest_started_at"] is None else now - row["oldest_started_at"]
    claims = ", ".join(row["queues"]), ", ".join(row["versions"] or ()) or "all"
    beat = f"{duration_text(now - row['heartbeat_at'])} ago"
    return row["name"], lease, beat, *claims, row["executing"], row["slots"], oldest, now - row["started_at"]


def schedules(
    *,
    count: Annotated[int, typer.Option("--next", min=0, max=1_000, metavar="N", help="How many next ticks.")] = 1,
    as_json: AsJson = False,
    url: Url = None,
    app: App = None,
    schema: Schema = None,
) -> None:
    """Show each schedule: what it starts and when, its next ticks, and why it is paused."""
    with session_of(url, app, schema) as session:
        from sqla_durable.tools.cli.reading import schedules as read

        rows = [_schedule(each, count) for each in read(session)]
    if as_json:
        print_json(rows)
        return
    columns = "schedule", "workflow", "times", "last", "next", "paused"
    print_table(columns, (_shown_schedule(each) for each in rows))


def _schedule(row: Schedule, count: int) -> dict[str, Any]:
    columns = {each.key: getattr(row, each.key) for each in row.__table__.columns}
    return {**columns, "next_ticks": _ticks(row, count)}


def _ticks(row: Schedule, count: int) -> list[datetime] | str:
    """Return the next ticks, or why there are none that can be computed."""
    from sqla_durable import manage
    from sqla_durable.errors import ArgumentError

    if row.paused_at is not None or row.ended_at is not None:
        return []
    try:
        return manage.next_ticks(row, count)
    except ArgumentError as error:  # a row by SQL
        return f"never: {error}"


def _shown_schedule(row: Row) -> tuple[Any, ...]:
    times = " | ".join(row["cron"]) if row["cron"] else f"every {duration_text(row['every'])}"
    zone = "" if row["tz"] == "UTC" else f" {row['tz']}"
    ticks = row["next_ticks"]
    following = ticks if isinstance(ticks, str) else ", ".join(map(shown, ticks))
    if row["ended_at"] is not None:
        following = f"ended {shown(row['ended_at'])}"
    paused = ""
    if row["paused_at"] is not None:
        reason = f": {row['pause_reason']}" if row["pause_reason"] else ""
        paused = f"since {shown(row['paused_at'])}{reason}"
    return row["name"], row["workflow"], f"{times}{zone}", row["last_at"], following, paused
