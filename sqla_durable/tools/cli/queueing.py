"""The commands `queue ...`: pause queues and their keys, let them go on, change their settings, wait for their end."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sqla_durable.errors import ArgumentError
from sqla_durable.tools.cli.acting import Act, counted, warn
from sqla_durable.tools.cli.database import App, Schema, Url, session_of
from sqla_durable.tools.cli.errors import FAILED, CommandError
from sqla_durable.tools.cli.groups import grouped
from sqla_durable.tools.cli.times import parsed_duration

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from sqla_durable import Queue

queue = typer.Typer(
    name="queue",
    help="Pause queues, change their settings, wait until they are empty.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_Name = Annotated[str, typer.Argument(metavar="NAME", help="The queue.")]
_By = Annotated[str | None, typer.Option("--by", metavar="KEY", help="One key of the queue, and not all of it.")]

_COUNTS = "concurrency", "per_worker", "per_key"
_RATES = "rate", "key_rate"
_CHOICES = {"fifo": ("skip", "block"), "while_suspended": ("release", "hold")}
_NONE = "none"
_RATE = re.compile(r"(\d+)/(.+)")
_PAUSE_BETWEEN_POLLS = 0.5  # seconds


@queue.command("pause")
@grouped
def pause(name: _Name, *, by: _By = None, act: Act) -> None:
    """Pause a queue, or one key of it: nothing of it is claimed any more. What runs goes on."""
    _switch(name, by, act, verb="queue pause")


@queue.command("resume")
@grouped
def resume(name: _Name, *, by: _By = None, act: Act) -> None:
    """Let a paused queue, or one key of it, go on."""
    _switch(name, by, act, verb="queue resume")


def _switch(name: str, by: str | None, act: Act, *, verb: str) -> None:
    if by is not None and not by.strip():
        raise CommandError(f"--by {by!r} is blank: name a key, or leave the option out for the whole queue.")
    what = f"queue {name!r}" if by is None else f"key {by!r} of queue {name!r}"
    pauses = verb == "queue pause"
    with act.session() as session:
        from sqla_durable import manage

        change = None if by is None else (manage.pause_key if pauses else manage.resume_key)
        with act.transaction(session):
            was_paused = _is_paused(session, name, by)
            if change is not None and by is not None:
                change(session, name, by)
            else:
                (manage.pause_queue if pauses else manage.resume_queue)(session, name)
            changed = was_paused != pauses
            if changed:
                act.note_subject(session, name, verb, {"by": by})
        _warn_of_unknown(session, name)
    did, had = ("is paused", "was already paused") if pauses else ("goes on", "was not paused")
    message = f"{what} {did if changed else had}."
    act.print(message[0].upper() + message[1:], value=name, verb=verb, queue=name, by=by, changed=changed)


def _is_paused(session: Session, name: str, by: str | None) -> bool:
    from sqla_durable import Queue
    from sqla_durable.models import QueueKey

    row = session.get(Queue, name) if by is None else session.get(QueueKey, (name, by))
    return row is not None and row.paused_at is not None


@queue.command("set")
@grouped
def set_(
    name: _Name,
    *,
    concurrency: Annotated[str | None, typer.Option(metavar="N", help="How many run at once.")] = None,
    per_worker: Annotated[str | None, typer.Option(metavar="N", help="How many run at once in a worker.")] = None,
    per_key: Annotated[str | None, typer.Option(metavar="N", help="How many run at once with the same key.")] = None,
    rate: Annotated[str | None, typer.Option(metavar="N/PERIOD", help="How many start in a period: 100/1m.")] = None,
    key_rate: Annotated[str | None, typer.Option(metavar="N/PERIOD", help="The same, with the same key.")] = None,
    while_suspended: Annotated[
        str | None, typer.Option(metavar="release|hold", help="Whether what is suspended keeps its place.")
    ] = None,
    fifo: Annotated[str | None, typer.Option(metavar="skip|block", help="One of a key at a time, in order.")] = None,
    fair: Annotated[bool | None, typer.Option("--fair/--no-fair", help="Whether keys take turns.")] = None,
    weight: Annotated[
        list[str] | None, typer.Option(metavar="KEY=N", help="How many places a key gets in its turn; repeatable.")
    ] = None,
    aging: Annotated[
        str | None, typer.Option(metavar="PERIOD", help="For each of it that it waits, a priority higher.")
    ] = None,
    act: Act,
) -> None:
    """Change settings of a queue; those that are not given stay as they are, and `none` removes one.

    Where the code declares the queue, the next worker that starts brings its settings back: change them there too.
    """
    texts = {
        "concurrency": concurrency,
        "per_worker": per_worker,
        "per_key": per_key,
        "rate": rate,
        "key_rate": key_rate,
        "while_suspended": while_suspended,
        "fifo": fifo,
        "aging": aging,
    }
    given: dict[str, Any] = {each: _parsed(each, text) for each, text in texts.items() if text is not None}
    given |= {} if fair is None else {"fair": fair}
    if not given and not weight:
        raise CommandError("nothing is to be changed: add an option, such as --concurrency 10.")
    with act.session() as session:
        from sqla_durable import Queue, manage

        with act.transaction(session):
            found = session.get(Queue, name, with_for_update={"key_share": True})
            before, weights_before = _settings(found), _weights(found)
            weights = {**weights_before, **_parsed_weights(weight)} if weight else None
            try:
                row = manage.put_queue(session, name, **{**before, **given}, weights=weights)
            except ArgumentError as error:
                raise CommandError(_in_options(str(error))) from None
            session.refresh(row)
            after = _settings(row)
            changes = {
                each: {"from": _said(each, before[each]), "to": _said(each, after[each])}
                for each in after
                if before[each] != after[each]
            }
            changes |= {} if weights is None else _changed_weights(weights_before, weights)
            if changes or found is None:
                act.note_subject(session, name, "queue set", changes)
        if found is None:
            _warn_of_unknown(session, name)
    _print_changes(name, changes, act)


def _in_options(message: str) -> str:
    """Return a message about settings with their names as options."""
    for each in (*_COUNTS, *_RATES, "while_suspended", "fifo", "fair", "aging", "weights"):
        option = f"--{each.replace('_', '-').removesuffix('s') if each == 'weights' else each.replace('_', '-')}"
        message = re.sub(rf"\b{each}(\[0\])?=True", option, message)
        message = re.sub(rf"\b{each}(\[\d\])?=", f"{option} ", message)
        message = re.sub(rf"(?<![-\w]){each}(?=[ :,.]|$)", option, message) if "_" in each else message
    return message


def _warn_of_unknown(session: Session, name: str) -> None:
    """Say that a name may be misspelt: nothing waits or runs in such a queue, and no worker claims from it."""
    if not _is_known(session, name):
        warn([f"Nobody claims from a queue {name!r}, and nothing waits in it: is that its name?"])


def _is_known(session: Session, name: str) -> bool:
    """Return whether a queue has anything unfinished in it, or a worker claims from it."""
    from sqlalchemy import select

    from sqla_durable import Workflow, WorkflowStatus
    from sqla_durable.definitions.queues import fitting
    from sqla_durable.models import Worker
    from sqla_durable.store.statements import status_literal

    for each in (WorkflowStatus.PENDING, WorkflowStatus.RUNNING, WorkflowStatus.SUSPENDED):
        found = select(Workflow.id).where(Workflow.queue == name, Workflow.status == status_literal(each)).limit(1)
        if session.scalar(found) is not None:
            return True
    patterns = [each for queues in session.scalars(select(Worker.queues)) for each in queues]
    return fitting(patterns).fullmatch(name) is not None


def _settings(row: Queue | None) -> dict[str, Any]:
    """Return the settings of a queue as `put_queue` takes them, without weights; the defaults if it has no row."""
    if row is None:
        return {**dict.fromkeys((*_COUNTS, *_RATES, "fifo", "aging")), "while_suspended": "release", "fair": False}
    return {
        "concurrency": row.concurrency,
        "per_worker": row.per_worker,
        "per_key": row.per_key,
        "rate": None if row.rate is None else (row.rate, row.rate_period),
        "key_rate": None if row.key_rate is None else (row.key_rate, row.key_rate_period),
        "while_suspended": row.while_suspended,
        "fifo": row.fifo,
        "fair": row.fair,
        "aging": row.aging,
    }


def _weights(row: Queue | None) -> dict[str, int]:
    return {} if row is None else {each.by: each.weight for each in row.keys if each.weight != 1}


def _changed_weights(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, Any]:
    return {
        f"weight of {key}": {"from": before.get(key, 1), "to": after[key]}
        for key in after
        if before.get(key, 1) != after[key]
    }


def _said(name: str, value: Any) -> Any:
    """Return a setting as the options write it: JSON knows numbers, texts and truth values."""
    if name in _RATES and value is not None:
        return f"{value[0]}/{_period(value[1])}"
    return _period(value) if isinstance(value, timedelta) else value


def _period(value: timedelta) -> str:
    """Return a duration exactly, in the largest unit of which it is a whole number."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if not value % timedelta(seconds=size):
            return f"{value // timedelta(seconds=size)}{unit}"
    return f"{value.total_seconds():g}s"


