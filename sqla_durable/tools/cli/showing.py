"""The command `show`: all that is known of one workflow. What is read for it is in `details`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sqla_durable.definitions.texts import duration_text
from sqla_durable.tools.cli.database import App, Schema, Url, session_of
from sqla_durable.tools.cli.filters import parsed_id
from sqla_durable.tools.cli.output import AsJson, error_in_words, print_json, print_lines, print_table, shown

if TYPE_CHECKING:
    from sqla_durable.tools.cli.details import Details

_WIDTH = 10  # of the names of facts
_STEP_COLUMNS = "#", "step", "status", "tries", "started", "took", "outcome"
_FACTS = "queue", "key", "former_key", "tags", "version", "schedule", "parent_id", "forked_from", "headers"
_AS_TEXT = "input", "output", "value", "payload", "details"


def show(
    workflow_id: Annotated[str, typer.Argument(metavar="ID", help="The workflow's id.")],
    *,
    full: Annotated[bool, typer.Option("--full", help="Show values, lists and the traceback whole.")] = False,
    as_json: AsJson = False,
    url: Url = None,
    app: App = None,
    schema: Schema = None,
) -> None:
    """Show one workflow: what it has done, what it waits for, and why it does not go on.

    What it waits for is in words, and so is why it does not start while it is pending. Of a step that is being
    executed, what its worker's last heartbeat said is shown: steps that are shorter than the time between two
    heartbeats are only in the list of steps.
    Values are cut at 500 characters, steps to the last 200, children to 50 and three levels; --full shows more.
    Every query is by id, however many workflows there are.
    """
    wanted = parsed_id(workflow_id)
    with session_of(url, app, schema) as session:
        from sqla_durable.tools.cli.details import read

        found = read(session, wanted, whole=full or as_json)
    if as_json:
        print_json([_as_object(found)])
    else:
        _print(found, full=full)


def _as_object(found: Details) -> dict[str, Any]:
    rest = {name: value for name, value in asdict(found).items() if name not in ("workflow", "children", "read_at")}
    return {
        **found.workflow,
        "read_at": found.read_at,
        **rest,
        "children": found.children,
    }


def _print(found: Details, *, full: bool) -> None:
    row = found.workflow
    print(f"{shown(row['name'])} {row['id']}")
    for name, value in _facts(found):
        _print_fact(name, value)
    for name in ("input", "output"):
        _print_value(name, row[name], full=full)
    _print_error(row["error"], full=full)
    _print_list("Waits", found.waits)
    _print_list("Does not start, because", found.reasons)
    _print_list("Runs now", _running(found))
    _print_steps(found, full=full)
    _print_children(found)
    _print_others(found, full=full)


def _facts(found: Details) -> Iterator[tuple[str, Any]]:
    row = found.workflow
    yield "status", _status(row, found.read_at)
    for name in _FACTS:
        if row[name] is not None:
            yield name.removesuffix("_id").replace("_", " "), row[name]
        if name == "queue" and row["priority"]:
            yield "priority", row["priority"]
        if name == "queue" and row["by"] is not None:
            yield "by", row["by"]
    yield "created", row["created_at"]
    if row["started_at"] is not None:
        yield "started", f"{shown(row['started_at'])}, after {duration_text(row['started_at'] - row['created_at'])}"
    if row["finished_at"] is not None:
        since = row["started_at"] or row["created_at"]
        yield "finished", f"{shown(row['finished_at'])}, after {duration_text(row['finished_at'] - since)}"
    elif row["deadline_at"] is not None:
        yield "deadline", row["deadline_at"]
    if row["attempt"] > 1:
        crashes = f", crashes in a row: {row['crashes']}" if row["crashes"] else ""
        yield "attempt", f"{row['attempt']}{crashes}"
    if row["cancellation"] is not None:
        yield "saga", row["cancellation"]


def _status(row: Mapping[str, Any], now: datetime) -> str:
    """Return the status, with how long it has not changed or how long ago it came, as far as the row says."""
    match str(row["status"]):
        case "pending":
            return f"pending for {duration_text(now - row['enqueued_at'])}"
        case "succeeded" | "failed" | "cancelled" as status:
            return f"{status} {duration_text(now - row['finished_at'])} ago"
        case status:
            until = f", until {shown(row['wake_at'])} at the latest" if row["wake_at"] is not None else ""
            return f"{status}{until}"


def _running(found: Details) -> Iterator[str]:
    row, worker, now = found.workflow, found.worker, found.read_at
    if str(row["status"]) != "running":
        return
    if worker is None:
        yield "in an executor, or on a worker whose row is gone"
        return
    beat = f"last heartbeat {duration_text(now - worker['heartbeat_at'])} ago"
    if worker["is_alive"]:
        yield f"on worker {worker['name']!r}, {beat}"
    else:
        dead = duration_text(now - worker["lease_expires_at"])
        yield f"on worker {worker['name']!r}, whose lease expired {dead} ago ({beat}): another one reclaims it"
    for each in found.running:
        yield f"step {each.step!r}, try {each.try_number}, running for {duration_text(now - each.since)}"


def _print_fact(name: str, value: object) -> None:
    print(f"  {name:<{_WIDTH}} {shown(value)}")


def _print_value(name: str, value: object, *, full: bool) -> None:
    if value is None:
        return
    if not full:
        _print_fact(name, _cut(str(value)))
        return
    print(f"  {name}")
    print_lines(json.dumps(value, indent=2, ensure_ascii=False), indent="    ")


def _cut(text: str) -> str:
    from sqla_durable.tools.cli.details import MOST_CHARACTERS

    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}… (--full shows all)"


def _in_words(error: Mapping[str, Any] | None, *, full: bool = False) -> str:
    if not error:
        return ""
    text = error_in_words(error["type"], error.get("message"))
    return text if full else _cut(text)


def _print_error(error: Mapping[str, Any] | None, *, full: bool) -> None:
    if not error:
        return
    _print_fact("error", _in_words(error, full=full))
    if full and error.get("traceback"):
        print_lines(str(error["traceback"]), indent="    ")


def _print_list(title: str, lines: Any) -> None:
    given = list(lines)
    if given:
        print(f"\n{title}")
        print_lines("\n".join(shown(each) for each in given))


def _print_steps(found: Details, *, full: bool) -> None:
    if not found.steps:
        return
    print("\nSteps")
    if found.steps_before:
        print(f"  {found.steps_before:,} earlier ones are not shown; --full shows all.")
    print_table(_STEP_COLUMNS, (_step(each, found.read_at, full=full) for each in found.steps), cut="outcome")


def _step(step: Mapping[str, Any], now: datetime, *, full: bool) -> tuple[Any, ...]:
    is_over = str(step["status"]) in ("succeeded", "failed")
    took: timedelta = (step["finished_at"] if is_over else now) - step["started_at"]
    outcome = _in_words(step["error"], full=full)
    if not outcome:
        value = step["output"] if is_over else step["details"]
        outcome = "" if value is None else shown(value) if full else _cut(str(value))
    return step["position"], step["key"], step["status"], step["tries"], step["started_at"], took, outcome


def _print_children(found: Details) -> None:
    if not found.children:
        return
    print("\nChildren")
    for each in found.children:
        detached = ", detached" if each["detached"] else ""
        error = _in_words(each["error"])
        line = f"{each['name']} {each['id']} {each['status']}{detached}{f' {error}' if error else ''}"
        print(f"{'  ' * each['depth']}{shown(line)}")
    if found.has_more_children:
        print(f"  and more: `list --parent {found.workflow['id']}` has all that it has started itself.")


def _print_others(found: Details, *, full: bool) -> None:
    _print_rows("Events", found.events, ("key", "value", "created_at"), full=full)
    _print_rows("Sent and not taken", found.signals, ("name", "key", "payload", "created_at"), full=full)
    _print_rows("What operators did", found.audit, ("at", "who", "verb", "reason", "details"), full=full)


def _print_rows(title: str, rows: Any, columns: tuple[str, ...], *, full: bool) -> None:
    from sqla_durable.tools.cli.details import MOST_OTHERS

    if not rows:
        return
    print(f"\n{title}")
    kept = rows if full else rows[:MOST_OTHERS]
    texts = (
        [_cut(shown(each[column])) if column in _AS_TEXT and not full else each[column] for column in columns]
        for each in kept
    )
    print_table(columns, texts)
    if len(rows) > len(kept):
        print("  and more: --full shows all.")
