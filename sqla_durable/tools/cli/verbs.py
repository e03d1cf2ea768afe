"""The commands that change workflows: cancel, resume, retry, rewind, fork, change and delete.

Each is the function of `manage` with its name; `choosing` has the loop over the workflows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from sqla_durable.tools.cli.acting import Act, parsed_object
from sqla_durable.tools.cli.choosing import Bulk, Changed, Choice, Ids, Verb, carry_out
from sqla_durable.tools.cli.errors import CommandError
from sqla_durable.tools.cli.filters import Filters
from sqla_durable.tools.cli.groups import grouped
from sqla_durable.tools.cli.times import parsed_duration, parsed_moment

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Select
    from sqlalchemy.orm import Session

    from sqla_durable import Workflow


@grouped
def cancel(ids: Ids = None, *, filters: Filters, bulk: Bulk, act: Act) -> None:
    """Cancel workflows that are pending, running or suspended, with their children."""
    from sqla_durable import manage
    from sqla_durable.store.manage import is_cancellable

    def describe(workflow: Workflow) -> str:
        if workflow.status.finished:
            return f"{workflow.status.as_predicate} already."
        return "is being compensated already."

    verb = Verb(
        name="cancel",
        done="cancelled",
        applies=is_cancellable,
        change=_same(manage.cancel),
        describe=describe,
        takes_children=True,
    )
    carry_out(verb, Choice.of(ids, filters, everything=bulk.everything), act=act, bulk=bulk)


@grouped
def resume(ids: Ids = None, *, filters: Filters, bulk: Bulk, act: Act) -> None:
    """Let workflows go on that were cancelled, or stopped for crashes or a deadline, after their last checkpoint."""
    from sqlalchemy import and_

    from sqla_durable import WorkflowStatus, manage
    from sqla_durable.store.manage import is_stopped, keeps_key

    def describe(workflow: Workflow) -> str:
        if workflow.former_key is not None:
            return _KEY_TAKEN
        if workflow.status is WorkflowStatus.CANCELLED:
            return "was cancelled and has compensated: fork it."
        if workflow.status is WorkflowStatus.FAILED:
            return "has failed with an error of its own: retry it."
        return f"is {workflow.status}: resume is for what was cancelled, or stopped for crashes or a deadline."

    verb = Verb(
        name="resume",
        done="resumed",
        applies=lambda: and_(is_stopped(), keeps_key()),
        change=_same(manage.resume),
        describe=describe,
        asks=False,
    )
    carry_out(verb, Choice.of(ids, filters, everything=bulk.everything), act=act, bulk=bulk)


@grouped
def retry(ids: Ids = None, *, filters: Filters, bulk: Bulk, act: Act) -> None:
    """Let workflows go on that failed with an error of their own, from the step that failed."""
    from sqla_durable import WorkflowStatus, manage
    from sqla_durable.store.manage import is_retriable

    def describe(workflow: Workflow) -> str:
        if workflow.status is not WorkflowStatus.FAILED:
            return f"is {workflow.status}: retry is for what has failed."
        if workflow.former_key is not None:
            return _KEY_TAKEN
        if workflow.cancellation is not None:
            return "has a saga, which may have compensated its steps: fork it."
        return "was stopped for its crashes or its deadline: resume it."

    verb = Verb(name="retry", done="retried", applies=is_retriable, change=_same(manage.retry), describe=describe)
    carry_out(verb, Choice.of(ids, filters, everything=bulk.everything), act=act, bulk=bulk)


@grouped
def rewind(
    ids: Ids = None,
    *,
    to_step: Annotated[str, typer.Option("--to-step", metavar="KEY", help="The first step to be executed again.")],
    filters: Filters,
    bulk: Bulk,
    act: Act,
) -> None:
    """Let workflows go on from an earlier step, whatever their status; what they did since is not undone.

    Of those that options choose, these are the ones that have a record of the step.
    """
    from sqlalchemy import and_

    from sqla_durable import manage
    from sqla_durable.store.manage import is_rewindable

    def describe(workflow: Workflow) -> str:
        return _without_step(workflow, to_step) or _KEY_TAKEN

    verb = Verb(
        name="rewind",
        done="rewound",
        applies=lambda: and_(is_rewindable(), _has_step(to_step)),
        change=_same(partial(manage.rewind, to_step=to_step)),
        describe=describe,
        details={"to_step": to_step},
    )
    carry_out(verb, Choice.of(ids, filters, everything=bulk.everything), act=act, bulk=bulk)


@grouped
def fork(
    ids: Ids = None,
    *,
    from_step: Annotated[
        str | None, typer.Option("--from-step", metavar="KEY", help="The first step to be executed; else the first.")
    ] = None,
    arguments: Annotated[
        str | None, typer.Option("--input", metavar="JSON", help="Arguments that differ; - reads stdin.")
    ] = None,
    to_queue: Annotated[
        str | None, typer.Option("--to-queue", metavar="NAME", help="The queue of the new workflows.")
    ] = None,
    new_key: Annotated[
        str | None, typer.Option("--new-key", metavar="KEY", help="The key of the new one: a repeat makes no other.")
    ] = None,
    filters: Filters,
    bulk: Bulk,
    act: Act,
) -> None:
    """Start new workflows with what others had recorded before a step; the others stay as they are.

    Of those that options choose, these are the ones that have a record of the step. With --quiet, prints the new ids.
    """
    from sqlalchemy import true

    given = None if arguments is None else parsed_object("--input", arguments)
    choice = Choice.of(ids, filters, everything=bulk.everything)
    if new_key is not None and len(choice.ids) != 1:
        raise CommandError("--new-key is the key of one workflow: name one by its id.")
    change = partial(_forked, from_step=from_step, input=given, queue=to_queue, key=new_key)
    details = {"from_step": from_step, "input": sorted(given or ()) or None, "to_queue": to_queue, "new_key": new_key}
    verb = Verb(
        name="fork",
        done="forked",
        applies=true if from_step is None else lambda: _has_step(from_step),
        change=change,
        describe=lambda workflow: _without_step(workflow, from_step) or "has been forked with this key already.",
        asks=len(choice.ids) != 1,
        details=details,
    )
    carry_out(verb, choice, act=act, bulk=bulk)


@grouped
def change(
    ids: Ids = None,
    *,
    to_queue: Annotated[str | None, typer.Option("--to-queue", metavar="NAME", help="Their new queue.")] = None,
    priority: Annotated[int | None, typer.Option("--priority", help="Their new priority: lower is first.")] = None,
    delay: Annotated[
        str | None, typer.Option("--delay", metavar="DURATION", help="How long after now: 30s, 5m, 2h; 0 is now.")
    ] = None,
    at: Annotated[str | None, typer.Option("--at", metavar="TIME", help="When they become due.")] = None,
    filters: Filters,
    bulk: Bulk,
    act: Act,
) -> None:
    """Change the queue or the priority of workflows that wait, or when those become due that have not started."""
    from sqla_durable import WorkflowStatus, manage
    from sqla_durable.store.changes import is_changeable

    details = {"to_queue": to_queue, "priority": priority, "delay": delay, "at": at}
    if not any(each is not None for each in details.values()):
        raise CommandError("nothing is to be changed: add --to-queue, --priority, --delay or --at.")
    given: dict[str, Any] = {
        "queue": to_queue,
        "priority": priority,
        "delay": None if delay is None else parsed_duration("--delay", delay),
        "at": None if at is None else parsed_moment("--at", at),
    }
    is_timed = delay is not None or at is not None

    def describe(workflow: Workflow) -> str:
        if workflow.status in (WorkflowStatus.PENDING, WorkflowStatus.SUSPENDED):
            return "has started: --delay and --at are for what has not."
        return f"is {workflow.status}: only what is pending or suspended can be changed."

    choice = Choice.of(ids, filters, everything=bulk.everything)
    verb = Verb(
        name="change",
        done="changed",
        applies=partial(is_changeable, is_timed=is_timed),
        change=_same(partial(manage.change, **given)),
        describe=describe,
        asks=not choice.ids,
        details=details,
    )
    carry_out(verb, choice, act=act, bulk=bulk)


@grouped
def delete(ids: Ids = None, *, filters: Filters, bulk: Bulk, act: Act) -> None:
    """Delete finished workflows with their children and their histories; rows of your own tables stay."""
    from sqla_durable import Workflow, manage

    def describe(workflow: Workflow) -> str:
        if not workflow.status.finished:
            return f"is {workflow.status}: cancel it first."
        return "has a child that is not finished, or a parent that may still ask for its outcome."

    verb = Verb(
        name="delete",
        done="deleted",
        applies=lambda: Workflow.finished_at.is_not(None),
        change=_same(manage.delete),
        describe=describe,
        deletes=True,
        takes_children=True,
    )
    carry_out(verb, Choice.of(ids, filters, everything=bulk.everything), act=act, bulk=bulk)


_KEY_TAKEN = "has lost its key to a newer workflow: fork it."


def _same(change: Callable[[Session, Select[Any]], Iterable[UUID]]) -> Callable[[Session, Select[Any]], Changed]:
    """Return a function of `manage` as one that returns of each workflow its own id."""
    return lambda session, meant: {each: each for each in change(session, meant)}


def _forked(session: Session, meant: Select[Any], *, key: str | None, **options: Any) -> Changed:
    from sqla_durable import Workflow, manage

    if key is None:
        return {each.forked_from: each.id for each in manage.fork(session, meant, **options) if each.forked_from}
    source = session.scalars(meant.with_only_columns(Workflow.id)).one()
    known = set(session.scalars(meant.with_only_columns(Workflow.id).where(_was_forked(key))))
    made = manage.fork(session, source, key=key, **options)
    return {} if known else {source: made.id}


def _was_forked(key: str) -> ColumnElement[bool]:
    from sqlalchemy import exists, select
    from sqlalchemy.orm import aliased

    from sqla_durable import Workflow

    made = aliased(Workflow)
    return exists(select(made.id).where(made.forked_from == Workflow.id, made.name == Workflow.name, made.key == key))


def _has_step(key: str) -> ColumnElement[bool]:
    from sqla_durable import Step, Workflow

    return Workflow.steps.any(Step.key == key)


def _without_step(workflow: Workflow, key: str | None) -> str | None:
    """Return that a workflow has no record of a step, if that is so."""
    if key is None or any(each.key == key for each in workflow.steps):
        return None
    known = ", ".join(repr(each.key) for each in workflow.steps[:20])
    return f"has no record of a step {key!r}: it has {known or 'none'}."