def _print_changes(name: str, changes: Mapping[str, Any], act: Act) -> None:
    listed = ", ".join(
        f"{each.replace('_', '-')} {_in_words(change['from'])} → {_in_words(change['to'])}"
        for each, change in changes.items()
    )
    message = f"Queue {name!r}: {listed}." if changes else f"Queue {name!r} is unchanged."
    act.print(message, value=name, verb="queue set", queue=name, changes=changes)


def _in_words(value: object) -> object:
    match value:
        case None:
            return _NONE
        case bool():
            return "yes" if value else "no"
        case _:
            return value


def _parsed(name: str, text: str) -> Any:
    option = f"--{name.replace('_', '-')}"
    if name in _CHOICES and text not in (*_CHOICES[name], _NONE):
        raise CommandError(f"{option} {text!r} is none of {', '.join(_CHOICES[name])}; {_NONE} removes it.")
    if text == _NONE:
        return "release" if name == "while_suspended" else None
    if name in _COUNTS:
        return _parsed_number(option, text)
    if name in _RATES:
        matched = _RATE.fullmatch(text)
        if matched is None:
            raise CommandError(f"{option} {text!r} is not N/PERIOD, such as 100/1m or 5/1s.")
        period = matched[2] if matched[2][0].isdigit() else f"1{matched[2]}"
        return int(matched[1]), parsed_duration(option, period)
    return parsed_duration(option, text) if name == "aging" else text


