"""The commands that start workflows and send to them: start, signal and update. None of them needs the code."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sqla_durable.tools.cli.acting import Act, parsed_json, parsed_object
from sqla_durable.tools.cli.errors import CommandError
from sqla_durable.tools.cli.filters import parsed_id, parsed_tags
from sqla_durable.tools.cli.groups import grouped
from sqla_durable.tools.cli.times import duration_option, parsed_duration

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy.orm import Session

    from sqla_durable.api.options import StartOptions
    from sqla_durable.api.workflows import BoundWorkflow

_Id = Annotated[str, typer.Argument(metavar="ID", help="The workflow.")]
_Payload = Annotated[str, typer.Argument(metavar="JSON", help="What is sent; - reads stdin.")]
_Key = Annotated[str | None, typer.Option("--key", help="An idempotency key: what has it is sent once.")]


@grouped
def start(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The workflow's name.")],
    *,
    arguments: Annotated[
        str, typer.Option("--input", metavar="JSON", help="Its arguments by name, an object; - reads stdin.")
    ] = "{}",
    key: Annotated[str | None, typer.Option("--key", help="Its key: what has it is started once.")] = None,
    queue: Annotated[str | None, typer.Option("--queue", help="Its queue; by default that of the code, if given.")] = (
        None
    ),
    by: Annotated[str | None, typer.Option("--by", help="Its key in the queue.")] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", metavar="NAME=VALUE", help="A tag; repeatable.")] = None,
    priority: Annotated[int, typer.Option("--priority", help="Lower is served first.")] = 0,
    delay: Annotated[
        str | None, typer.Option("--delay", metavar="DURATION", help="How long after now it is due: 30s, 5m, 2h.")
    ] = None,
    act: Act,
) -> None:
    """Start a workflow by its name, and print its id.

    With --app its arguments are checked by the code; without, by the worker that executes it, and the queue is
    'default' unless --queue says another.
    """
    with act.session() as session:
        from sqla_durable.api.options import StartOptions
        from sqla_durable.api.workflows import start as start_bound

        options = StartOptions(
            key=key,
            queue=queue,
            by=by,
            tags=parsed_tags(tag) or None,
            priority=priority,
            delay=None if delay is None else parsed_duration("--delay", delay),
        )
        given = parsed_object("--input", arguments)
        bound = _unchecked(name, given, options) if act.app is None else _checked(act.app, name, given, options)
        with act.transaction(session):
            workflow = start_bound(session, bound)
            session.flush()
            workflow_id, is_new = workflow.id, workflow.id == bound.new.id
            details = {"key": key, "queue": bound.new.queue, "by": by, "tags": options.tags, "delay": delay}
            act.note_workflows(session, [workflow_id] if is_new else [], "start", details)
    if not is_new and not act.quiet:
        typer.echo(f"A workflow {name!r} with the key {key!r} was there: nothing was started.", err=True)
    if is_new and act.app is None and queue is None and not act.quiet:
        typer.echo(f"Started in queue {bound.new.queue!r}: without --app that of the code is not known.", err=True)
    act.print(str(workflow_id), value=workflow_id, verb="start", id=workflow_id, name=name, is_new=is_new)


def _unchecked(name: str, arguments: dict[str, Any], options: StartOptions) -> BoundWorkflow:
    """Return a start of which nothing but its name is known."""
    from uuid_utils.compat import uuid7

    from sqla_durable.api.workflows import BoundWorkflow
    from sqla_durable.definitions.blobs import blobs_in
    from sqla_durable.definitions.checks import require_text
    from sqla_durable.definitions.codec import Codec
    from sqla_durable.store import NewWorkflow

    require_text(name, what="workflow's name")
    new = NewWorkflow(
        id=uuid7(),
        name=name,
        input=Codec.inferred(what=f"input of workflow {name!r}").encode(arguments),
        queue=options.queue or "default",
        priority=options.priority,
        key=options.key,
        delay=options.delay.total_seconds() if options.delay else None,
        by=options.by,
        tags=None if options.tags is None else dict(options.tags),
    )
    return BoundWorkflow(new, blobs=blobs_in(new.input))


def _checked(app: str, name: str, arguments: dict[str, Any], options: StartOptions) -> BoundWorkflow:
    """Return a start whose arguments fit the code.

    Raises:
        CommandError: they do not.
    """
    from sqla_durable.api.workflows import WorkflowFunction
    from sqla_durable.errors import DecodingError
    from sqla_durable.tools.cli.target import load

    definition = load(app).registry.workflow(name)
    try:
        decoded = definition.arguments.decode(json.dumps(arguments))
    except DecodingError as error:
        raise CommandError(f"--input does not fit workflow {name!r}: {_without_stored(str(error))}") from None
    return WorkflowFunction[..., Any](definition, options).bind(**decoded)


def _without_stored(message: str) -> str:
    """Return what does not fit, in words about what is given and not about what is stored."""
    return message.replace("the stored ", "the ").replace(" that the code has now", "").partition(". Restore ")[0]


def _warn_of_other_names(session: Session, workflow_id: UUID, name: str) -> None:
    """Say what a suspended workflow waits for, if it is not this signal."""
    from sqla_durable import Workflow

    row = session.get(Workflow, workflow_id)
    awaited = [each["signal"] for each in (row.awaits if row else None) or () if "signal" in each]
    if awaited and name not in awaited:
        names = ", ".join(repr(each) for each in awaited if not each.startswith("#")) or "something else"
        typer.echo(f"It does not wait for {name!r} now, but for {names}: the signal is kept until it does.", err=True)


@grouped
def signal(
    workflow: _Id,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The signal's name.")],
    payload: _Payload = "null",
    *,
    key: _Key = None,
    act: Act,
) -> None:
    """Send a signal to a workflow."""
    workflow_id, given = parsed_id(workflow), parsed_json("the payload", payload)
    with act.session() as session:
        from sqla_durable import send_signal
        from sqla_durable.store.signals import sent_with_key

        with act.transaction(session):
            known = key is not None and bool(sent_with_key(session, [workflow_id], name=name, key=key))
            send_signal(session, workflow_id, name, given, key=key)
            if not known:
                act.note_workflows(session, [workflow_id], "signal", {"signal": name, "key": key})
        if not act.quiet:
            with session.begin():
                _warn_of_other_names(session, workflow_id, name)
    done = "was sent before, with this key" if known else "was sent"
    act.print(
        f"Signal {name!r} {done}.", value=workflow_id, verb="signal", id=workflow_id, signal=name, is_new=not known
    )


@grouped
def update(
    workflow: _Id,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The update's name.")],
    payload: _Payload = "null",
    *,
    key: _Key = None,
    wait: Annotated[
        timedelta | None, duration_option("--wait", help="Wait for the reply so long, and print it: 10s.")
    ] = None,
    act: Act,
) -> None:
    """Send an update to a running workflow, and print the id of the update; with --wait, the reply as JSON.

    The exit code is 1 if it is rejected, or if there is no reply in time.
    """
    workflow_id, given = parsed_id(workflow), parsed_json("the payload", payload)
    with act.session() as session:
        from sqla_durable import send_update
        from sqla_durable.store.updates import receiver

        with act.transaction(session):
            before = receiver(session, workflow_id, name=name, key=key)
            sent = send_update(session, workflow_id, name, given, key=key)
            is_new = before is None or before.known is None
            if is_new:
                act.note_workflows(session, [workflow_id], "update", {"update": name, "id": sent.id, "key": key})
        row: dict[str, Any] = {"verb": "update", "id": workflow_id, "update": name, "update_id": sent.id}
        row |= {"is_new": is_new}
        if wait is None:
            done = "was sent" if is_new else "was sent before, with this key"
            act.print(f"Update {sent.id} {done}.", value=sent.id, **row)
            return
        reply = sent.result(wait)
    text = json.dumps(reply, ensure_ascii=False)
    act.print(text, value=text, **row, reply=reply)