def _parsed_number(option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise CommandError(f"{option} {text!r} is no number; {_NONE} removes the limit.") from None


def _parsed_weights(given: Sequence[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for each in given:
        key, _, number = each.rpartition("=")
        if not key:
            raise CommandError(f"--weight {each!r} is not KEY=N, such as ada=3.")
        if not number.isdecimal() or int(number) < 1:
            raise CommandError(f"--weight {each!r} has no number of 1 or more after the key: write it as ada=3.")
        found[key] = int(number)
    return found


@queue.command("drain")
def drain(
    name: _Name,
    *,
    timeout: Annotated[
        str | None, typer.Option("--timeout", metavar="DURATION", help="How long to wait: 30s, 5m, 2h.")
    ] = None,
    url: Url = None,
    app: App = None,
    schema: Schema = None,
) -> None:
    """Wait until nothing of a queue is pending or running; of one that is paused, until nothing is running.

    Changes nothing. What is suspended or delayed is not waited for. The exit code is 1 if the time is over before.
    """
    until = None if timeout is None else time.monotonic() + parsed_duration("--timeout", timeout).total_seconds()
    with session_of(url, app, schema) as session:
        _warn_of_unknown(session, name)
        while True:
            pending, running = _unfinished(session, name)
            paused = _is_paused(session, name, None)
            session.rollback()
            if running == 0 and (paused or pending == 0):
                if pending:
                    warn([f"Queue {name!r} is paused, and {counted(pending)} {_are(pending)} pending in it."])
                return
            if until is not None and time.monotonic() >= until:
                break
            time.sleep(_PAUSE_BETWEEN_POLLS)
    warn([f"After {timeout} {counted(pending)} of queue {name!r} {_are(pending)} pending, and {running:,} running."])
    raise typer.Exit(FAILED)


def _unfinished(session: Session, name: str) -> tuple[int, int]:
    """Return how many workflows of a queue are pending, and how many run."""
    from sqlalchemy import select

    from sqla_durable import Workflow, WorkflowStatus
    from sqla_durable.store.statements import count_rows, status_literal

    pending, running = (
        select(count_rows()).where(Workflow.queue == name, Workflow.status == status_literal(each)).scalar_subquery()
        for each in (WorkflowStatus.PENDING, WorkflowStatus.RUNNING)
    )
    row = session.execute(select(pending, running)).one()
    return row[0], row[1]


def _are(number: int) -> str:
    return "is" if number == 1 else "are"
